"""A run from the inside: the process that executes it records, saves checkpoints, and finishes through this."""

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import IO, TYPE_CHECKING, Any, ClassVar, Final

import xxhash

from undo.config.files import as_json, sync, write_atomically
from undo.config.mistakes import ConfigError
from undo.config.schema import StageConfig, as_raw
from undo.runs import checksums
from undo.runs.company import Company
from undo.runs.directory import Interrupted, RunDirectory, identity_of
from undo.runs.environment import environment
from undo.runs.tracking import open_tracker

if TYPE_CHECKING:
    from torch import Tensor


RUN: Final = "run"  # what the run itself notes in a checkpoint, beside the loop's progress


class Run(RunDirectory):
    """A run from the inside: the process that executes it holds this."""

    leads: ClassVar[bool] = True  # whether this process writes to the run's directory
    _stop_requested = False  # by a signal, for every run of the process
    _loops = 0  # that are at work, and look at _stop_requested
    _metrics: IO[bytes]
    _recorded: xxhash.xxh3_128  # of the lines of metrics.jsonl
    _started = 0.0

    def open(self, config: StageConfig, company: Company | None = None) -> None:
        """Begin. company: the runs that go side by side with it."""
        self.configured, self.company = config, company or Company()
        self._started = time.monotonic()
        self.forget_failure()
        self._metrics = open(self.folder / "metrics.jsonl", "ab")  # noqa: SIM115  # until finish()
        self._recorded = xxhash.xxh3_128()
        self._parents = {name: self.sibling(name).identity() for name in config.parents()}  # as they are when it begins
        self._seconds_before = 0.0
        self._tracker = open_tracker(self, config)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """While this lasts, the process works for another run: `seconds` are those of its own turns."""
        began = time.monotonic()
        yield
        self._started += time.monotonic() - began

    def fail(self, reason: str, diverged: int | None = None) -> None:
        """Keep the first reason: when one rank fails, the others fail because of it. Followers write this file too."""
        if self.failure is None:
            super().fail(reason, diverged)

    def record(self, step: int, values: Mapping[str, float]) -> None:
        """One line of metrics.jsonl. No clock goes in here: an interrupted run must write the same bytes."""
        line = as_json({"step": step, **values}).encode() + b"\n"
        self._metrics.write(line)
        self._metrics.flush()
        self._recorded.update(line)
        self._tracker.log(step, values)

    # --- checkpoint ------------------------------------------------------------------------------------------------

    @property
    def _checkpoint(self) -> Path:
        return self.folder / "checkpoint" / "state.safetensors"

    def save_checkpoint(self, tensors: "Mapping[str, Tensor]", progress: Mapping[str, Any]) -> None:
        """Replace the checkpoint in one atomic step. `progress` is anything JSON can hold."""
        from safetensors.torch import save_file

        self._metrics.flush()
        os.fsync(self._metrics.fileno())
        ours = {
            "metrics_bytes": self._metrics.tell(),
            "metrics_checksum": self._recorded.hexdigest(),
            "seconds": self._seconds_before + time.monotonic() - self._started,
            "parents": self._parents,
        }
        note = as_json({**progress, RUN: ours})
        self._checkpoint.parent.mkdir(exist_ok=True)
        partial = self._checkpoint.with_suffix(".partial")
        save_file(dict(tensors), partial, {"progress": note, "checksum": checksums.of_tensors(tensors, note)})
        sync(partial)
        partial.replace(self._checkpoint)
        sync(self._checkpoint.parent)

    def load_checkpoint(self) -> "tuple[dict[str, Tensor], dict[str, Any]] | None":
        """The last checkpoint's tensors and progress. metrics.jsonl is cut back to that point. None: start afresh.

        Raises ConfigError if either file is not what was saved, or if a parent has been made anew since.
        """
        saved = self._read_checkpoint()
        size, self._recorded = 0, xxhash.xxh3_128()
        if saved is not None:
            ours = saved[1].pop(RUN)
            size, self._seconds_before = ours["metrics_bytes"], ours["seconds"]
            if anew := [name for name, identity in self._parents.items() if ours["parents"].get(name) != identity]:
                raise ConfigError(
                    f"{self._checkpoint}: was made from another {anew[0]} than there is now\n"
                    f"delete it to start this run afresh"
                )
            with open(self._metrics.name, "rb") as file:
                self._recorded.update(file.read(size))
            if self._recorded.hexdigest() != ours["metrics_checksum"]:
                raise ConfigError(
                    f"{self._metrics.name}: is damaged: it does not begin with the {size:,} bytes that were recorded "
                    f"before the checkpoint\ndelete {self._checkpoint} to start this run afresh"
                )
        self._metrics.truncate(size)
        self._metrics.seek(0, os.SEEK_END)  # where the next checkpoint finds that it is
        return saved

    def _read_checkpoint(self) -> "tuple[dict[str, Tensor], dict[str, Any]] | None":
        from safetensors import SafetensorError, safe_open

        if not self._checkpoint.exists():
            return None
        try:
            with safe_open(self._checkpoint, framework="pt") as file:
                note, wanted = (file.metadata()[key] for key in ("progress", "checksum"))
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # not a dict
                if checksums.of_tensors(tensors, note) != wanted:
                    raise ValueError("its checksum is another")
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:  # no metadata at all is None
            raise ConfigError(f"{self._checkpoint}: is damaged ({error})\ndelete it to start this run afresh") from None
        return tensors, json.loads(note)

    # --- stopping --------------------------------------------------------------------------------------------------

    @classmethod
    def stop_on_signals(cls) -> None:
        """From now on SIGTERM and SIGINT ask the loop to save and leave. Outside the loop they raise Interrupted."""

        def request(signum: int, frame: FrameType | None) -> None:
            cls._stop_requested = True
            if not cls._loops:
                raise Interrupted

        signal.signal(signal.SIGTERM, request)
        signal.signal(signal.SIGINT, request)

    @classmethod
    def stopping(cls) -> bool:
        return cls._stop_requested

    @property
    def stop_requested(self) -> bool:
        return Run._stop_requested

    @contextmanager
    def saves_before_it_stops(self) -> Iterator[None]:
        """Around a loop that looks at `stop_requested` at each step."""
        Run._loops += 1
        try:
            yield
        finally:
            Run._loops -= 1

    # --- the end ---------------------------------------------------------------------------------------------------

    def finish(self, **facts: Any) -> None:
        """Write run.json, which marks the run as done. `facts` come from the stage, such as steps and FLOPs."""
        config = self.configured
        self._metrics.close()
        self._tracker.finish()
        content = {
            "name": self.name,
            "variant": config.variant,
            "identity": identity_of(as_raw(config), self._parents),
            "parents": self._parents,
            **facts,
            "checksums": checksums.of_run(self.folder),
            "seconds": round(self._seconds_before + time.monotonic() - self._started, 3),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            **environment(),
        }
        write_atomically(self.folder / "run.json", as_json(content, indent=1))
        shutil.rmtree(self.folder / "checkpoint", ignore_errors=True)


class Follower(Run):
    """A run as seen by the ranks that compute but leave all records to the leader."""

    leads = False

    def open(self, config: StageConfig, company: Company | None = None) -> None:
        self.configured, self.company = config, company or Company()

    def record(self, step: int, values: Mapping[str, float]) -> None:
        pass

    def save_checkpoint(self, tensors: "Mapping[str, Tensor]", progress: Mapping[str, Any]) -> None:
        pass

    def load_checkpoint(self) -> "tuple[dict[str, Tensor], dict[str, Any]] | None":
        saved = self._read_checkpoint()
        if saved is not None:
            del saved[1][RUN]
        return saved

    def finish(self, **facts: Any) -> None:
        pass

    @contextmanager
    def lock(self, wait: bool) -> Iterator[bool]:
        """The leader has it."""
        yield True
