"""Fan-out: jobs over all visible GPUs, or over the cores where there is none. Never imports torch.

The seam to a cluster is `Job` and the signature of `run_jobs`: a job is a command line, it may start when the runs
it waits for are done, and *done* is said by a run's own run.json, never by the launcher. A backend that submits
`job.command` to a queue and waits for the same files can take the place of the local one.
"""

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Final, Protocol

from undo import nanny, ranks
from undo.config import ConfigError
from undo.run import INTERRUPTED, RunDirectory

POLL_SECONDS: Final = 0.1
# Large tensors are reused, not returned to the kernel after each step: page faults are half of naive CPU time.
MALLOC: Final = {
    "MALLOC_MMAP_THRESHOLD_": "8589934592",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
}


@dataclass(frozen=True)
class Job:
    """One process. It executes its runs one after the other; if it dies, only the run in hand is lost."""

    argv: tuple[str, ...]
    runs: tuple[RunDirectory, ...]
    waits_for: frozenset[str]  # names of runs of the same setting
    share: "DeviceShare"

    @property
    def command(self) -> list[str]:
        return [*self.argv, *(str(run.folder) for run in self.runs)]


@dataclass(frozen=True)
class DeviceShare:
    """How much of the machine a job takes: 1 / runs_per_gpu of `devices` GPUs, or `threads` cores for each device where
    there is none."""

    runs_per_gpu: int = 1
    threads: int = 1
    devices: int = 1


class Display(Protocol):
    """Hears of every change of a run's state."""

    def changed(self, run: RunDirectory, state: str, detail: str = "") -> None: ...


# --- devices -------------------------------------------------------------------------------------------------------


def visible_gpus(environment: Mapping[str, str] = os.environ) -> list[str]:
    """The GPUs that this process may use, as strings: indices, UUIDs or MIG names, as CUDA_VISIBLE_DEVICES has them."""
    listed = environment.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        return [name.strip() for name in listed.split(",") if name.strip() and name.strip() != "-1"]
    query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return answer.split()


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Slot:
    """A share of devices, held by an open lock file for each, and so by whoever inherits their descriptors."""

    def __init__(self, devices: Sequence[str], files: Sequence[int]) -> None:
        self.device = ",".join(dict.fromkeys(devices))  # as CUDA_VISIBLE_DEVICES has them, or cpu
        self.files = tuple(files)

    def release(self) -> None:
        for file in self.files:
            os.close(file)


def take_slot(share: DeviceShare, gpus: Sequence[str], folder: Path | None = None) -> Slot | None:
    """A free share of as many devices as are wanted, or None. All launchers of a user see the same lock files, so they
    do not overbook.

    A device takes one more run only if neither the newcomer's limit nor that of any run on it is exceeded.
    """
    folder = folder or Path(tempfile.gettempdir()) / f"undo-slots-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    limit = share.runs_per_gpu if gpus else max(1, cores() // share.threads)
    devices, files = list[str](), list[int]()
    with _alone(folder / "several.guard") if share.devices > 1 else contextlib.nullcontext():  # or two have half each
        for device in gpus or ["cpu"] * share.devices:
            with _alone(folder / f"{_file_name(device)}.guard"):
                file = _take_one_of(folder, device, limit)
            if file is not None:
                devices.append(device)
                files.append(file)
            if len(files) == share.devices:
                return Slot(devices, files)
        for file in files:
            os.close(file)
    return None


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    with open(path, "w") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        yield


