"""The run directory: what a run is (identity), what it says (records), where it stopped (checkpoint), whence (lineage).

runs/<setting>/<stage>/<name>/
    config.yaml      resolved: exactly what the process reads
    metrics.jsonl    one JSON object a line, keyed by step; the same bytes whether or not the run was interrupted
    log.txt          what the process printed
    checkpoint/      resume state, replaced atomically, gone when the run is done
    model/           a Hugging Face folder
    evaluations/     of that model, made once for all runs that start from it
    failure.json     why the last attempt failed
    run.json         written last and atomically: its presence means done
"""

import fcntl
import hashlib
import json
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import IO, TYPE_CHECKING, Any, ClassVar, Final, Self

from omegaconf import OmegaConf
from pydantic import ValidationError

from undo import ranks
from undo.config import ConfigError, Raw, StageConfig, as_raw, differences, read_yaml
from undo.tracking import open_tracker

if TYPE_CHECKING:
    from torch import Tensor

INTERRUPTED: Final = 75  # exit status of a worker that stopped at a checkpoint (EX_TEMPFAIL)


class Diverged(Exception):  # noqa: N818  # an outcome, not an error
    """The loss or the gradient was not finite at this step: a result of an attack, a failure of everything else."""

    def __init__(self, step: int) -> None:
        super().__init__(f"diverged at step {step}: the loss or its gradient is not finite")
        self.step = step


class Interrupted(Exception):  # noqa: N818
    """The run was asked to stop, and has saved where it was."""


