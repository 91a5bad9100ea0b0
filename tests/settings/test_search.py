"""run_wmdp.py around its search: what --only and --force mean there, runs that diverge, mistakes said before it.

Jobs are taken from the launcher's hands: a run is its files, and nothing is trained.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.settings.test_wmdp import world
from undo.config.mistakes import ConfigError
from undo.config.schema import validate
from undo.config.sweep import read_yaml
from undo.experiments import cli
from undo.experiments.points import FILE
from undo.experiments.remedy import command_for, command_of, remedy
from undo.launch.jobs import Job
from undo.results.arms import Undo
from undo.runs.directory import RunDirectory, identity_of
from undo.settings import publish as run_figures
from undo.settings import wmdp as run_wmdp
from undo.settings.stages import STAGES

SEARCH = {"search-maxent": 3, "search-rmu": 3}


class Machine:
    """Makes runs at once, in the order of their jobs, and remembers them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.made, self.failing = folder, list[str](), dict[str, str]()

    def run_jobs(self, jobs: Sequence[Job], display: object) -> dict[str, str]:
        failed: dict[str, str] = {}
        for run, parents in ((run, job.waits_for) for job in jobs for run in job.runs):
            reason = next((text for part, text in self.failing.items() if part in run.name), None)
            if reason is None and not parents & failed.keys():
                self._make(run)
            elif reason is not None:
                run.fail(reason, 3 if "Diverged" in reason else None)
                failed[run.name] = reason
            else:
                failed[run.name] = "not run"
        return failed

    def _make(self, run: RunDirectory) -> None:
        self.made.append(run.name)
        parents = validate(STAGES[run.name.partition("/")[0]].schema, run.config, run.name).parents()
        alpha = run.config.get("method", {}).get("alpha", 0.5)
        lineage = {name: run.sibling(name).identity() for name in parents}
        facts = {"identity": identity_of(run.config, lineage), "parents": lineage}
        facts["evaluation"] = {"retain": 5.0 - alpha, "forget": 8.0 - alpha}
        (run.folder / "metrics.jsonl").write_text(json.dumps({"step": 0, "retain": 4.5, "forget": 5.0}) + "\n")
        (run.folder / "run.json").write_text(json.dumps(facts))

    def of(self, part: str) -> list[str]:
        return [name for name in self.made if part in name]


@pytest.fixture
def machine(tmp_path, monkeypatch) -> Machine:
    machine = Machine(world(tmp_path))
    monkeypatch.setattr(cli, "run_jobs", machine.run_jobs)
    monkeypatch.setattr(run_wmdp, "publish", lambda *_: None)
    return machine


