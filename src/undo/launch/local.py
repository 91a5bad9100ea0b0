"""The local backend: one process for each job, over all visible GPUs, or over the cores where there is none."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Final, Self

from undo.launch import nanny
from undo.launch.devices import Slot, take_slot, taken, visible_gpus
from undo.launch.jobs import DeviceShare, Display, Job, most_urgent_first
from undo.launch.template import DEVICES, LOST, Forked, Template
from undo.runs import ranks
from undo.runs.directory import INTERRUPTED, RunDirectory

POLL_SECONDS: Final = 0.1
# Large tensors are reused, not returned to the kernel after each step: page faults are half of naive CPU time.
MALLOC: Final = {
    "MALLOC_MMAP_THRESHOLD_": "8589934592",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
}


@dataclass
class Worker:
    """A running job: its nanny process, whose standard input we hold open, and the device share that it occupies."""

    job: Job
    slot: Slot
    process: subprocess.Popen[bytes] | Forked
    seen: set[str] = field(default_factory=set)  # runs whose end has been reported

    @classmethod
    def start(cls, job: Job, slot: Slot, template: Template) -> "Worker":
        told = environment(job.share, slot.device)
        for run in job.runs:
            run.forget_failure()
        with open(job.runs[0].log, "ab") as log:
            if job.imports and template.serves(job.imports, told):
                with suppress(OSError):
                    forked = template.fork(job.command, job.imports, told[DEVICES], [log.fileno(), *slot.files])
                    return cls(job, slot, forked)
            process = subprocess.Popen(
                [sys.executable, "-S", "-E", nanny.__file__, *job.command],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=told,
                pass_fds=slot.files,
                start_new_session=True,  # Ctrl-C reaches the launcher only, which stops its jobs one way
            )
        return cls(job, slot, process)

    def ask_to_stop(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()

    def hurry(self) -> None:
        """End what was asked to stop, without time for a checkpoint."""
        self.process.terminate()

    def close(self) -> None:
        self.ask_to_stop()
        self.process.wait()
        self.slot.release()


def environment(share: DeviceShare, device: str) -> dict[str, str]:
    """What a job is told. `device`: as a slot has it."""
    threads = str(share.threads)
    told = {
        **{key: value for key, value in os.environ.items() if key not in ranks.VARIABLES},
        **MALLOC,
        DEVICES: "" if device == "cpu" else device,
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "PYTHONUNBUFFERED": "1",
        "PYTHONIOENCODING": "utf-8:backslashreplace",  # its output is a log: no terminal says how it is read
        "TOKENIZERS_PARALLELISM": "false" if device == "cpu" else "true",
        **({"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads} if device == "cpu" else {}),
    }
    if told.pop("PYTHONDONTWRITEBYTECODE", None):
        # Else each process compiles torch and transformers anew, 7 s every time; nothing goes beside the sources.
        told["PYTHONPYCACHEPREFIX"] = str(Path(tempfile.gettempdir()) / f"undo-bytecode-{os.getuid()}")
    return told


def template_for(jobs: Sequence[Job], gpus: Sequence[str]) -> Template:
    """One that can fork the jobs, as many as have the same environment, if they are at least two."""
    alike: dict[frozenset[tuple[str, str]], list[Job]] = {}
    for job in jobs if sys.platform == "linux" else ():
        if job.imports:
            told = environment(job.share, ",".join(gpus) if gpus and job.share.devices else "cpu")
            alike.setdefault(frozenset(told.items()), []).append(job)
    told, most = max(alike.items(), key=lambda entry: len(entry[1]), default=((), []))
    names = dict.fromkeys(name for job in most for name in job.imports)
    return Template(list(names) if len(most) > 1 else (), dict(told))


# --- all jobs ------------------------------------------------------------------------------------------------------


def run_jobs(jobs: Sequence[Job], display: Display) -> dict[str, str]:
    """Execute all jobs, each as soon as its parents are done and a device is free -> failed runs and the reasons.

    After SIGINT or SIGTERM it raises KeyboardInterrupt once every process has ended. A second signal hurries that.
    """
    gpus = visible_gpus()
    waiting, working, failed = most_urgent_first(jobs), list[Worker](), dict[str, str]()
    with _Signals() as signals, closing(template_for(waiting, gpus)) as template:
        try:
            while waiting or working:
                waits_for = None
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
                    if held := next((run for run in job.runs if run.is_held()), None):  # let it finish, then look again
                        waits_for = waits_for or f"another launcher, which runs {held.name}"
                        continue
                    slot = take_slot(job.share, gpus, holder=str(job.runs[0].folder.absolute()))
                    if slot is None:
                        full.add(job.share)
                        continue
                    waiting.remove(job)
                    working.append(Worker.start(job, slot, template))
                    for run in job.groups[0]:
                        display.changed(run, "running", slot.device)
                if full and not working:
                    waits_for = "; ".join(("a free " + ("GPU" if gpus else "core"), *taken(gpus)[:3]))
                if not waiting and template.idle:
                    template.close()
                display.looked(None if working else waits_for)
                template.wait(POLL_SECONDS)
        finally:
            template.close()
            _stop(working, signals, display)
    return failed


def _stop(working: Sequence[Worker], signals: "_Signals", display: Display) -> None:
    """Return when every process of the jobs has ended. A signal that comes meanwhile hurries them."""
    asked, signals.raises = min(signals.count, 1), False
    for worker in working:
        worker.ask_to_stop()
    if working:
        display.stopping(len(working))
    while any(worker.process.poll() is None for worker in working):
        if signals.count > asked:
            for worker in working:
                worker.hurry()
        time.sleep(POLL_SECONDS)
    for worker in working:
        worker.close()


def _report(worker: Worker, failed: dict[str, str], display: Display) -> None:
    """Tell the display which runs of a job have ended since the last look, and which ones are in hand."""
    groups = worker.job.groups
    for position, group in enumerate(groups):
        news = [run for run in group if run.name not in worker.seen and _ended(run, failed, display)]
        worker.seen |= {run.name for run in news}
        if any(run.name not in worker.seen for run in group):
            return
        if news and position + 1 < len(groups):
            for run in groups[position + 1]:
                display.changed(run, "running", worker.slot.device)


def _ended(run: RunDirectory, failed: dict[str, str], display: Display) -> bool:
    if run.done:
        display.changed(run, "done")
    elif (reason := run.failure) is not None:
        failed[run.name] = reason
        display.changed(run, "failed", reason)
    else:
        return False
    return True


def _after_exit(worker: Worker, failed: dict[str, str], display: Display) -> list[Job]:
    """A job for the remaining runs, if the process died in the middle. Those that it was executing have failed."""
    _report(worker, failed, display)
    rest = [[run for run in group if run.name not in worker.seen] for group in worker.job.groups]
    rest = [group for group in rest if group]
    if not rest:
        return []
    in_hand, *others = rest
    status = worker.process.wait()
    if status == LOST:
        return [worker.job]
    if status < 0:  # the nanny itself was killed, and the job dies with it
        status = 128 - status
    elif any(run.is_held() for run in in_hand):  # another launcher was faster: wait for it
        return [replace(worker.job, runs=tuple(run for group in rest for run in group))]
    reason = f"the process exited with status {status} before the run was done"
    if status == INTERRUPTED:
        reason = "the process was asked to stop, and has saved a checkpoint"
    if status > 128:
        name = signal.Signals(status - 128).name
        reason = f"the process was ended by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    for run in in_hand:
        run.fail(reason)
        failed[run.name] = reason
        display.changed(run, "failed", reason)
    return [replace(worker.job, runs=tuple(run for group in others for run in group))] if others else []


def _give_up(job: Job, failed: dict[str, str], display: Display) -> bool:
    """Whether a parent has failed, so that the job can never run."""
    for parent in sorted(job.waits_for & failed.keys()):
        for run in job.runs:
            failed[run.name] = f"not run: {parent} failed"
            display.changed(run, "failed", failed[run.name])
        return True
    return False


class _Signals:
    """While this lasts, the first SIGINT or SIGTERM raises KeyboardInterrupt. Later ones are counted and raise nothing,
    so that whoever cleans up is left to finish."""

    def __init__(self) -> None:
        self.count, self.raises = 0, True

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._came) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _came(self, signum: int, frame: FrameType | None) -> None:
        self.count += 1
        if self.raises:
            self.raises = False
            raise KeyboardInterrupt
