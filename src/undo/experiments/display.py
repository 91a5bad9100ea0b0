"""What the launcher shows: a live table on a terminal, a line for each change elsewhere, failures at the end."""

import json
import os
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.live import Live
from rich.table import Table

from undo.config.units import duration
from undo.experiments.plan import PlannedRun
from undo.runs.directory import RunDirectory
from undo.train.stage import TrainingStage

TAIL_BYTES = 8192  # enough to hold the last step and the last evaluation of metrics.jsonl


class LiveTable:
    """Shows runs while they execute. Implements launch.jobs.Display."""

    def __init__(self, planned: Sequence[PlannedRun]) -> None:
        self._begin = time.monotonic()
        self._planned = {p.name: p for p in planned}
        self._state = {p.name: "skipped" if p.directory.done else "waiting" for p in planned}
        self._detail: dict[str, str] = {}
        self._started: dict[str, tuple[float, int]] = {}  # when this launcher saw it start, and at which step
        self._seconds: dict[str, float] = {}
        self._console = Console()
        self._live = Live(get_renderable=self._table, console=self._console, refresh_per_second=2, transient=True)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        skipped = sum(state == "skipped" for state in self._state.values())
        if skipped:
            self._console.print(f"{skipped} of {len(self._state)} runs were done before")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live.is_started:
            self._live.stop()
        counts = Counter(self._state.values())
        summary = ", ".join(f"{counts[s]} {s}" for s in ("done", "skipped", "failed", "waiting") if counts[s])
        self._console.print(f"{summary} in {duration(time.monotonic() - self._begin)}")
        not_run: dict[str, list[str]] = {}
        for name, state in self._state.items():
            if state == "failed" and self._detail[name].startswith("not run"):
                not_run.setdefault(self._detail[name], []).append(name)
            elif state == "failed":
                self._console.print(f"[red]failed[/] {name}: ", end="", highlight=False)
                self._console.print(self._detail[name], markup=False, highlight=False, soft_wrap=True)
                self._console.print(f"       log: {self._planned[name].directory.log}", soft_wrap=True, highlight=False)
        for reason, names in not_run.items():  # one cause, one line
            some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            self._console.print(f"{reason}: {some}", markup=False, highlight=False, soft_wrap=True)

    def changed(self, run: RunDirectory, state: str, detail: str = "") -> None:
        self._state[run.name], self._detail[run.name] = state, detail
        if state == "running":
            self._started[run.name] = time.monotonic(), _last(run).get("step", 0)
        elif run.name in self._started:
            self._seconds[run.name] = time.monotonic() - self._started[run.name][0]
        if not self._live.is_started:
            took = f" in {duration(self._seconds[run.name])}" if run.name in self._seconds else ""
            where = f" on {detail}" if state == "running" else f": {detail}" if detail else ""
            self._console.print(f"{state:8}{run.name}{took}{where}", highlight=False, markup=False, soft_wrap=True)

    def interrupted(self, force: bool) -> None:
        """`force`: whether the command would delete what it has just made."""
        for name, state in self._state.items():
            if state == "running":
                self._state[name] = "waiting"
        how = " without --force" * force
        self._console.print(f"interrupted: every process has ended; the same command{how} continues")

    def _table(self) -> Table:
        """Running runs, then what just ended, then what comes next, as far as the terminal's height allows."""
        table = Table(box=None, pad_edge=False)
        for column in ("run", "state", "step", "loss", "retain", "forget", "left"):
            table.add_column(column, justify="left" if column in ("run", "state") else "right", no_wrap=True)
        room = max(8, self._console.height - 4)
        by_state = {
            s: [n for n, state in self._state.items() if state == s] for s in ("running", "failed", "done", "waiting")
        }
        shown = by_state["running"] + by_state["failed"] + by_state["done"][-room // 2 :]
        for name in (shown + by_state["waiting"])[:room]:
            table.add_row(name, self._state[name], *self._progress(name))
        counts = Counter(self._state.values())
        finished = counts["done"] + counts["skipped"]
        table.caption = f"{finished} of {len(self._state)} done, {duration(time.monotonic() - self._begin)}"
        return table

    def _progress(self, name: str) -> tuple[str, ...]:
        if self._state[name] not in ("running", "done"):
            return ("",) * 5
        config, last = self._planned[name].config, _last(self._planned[name].directory)
        if not isinstance(config, TrainingStage):
            return (_last_line(self._planned[name].directory.log), *("",) * 4)
        if not last:
            return ("",) * 5
        step, steps = last["step"], config.training.steps
        left = ""
        if self._state[name] == "running":
            began, first = self._started[name]
            if step > first:
                left = duration((time.monotonic() - began) / (step - first) * (steps - step))
        else:
            left = "took " + duration(self._seconds.get(name, 0))
        numbers = (f"{last[key]:.3f}" if key in last else "" for key in ("loss", "retain", "forget"))
        return (f"{step}/{steps}", *numbers, left)


def _tail(path: Path) -> list[bytes]:
    """The complete lines at the end of a file; the first of them may be torn."""
    try:
        with open(path, "rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - TAIL_BYTES))
            return file.read().split(b"\n")[:-1]
    except OSError:
        return []


def _last_line(path: Path) -> str:
    """The last line of output of a run that trains nothing."""
    return next((line.decode(errors="replace") for line in reversed(_tail(path)) if line.strip()), "")


def _last(run: RunDirectory) -> dict[str, Any]:
    """The latest value of every key in the last lines of the run's metrics."""
    merged: dict[str, Any] = {}
    for line in _tail(run.folder / "metrics.jsonl"):
        try:
            merged |= json.loads(line)
        except ValueError:  # the first line of the tail is rarely whole
            continue
    return merged