class RunDirectory:
    """A run as others see it: done or not, its config, its records, its model."""

    def __init__(self, runs: Path, setting: str, name: str) -> None:
        """`name` is <stage>/<name>."""
        self.runs, self.setting, self.name = runs, setting, name
        self.folder = runs / setting / name

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.folder)!r})"

    @classmethod
    def at(cls, folder: Path) -> Self:
        return cls(folder.parents[2], folder.parents[1].name, f"{folder.parent.name}/{folder.name}")

    def sibling(self, name: str) -> "RunDirectory":
        return RunDirectory(self.runs, self.setting, name)

    @property
    def done(self) -> bool:
        return (self.folder / "run.json").exists()

    @property
    def facts(self) -> dict[str, Any]:
        return json.loads((self.folder / "run.json").read_text())

    @property
    def failure(self) -> str | None:
        """Why the last attempt failed, or None."""
        try:
            return json.loads((self.folder / "failure.json").read_text())["reason"]
        except (OSError, ValueError):
            return None

    @property
    def diverged(self) -> bool:
        """Whether the last attempt failed because its numbers were no longer finite; cli.work names the exception."""
        return (self.failure or "").startswith(f"{Diverged.__name__}: ")

    @property
    def config(self) -> Raw:
        return read_yaml(self.folder / "config.yaml")

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"

    def records(self) -> Iterator[dict[str, Any]]:
        """All complete lines of metrics.jsonl; a line that is being written is left out."""
        try:
            text = (self.folder / "metrics.jsonl").read_text()
        except OSError:
            return
        for line in text.splitlines(keepends=True):
            if line.endswith("\n"):
                yield json.loads(line)

    def evaluations(self) -> dict[int, dict[str, float]]:
        """Step -> metrics of the evaluation at that step."""
        return {r["step"]: r for r in self.records() if "retain" in r or "forget" in r}

    def claim(self, config: StageConfig) -> None:
        """Make the folder this config's, or find that it is already. Raises ConfigError if it is another's."""
        wanted = as_raw(config)
        if (self.folder / "config.yaml").exists():
            changed = differences(_without_execution(_completed(self.config, config)), _without_execution(wanted))
            if changed:
                more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
                raise ConfigError(
                    f"{self.folder} exists with another config: {changed[0]}{more}\n"
                    f"give the run another name, or start it afresh with --force"
                )
            if self.done:
                return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self.folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(wanted)))
        except OSError as error:
            raise ConfigError(
                f"{self.folder}: cannot be written ({error.strerror}); choose another place with --runs"
            ) from None

    def identity(self) -> str:
        """A hash of the config and of all ancestors' identities."""
        return self.facts["identity"] if self.done else ""

    def is_stale(self, config: StageConfig) -> str | None:
        """The parent that has been made anew with other settings since this run was done, if there is one."""
        recorded = self.facts["parents"]
        for parent in config.parents():
            if recorded.get(parent) != self.sibling(parent).identity():
                return parent
        return None

    def fail(self, reason: str) -> None:
        """Leave the reason for the launcher, if that is possible: the disk may be what failed."""
        with suppress(OSError):
            write_atomically(self.folder / "failure.json", json.dumps({"reason": reason}))

    def forget_failure(self) -> None:
        (self.folder / "failure.json").unlink(missing_ok=True)

    def is_held(self) -> bool:
        """Whether a process has the run in hand."""
        if not self.folder.exists():
            return False
        with self.lock(wait=False) as free:
            return not free

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    @contextmanager
    def lock(self, wait: bool) -> Iterator[bool]:
        """Hold the run for oneself; yields False at once if another process has it and `wait` is not set."""
        with open(self.folder / ".lock", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            yield True


class Run(RunDirectory):
    """A run from the inside: the process that executes it holds this."""

    leads: ClassVar[bool] = True  # whether this process writes to the run's directory
    _stop_requested = False  # by a signal, for every run of the process
    _saving = False  # whether a loop is at work that looks at _stop_requested
    _metrics: IO[bytes]
    _started: float

    def open(self, config: StageConfig) -> None:
        self.configured = config
        self._started = time.monotonic()
        self.forget_failure()
        self._metrics = open(self.folder / "metrics.jsonl", "ab")  # noqa: SIM115  # until finish()
        self._seconds_before = 0.0
        self._tracker = open_tracker(self, config)

    def fail(self, reason: str) -> None:
        """The first reason stays: of several ranks, the others fail because one did. It alone a follower writes too."""
        if self.failure is None:
            super().fail(reason)

    def record(self, step: int, values: Mapping[str, float]) -> None:
        """One line of metrics.jsonl. No clock goes in here: an interrupted run must write the same bytes."""
        self._metrics.write(json.dumps({"step": step, **values}).encode() + b"\n")
        self._metrics.flush()
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
        seconds = self._seconds_before + time.monotonic() - self._started
        note = {**progress, "metrics_bytes": self._metrics.tell(), "seconds": seconds}
        self._checkpoint.parent.mkdir(exist_ok=True)
        partial = self._checkpoint.with_suffix(".partial")
        save_file(dict(tensors), partial, metadata={"progress": json.dumps(note)})
        _sync(partial)
        partial.replace(self._checkpoint)
        _sync(self._checkpoint.parent)

    def load_checkpoint(self) -> "tuple[dict[str, Tensor], dict[str, Any]] | None":
        """The tensors and the progress note, with metrics.jsonl cut back to where it stood then. None: start anew."""
        saved = self._read_checkpoint()
        if saved is None:
            self._metrics.truncate(0)
            return None
        tensors, progress = saved
        self._metrics.truncate(progress.pop("metrics_bytes"))
        self._seconds_before = progress.pop("seconds")
        return tensors, progress

    def _read_checkpoint(self) -> "tuple[dict[str, Tensor], dict[str, Any]] | None":
        from safetensors import safe_open

        if not self._checkpoint.exists():
            return None
        with safe_open(self._checkpoint, framework="pt") as file:
            progress = json.loads(file.metadata()["progress"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # not a dict
        return tensors, progress

    # --- stopping --------------------------------------------------------------------------------------------------

    @classmethod
    def stop_on_signals(cls) -> None:
        """From now on SIGTERM and SIGINT ask the loop to save and leave; outside of it they raise Interrupted."""

        def request(signum: int, frame: FrameType | None) -> None:
            cls._stop_requested = True
            if not cls._saving:
                raise Interrupted

        signal.signal(signal.SIGTERM, request)
        signal.signal(signal.SIGINT, request)

    @property
    def stop_requested(self) -> bool:
        return Run._stop_requested

    @contextmanager
    def saves_before_it_stops(self) -> Iterator[None]:
        """Around a loop that looks at `stop_requested` at each step."""
        Run._saving = True
        try:
            yield
        finally:
            Run._saving = False

    # --- the end ---------------------------------------------------------------------------------------------------

    def finish(self, **facts: Any) -> None:
        """Write run.json: the run is done. `facts` are the stage's own, such as steps, tokens and flops."""
        config = self.configured
        parents = {name: self.sibling(name).identity() for name in config.parents()}
        self._metrics.close()
        self._tracker.finish()
        content = {
            "name": self.name,
            "variant": config.variant,
            "identity": digest([_without_execution(as_raw(config)), parents]),
            "parents": parents,
            **facts,
            "seconds": round(self._seconds_before + time.monotonic() - self._started, 3),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            **environment(),
        }
        write_atomically(self.folder / "run.json", json.dumps(content, indent=1))
        shutil.rmtree(self.folder / "checkpoint", ignore_errors=True)


class Follower(Run):
    """A run as a rank holds it that computes along and leaves all records to the leader."""

    leads = False

    def open(self, config: StageConfig) -> None:
        self.configured = config

    def record(self, step: int, values: Mapping[str, float]) -> None:
        pass

    def save_checkpoint(self, tensors: "Mapping[str, Tensor]", progress: Mapping[str, Any]) -> None:
        pass

    def load_checkpoint(self) -> "tuple[dict[str, Tensor], dict[str, Any]] | None":
        saved = self._read_checkpoint()
        if saved is not None:
            del saved[1]["metrics_bytes"], saved[1]["seconds"]
        return saved

    def finish(self, **facts: Any) -> None:
        pass

    @contextmanager
    def lock(self, wait: bool) -> Iterator[bool]:
        """The leader has it."""
        yield True


def environment() -> dict[str, Any]:
    """Where and with what a run was executed. Peak memory is the process's own, earlier runs of it included; of several
    devices it is the leader's."""
    device, peak = platform.processor() or platform.machine(), None
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        device, peak = torch.cuda.get_device_name(), torch.cuda.max_memory_allocated()
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {
        "device": device,
        "devices": ranks.count(),
        "threads": torch.get_num_threads() if torch is not None else 1,
        "peak_rss_bytes": rss,
        "peak_device_bytes": peak,
        "git_revision": git_revision(),
        "versions": {"python": platform.python_version()} | {p: version(p) for p in ("undo", "torch", "transformers")},
    }


@cache
def git_revision() -> str | None:
    """The revision of this code, with + if files were changed since; None outside a checkout."""
    here = Path(__file__).parent
    try:
        git = ["git", "-C", str(here)]
        revision = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return revision + ("+" if changed else "")


def write_atomically(path: Path, text: str) -> None:
    """A reader sees the old file or the new one, and after a power cut too."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _completed(old: Raw, config: StageConfig) -> Raw:
    """A config as it was written, with the defaults of keys that did not exist yet: they are what was done then."""
    try:
        return as_raw(type(config).model_validate_json(json.dumps(old)))
    except ValidationError:
        return old


def _without_execution(raw: Raw) -> Raw:
    return {key: value for key, value in raw.items() if key != "execution"}


def digest(value: Any) -> str:
    """A short name for any JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