def _take_one_of(folder: Path, device: str, limit: int) -> int | None:
    """The descriptor of a lock file of the device."""
    used, strictest, free = 0, limit, None
    present = len(list(folder.glob(f"{_file_name(device)}.slot-*")))  # another launcher may have allowed more of them
    for index in range(max(limit, present)):
        file = os.open(folder / f"{_file_name(device)}.slot-{index}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            used += 1
            strictest = min(strictest, int(os.pread(file, 16, 0) or b"1"))
            os.close(file)
            continue
        if free is None:
            free = file
        else:
            os.close(file)
    if free is None:
        return None
    if used >= strictest:
        os.close(free)
        return None
    os.truncate(free, 0)
    os.pwrite(free, str(limit).encode(), 0)
    return free


def _file_name(device: str) -> str:
    return "".join(c if c.isalnum() or c == "-" else "_" for c in device)


# --- one job as a process ------------------------------------------------------------------------------------------


@dataclass
class Worker:
    """A running job: its nanny, whose standard input we hold, and the device share it keeps until it is gone."""

    job: Job
    slot: Slot
    process: subprocess.Popen[bytes]
    seen: set[str] = field(default_factory=set)  # runs whose end has been reported

    @classmethod
    def start(cls, job: Job, slot: Slot) -> "Worker":
        threads = str(job.share.threads)
        environment = {
            **{key: value for key, value in os.environ.items() if key not in ranks.VARIABLES},
            **MALLOC,
            "CUDA_VISIBLE_DEVICES": "" if slot.device == "cpu" else slot.device,
            "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
            "PYTHONUNBUFFERED": "1",
            "TOKENIZERS_PARALLELISM": "false" if slot.device == "cpu" else "true",
            **({"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads} if slot.device == "cpu" else {}),
        }
        if environment.pop("PYTHONDONTWRITEBYTECODE", None):
            # Else each process compiles torch and transformers anew, 7 s every time; nothing goes beside the sources.
            environment["PYTHONPYCACHEPREFIX"] = str(Path(tempfile.gettempdir()) / f"undo-bytecode-{os.getuid()}")
        command = [sys.executable, "-S", "-E", nanny.__file__, *job.command]
        for run in job.runs:
            run.forget_failure()
        with open(job.runs[0].log, "ab") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=environment,
                pass_fds=slot.files,
                start_new_session=True,  # Ctrl-C reaches the launcher only, which stops its jobs one way
            )
        return cls(job, slot, process)

    def ask_to_stop(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()

    def close(self) -> None:
        self.ask_to_stop()
        self.process.wait()
        self.slot.release()


# --- all jobs ------------------------------------------------------------------------------------------------------


def run_jobs(jobs: Sequence[Job], display: Display) -> dict[str, str]:
    """Execute all jobs, each as soon as its parents are done and a device is free -> reason by name of failed run.

    Raises KeyboardInterrupt once every process is gone, if SIGINT or SIGTERM came.
    """
    gpus = visible_gpus()
    waiting, working, failed = most_urgent_first(jobs), list[Worker](), dict[str, str]()
    with _signals_as_interrupt():
        try:
            while waiting or working:
                for worker in list(working):
                    _report(worker, failed, display)
                    if worker.process.poll() is not None:
                        working.remove(worker)
                        worker.close()
                        waiting += _after_exit(worker, failed, display)
                waiting = [job for job in waiting if not _give_up(job, failed, display)]
                full = set[DeviceShare]()  # asked for in vain: one look for all that want the same, many times a second
                for job in list(waiting):
                    if job.share in full or any(not job.runs[0].sibling(parent).done for parent in job.waits_for):
                        continue
                    if any(run.is_held() for run in job.runs):  # by another launcher: let it finish, then look again
                        continue
                    slot = take_slot(job.share, gpus)
                    if slot is None:
                        full.add(job.share)
                        continue
                    waiting.remove(job)
                    working.append(Worker.start(job, slot))
                    display.changed(job.runs[0], "running", slot.device)
                time.sleep(POLL_SECONDS)
        finally:
            for worker in working:  # all at once, then one after the other
                worker.ask_to_stop()
            for worker in working:
                worker.close()
    return failed


def most_urgent_first(jobs: Sequence[Job]) -> list[Job]:
    """By the number of jobs that must still follow one after the other; equals stay in order."""
    children: dict[str, list[Job]] = {}
    for job in jobs:
        for parent in job.waits_for:
            children.setdefault(parent, []).append(job)

    @cache
    def generations(job: Job) -> int:
        return 1 + max((generations(child) for run in job.runs for child in children.get(run.name, [])), default=0)

    return sorted(jobs, key=generations, reverse=True)


def _report(worker: Worker, failed: dict[str, str], display: Display) -> None:
    """Tell the display which runs of a job have ended since the last look, and which one is in hand."""
    for position, run in enumerate(worker.job.runs):
        if run.name in worker.seen:
            continue
        if run.done:
            display.changed(run, "done")
        elif (reason := run.failure) is not None:
            failed[run.name] = reason
            display.changed(run, "failed", reason)
        else:
            return
        worker.seen.add(run.name)
        if position + 1 < len(worker.job.runs):
            display.changed(worker.job.runs[position + 1], "running", worker.slot.device)


def _after_exit(worker: Worker, failed: dict[str, str], display: Display) -> list[Job]:
    """The job of what is left, if the process died in the middle: the run in hand has failed, the others go on."""
    _report(worker, failed, display)
    rest = [run for run in worker.job.runs if run.name not in worker.seen]
    if not rest:
        return []
    in_hand, *others = rest
    if in_hand.is_held():  # another launcher was faster: wait for it
        return [replace(worker.job, runs=tuple(rest))]
    status = worker.process.returncode
    reason = f"the process exited with status {status} before the run was done"
    if status == INTERRUPTED:
        reason = "the process was asked to stop, and has saved a checkpoint"
    if status > 128:
        name = signal.Signals(status - 128).name
        reason = f"the process was ended by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    in_hand.fail(reason)
    failed[in_hand.name] = reason
    display.changed(in_hand, "failed", reason)
    return [replace(worker.job, runs=tuple(others))] if others else []


def _give_up(job: Job, failed: dict[str, str], display: Display) -> bool:
    """Whether a parent has failed, so that the job can never run."""
    for parent in sorted(job.waits_for & failed.keys()):
        for run in job.runs:
            failed[run.name] = f"not run: {parent} failed"
            display.changed(run, "failed", failed[run.name])
        return True
    return False


@contextlib.contextmanager
def _signals_as_interrupt() -> Iterator[None]:
    """SIGTERM does what Ctrl-C does."""

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def check_devices(share: DeviceShare) -> None:
    """Raises ConfigError if a run wants more than there is: it would wait for ever."""
    gpus = visible_gpus()
    if gpus and share.devices > len(gpus):
        raise ConfigError(
            f"execution.devices={share.devices}, but {len(gpus)} GPUs are visible: {', '.join(gpus)}\n"
            f"take fewer devices, or name more in CUDA_VISIBLE_DEVICES"
        )
    if not gpus and share.devices * share.threads > cores():
        several = f"execution.devices={share.devices} with " * (share.devices > 1)
        raise ConfigError(f"{several}execution.threads={share.threads}, but this machine has {cores()} cores")
