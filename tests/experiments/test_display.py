"""What the launcher says while runs execute: text, not markup; a line now and then; and never at the runs' cost."""

import json
import sys
from contextlib import suppress

import pytest

from tests.train.test_loop import make
from undo.experiments import display
from undo.experiments.display import LiveTable
from undo.experiments.plan import PlannedRun
from undo.prepare_models.pretrain import STAGE


@pytest.fixture
def planned(tmp_path) -> list[PlannedRun]:
    """One run, in a folder whose name is markup where markup is read."""
    run, config = make(tmp_path / "[b]bold[/b] [/y] :smile:")
    return [PlannedRun(STAGE, config, run)]


def test_paths_and_reasons_are_never_markup(planned, capsys):
    (run,) = planned
    with LiveTable(planned) as table:
        table.changed(run.directory, "running", "cpu")
        table.changed(run.directory, "failed", "no [/z] file")
    printed = capsys.readouterr().out
    assert "failed pretrain/x: no [/z] file\n" in printed
    assert f"log: {run.directory.log}\n" in printed


def test_the_table_of_a_terminal_shows_brackets_as_they_are(planned, capsys):
    (run,) = planned
    table = LiveTable(planned)
    table.looked("a free core; core 0 is taken by /runs/[/x]")
    table._planned = {"[/a]": run}
    table._state = {"[/a]": "running"}
    table._started = {"[/a]": (0.0, 0)}
    table._console.print(table._table())
    printed = " ".join(capsys.readouterr().out.split())
    assert "left [/a] running" in printed
    assert "waiting for a free core; core 0 is taken by /runs/[/x]" in printed.partition("[/a]")[2]


def test_off_a_terminal_a_line_now_and_then_says_how_far_it_is(planned, capsys, monkeypatch):
    (run,) = planned
    with open(run.directory.folder / "metrics.jsonl", "w") as file:
        file.write(json.dumps({"step": 3, "loss": 1.25}) + "\n")
    with LiveTable(planned) as table:
        table.changed(run.directory, "running", "cpu")
        table.looked(None)
        assert "step" not in capsys.readouterr().out
        monkeypatch.setattr(display, "QUIET_SECONDS", 0.0)
        table.looked(None)
        assert capsys.readouterr().out == "0 of 1 done; pretrain/x 3/6 loss 1.250\n"


def test_records_that_are_none_stop_no_run(planned, capsys, monkeypatch):
    (run,) = planned
    monkeypatch.setattr(display, "QUIET_SECONDS", 0.0)
    for text in (
        '[1]\n"x"\n\0\0\n',
        '{"loss": 1.0}\n',
        '{"step": "?"}\n',
        '{"step": 2, "loss": null, "retain": "x"}\n',
    ):
        (run.directory.folder / "metrics.jsonl").write_text(text)
        with LiveTable(planned) as table:
            table.changed(run.directory, "running", "cpu")
            table.looked(None)
    assert "pretrain/x 2/6\n" in capsys.readouterr().out


def test_what_is_waited_for_is_said_once(planned, capsys):
    with LiveTable(planned) as table:
        for _ in range(3):
            table.looked("a free core")
        assert capsys.readouterr().out == "0 of 1 done; waiting for a free core\n"
        table.looked(None)
        table.looked("a free core")
        assert "waiting" in capsys.readouterr().out


@pytest.mark.parametrize("force", [False, True])
def test_the_hint_after_an_interruption_is_true(planned, capsys, force):
    """With --force the same command would delete what it has just made."""
    with LiveTable(planned) as table:
        table.stopping(2)
        table.interrupted(force)
    assert ("the same command without --force continues" if force else "the same command continues") in (
        capsys.readouterr().out
    )


def test_a_display_that_cannot_print_stops_no_run(planned, monkeypatch):
    (run,) = planned
    full = open("/dev/full", "w")  # noqa: SIM115
    monkeypatch.setattr(sys, "stdout", full)
    with LiveTable(planned) as table:
        table.changed(run.directory, "running", "cpu")
        table.changed(run.directory, "done")
    with suppress(OSError):  # what could not be printed is still in its buffer
        full.close()
