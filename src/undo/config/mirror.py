"""The mirror: local files that stand for what configs name on the Hugging Face hub, for machines without a network.

A YAML file that maps owner/name or owner/name:subset to a file, a glob, a folder, or {split: file}; paths are relative
to it. In a folder, a dataset's files are those named after the subset. `--mirror FILE` sets UNDO_MIRROR for workers.
"""

import os
from functools import cache
from pathlib import Path
from typing import Any, Final

from undo.config.mistakes import ConfigError
from undo.config.sweep import read_yaml

VARIABLE: Final = "UNDO_MIRROR"


def use(file: Path | None) -> None:
    """Let this process and those that it starts read from the mirror (None: from that of the environment, if any).

    Raises ConfigError for a file that is no mirror.
    """
    if file is not None:
        os.environ[VARIABLE] = str(file.expanduser().absolute())
    _entries()


def stand_in(name: str, subset: str | None = None, split: str | None = None) -> str | None:
    """The path or glob that stands for a dataset's split, or for a model or tokenizer; None without an entry.

    Raises ConfigError for a split that the entry does not have.
    """
    file, entries = _entries()
    key = next((key for key in (f"{name}:{subset}", name) if key in entries), None)
    if file is None or key is None:
        return None
    value = entries[key]
    if isinstance(value, dict):
        if split not in value:
            raise ConfigError(f"{file}: {key} has no {split}; it has {', '.join(value)}")
        value = value[split]
    path = file.parent / Path(value).expanduser()
    if subset is not None and path.is_dir():  # of a dataset with a file for each subset
        return str(path / f"{subset}.*")
    return str(path)


def named(path: str) -> str:
    """A path of `stand_in` as the mirror has it, relative to its file: records need not tell where that lies."""
    file = _entries()[0]
    return path if file is None else os.path.relpath(path, file.parent)


def way_out() -> str:
    """What one can do where the hub is not reached."""
    given = _entries()[0]
    missing = f"{given} has no entry for it" if given else "no network? --mirror FILE names local files for it"
    return f"{missing} (docs/data.md, Without a network)"


def _entries() -> tuple[Path | None, dict[str, Any]]:
    given = os.environ.get(VARIABLE)
    if not given:
        return None, {}
    file = Path(given).absolute()
    return file, _read(file)


@cache
def _read(file: Path) -> dict[str, Any]:
    entries = read_yaml(file)
    for key, value in entries.items():
        files = value.values() if isinstance(value, dict) else [value]
        if "/" not in key or not files or not all(isinstance(path, str) for path in files):
            raise ConfigError(
                f"{file}: {key!r}: a mirror's lines are owner/name: FILE, owner/name:subset: FILE, "
                f"or either with {{split: FILE}}"
            )
    return entries
