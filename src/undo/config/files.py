"""Files that survive a power cut, plain YAML read fast, JSON of any numbers, and short names for JSON values."""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any


def write_atomically(path: Path, text: str) -> None:
    """Replace a file so that readers see either the old or the new one, even after a power cut.

    A symbolic link that stands in its place is replaced, not followed.
    """
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)
    with open(partial, "x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    sync(path.parent)


def open_lock(path: Path) -> IO[bytes]:
    """A file to lock, made if it is not there; OSError for a symbolic link."""
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666), "r+b")


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def as_json(value: Any, indent: int | None = None) -> str:
    """JSON has no NaN and no infinity: both are written as null, which `numbers` reads as NaN."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(v) for key, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, list | tuple) else value


def numbers(values: Mapping[str, Any]) -> dict[str, Any]:
    """What `as_json` wrote of named numbers, read back."""
    return {name: math.nan if value is None else value for name, value in values.items()}


def digest(value: Any) -> str:
    """A short name for any JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def dump_yaml(values: Any) -> str:
    """Plain values as YAML that `load_yaml` reads back as they are."""
    import yaml

    return yaml.dump(values, Dumper=getattr(yaml, "CSafeDumper", yaml.SafeDumper), sort_keys=False, allow_unicode=True)


def load_yaml(path: Path) -> Any:
    """What `dump_yaml` wrote. Ten times as fast as the reader of what users write (config/sweep.py).

    Raises OSError, or ValueError for what is not UTF-8 or not YAML.
    """
    import yaml

    with open(path, encoding="utf-8") as file:
        try:
            return yaml.load(file, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        except yaml.YAMLError as error:
            raise ValueError(str(error)) from None
