"""The launcher with real processes: isolation, device shares, and no orphan however it ends."""

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.conftest import HANGS, ROOT
from tests.fake_stage import NEEDS, Recorder, directory, job
from undo.config.mistakes import ConfigError
from undo.launch import devices
from undo.launch.devices import check_card, take_slot, visible_gpus
from undo.launch.jobs import DeviceShare
from undo.launch.local import run_jobs
from undo.runs import ranks
from undo.settings.stages import STAGES

WAYS = {"fresh": (), "fork": NEEDS}  # how a job starts, and what its launcher is told that it needs


@pytest.fixture(autouse=True)
def _own_slots_and_our_modules(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")]))))


@pytest.fixture(params=WAYS)
def needs(request) -> tuple[str, ...]:
    """For a test of both ways of starting."""
    return WAYS[request.param]


def journal(runs: Path) -> list[dict]:
    path = runs / "fake/test/journal.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_failing_run_does_not_stop_the_others(tmp_path, needs):
    display = Recorder()
    failed = run_jobs([job(tmp_path, name, imports=needs) for name in ("a", "raise", "exit", "b")], display)
    assert display.final() == {"test/a": "done", "test/raise": "failed", "test/exit": "failed", "test/b": "done"}
    assert failed["test/raise"] == "RuntimeError: on purpose"
    assert "status 7" in failed["test/exit"]


def test_a_process_that_dies_loses_only_the_run_in_hand(tmp_path, needs):
    display = Recorder()
    jobs = [job(tmp_path, *names, imports=needs) for names in (("a", "kill", "b", "raise", "c"), ("d",))]
    failed = run_jobs(jobs, display)
    assert {name for name, state in display.final().items() if state == "done"} == {f"test/{x}" for x in "abcd"}
    assert "SIGKILL" in failed["test/kill"]
    assert directory(tmp_path, "kill").failure == failed["test/kill"]


def test_of_runs_side_by_side_a_process_that_dies_loses_those_in_hand(tmp_path):
    """All of a group run from its beginning; the next group gets a process of its own."""
    display, names = Recorder(), ["a", "raise", "kill", "b", "c", "d"]
    failed = run_jobs([replace(job(tmp_path, *names), together=4)], display)
    running = [name for name, state, _ in display.events if state == "running"]
    assert running == [f"test/{name}" for name in names]
    assert {name for name, state in display.final().items() if state == "done"} == {"test/a", "test/c", "test/d"}
    assert failed["test/raise"] == "RuntimeError: on purpose"
    assert "SIGKILL" in failed["test/kill"] == failed["test/b"]


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
def test_each_gpu_has_its_runs_and_no_more(tmp_path, monkeypatch, per_gpu, needs):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-8a7b")
    share = DeviceShare(runs_per_gpu=per_gpu)
    run_jobs([job(tmp_path, f"r{i}", share=share, imports=needs) for i in range(8)], Recorder())
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
    monkeypatch.setattr(devices, "cores", lambda: range(6))
    taken = [take_slot(DeviceShare(threads=2), [], tmp_path) for _ in range(4)]
    assert [slot is not None for slot in taken] == [True, True, True, False]
    for slot in taken[:3]:
        assert slot
        slot.release()


def test_launchers_on_different_cores_do_not_wait_for_each_other(tmp_path, monkeypatch):
    """taskset, Slurm and Docker give each its own."""
    monkeypatch.setattr(devices, "cores", lambda: [0, 1])
    whole = take_slot(DeviceShare(threads=2), [], tmp_path)
    monkeypatch.setattr(devices, "cores", lambda: [1, 2])
    first, second = (take_slot(DeviceShare(), [], tmp_path) for _ in range(2))
    assert whole
    assert first  # core 2
    assert second is None
    whole.release()
    assert take_slot(DeviceShare(), [], tmp_path) is not None


def test_who_computes_nothing_waits_for_no_device(tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "cores", lambda: [0])
    assert take_slot(DeviceShare(), [], tmp_path)
    linked = take_slot(DeviceShare(devices=0), [], tmp_path)
    assert linked
    assert linked.device == "cpu"
    assert take_slot(DeviceShare(devices=0), ["0"], tmp_path)
    assert [stage.name for stage in STAGES.values() if not stage.computes] == ["base"]


@pytest.mark.parametrize("gpus", ["", "7"])
def test_who_waits_says_for_what(tmp_path, monkeypatch, gpus):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    monkeypatch.setattr(devices, "cores", lambda: [5])
    folder = tmp_path / f"undo-slots-{os.getuid()}"
    slot = take_slot(DeviceShare(), visible_gpus(), folder, "/runs/demo/pretrain/other run")
    assert slot
    display = Recorder()
    display.looked = lambda text: (display.waited_for.append(text), text and slot.release())
    run_jobs([job(tmp_path, "a")], display)
    assert display.final() == {"test/a": "done"}
    name, what = ("GPU 7", "GPU") if gpus else ("core 5", "core")
    assert display.waited_for[0] == f"a free {what}; {name} is taken by /runs/demo/pretrain/other run"
    assert set(display.waited_for[1:]) == {None}


def test_who_waits_for_another_launcher_says_so(tmp_path):
    display, held = Recorder(), directory(tmp_path, "a").lock(wait=False)
    held.__enter__()
    display.looked = lambda text: (display.waited_for.append(text), text and held.__exit__(None, None, None))
    run_jobs([job(tmp_path, "a")], display)
    assert display.waited_for[0] == "another launcher, which runs test/a"


@pytest.mark.parametrize("trouble", ["another's", "read-only", "ENOLCK", "no TMPDIR"])
def test_where_locks_cannot_be_kept_the_variable_is_named(tmp_path, monkeypatch, trouble):
    match trouble:
        case "another's":
            monkeypatch.setattr(os, "getuid", lambda: 12345)
        case "read-only":
            (tmp_path / "undo-slots").write_text("")  # root may write everywhere, but not make a folder of a file
        case "ENOLCK":
            monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOLCK, "No locks")))
        case _:
            monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [str(tmp_path / "none")])
    folder = {"read-only": tmp_path / "undo-slots", "no TMPDIR": None}.get(trouble, tmp_path / "slots")
    with pytest.raises(ConfigError, match="set TMPDIR") as error:
        take_slot(DeviceShare(), [], folder)
    assert len(str(error.value).splitlines()) == 2


