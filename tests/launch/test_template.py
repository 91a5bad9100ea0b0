"""Forked jobs are as fresh ones, and a template that cannot be used, or dies, takes nothing with it."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import HANGS
from tests.fake_stage import NEEDS, ONE, Recorder, directory, job
from tests.launch.test_launch import (  # noqa: F401  # the fixture is for all tests of this file, too
    _own_slots_and_our_modules,
    alive,
    journal,
    start_launcher,
    started,
    wait_for,
)
from undo.launch.jobs import DeviceShare
from undo.launch.local import environment, run_jobs, template_for
from undo.launch.template import Template

TORCH = (*NEEDS, "torch", "numpy.random")


def forked(runs: Path, name: str) -> bool:
    return (directory(runs, name).folder / "forked").read_text() == "yes"


def templates(launcher: int) -> list[int]:
    """The template of a launcher, where there is one: a child whose command line begins as its does."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                command = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if parent == launcher and b"undo.launch.template" in command[:3]:
                found.append(int(entry.name))
    return found


def module(folder: Path, name: str, source: str) -> str:
    """A module that a job may say it needs."""
    (folder / f"{name}.py").write_text(source)
    os.environ["PYTHONPATH"] += os.pathsep + str(folder)  # which the fixture gives back
    return name


@pytest.mark.parametrize(
    ("gpus", "names"), [("", ("portrait-1", "portrait-torch")), ("5,GPU-8a7b", ("portrait-1", "portrait-2"))]
)
def test_a_forked_job_is_as_a_fresh_one(tmp_path, monkeypatch, gpus, names):
    """Its arguments, environment, files, streams, signals, threads and random numbers, but for what is its own."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    monkeypatch.setenv("RANK", "3")  # is kept from jobs
    found = dict[str, list[dict[str, Any]]]()
    for way, needs in (("fresh", ()), ("fork", NEEDS if gpus else TORCH)):
        runs = tmp_path / way
        assert run_jobs([job(runs, name, imports=needs) for name in names], Recorder()) == {}
        texts = [(directory(runs, name).folder / "portrait.json").read_text() for name in names]
        found[way] = [json.loads(text.replace(str(runs), "RUNS")) for text in texts]
        assert [forked(runs, name) for name in names] == [way == "fork"] * 2
    drawn = [number for way in found.values() for entry in way for number in entry.pop("drawn")]
    assert len(set(drawn)) == len(drawn) == (4 if gpus else 8)
    for fresh, fork in zip(found["fresh"], found["fork"], strict=True):
        devices = {entry["environment"].pop("CUDA_VISIBLE_DEVICES") for entry in (fresh, fork)}
        assert devices <= set(gpus.split(","))
        for key, value in fresh.items():
            assert fork[key] == value, key
        assert fresh["main"][0] == "tests.fake_stage"
        assert "RANK" not in fresh["environment"]


REFUSED = {
    "is not there": None,
    "raises": "raise RuntimeError('on purpose')",
    "has a thread": "import threading, time; threading.Thread(target=time.sleep, args=(600,), daemon=True).start()",
    "has touched a GPU": "import sys; from types import SimpleNamespace as N\n"
    "sys.modules['torch'] = N(cuda=N(_is_in_bad_fork=lambda: True), default_generator=N(seed=int))",
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_must_not_be_forked_is_started_afresh(tmp_path, what):
    source = REFUSED[what]
    name = "missing" if source is None else module(tmp_path, "refused", source)
    failed = run_jobs([job(tmp_path, run, imports=(*NEEDS, name)) for run in ("a", "raise", "b")], Recorder())
    assert failed == {"test/raise": "RuntimeError: on purpose"}
    assert not any(forked(tmp_path, run) for run in ("a", "b"))
    assert len(journal(tmp_path)) == 2  # each once


def test_real_torch_says_that_a_gpu_was_touched(tmp_path):
    torch = pytest.importorskip("torch")
    if not torch.backends.cuda.is_built():
        pytest.skip("this torch knows no GPU")
    name = module(tmp_path, "touches", "import torch; torch.cuda.is_available()")
    assert run_jobs([job(tmp_path, run, imports=(*NEEDS, name)) for run in ("a", "b")], Recorder()) == {}
    assert not forked(tmp_path, "a")


def test_only_jobs_with_the_same_environment_are_forked_and_only_if_they_are_several(tmp_path):
    alike = [job(tmp_path, str(number), imports=NEEDS) for number in range(3)]
    other = job(tmp_path, "other", share=DeviceShare(threads=2), imports=NEEDS)
    for jobs, gpus, serves in (
        ([*alike, other], [], True),
        ([other, alike[0]], [], False),
        ([*alike[:1], job(tmp_path, "fresh")], [], False),
        ([*alike, other], ["0"], True),
    ):
        template = template_for(jobs, gpus)
        device = gpus[0] if gpus else "cpu"
        told = environment(ONE, device)
        assert template.alive == template.serves(NEEDS, told) == serves
        assert not template.serves(("json",), told)
        assert not template.serves(NEEDS, told | {"HF_HOME": "/elsewhere"})
        assert template.serves(NEEDS, environment(DeviceShare(threads=2), device)) == bool(gpus)  # a GPU's has no say
        template.close()
        assert not template.serves(NEEDS, told)


def test_what_does_not_fit_into_a_request_is_started_afresh(tmp_path):
    template = Template(NEEDS, environment(ONE, "cpu"))
    try:
        before = sorted(os.listdir("/proc/self/fd"))
        with pytest.raises(OSError, match="too long"):
            template.fork(["x" * (1 << 22)], NEEDS, "", [1])
        assert sorted(os.listdir("/proc/self/fd")) == before
        assert template.idle
    finally:
        template.close()


@pytest.mark.parametrize("end", ["kill -9", "SIGTERM"])
def test_no_template_outlives_its_launcher_while_it_imports(tmp_path, end):
    name = module(tmp_path, "slow", "import time; time.sleep(600)")
    launcher = start_launcher(tmp_path, "a", "b", needs=(*NEEDS, name))
    (template,) = wait_for(lambda: templates(launcher.pid))
    time.sleep(0.3)  # some way into Python's own start, or the import
    launcher.send_signal(signal.SIGKILL if end == "kill -9" else signal.SIGTERM)
    assert launcher.wait(timeout=HANGS) == (-9 if end == "kill -9" else 130)
    wait_for(lambda: not alive([template]))
    assert run_jobs([job(tmp_path, "a")], Recorder()) == {}  # run and share are free


def test_a_template_that_is_killed_takes_no_job_with_it(tmp_path):
    """What it was importing for is started afresh; what runs goes on, and what comes next is started afresh."""
    name = module(tmp_path, "slow", "import time; time.sleep(600)")
    launcher = start_launcher(tmp_path / "1", "a", "b", needs=(*NEEDS, name))
    (template,) = wait_for(lambda: templates(launcher.pid))
    os.kill(template, signal.SIGKILL)
    assert launcher.wait(timeout=HANGS) == 0
    assert not any(forked(tmp_path / "1", run) for run in ("a", "b"))

    launcher = start_launcher(tmp_path / "2", *(f"r{number}" for number in range(6)), needs=NEEDS)
    wait_for(lambda: directory(tmp_path / "2", "r1").done)
    for pid in templates(launcher.pid):
        os.kill(pid, signal.SIGKILL)
    assert launcher.wait(timeout=HANGS) == 0
    assert sorted(entry["run"] for entry in journal(tmp_path / "2")) == sorted(["first", *(f"r{n}" for n in range(6))])
    assert forked(tmp_path / "2", "first")
    assert not forked(tmp_path / "2", "r5")


def test_a_template_ends_when_nothing_waits_for_it(tmp_path):
    launcher = start_launcher(tmp_path, "sleep", needs=NEEDS)
    pids = started(tmp_path, "sleep", NEEDS)
    wait_for(lambda: not templates(launcher.pid))
    assert len(alive(pids)) == 3
    launcher.terminate()
    assert launcher.wait(timeout=HANGS) == 130
    assert not alive(pids)
