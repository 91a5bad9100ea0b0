"""A stage without torch, and jobs made of it, for tests of the launcher. What a run does is in its name."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from undo.launch.jobs import DeviceShare, Job
from undo.runs.directory import RunDirectory
from undo.runs.run import Run

ONE = DeviceShare()


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
    """With `imports` it may be forked."""
    folders = tuple(directory(runs, name) for name in names)
    argv = (sys.executable, "-m", "tests.fake_stage")
    return Job(argv, folders, frozenset(f"test/{name}" for name in after), share, imports)


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
