"""The tracker gets a copy of the records: each step once, over kills and resumptions, and never in training's way."""

import sys
import threading
from types import SimpleNamespace

import pytest
import torch

from tests.conftest import training
from tests.train.test_loop import make
from undo.runs import tracking
from undo.runs.run import Run


class Service:
    """What W&B keeps of its runs: it takes a row when the next step begins, or at the end."""

    def __init__(self) -> None:
        self.rows: list[dict] = []
        self.starts: list[dict] = []
        self.row: dict = {}
        self.reached = threading.Event()  # there is a route
        self.reached.set()

    def login(self, **_: object) -> None:
        pass

    def init(self, **how: object) -> SimpleNamespace:
        self.reached.wait()
        self.starts.append(how)
        self.row = {}
        return SimpleNamespace(log=self.log, finish=lambda: self.log({}, step=1 << 30))

    def log(self, values: dict, step: int) -> None:
        if self.row and self.row["step"] != step:
            self.rows.append(self.row)
            self.row = {}
        self.row |= {"step": step, **values}


@pytest.fixture
def service(monkeypatch) -> Service:
    made = Service()
    monkeypatch.setitem(sys.modules, "wandb", made)
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    return made


def attempt(folder, steps, checkpoint=None, **execution) -> Run:
    """One attempt's records: an evaluation at step 0, then a line a step; a checkpoint behind one of them."""
    run, _ = make(folder, training(), **execution)
    loaded = run.load_checkpoint()
    for step in range(loaded[1]["step"] + 1 if loaded else 0, steps + 1):
        run.record(step, {"loss": 1.0 / (step + 1)})
        if step == checkpoint:
            run.save_checkpoint({"w": torch.ones(1)}, {"step": step})
    return run


def killed(run: Run) -> None:
    """The process is gone: what the service had not taken by then is lost."""
    tracker = run._tracker
    assert isinstance(tracker, tracking.WandbTracker)
    while not tracker._queue.empty():
        threading.Event().wait(0.01)


def test_a_resumed_curve_has_each_step_once(service, tmp_path):
    killed(attempt(tmp_path, steps=5, checkpoint=3, tracking="offline"))
    killed(attempt(tmp_path, steps=7, tracking="offline"))  # goes on behind step 3
    attempt(tmp_path, steps=9, tracking="offline").finish()
    assert [row["step"] for row in service.rows] == list(range(10))
    assert [row["loss"] for row in service.rows] == [1.0 / (step + 1) for step in range(10)]
    assert len({how["id"] for how in service.starts}) == 1
    assert {how["mode"] for how in service.starts} == {"offline"}
    assert {how["reinit"] for how in service.starts} == {"create_new"}  # runs side by side are several


def test_a_run_made_afresh_is_another_one(service, tmp_path):
    first = attempt(tmp_path, steps=2, tracking="offline")
    first.finish()
    first.remove()
    attempt(tmp_path, steps=2, tracking="offline").finish()
    assert len({how["id"] for how in service.starts}) == 2
    assert [row["step"] for row in service.rows] == [0, 1, 2, 0, 1, 2]


def test_training_does_not_wait_for_a_route(service, tmp_path, monkeypatch, capsys):
    service.reached.clear()
    monkeypatch.setattr(tracking, "PATIENCE", 0.1)
    run = attempt(tmp_path, steps=3, tracking="online")
    run.finish()
    assert run.done
    assert "W&B has not taken everything in 0.1 s; metrics.jsonl has it" in capsys.readouterr().out
    service.reached.set()


def test_a_tracker_that_fails_is_one_line_and_no_failure(service, tmp_path, monkeypatch, capsys):
    def refused(**_: object) -> None:
        raise RuntimeError("the key is not accepted\nmore about it")

    monkeypatch.setattr(service, "login", refused)
    run = attempt(tmp_path, steps=3, tracking="online")
    run.finish()
    assert run.done
    assert "W&B is not used: the key is not accepted; metrics.jsonl has everything\n" in capsys.readouterr().out
    assert service.rows == []
