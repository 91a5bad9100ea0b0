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
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, Self

from pydantic import ValidationError

from undo.config.files import digest, dump_yaml, load_yaml, numbers, open_lock, sync, write_atomically
from undo.config.mistakes import ConfigError
from undo.config.schema import Raw, StageConfig, as_raw, differences
from undo.runs import checksums

AFRESH: Final = "make the run afresh with --force"
LINKED: Final = ("model", "wandb")  # a fetched model is a link, and the tracker makes some to its last run
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
        """What run.json says. Raises ConfigError for a missing or damaged file."""
        path = self.folder / "run.json"
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read ({error.strerror or error}); {AFRESH}") from None
        except ValueError as error:
            raise ConfigError(f"{path}: is damaged ({error}); {AFRESH}") from None
        if not isinstance(facts, dict) or not facts:
            raise ConfigError(f"{path}: is damaged: it holds no facts; {AFRESH}")
        if isinstance(found := facts.get("evaluation"), dict):
            facts["evaluation"] = numbers(found)
        return facts

    def fact(self, name: str) -> Any:
        """One of `facts` that every run has. Raises ConfigError as they do, and where it is missing."""
        facts = self.facts
        if name not in facts:
            raise ConfigError(f"{self.folder / 'run.json'}: is damaged: it has no {name!r}; {AFRESH}")
        return facts[name]

    @property
    def failure(self) -> str | None:
        """Why the last attempt failed, or None."""
        return self._failure.get("reason")

    @property
    def _failure(self) -> dict[str, Any]:
        try:
            found = json.loads((self.folder / "failure.json").read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

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

    def check_model(self) -> None:
        """Raises ConfigError if a file of the model is not what the run left. A run from before checksums has none."""
        for name, checksum in self._checksums.items():
            path = self.folder / name
            if path.parent == self.model and not (path.is_file() and checksums.of_file(path) == checksum):
                raise ConfigError(f"{path}: is gone, or is not what {self.name} left there; {AFRESH}")

    @property
    def _checksums(self) -> dict[str, str]:
        """Of files of the run, by their path in it; none for a run that is not done, or is older than they are."""
        return self.facts.get("checksums", {}) if self.done else {}

    @property
    def outcomes_file(self) -> Path:
        return self.folder / "outcomes.json"

    @property
    def outcomes(self) -> dict[str, dict[str, list[float]]]:
        """Of the last evaluation by role, item by item: `scored` and `weights`; none where they were not kept."""
        path = self.outcomes_file
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read ({error.strerror or error})") from None
        if self._checksums.get(path.name) not in (None, checksums.of_bytes(content)):
            raise ConfigError(f"{path}: is not what the run recorded; {AFRESH}")
        return json.loads(content)

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"

    def records(self) -> Iterator[dict[str, Any]]:
        """All complete lines of metrics.jsonl. A line that is still being written is left out.

        Raises ConfigError with the number of a line that is damaged.
        """
        return self._lines()

    def _lines(self, keys: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
        """Records that hold one of the quoted `keys`; all for none. The others are not parsed: most lines are steps."""
        path = self.folder / "metrics.jsonl"
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read ({error.strerror or error})") from None
        for number, line in enumerate(content.decode(errors="replace").split("\n")[:-1], 1):
            wanted, record = not keys or any(key in line for key in keys), None
            if wanted:
                with suppress(ValueError):
                    record = json.loads(line)
            if not (isinstance(record, dict) and "step" in record if wanted else line[:1] + line[-1:] == "{}"):
                raise ConfigError(f"{path} line {number}: is damaged; {AFRESH}")
            if record is not None:
                yield numbers(record)
        if self._checksums.get(path.name) not in (None, checksums.of_bytes(content)):
            raise ConfigError(f"{path}: is not what the run recorded; {AFRESH}")

    def evaluations(self) -> dict[int, dict[str, float]]:
        """Step -> metrics of the evaluation at that step."""
        return {r["step"]: r for r in self._lines(('"retain"', '"forget"'))}

    def check_claim(self, config: StageConfig) -> None:
        """Raises ConfigError if the folder has another config than this one, or was made with another."""
        wanted = as_raw(config)
        old = self.config if (self.folder / "config.yaml").exists() else wanted
        if changed := differences(without_execution(_completed(old, config)), without_execution(wanted)):
            more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
            raise ConfigError(
                f"{self.folder} exists with another config: {changed[0]}{more}\n"
                f"give the run another name, or start it afresh with --force (CHANGELOG.md has defaults that changed)"
            )
        if self.done:
            self._require_identity(old)

    def claim(self, config: StageConfig) -> None:
        """Take the folder for this config, or find that it has it already. Raises ConfigError if it has another."""
        self.check_claim(config)
        if self.done and (self.folder / "config.yaml").exists():
            return
        self._refuse_links()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._remove_remains()
            write_atomically(self.folder / "config.yaml", dump_yaml(as_raw(config)))
        except OSError as error:
            raise ConfigError(
                f"{self.folder}: cannot be written ({error.strerror}); choose another place with --runs"
            ) from None

    def _refuse_links(self) -> None:
        """Raises ConfigError for a symbolic link where a run writes: what it leads to is not the run's to change."""
        for folder, folders, files in os.walk(self.folder):
            if Path(folder) == self.folder:
                folders[:] = [name for name in folders if name not in LINKED]
            if found := [name for name in (*folders, *files) if (Path(folder) / name).is_symlink()]:
                raise ConfigError(
                    f"{Path(folder) / found[0]}: is a symbolic link, and a run writes into its own folder only\n"
                    f"delete the link"
                )

    def _require_identity(self, made_with: Raw) -> None:
        """Raises ConfigError if run.json says that this done run was made with another config."""
        if identity_of(made_with, self.fact("parents")) != self.fact("identity"):
            raise ConfigError(
                f"{self.folder / 'config.yaml'}: is gone or was changed, and run.json says that the run was made with "
                f"another config\nput the file back, or start the run afresh with --force"
            )

    def identity(self) -> str:
        """A hash of the config and of all ancestors' identities."""
        return self.fact("identity") if self.done else ""

    def is_stale(self, config: StageConfig) -> str | None:
        """A parent that was made again with other settings after this run was done, if there is one."""
        recorded = self.fact("parents")
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
        """Delete the run. What marks it as done goes first and for good, then its name all at once, so that half a run
        is never taken for one, nor its remains for parts of the next.

        Of a folder that is a symbolic link only the link goes. Raises ConfigError for what cannot be deleted.
        """
        try:
            if self.folder.is_symlink():
                self.folder.unlink()
            elif self.folder.exists():
                mark = self.folder / "run.json"
                shutil.rmtree(mark) if mark.is_dir() and not mark.is_symlink() else mark.unlink(missing_ok=True)
                sync(self.folder)
                self._remove_remains()
                self.folder.rename(self._remains)
                sync(self.folder.parent)
            self._remove_remains()
        except OSError as error:
            raise ConfigError(
                f"{error.filename or self.folder}: cannot be deleted ({error.strerror or error})\n"
                f"delete {self.folder} yourself, or choose another place with --runs"
            ) from None

    @property
    def _remains(self) -> Path:
        """Where a run lies while it is deleted; no run's name begins with a dot."""
        return self.folder.with_name(f".{self.folder.name}.deleted")

    def _remove_remains(self) -> None:
        if self._remains.exists():
            shutil.rmtree(self._remains)

    @contextmanager
    def lock(self, wait: bool) -> Iterator[bool]:
        """Hold the run exclusively. Yields False at once if another process holds it and `wait` is not set."""
        try:
            file = open_lock(self.folder / ".lock")
        except OSError as error:
            raise self._unlockable(error) from None
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            except OSError as error:  # as NFS says where no lock server runs
                raise self._unlockable(error) from None
            yield True

    def _unlockable(self, error: OSError) -> ConfigError:
        return ConfigError(
            f"{self.folder / '.lock'}: cannot be locked ({error.strerror or error})\n"
            f"choose a place with --runs that keeps locks, such as a local disk"
        )


def _completed(old: Raw, config: StageConfig) -> Raw:
    """A config as it was written, plus the defaults of keys that did not exist then, which describe what was done."""
    try:
        return as_raw(type(config).model_validate_json(json.dumps(old)))
    except ValidationError:
        return old


def identity_of(config: Raw, parents: Mapping[str, str]) -> str:
    """A hash of what a run computes: its config without `execution`, and the identities of its parents by name."""
    return digest([without_execution(config), dict(parents)])


def without_execution(raw: Raw) -> Raw:
    return {key: value for key, value in raw.items() if key != "execution"}
