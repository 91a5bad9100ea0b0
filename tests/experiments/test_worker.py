"""Why a run failed, as the launcher's table has it."""

from pathlib import Path

import pytest

from undo.config.mistakes import ConfigError
from undo.experiments.worker import reason


@pytest.mark.parametrize(
    ("place", "variable"),
    [
        ("/home/me/.cache/huggingface/hub/x.lock", "HF_HOME"),
        ("/scratch/tmp/made", "TMPDIR"),
        ("/home/me/.triton/cache", "HOME"),
        ("/runs/demo/log.txt", None),
        ("/home/me/project/runs/demo/log.txt", None),
    ],
)
def test_a_folder_of_a_library_that_cannot_be_written_names_its_variable(monkeypatch, place, variable):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("TMPDIR", "/scratch/tmp")
    monkeypatch.delenv("HF_HOME", raising=False)
    first, *cure = reason(PermissionError(13, "Permission denied", place)).splitlines()
    assert first == f"PermissionError: [Errno 13] Permission denied: {place!r}"
    assert cure == ([] if variable is None else [f"set {variable} to a folder that can be written"])
    monkeypatch.setenv("HF_HOME", "/scratch/hub")
    assert "set" not in reason(FileNotFoundError(2, "No such file or directory", "/home/me/.cache/x"))
    assert "set HF_HOME" in reason(OSError(30, "Read-only file system", Path("/scratch/hub/datasets")))


def test_a_mistake_keeps_all_its_lines():
    assert reason(ConfigError("what\ncure")) == "what\ncure"


def test_the_reason_of_a_library_is_one_line_that_is_not_cut_after_its_first():
    """transformers says what is wrong with a config in its second line."""
    assert (
        reason(ValueError("class X:\n    the hidden size (81) is odd"))
        == "ValueError: class X: the hidden size (81) is odd"
    )
    assert len(reason(ValueError("long " * 1000))) == 300
