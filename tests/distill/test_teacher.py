"""Students that train side by side: the bits of separate runs from one teacher pass, whatever happens to the others."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import HANGS, ROOT, SHAPE, metrics, training
from undo.config.schema import as_raw, validate
from undo.distill import teacher as teaching
from undo.distill.undo import STAGE, Undo
from undo.experiments import worker
from undo.lm import memory
from undo.lm.read import hidden_states
from undo.prepare_models.pretrain import Pretrain, pretrain
from undo.runs.directory import RunDirectory
from undo.runs.run import Run
from undo.train.parents import _memory_asked

STEPS, LONG = 8, 20
MICRO = 2  # micro-batches of a step
EARLY = {"a": {"retain_threshold": 1.0}}  # at step 3
OF_THE_PROCESS = ("git_revision", "seconds", "evaluation_seconds", "tokens_per_second", "finished", "peak_rss_bytes")
THREE = {"a": {"alpha": 0.2}, "b": {"alpha": 0.5, "beta": 0.3}, "c": {"alpha": 0.8}}


@pytest.fixture(scope="module")
def school(data, tmp_path_factory) -> Path:
    """Runs with data and a teacher, to be copied."""
    runs = tmp_path_factory.mktemp("school")
    shutil.copytree(data.folder, runs / "tiny/prepare/data")
    raw = {"name": "teacher", "data": "prepare/data", "model": as_raw(SHAPE), "mixture": {"retain": 1.0}}
    raw |= {"training": as_raw(training(steps=20)), "evaluation": {"name": "accuracy"}}
    run, config = Run(runs, "tiny", "pretrain/teacher"), validate(Pretrain, raw, "test")
    run.claim(config)
    run.open(config)
    list(pretrain(config, run))
    return runs


@pytest.fixture
def in_this_process(monkeypatch):
    monkeypatch.setattr(worker, "_write_to", lambda *_: None)
    monkeypatch.setattr(Run, "stop_on_signals", lambda: None)


@pytest.fixture
def passes(monkeypatch) -> list[int]:
    """One entry for each pass through a teacher."""
    made: list[int] = []

    def counted(model: Any, tokens: Any) -> Any:
        made.append(1)
        return hidden_states(model, tokens)

    monkeypatch.setattr(teaching, "hidden_states", counted)
    return made


def students(
    school: Path, runs: Path, changes: dict[str, dict[str, Any]] | None = None, steps: int = STEPS
) -> list[Run]:
    """Three students of the teacher that differ in noise and its seed. changes: other keys, by name."""
    shutil.copytree(school, runs)
    made = []
    for number, (name, noise) in enumerate(THREE.items()):
        own = dict((changes or {}).get(name, {}))
        raw = {"name": name, "seeds": {"noise": number}, "data": "prepare/data", "teacher": "pretrain/teacher"}
        raw |= {"mixture": {"retain": 0.5, "forget": 0.5}, "noise": noise, "evaluation": {"name": "accuracy"}}
        raw |= {"training": as_raw(training(steps=steps, **own.pop("training", {})))}
        raw |= {"execution": {"micro_rows": 2, "checkpoint_every": 3, "students": 3}, **own}
        run = Run(runs, "tiny", f"undo/{name}")
        run.claim(validate(Undo, raw, "test"))
        made.append(run)
    return made


def facts(run: RunDirectory) -> dict[str, Any]:
    return {key: value for key, value in run.facts.items() if key not in OF_THE_PROCESS}


def same_bits(one: RunDirectory, other: RunDirectory) -> None:
    for file in ("metrics.jsonl", "model/model.safetensors"):
        assert (one.folder / file).read_bytes() == (other.folder / file).read_bytes(), file
    assert facts(one) == facts(other)
    assert facts(one)["flops"] > 0


def work(runs: list[Run], together: int = 3) -> int:
    return worker.work(STAGE, [run.folder for run in runs], together)


def test_side_by_side_is_bit_equal_to_one_by_one_with_a_third_of_the_passes(school, tmp_path, in_this_process, passes):
    alone, beside = students(school, tmp_path / "a"), students(school, tmp_path / "b")
    assert work(alone, together=1) == 0
    assert len(passes) == 3 * STEPS * MICRO
    passes.clear()
    assert work(beside) == 0
    assert len(passes) == STEPS * MICRO
    for one, other in zip(alone, beside, strict=True):
        same_bits(one, other)
    weights = {(run.model / "model.safetensors").read_bytes() for run in beside}
    assert len(weights) == 3  # they are three students


def test_one_that_diverges_and_one_that_is_done_early_stop_no_other(school, tmp_path, in_this_process, passes):
    changes = {"a": {"training": {"learning_rate": 1e30}}, "b": {"retain_threshold": 1.0}}  # a at step 1, b at step 3
    alone, beside = students(school, tmp_path / "a", changes), students(school, tmp_path / "b", changes)
    assert work(alone, together=1) == 1
    passes.clear()
    assert work(beside) == 1
    assert len(passes) == STEPS * MICRO
    assert [run.done for run in beside] == [False, True, True]
    assert (
        beside[0].failure == alone[0].failure == "Diverged: diverged at step 1: the loss or its gradient is not finite"
    )
    assert [beside[1].facts["steps"], beside[2].facts["steps"]] == [3, STEPS]
    for one, other in zip(alone[1:], beside[1:], strict=True):
        same_bits(one, other)


def test_one_that_cannot_begin_stops_no_other(school, tmp_path, in_this_process):
    alone, beside = students(school, tmp_path / "a"), students(school, tmp_path / "b")
    (beside[0].folder / "config.yaml").write_text("name: [torn")
    work(alone, together=1)
    assert work(beside) == 1
    assert "is damaged" in (beside[0].failure or "")
    for one, other in zip(alone[1:], beside[1:], strict=True):
        same_bits(one, other)


@pytest.mark.parametrize(("room", "expected"), [(2, 2), (1, 3), (0, None)])
def test_where_memory_is_short_fewer_go_side_by_side(
    school, tmp_path, in_this_process, passes, monkeypatch, capsys, room, expected
):
    """With room for `room` students, `expected` groups read each batch; the results are the same."""
    alone, beside = students(school, tmp_path / "a"), students(school, tmp_path / "b")
    work(alone, together=1)
    passes.clear()
    config = validate(Undo, beside[0].config, "test")
    asked = _memory_asked(config, beside[0], config.teacher, [config.teacher])
    del asked["available"]
    needed = [memory.needed(**asked, beside=others).total for others in range(3)]
    assert needed == sorted(set(needed))
    enough = needed[room - 1] if room else needed[0] - 1
    monkeypatch.setattr(memory, "available", lambda *_: (enough, "cpu"))
    capsys.readouterr()
    if expected is None:
        assert work(beside) == 1
        assert all("this run needs" in (run.failure or "") for run in beside)
        return
    assert work(beside) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("waits: ")]
    assert len(said) == {2: 1, 1: 3}[room]  # of one student; of two, and of one of them again
    assert f"{room + 1} students side by side need" in said[0]
    assert len(passes) == expected * STEPS * MICRO
    for one, other in zip(alone, beside, strict=True):
        same_bits(one, other)


STOPPED_AT = 14
STOPPED = """
import os, signal, sys
from undo.experiments import worker
from undo.runs.run import Run

