"""Documents of a role: from the user's files (jsonl, json, parquet, txt) or streamed from the Hugging Face hub.

Everything is read in bounded memory, and every mistake in a file is named with its place. A .txt file holds one
document a paragraph: blank lines separate them, and a paragraph of a million characters ends there.
"""

import glob
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import numpy as np
from pydantic import model_validator

from undo.config import ConfigError, Count, Frozen, Share
from undo.prepare_data.corpora import origin

SUFFIXES = (".jsonl", ".json", ".parquet", ".txt")


class Source(Frozen):
    """Where a role's documents come from, and how many of them are used."""

    path: str | None = None  # a file or a glob of files; where it is given, the hub is not asked
    hub: str | None = None  # a dataset of the hub: owner/name
    subset: str | None = None  # of the hub's dataset
    split: str = "train"  # of the hub's dataset
    column: str = "text"
    share: Share = 1.0  # of the documents, drawn at random: a corpus may be sorted by source
    documents: Count | None = None  # use at most so many
    tokens: Count | None = None  # stop when the training store has so many

    @model_validator(mode="after")
    def _has_a_place(self) -> Self:
        if self.path is None and self.hub is None:
            raise ValueError("give `path`, a file or a glob, or `hub`, a dataset as owner/name")
        return self

    def files(self) -> list[Path]:
        """The files of `path`, in order. Raises ConfigError if there is none, or one that cannot be read."""
        if self.path is None:
            return []
        found = [Path(name) for name in sorted(glob.glob(self.path, recursive=True))]
        if not found:
            where = origin(self.path)
            raise ConfigError(f"{self.path}: there is no such file" + (f"\n{where}" if where else ""))
        for file in found:
            if file.suffix not in SUFFIXES:
                raise ConfigError(f"{file}: unknown kind of file; give one of {', '.join(SUFFIXES)}")
            if not file.is_file() or file.stat().st_size == 0:
                raise ConfigError(f"{file}: is empty or no file")
        return found

    def bytes_of_tokens(self, width: int) -> int | None:
        """At most about so much will be stored, `width` bytes a token; None: not known."""
        bounds = [None if self.tokens is None else self.tokens * width]
        if self.path is not None:
            sizes = [(f.stat().st_size, 1 if f.suffix == ".parquet" else 2) for f in self.files()]
            bounds.append(round(self.share * sum(size * width // bytes_each for size, bytes_each in sizes)))
        elif self.documents is not None:
            bounds.append(self.documents * 1000 * width)
        return min((bound for bound in bounds if bound is not None), default=None)

    def texts(self) -> Iterator[str]:
        """The documents that are not blank: `share` of them, in order, at most `documents`; the same ones each time."""
        texts = (text for file in self.files() for text in read(file, self.column)) if self.path else self._stream()
        count, draws = 0, np.random.default_rng(42)
        for text in texts:
            if not text.strip() or draws.random() >= self.share:
                continue
            yield text
            count += 1
            if count == self.documents:
                return
        if count == 0:
            raise ConfigError(f"{self.path or self.hub}: holds no text in column {self.column!r}")

    def _stream(self) -> Iterator[str]:
        import datasets
        from datasets.exceptions import DatasetNotFoundError
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

        from undo.tracking import find_token

        assert self.hub is not None
        try:
            rows = datasets.load_dataset(
                self.hub, self.subset, split=self.split, streaming=True, token=find_token("hf_token.txt", "HF_TOKEN")
            )
            for row in rows:
                if self.column not in row:
                    raise ConfigError(f"{self.hub}: has no column {self.column!r}; it has {', '.join(sorted(row))}")
                yield row[self.column]
        except GatedRepoError:
            raise ConfigError(
                f"{self.hub} is gated: ask for access at https://huggingface.co/datasets/{self.hub},\n"
                f"then put your token into tokens/hf_token.txt or HF_TOKEN"
            ) from None
        except (RepositoryNotFoundError, DatasetNotFoundError):
            raise ConfigError(
                f"{self.hub}: there is no such dataset, or a token is needed to see it\n"
                f"put your token into tokens/hf_token.txt or HF_TOKEN"
            ) from None
        except (OSError, ValueError) as error:  # no network; an unknown subset or split
            reason = str(error).strip().splitlines()[0][:200]
            raise ConfigError(f"{self.hub}: cannot be read: {reason}\nor give your own files with path=") from None


def read(file: Path, column: str) -> Iterator[str]:
    """The texts of one file. Raises ConfigError that names file and line."""
    try:
        match file.suffix:
            case ".parquet":
                yield from _parquet(file, column)
            case ".txt":
                yield from _paragraphs(file)
            case _:
                yield from _json(file, column)
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror or error})") from None


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    with open(file, "rb") as binary:
        for number, line in enumerate(binary, 1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ConfigError(
                    f"{file} line {number}: is not UTF-8 (byte {line[error.start]:#x})\n"
                    f"convert it, for example with: iconv -f <its encoding> -t UTF-8"
                ) from None


def _paragraphs(file: Path) -> Iterator[str]:
    paragraph: list[str] = []
    size = 0
    for _, line in _lines(file):
        if line.strip():
            paragraph.append(line)
            size += len(line)
        if paragraph and (not line.strip() or size >= 1_000_000):
            yield "".join(paragraph)
            paragraph, size = [], 0
    if paragraph:
        yield "".join(paragraph)


def _json(file: Path, column: str) -> Iterator[str]:
    """One object a line, or, in a .json file, one array of objects."""
    for number, line in _lines(file):
        if not line.strip():
            continue
        if file.suffix == ".json" and number == 1 and line.lstrip().startswith("["):
            yield from _array(file, column)
            return
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{file} line {number}: is not JSON: {error}") from None
        yield _text(row, column, f"{file} line {number}")


def _array(file: Path, column: str) -> Iterator[str]:
    if file.stat().st_size > 2**30:
        raise ConfigError(f"{file}: an array of more than 1 GiB would not fit the memory; write one object a line")
    text = "".join(line for _, line in _lines(file))
    try:
        rows = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{file}: is not JSON: {error}") from None
    for index, row in enumerate(rows):
        yield _text(row, column, f"{file} entry {index}")


def _text(row: object, column: str, where: str) -> str:
    if not isinstance(row, dict):
        raise ConfigError(f"{where}: is no object with a column {column!r}")
    if column not in row:
        raise ConfigError(f"{where}: has no column {column!r}; it has {', '.join(sorted(map(str, row)))}")
    if not isinstance(row[column], str):
        raise ConfigError(f"{where}: column {column!r} holds {type(row[column]).__name__}, not text")
    return row[column]


def _parquet(file: Path, column: str) -> Iterator[str]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(file)
        if column not in table.schema_arrow.names:
            raise ConfigError(f"{file}: has no column {column!r}; it has {', '.join(table.schema_arrow.names)}")
        kind = table.schema_arrow.field(column).type
        if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
            raise ConfigError(f"{file}: column {column!r} holds {kind}, not text")
        for batch in table.iter_batches(batch_size=1024, columns=[column]):
            yield from (text or "" for text in batch.column(0).to_pylist())
    except pyarrow.ArrowInvalid as error:
        raise ConfigError(f"{file}: is no parquet file, or a damaged one: {str(error).splitlines()[0]}") from None
