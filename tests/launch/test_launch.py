"""The launcher with real processes: isolation, device shares, and no orphan however it ends."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.fake_stage import Recorder, directory, job
from undo.launch import devices
from undo.launch.devices import take_slot, visible_gpus
from undo.launch.jobs import DeviceShare
from undo.launch.local import run_jobs


@pytest.fixture(autouse=True)
def _own_slots(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)


def journal(runs: Path) -> list[dict]:
    path = runs / "fake/test/journal.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_failing_run_does_not_stop_the_others(tmp_path):
    display = Recorder()
    failed = run_jobs([job(tmp_path, "a"), job(tmp_path, "raise"), job(tmp_path, "exit"), job(tmp_path, "b")], display)
    assert display.final() == {"test/a": "done", "test/raise": "failed", "test/exit": "failed", "test/b": "done"}
    assert failed["test/raise"] == "RuntimeError: on purpose"
    assert "status 7" in failed["test/exit"]


def test_a_process_that_dies_loses_only_the_run_in_hand(tmp_path):
    display = Recorder()
    failed = run_jobs([job(tmp_path, "a", "kill", "b", "raise", "c")], display)
    assert {name for name, state in display.final().items() if state == "done"} == {"test/a", "test/b", "test/c"}
    assert "SIGKILL" in failed["test/kill"]
    assert directory(tmp_path, "kill").failure == failed["test/kill"]


def test_children_wait_for_their_parents_and_fall_with_them(tmp_path):
    display = Recorder()
    jobs = [
        job(tmp_path, "grandchild", after=("child",)),
        job(tmp_path, "child", after=("raise",)),
        job(tmp_path, "second", after=("first",)),
        job(tmp_path, "raise"),
        job(tmp_path, "first"),
    ]
    failed = run_jobs(jobs, display)
    assert failed["test/child"] == "not run: test/raise failed"
    assert failed["test/grandchild"] == "not run: test/child failed"
    ends = {entry["run"]: entry for entry in journal(tmp_path)}
    assert ends["first"]["end"] <= ends["second"]["begin"]


def test_a_rerun_forgets_the_last_failure(tmp_path):
    directory(tmp_path, "a").fail("earlier")
    assert run_jobs([job(tmp_path, "a")], Recorder()) == {}
    assert directory(tmp_path, "a").failure is None


@pytest.mark.parametrize("per_gpu", [1, 2])
def test_each_gpu_has_its_runs_and_no_more(tmp_path, monkeypatch, per_gpu):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-8a7b")
    share = DeviceShare(runs_per_gpu=per_gpu)
    run_jobs([job(tmp_path, f"r{i}", share=share) for i in range(8)], Recorder())
    entries = journal(tmp_path)
    assert {entry["device"] for entry in entries} == {"5", "GPU-8a7b"}
    assert len(entries) == 8
    for device in ("5", "GPU-8a7b"):
        mine = [entry for entry in entries if entry["device"] == device]
        changes = sorted([(entry["begin"], 1) for entry in mine] + [(entry["end"], -1) for entry in mine])
        level, peak = 0, 0
        for _, change in changes:
            level += change
            peak = max(peak, level)
        assert peak <= per_gpu


def test_two_launchers_together_do_not_overbook(tmp_path):
    one = take_slot(DeviceShare(runs_per_gpu=2), ["0"], tmp_path)
    two = take_slot(DeviceShare(runs_per_gpu=2), ["0"], tmp_path)
    assert one
    assert two
    assert take_slot(DeviceShare(runs_per_gpu=2), ["0"], tmp_path) is None
    assert take_slot(DeviceShare(runs_per_gpu=3), ["0"], tmp_path) is None  # the two that run allow only two
    one.release()
    assert take_slot(DeviceShare(runs_per_gpu=1), ["0"], tmp_path) is None  # this one wants to be alone
    two.release()
    alone = take_slot(DeviceShare(runs_per_gpu=1), ["0"], tmp_path)
    assert alone
    assert take_slot(DeviceShare(runs_per_gpu=4), ["0"], tmp_path) is None
    other = take_slot(DeviceShare(runs_per_gpu=4), ["0", "1"], tmp_path)
    assert other
    assert other.device == "1"


def test_asking_in_vain_leaves_nothing_behind(tmp_path):
    """The launcher asks ten times a second; every file would be opened at every later look."""
    taken = [take_slot(DeviceShare(runs_per_gpu=2), ["0"], tmp_path) for _ in range(2)]
    before = sorted(tmp_path.iterdir())
    assert not any(take_slot(DeviceShare(runs_per_gpu=n), ["0"], tmp_path) for n in (1, 2, 2, 2))
    assert sorted(tmp_path.iterdir()) == before
    assert all(taken)


def test_cpu_workers_divide_the_cores(tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "cores", lambda: 6)
    taken = [take_slot(DeviceShare(threads=2), [], tmp_path) for _ in range(4)]
    assert [slot is not None for slot in taken] == [True, True, True, False]
    for slot in taken[:3]:
        assert slot
        slot.release()


def test_a_cpu_worker_is_told_its_threads_and_sees_no_gpu(tmp_path):
    run_jobs([job(tmp_path, "a")], Recorder())
    (entry,) = journal(tmp_path)
    assert entry["threads"] == "1"
    assert entry["device"] == ""


@pytest.mark.parametrize(
    ("listed", "devices"),
    [("0,1", ["0", "1"]), ("", []), ("-1", []), ("GPU-1a, MIG-2b", ["GPU-1a", "MIG-2b"]), ("3", ["3"])],
)
def test_devices_come_from_the_environment_as_strings(listed, devices):
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": listed}) == devices


# --- the launcher's own end ----------------------------------------------------------------------------------------


def start_launcher(runs: Path, *names: str) -> subprocess.Popen[str]:
    """A launcher in a process of its own, one job for each name."""
    program = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from tests.fake_stage import Recorder, job
from undo.launch.local import run_jobs
try:
    run_jobs([job(Path({str(runs)!r}), name) for name in {names!r}], Recorder())
except KeyboardInterrupt:
    sys.exit(130)
"""
    return subprocess.Popen([sys.executable, "-c", program], text=True, start_new_session=True)