record = Run.record

def stopped(self, step, values):
    record(self, step, values)
    if self.name == "undo/c" and step == {step} and "loss" in values:
        os.kill(os.getpid(), signal.{name})

Run.record = stopped
sys.exit(worker.main(sys.argv[1:]))
"""


def stopped(runs: list[Run], name: str) -> int:
    """The exit status of a worker that gets this signal when the last student has taken some steps."""
    command = [sys.executable, "-c", STOPPED.format(step=STOPPED_AT, name=name)]
    command += [f"{worker.TOGETHER}3", STAGE.module, *(str(run.folder) for run in runs)]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=HANGS).returncode


@pytest.fixture(scope="module")
def long(school, tmp_path_factory) -> list[Run]:
    """Three students, one by one, with time to be stopped; the first is done early."""
    made = students(school, tmp_path_factory.mktemp("long") / "runs", EARLY, LONG)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(worker, "_write_to", lambda *_: None)
        patched.setattr(Run, "stop_on_signals", lambda: None)
        assert work(made, together=1) == 0
    return made


def test_killed_students_resume_each_from_its_own_checkpoint(school, tmp_path, long, in_this_process, passes):
    """Of one the checkpoint is removed, so that they stand at different steps."""
    beside = students(school, tmp_path / "runs", EARLY, LONG)
    assert stopped(beside, "SIGKILL") == -signal.SIGKILL
    assert [run.done for run in beside] == [True, False, False]
    (beside[1].folder / "checkpoint/state.safetensors").unlink()
    assert work(beside) == 0
    assert len(passes) == LONG * MICRO  # one catches up, and from there all share
    for one, other in zip(long, beside, strict=True):
        same_bits(one, other)


def test_sigterm_saves_a_checkpoint_of_every_student(school, tmp_path, long, in_this_process):
    beside = students(school, tmp_path / "runs", EARLY, LONG)
    assert stopped(beside, "SIGTERM") == 75
    assert [run.done for run in beside] == [True, False, False]
    for run in beside[1:]:
        assert run.failure is None
        saved = run._read_checkpoint()
        assert saved is not None
        assert saved[1]["step"] == metrics(run.folder)[-1]["step"] == STOPPED_AT  # nothing that was trained is lost
        assert run.log.read_text().count("interrupted; the next start goes on from here\n") == 1
    assert work(beside) == 0
    for one, other in zip(long, beside, strict=True):
        same_bits(one, other)


def test_seconds_are_those_of_a_run_s_own_turns(school, tmp_path, in_this_process):
    """Of each other's and of one that waits they are not."""
    beside = students(school, tmp_path / "runs")
    began = time.monotonic()
    work(beside)
    assert sum(run.facts["seconds"] for run in beside) <= time.monotonic() - began + 0.01
    assert json.loads((beside[0].folder / "run.json").read_text())["seconds"] > 0