def wmdp(machine: Machine, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    runs = str(machine.folder.parent / "runs")
    monkeypatch.setattr(sys, "argv", ["run_wmdp.py", str(machine.folder), "--runs", runs, *arguments])
    machine.made.clear()
    return run_wmdp.main()


def points(machine: Machine) -> Path:
    return machine.folder.parent / "runs/tiny_wmdp" / FILE


def test_only_chooses_within_the_search_and_the_points_wait_for_all_of_it(machine, monkeypatch, capsys):
    assert wmdp(machine, monkeypatch, "--stage", "search", "--only", "search-rmu*") == 0
    assert len(machine.of("search-rmu")) == len(machine.of("unlearn/")) == 3
    assert "pretrain/base" in machine.made  # it stands on that
    assert "3 runs of the search are still to be made" in capsys.readouterr().out
    assert not points(machine).exists()
    assert wmdp(machine, monkeypatch, "--stage", "search", "--only", "search-maxent*") == 0
    assert set(read_yaml(points(machine))) == {"maxent", "rmu"}


def test_only_behind_the_search_makes_all_of_the_search_first(machine, monkeypatch):
    assert wmdp(machine, monkeypatch, "--only", "unlearn/maxent_best*") == 0
    assert {name: len(machine.of(name)) for name in SEARCH} == SEARCH
    assert machine.made[-1] == "unlearn/maxent_best-seed_0"
    assert not machine.of("sam")


def test_only_before_the_points_needs_no_search(machine, monkeypatch, capsys):
    assert wmdp(machine, monkeypatch, "--only", "prepare/qa") == 0
    assert "search" not in capsys.readouterr().out
    assert machine.made == ["prepare/corpora", "prepare/qa"]
    with pytest.raises(ConfigError, match="matches none of"):
        wmdp(machine, monkeypatch, "--only", "nothing*")
    assert machine.made == []


def test_force_makes_every_run_afresh_once(machine, monkeypatch):
    assert wmdp(machine, monkeypatch) == 0
    first = list(machine.made)
    assert wmdp(machine, monkeypatch, "--force") == 0
    assert machine.made == first
    assert len(set(first)) == len(first)
    assert {name.partition("/")[0] for name in first} == {"prepare", "pretrain", "unlearn", "undo", "relearn"}


def test_what_diverged_is_left_out_of_the_choice(machine, monkeypatch, capsys):
    raw = read_yaml(machine.folder / "unlearn_search.yaml")
    raw["sweep"]["training.learning_rate"] = [2e-3, 1e-3]
    (machine.folder / "unlearn_search.yaml").write_text(json.dumps(raw))
    machine.failing = {"search-rmu-alpha_0.8-lr_2": "Diverged: diverged at step 3: the loss is not finite"}
    assert wmdp(machine, monkeypatch) == 0
    said = capsys.readouterr().out
    assert "left out of the choice: unlearn/search-rmu-alpha_0.8-lr_2.0e-03: Diverged: diverged at step 3" in said
    assert machine.of("relearn/")
    assert "lr_2.0e-03" not in [p["run"] for p in read_yaml(points(machine))["rmu"].values() if "0.8-" in p["run"]]


@pytest.mark.parametrize(
    "failing",
    [
        {"prepare/mixture": "OSError: the disk is full"},
        {"search-rmu-alpha_0.8": "Diverged: at step 3", "search-maxent-alpha_0.7": "OutOfMemoryError: no room"},
        {"pretrain/base": "Diverged: at step 3"},
    ],
)
def test_another_failure_of_the_search_stops_it(machine, monkeypatch, failing):
    machine.failing = failing
    assert wmdp(machine, monkeypatch) == 1
    assert not points(machine).exists()


def test_a_method_that_always_diverges_is_said(machine, monkeypatch):
    machine.failing = {"search-rmu": "Diverged: at step 3"}
    with pytest.raises(ConfigError, match="rmu: every run of the search diverged"):
        wmdp(machine, monkeypatch)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("relearn.training.stps=3", "unknown key 'training.stps'"),
        ("undo.noise.alhpa=0.5", "unknown key 'noise.alhpa'"),
        ("unlearn.variants.sam_medium.method.rh=1", "unknown key 'method.rh'"),
        ("unlearn.points=serch", "points=serch cannot be set; the only value for `points` is search"),
        ("unlearn.points.maxent.best.alpha=0.5", "the only value for `points` is search"),
    ],
)
@pytest.mark.parametrize("more", [["--dry-run"], []])
def test_a_mistake_in_what_comes_after_is_said_before_the_search(machine, monkeypatch, override, words, more):
    with pytest.raises(ConfigError) as error:
        wmdp(machine, monkeypatch, override, *more)
    assert words in str(error.value)
    assert machine.made == []


# --- the commands that errors name ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "script"),
    [
        ("wmdp_small", "run_wmdp.py"),  # its points are searched
        ("wmdp_bio", "run_wmdp.py"),  # its model is fetched
        ("language_small", "run_all.py"),
        ("not_there", "run_all.py"),
    ],
)
def test_the_command_of_a_setting(setting, script, tmp_path):
    assert command_of(setting) == f"uv run {script} {setting}"
    with pytest.raises(ConfigError, match=f"uv run {script} {setting}"):
        run_figures.publish(Path(setting), tmp_path)


def test_commands_name_scripts_that_exist():
    found = remedy("wmdp_small", "undo", lambda arm: isinstance(arm, Undo), "undo/*")
    assert found == "make it with: uv run run_wmdp.py wmdp_small --only 'undo/undo_*'"
    assert command_for("base/model", "wmdp_bio") == "uv run run_base.py wmdp_bio --only model"
    for stage in STAGES:
        assert (ROOT / command_for(f"{stage}/x", "wmdp_bio").split()[2]).exists()
