"""Output that cannot be written, or not in its encoding, costs neither a traceback nor what a command has done."""

import io
import os
import subprocess
import sys

import pytest

from undo.config.guard import guarded
from undo.config.mistakes import ConfigError


def said(status: int = 0) -> int:
    print("undo é ✓ " * 2000)
    return status


def to(path: str) -> io.TextIOWrapper:
    return io.TextIOWrapper(open(path, "wb"), encoding="utf-8")


def pipe_without_a_reader() -> io.TextIOWrapper:
    reader, writer = os.pipe()
    os.close(reader)
    return io.TextIOWrapper(os.fdopen(writer, "wb"), encoding="utf-8")


@pytest.mark.parametrize("flushes", [True, False])
@pytest.mark.parametrize(("output", "complaint"), [("full", "No space left"), ("pipe", "")])
def test_output_that_is_lost_is_said_and_no_traceback(monkeypatch, capsys, flushes, output, complaint):
    monkeypatch.setattr(sys, "stdout", to("/dev/full") if output == "full" else pipe_without_a_reader())
    assert guarded(said if flushes else lambda: print("short") or 0) == 1
    assert guarded(lambda: 130) == 130
    assert guarded(lambda: sys.exit(2)) == 2
    assert complaint in capsys.readouterr().err
    sys.stdout.close()  # Python's own end: nothing is left that could fail


def test_characters_that_the_encoding_lacks_are_escaped(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert guarded(said) == 0
    assert written.getvalue().startswith(rb"undo \xe9 \u2713")


def test_other_errors_of_files_are_not_taken_for_lost_output():
    with pytest.raises(FileNotFoundError):
        guarded(lambda: len(os.listdir("/no/such/folder")))


def test_without_any_stream_a_command_does_its_work(tmp_path):
    code = "import sys; from undo.config.guard import guarded; from undo.config.mistakes import ConfigError as E\n"
    code += "def work():\n print(1); open('made', 'w').write('all'); raise E('x')\nsys.exit(guarded(work))"
    closed = subprocess.run(["bash", "-c", 'exec "$0" -c "$1" <&- >&- 2>&-', sys.executable, code], cwd=tmp_path)
    assert closed.returncode == 2
    assert (tmp_path / "made").read_text() == "all"


def test_a_mistake_is_printed_alone(capsys):
    def mistaken() -> int:
        raise ConfigError("mend this")

    assert guarded(mistaken) == 2
    assert capsys.readouterr().err == "error: mend this\n"