def alive(pids: list[int]) -> list[int]:
    living = []
    for pid in pids:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            continue
        if state != "Z":
            living.append(pid)
    return living


def wait_for(condition, seconds: float = 30):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if result := condition():
            return result
        time.sleep(0.05)
    raise AssertionError("waited in vain")


@pytest.mark.parametrize("end", ["kill -9", "SIGTERM", "SIGINT", "Ctrl-C"])
def test_no_orphans_however_the_launcher_ends(tmp_path, end):
    launcher = start_launcher(tmp_path, "sleep")
    pids_file = tmp_path / "fake/test/sleep/pids"
    wait_for(pids_file.exists)
    pids = wait_for(lambda: json.loads(pids_file.read_text() or "null"))
    assert len(alive(pids)) == 3
    if end == "Ctrl-C":
        os.killpg(launcher.pid, signal.SIGINT)
    else:
        launcher.send_signal({"kill -9": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT}[end])
    status = launcher.wait(timeout=30)
    assert status == (-9 if end == "kill -9" else 130)
    wait_for(lambda: not alive(pids))


def test_the_share_of_a_dead_launcher_is_free_once_its_processes_are_gone(tmp_path):
    launcher = start_launcher(tmp_path, "sleep")
    pids_file = tmp_path / "fake/test/sleep/pids"
    wait_for(pids_file.exists)
    launcher.kill()
    launcher.wait()
    assert run_jobs([job(tmp_path, "next")], Recorder()) == {}


def test_two_launchers_on_the_same_runs_do_each_once(tmp_path):
    launchers = [start_launcher(tmp_path, "a", "b", "c") for _ in range(2)]
    assert [process.wait(timeout=60) for process in launchers] == [0, 0]
    assert sorted(entry["run"] for entry in journal(tmp_path)) == ["a", "b", "c"]
