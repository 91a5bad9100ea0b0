"""The run directory: what a run is (identity), what it says (records), where it stopped (checkpoint), whence (lineage).

runs/<setting>/<stage>/<name>/
    config.yaml      resolved: exactly what the process reads
    metrics.jsonl    one JSON object a line, keyed by step, null what is not finite; the same bytes whether or not the
                     run was interrupted
    log.txt          what the process printed
    checkpoint/      resume state, replaced atomically, gone when the run is done
    model/           a Hugging Face folder
    evaluations/     of that model, made once for all runs that start from it
    failure.json     why the last attempt failed
    run.json         written last and atomically: its presence means done
"""

import fcntl
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, Self

from pydantic import ValidationError

from undo.config.files import dump_yaml, load_yaml, numbers, write_atomically
from undo.config.mistakes import ConfigError
from undo.config.schema import Raw, StageConfig, as_raw, differences

INTERRUPTED: Final = 75  # exit status of a worker that stopped at a checkpoint (EX_TEMPFAIL)


class Diverged(Exception):  # noqa: N818  # an outcome, not an error
    """The loss or the gradient was not finite at this step. For an attack this is a result, elsewhere a failure."""

    def __init__(self, step: int) -> None:
        super().__init__(f"diverged at step {step}: the loss or its gradient is not finite")
        self.step = step


class Interrupted(Exception):  # noqa: N818
    """The run was asked to stop and has saved a checkpoint."""


class RunDirectory:
    """A run seen from outside: whether it is done, its config, its records, its model."""

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
        facts = json.loads((self.folder / "run.json").read_text())
        if isinstance(found := facts.get("evaluation"), dict):
            facts["evaluation"] = numbers(found)
        return facts

    @property
    def failure(self) -> str | None:
        """Why the last attempt failed, or None."""
        return self._failure.get("reason")

    @property
    def _failure(self) -> dict[str, Any]:
        try:
            return json.loads((self.folder / "failure.json").read_text())
        except (OSError, ValueError):
            return {}

    @property
    def diverged(self) -> bool:
        """Whether the last attempt failed because its numbers were no longer finite."""
        return self._failure.get("diverged") is not None

    @property
    def config(self) -> Raw:
        """The config as plain values. Raises ConfigError for a missing or damaged file."""
        path = self.folder / "config.yaml"
        try:
            values = load_yaml(path)
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read ({error.strerror or error})") from None
        except ValueError as error:  # not UTF-8, or not YAML
            raise ConfigError(f"{path}: is damaged ({str(error).splitlines()[0]}); delete the run's folder") from None
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: is damaged: it holds no mapping; delete the run's folder")
        return values

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"

    def records(self) -> Iterator[dict[str, Any]]:
        """All complete lines of metrics.jsonl. A line that is still being written is left out."""
        return self._lines()

    def _lines(self, keys: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
        """Records that hold one of the quoted `keys`; all for none. The others are not parsed: most lines are steps."""
        try:
            text = (self.folder / "metrics.jsonl").read_text()
        except OSError:
            return
        for line in text.splitlines(keepends=True):
            if line.endswith("\n") and (not keys or any(key in line for key in keys)):
                yield numbers(json.loads(line))

    def evaluations(self) -> dict[int, dict[str, float]]:
        """Step -> metrics of the evaluation at that step."""
        return {r["step"]: r for r in self._lines(('"retain"', '"forget"'))}

    def claim(self, config: StageConfig) -> None:
        """Take the folder for this config, or find that it has it already. Raises ConfigError if it has another."""
        wanted = as_raw(config)
        if (self.folder / "config.yaml").exists():
            changed = differences(without_execution(_completed(self.config, config)), without_execution(wanted))
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
            write_atomically(self.folder / "config.yaml", dump_yaml(wanted))
        except OSError as error:
            raise ConfigError(
                f"{self.folder}: cannot be written ({error.strerror}); choose another place with --runs"
            ) from None

    def identity(self) -> str:
        """A hash of the config and of all ancestors' identities."""
        return self.facts["identity"] if self.done else ""

    def is_stale(self, config: StageConfig) -> str | None:
        """A parent that was made again with other settings after this run was done, if there is one."""
        recorded = self.facts["parents"]
        for parent in config.parents():
            if recorded.get(parent) != self.sibling(parent).identity():
                return parent
        return None

    def fail(self, reason: str, diverged: int | None = None) -> None:
        """Leave the reason for the launcher, if possible; the disk itself may have failed.

        diverged: the step whose loss or gradient was not finite, where that is the reason.
        """
        with suppress(OSError):
            write_atomically(self.folder / "failure.json", json.dumps({"reason": reason, "diverged": diverged}))

    def forget_failure(self) -> None:
        (self.folder / "failure.json").unlink(missing_ok=True)

    def is_held(self) -> bool:
        """Whether a process is executing the run."""
        if not self.folder.exists():
            return False
        with self.lock(wait=False) as free:
            return not free

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    @contextmanager
    def lock(self, wait: bool) -> Iterator[bool]:
        """Hold the run exclusively. Yields False at once if another process holds it and `wait` is not set."""
        with open(self.folder / ".lock", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            yield True


def _completed(old: Raw, config: StageConfig) -> Raw:
    """A config as it was written, plus the defaults of keys that did not exist then, which describe what was done."""
    try:
        return as_raw(type(config).model_validate_json(json.dumps(old)))
    except ValidationError:
        return old


def without_execution(raw: Raw) -> Raw:
    return {key: value for key, value in raw.items() if key != "execution"}