def test_a_card_that_is_named_but_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(devices, "DRIVERS", ())
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-dead-beef")
    for check in (check_card, ranks.this_process):
        with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES=GPU-dead-beef"):
            check()
    for nothing in ("", "-1", "NoDevFiles"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", nothing)
        check_card()
        assert ranks.this_process().device.type == "cpu"


def test_a_cpu_worker_is_told_its_threads_and_sees_no_gpu(tmp_path):
    run_jobs([job(tmp_path, "a")], Recorder())
    (entry,) = journal(tmp_path)
    assert entry["threads"] == "1"
    assert entry["device"] == ""


@pytest.mark.parametrize(
    ("listed", "devices"),
    [
        ("0,1", ["0", "1"]),
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
        ("GPU-1a, MIG-2b", ["GPU-1a", "MIG-2b"]),
        ("3", ["3"]),
    ],
)
def test_devices_come_from_the_environment_as_strings(listed, devices):
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": listed}) == devices


# --- the launcher's own end ----------------------------------------------------------------------------------------


def start_launcher(runs: Path, *names: str, needs: tuple[str, ...] = (), **options: int) -> subprocess.Popen[str]:
    """A launcher in a process of its own, one job for each name. If they may be forked, a run `first` comes before
    them, since for one job nothing is forked."""
    names = ("first", *names) if needs else names
    program = f"""
import sys
from pathlib import Path
from tests.fake_stage import Recorder, job
from undo.launch.local import run_jobs
try:
    run_jobs([job(Path({str(runs)!r}), name, imports={needs!r}) for name in {names!r}], Recorder())
except KeyboardInterrupt:
    sys.exit(130)
"""
    return subprocess.Popen([sys.executable, "-c", program], text=True, start_new_session=True, **options)


def started(runs: Path, name: str, needs: tuple[str, ...] = ()) -> list[int]:
    """The processes of a job that sleeps, once all are there, and once `first` is done."""
    if needs:
        wait_for(lambda: directory(runs, "first").done)
    file = runs / "fake/test" / name / "pids"
    pids = wait_for(lambda: file.exists() and json.loads(file.read_text() or "null"))
    assert (file.parent / "forked").read_text() == ("yes" if needs else "no")
    return pids


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


def wait_for(condition, seconds: float = HANGS):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if result := condition():
            return result
        time.sleep(0.05)
    raise AssertionError("waited in vain")


@pytest.mark.parametrize("end", ["kill -9", "SIGTERM", "SIGINT", "Ctrl-C"])
def test_no_orphans_however_the_launcher_ends(tmp_path, end, needs):
    launcher = start_launcher(tmp_path, "sleep", needs=needs)
    pids = started(tmp_path, "sleep", needs)
    assert len(alive(pids)) == 3
    if end == "Ctrl-C":
        os.killpg(launcher.pid, signal.SIGINT)
    else:
        launcher.send_signal({"kill -9": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT}[end])
    status = launcher.wait(timeout=HANGS)
    assert status == (-9 if end == "kill -9" else 130)
    wait_for(lambda: not alive(pids))


def test_a_second_ctrl_c_ends_at_once_what_saves_a_checkpoint(tmp_path, monkeypatch, needs):
    """The first one gives a job time; when the launcher is gone, so is every process."""
    monkeypatch.setenv("UNDO_GRACE_SECONDS", "600")
    launcher = start_launcher(tmp_path, "stubborn", needs=needs, stdout=subprocess.PIPE)
    pids = started(tmp_path, "stubborn", needs)
    launcher.send_signal(signal.SIGINT)
    assert launcher.stdout.readline().startswith("stopping ")
    assert len(alive(pids)) == 3
    for _ in range(2):  # a third one changes nothing
        launcher.send_signal(signal.SIGINT)
    assert launcher.wait(timeout=HANGS) == 130
    assert not alive(pids)


def test_a_worker_dies_with_its_nanny(tmp_path, needs):
    """It would hold the run, but not its share of the devices."""
    launcher = start_launcher(tmp_path, "sleep", needs=needs, stdout=subprocess.PIPE)
    worker, *children = started(tmp_path, "sleep", needs)
    os.kill(int(Path(f"/proc/{worker}/stat").read_text().rsplit(")", 1)[1].split()[1]), signal.SIGKILL)
    assert launcher.wait(timeout=HANGS) == 0
    assert not alive([worker])
    assert "ended by SIGKILL" in (directory(tmp_path, "sleep").failure or "")
    for child in children:  # torchrun's ranks end themselves; these do not
        os.kill(child, signal.SIGKILL)


def test_the_share_of_a_dead_launcher_is_free_once_its_processes_are_gone(tmp_path, needs):
    launcher = start_launcher(tmp_path, "sleep", needs=needs)
    started(tmp_path, "sleep", needs)
    launcher.kill()
    launcher.wait()
    assert run_jobs([job(tmp_path, "next")], Recorder()) == {}


def test_two_launchers_on_the_same_runs_do_each_once(tmp_path, needs):
    launchers = [start_launcher(tmp_path, "a", "b", "c", needs=needs) for _ in range(2)]
    assert [process.wait(timeout=HANGS) for process in launchers] == [0, 0]
    assert sorted(entry["run"] for entry in journal(tmp_path)) == ["a", "b", "c", *(["first"] if needs else [])]
