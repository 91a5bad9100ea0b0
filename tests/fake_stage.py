"""A stage without torch, and jobs made of it, for tests of the launcher. What a run does is in its name."""

import ctypes
import gc
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from undo.launch.jobs import DeviceShare, Job
from undo.runs.directory import RunDirectory
from undo.runs.run import Run

ONE = DeviceShare()
NEEDS = ("undo.runs.run",)  # so that a job may be forked
PR_GET_PDEATHSIG, PR_GET_CHILD_SUBREAPER = 2, 37  # linux/prctl.h


class Recorder:
    """A display that remembers."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str, str]] = []
        self.waited_for: list[str] = []

    def changed(self, run: RunDirectory, state: str, detail: str = "") -> None:
        self.events.append((run.name, state, detail))

    def looked(self, waits_for: str | None) -> None:
        if waits_for is not None and waits_for not in self.waited_for:
            self.waited_for.append(waits_for)

    def stopping(self, jobs: int) -> None:
        print("stopping", jobs, flush=True)

    def final(self) -> dict[str, str]:
        return {name: state for name, state, _ in self.events}


def directory(runs: Path, name: str) -> RunDirectory:
    run = RunDirectory(runs, "fake", f"test/{name}")
    run.folder.mkdir(parents=True, exist_ok=True)
    return run


def job(
    runs: Path, *names: str, after: tuple[str, ...] = (), share: DeviceShare = ONE, imports: tuple[str, ...] = ()
) -> Job:
    """With `imports` it may be forked. PYTHONPATH must have the folder of `tests`."""
    folders = tuple(directory(runs, name) for name in names)
    argv = (sys.executable, "-m", "tests.fake_stage")
    return Job(argv, folders, frozenset(f"test/{name}" for name in after), share, imports)


def portrait(with_torch: bool) -> dict[str, Any]:
    """All of a process that a job can see of how it came about."""
    prctl, said = ctypes.CDLL(None).prctl, ctypes.c_int()
    flags = {}
    for option in (PR_GET_PDEATHSIG, PR_GET_CHILD_SUBREAPER):
        prctl(option, ctypes.byref(said), 0, 0, 0)
        flags[option] = said.value
    parent = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().rstrip(b"\0").split(b"\0")
    streams = (sys.stdin, sys.stdout, sys.stderr)
    facts = {
        "command": [sys.argv, Path("/proc/self/cmdline").read_bytes().rstrip(b"\0").decode().split("\0")],
        "main": [sys.modules["__main__"].__spec__.name, __name__, __file__],
        "parent": [part.decode() for part in parent if not part.startswith(b"-")],
        "leads its session": [os.getsid(0) == os.getppid(), os.getpgid(0) == os.getppid()],
        "place": [os.getcwd(), sys.path, tempfile.gettempdir(), os.umask(0o22)],
        "environment": dict(os.environ),
        "python": [list(sys.flags), gc.isenabled(), gc.get_threshold(), sys.getrecursionlimit()],
        "files": {n: os.readlink(f"/proc/self/fd/{n}") for n in range(64) if os.path.lexists(f"/proc/self/fd/{n}")},
        "streams": [[s.encoding, s.errors, s.line_buffering, s.write_through, s.isatty()] for s in streams],
        "signals": {int(number): str(signal.getsignal(number)).split(" at ")[0] for number in signal.Signals},
        "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
        "kernel": flags,
        "threads": [threading.active_count(), len(os.listdir("/proc/self/task")), sorted(os.sched_getaffinity(0))],
        "drawn": [random.random()],
    }
    if with_torch:
        torch, numpy = import_module("torch"), import_module("numpy")
        facts["torch"] = [torch.get_num_threads(), torch.get_num_interop_threads(), str(torch.get_default_dtype())]
        facts["drawn"] += [numpy.random.random(), torch.rand((), dtype=torch.float64).item()]
    return facts


def work(folders: list[Path]) -> None:
    for folder in folders:
        run = Run.at(folder)
        with run.lock(wait=True):
            if run.done:
                continue
            name = folder.name
            with open(folder.parent / "journal.jsonl", "a") as journal:  # short appends are atomic
                device = os.environ["CUDA_VISIBLE_DEVICES"]
                note = {
                    "run": name,
                    "device": device,
                    "threads": os.environ.get("OMP_NUM_THREADS"),
                    "begin": time.monotonic(),
                }
                if name.startswith("raise"):
                    run.fail("RuntimeError: on purpose")
                    continue
                if name.startswith("kill"):
                    os.kill(os.getpid(), signal.SIGKILL)
                if name.startswith("exit"):
                    sys.exit(7)
                if name.startswith("portrait"):
                    (folder / "portrait.json").write_text(json.dumps(portrait("torch" in name)))
                (folder / "forked").write_text("yes" if "undo.launch.template" in sys.orig_argv else "no")
                if name.startswith("stubborn"):
                    signal.signal(signal.SIGTERM, signal.SIG_IGN)
                if name.startswith(("sleep", "stubborn")):  # with a child here and one in its own session, as torchrun
                    sleeper = [sys.executable, "-S", "-c", "import time; time.sleep(600)"]
                    children = [subprocess.Popen(sleeper), subprocess.Popen(sleeper, start_new_session=True)]
                    (folder / "pids").write_text(json.dumps([os.getpid(), *(child.pid for child in children)]))
                    time.sleep(600)
                time.sleep(0.15)
                journal.write(json.dumps(note | {"end": time.monotonic()}) + "\n")
            (folder / "run.json").write_text("{}")


if __name__ == "__main__":
    work([Path(folder) for folder in sys.argv[1:]])
