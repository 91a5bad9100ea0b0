"""What the launcher shows: a live table on a terminal, a line for each change elsewhere, failures at the end."""

import json
import os
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from undo.config.units import duration
from undo.experiments.plan import PlannedRun
from undo.runs.directory import RunDirectory
from undo.train.stage import TrainingStage

QUIET_SECONDS = 60.0  # off a terminal; then a line says how far the runs are
SHOWN = 3  # runs in such a line
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
        self._waits_for: str | None = None
        self._spoke = self._begin  # when the last line was printed
        self._console = Console(markup=False, emoji=False, highlight=False)  # names and paths are text
        self._live = Live(get_renderable=self._table, console=self._console, refresh_per_second=2, transient=True)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        skipped = sum(state == "skipped" for state in self._state.values())
        if skipped:
            self._say(f"{skipped} of {len(self._state)} runs were done before")
        return self

    def _say(self, text: str | Text) -> None:
        """One line. What becomes of our output does not concern the runs: config/guard.py reports it at the end."""
        self._spoke = time.monotonic()
        with suppress(OSError, ValueError):
            self._console.print(text, soft_wrap=True)

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live.is_started:
            self._live.stop()
        counts = Counter(self._state.values())
        summary = ", ".join(f"{counts[s]} {s}" for s in ("done", "skipped", "failed", "waiting") if counts[s])
        self._say(f"{summary} in {duration(time.monotonic() - self._begin)}")
        not_run: dict[str, list[str]] = {}
        for name, state in self._state.items():
            if state == "failed" and self._detail[name].startswith("not run"):
                not_run.setdefault(self._detail[name], []).append(name)
            elif state == "failed":
                self._say(Text.assemble(("failed", "red"), f" {name}: {self._detail[name]}"))
                self._say(f"       log: {self._planned[name].directory.log}")
        for reason, names in not_run.items():  # one cause, one line
            some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            self._say(f"{reason}: {some}")

    def changed(self, run: RunDirectory, state: str, detail: str = "") -> None:
        self._state[run.name], self._detail[run.name] = state, detail
        if state == "running":
            self._started[run.name] = time.monotonic(), _last(run).get("step", 0)
        elif run.name in self._started:
            self._seconds[run.name] = time.monotonic() - self._started[run.name][0]
        if not self._live.is_started:
            took = f" in {duration(self._seconds[run.name])}" if run.name in self._seconds else ""
            where = f" on {detail}" if state == "running" else f": {detail}" if detail else ""
            self._say(f"{state:8}{run.name}{took}{where}")

    def looked(self, waits_for: str | None) -> None:
        """Off a terminal a line now and then: how far the runs are, or what they wait for."""
        news = waits_for is not None and self._waits_for is None
        self._waits_for = waits_for
        if not self._live.is_started and (news or time.monotonic() - self._spoke >= QUIET_SECONDS):
            self._say(self._so_far())

    def stopping(self, jobs: int) -> None:
        runs = f"{jobs} run{'s' * (jobs > 1)}"
        self._say(f"stopping: {runs} may save a checkpoint first; another Ctrl-C ends them at once")

    def _so_far(self) -> str:
        counts = Counter(self._state.values())
        parts = [f"{counts['done'] + counts['skipped']} of {len(self._state)} done"]
        for name in [name for name, state in self._state.items() if state == "running"][:SHOWN]:
            step, loss, *_, left = self._progress(name)
            parts.append(f"{name} {step}" + f" loss {loss}" * bool(loss) + f", {left} left" * bool(left))
        if counts["running"] > SHOWN:
            parts.append(f"{counts['running'] - SHOWN} more running")
        if self._waits_for is not None:
            parts.append(f"waiting for {self._waits_for}")
        return "; ".join(parts)

    def interrupted(self, force: bool) -> None:
        """`force`: whether the command would delete what it has just made."""
        for name, state in self._state.items():
            if state == "running":
                self._state[name] = "waiting"
        how = " without --force" * force
        self._say(f"interrupted: every process has ended; the same command{how} continues")

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
        if self._waits_for is not None:
            table.caption += f", waiting for {self._waits_for}"
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
        numbers = (f"{last[k]:.3f}" if isinstance(last.get(k), float) else "" for k in ("loss", "retain", "forget"))
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
    """The latest value of every key in the last lines of the run's metrics; a line that is none is passed over."""
    merged: dict[str, Any] = {}
    for line in _tail(run.folder / "metrics.jsonl"):
        with suppress(ValueError):  # the first line of the tail is rarely whole
            record = json.loads(line)
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                merged |= record
    return merged
