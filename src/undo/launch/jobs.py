"""What the launcher works on: jobs, their share of the devices, and the display that hears of changes.

This is the seam to a cluster. A job is a command line; it may start when the runs it waits for are done, and a run is
done when its own run.json says so, never when the launcher says so. A backend that submits `job.command` to a queue and
waits for the same files can take the place of `local.run_jobs`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol

from undo.runs.directory import RunDirectory


@dataclass(frozen=True)
class Job:
    """One process. It executes its runs one after the other, `together` at a time; if it dies, only those in hand are
    lost.

    imports: what `python -m MODULE ...` will need, as pkgutil.resolve_name takes it. A process that has it may fork the
    job. None: it gets a fresh process.
    """

    argv: tuple[str, ...]
    runs: tuple[RunDirectory, ...]
    waits_for: frozenset[str]  # names of runs of the same setting
    share: "DeviceShare"
    imports: tuple[str, ...] = ()
    together: int = 1

    @property
    def groups(self) -> list[tuple[RunDirectory, ...]]:
        """The runs that go side by side, in the order in which their groups come."""
        return [self.runs[i : i + self.together] for i in range(0, len(self.runs), self.together)]

    @property
    def command(self) -> list[str]:
        return [*self.argv, *(str(run.folder) for run in self.runs)]


@dataclass(frozen=True)
class DeviceShare:
    """How much of the machine a job takes: 1 / runs_per_gpu of `devices` GPUs, or `threads` cores for each device where
    there is none. No devices: it computes nothing, and waits for none."""

    runs_per_gpu: int = 1
    threads: int = 1
    devices: int = 1


class Display(Protocol):
    """Is told of every change of a run's state, and called many times a second. It must not raise."""

    def changed(self, run: RunDirectory, state: str, detail: str = "") -> None: ...

    def looked(self, waits_for: str | None) -> None:
        """Some time has passed. `waits_for`: what keeps the next run from starting, if none is running."""
        ...

    def stopping(self, jobs: int) -> None:
        """So many processes have been asked to save a checkpoint and end."""
        ...


def most_urgent_first(jobs: Sequence[Job]) -> list[Job]:
    """Jobs by the length of the chain of jobs that must still follow them; ties keep their order."""
    children: dict[str, list[Job]] = {}
    for job in jobs:
        for parent in job.waits_for:
            children.setdefault(parent, []).append(job)

    @cache
    def generations(job: Job) -> int:
        return 1 + max((generations(child) for run in job.runs for child in children.get(run.name, [])), default=0)

    return sorted(jobs, key=generations, reverse=True)
