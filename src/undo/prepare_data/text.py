"""Documents of a role: from the user's files (jsonl, json, parquet, txt) or streamed from the Hugging Face hub.

Everything is read in bounded memory, and every mistake in a file is named with its place. A .txt file holds one
document a paragraph: blank lines separate them, and a paragraph of a million characters ends there.
"""

import glob
import json
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Literal, Self

from pydantic import model_validator

from undo.config.mistakes import ConfigError
from undo.config.schema import Count, Share
from undo.data.hub import HubDataset
from undo.prepare_data.corpora import origin

SUFFIXES = (".jsonl", ".json", ".parquet", ".txt", ".tokens")  # .tokens: WikiText's


class Paired(str):
    """A document; `other` is the same prompt with the other answer."""

    other: str

    def __new__(cls, text: str, other: str) -> Self:
        made = super().__new__(cls, text)
        made.other = other
        return made


class Place(HubDataset):
    """Files, or a dataset of the hub, and which part of them to read."""

    path: str | None = None  # a file or a glob of files; where it is given, the hub is not asked
    column: str | tuple[str, ...] = "text"  # several are joined by a blank line: a question and its answer
    paired_with: str | tuple[str, ...] | None = None  # column of the same prompt with a harmless answer: for RepNoise
    share: Share = 1.0  # of the documents, drawn at random: a corpus may be sorted by source
    questions: Literal["definitions"] | None = None  # not the documents, but questions and answers made from them

    @model_validator(mode="after")
    def _pairs_are_read_as_they_are(self) -> Self:
        if self.paired_with is not None and self.questions is not None:
            raise ValueError("has `questions`, which are made anew and have no pair: leave `paired_with` out")
        return self

    @property
    def local(self) -> str | None:
        """The path or glob that is read; None for a dataset that comes from the hub."""
        return self.path or self.stand_in()

    @property
    def label(self) -> str:
        """What is read, as messages and run.json name it."""
        local = self.local
        return self.dataset if local is None else local if self.path else f"{self.dataset} (mirrored by {local})"

    def files(self) -> list[Path]:
        """The files that are read, in order. Raises ConfigError if there is none, or one that cannot be read."""
        pattern = self.local
        if pattern is None:
            return []
        found = [Path(name) for name in sorted(glob.glob(pattern, recursive=True))]
        if not found:
            where = origin(pattern)
            raise ConfigError(f"{pattern}: there is no such file" + (f"\n{where}" if where else ""))
        for file in found:
            if file.suffix not in SUFFIXES:
                raise ConfigError(f"{file}: unknown kind of file; give one of {', '.join(SUFFIXES)}")
            if self.paired_with is not None and file.suffix in (".txt", ".tokens"):
                raise ConfigError(f"{file}: has no columns, so no paired_with; give .jsonl, .json or .parquet")
            if not file.is_file() or file.stat().st_size == 0:
                raise ConfigError(f"{file}: is empty or no file")
        return found

    def all_texts(self) -> Iterator[str]:
        """The documents that are not blank, or a `share` of them, in order and the same each time."""
        import numpy as np

        texts = self._read(self.column)
        if self.paired_with is not None:
            texts = map(Paired, texts, self._read(self.paired_with))
        found, draws = False, np.random.default_rng(42)
        for text in texts:
            if text.strip() and draws.random() < self.share:
                found = True
                yield from (text,) if self.questions is None else made_questions(text)
        if not found:
            raise ConfigError(f"{self.label}: holds no text in column {self.column!r}")

    def _read(self, column: str | tuple[str, ...]) -> Iterator[str]:
        if self.local is None:
            return (_text(row, column, self.dataset) for row in self.rows())
        return (text for file in self.files() for text in read(file, column))


class Part(Place):
    """One of several sources of a role."""

    proportion: Share  # of the role's characters

    @model_validator(mode="after")
    def _has_a_place(self) -> Self:
        if self.path is None and self.hub is None and self.proportion > 0:
            raise ValueError("give `path`, a file or a glob, or `hub`, a dataset as owner/name")
        return self


class Source(Place):
    """Where a role's documents come from, and how many of them are used."""

    parts: dict[str, Part] | None = None  # several places, each with its proportion
    renormalise: bool = False  # whether the proportions may add up to another number than 1
    documents: Count | None = None  # use at most so many
    tokens: Count | None = None  # stop when the training store has so many

    @model_validator(mode="after")
    def _has_a_place(self) -> Self:
        if self.parts is None:
            if self.path is None and self.hub is None:
                raise ValueError("give `path`, a file or a glob, or `hub`, a dataset as owner/name, or `parts`")
            return self
        if self.path is not None or self.hub is not None:
            raise ValueError("has `parts`, so `path` and `hub` belong to each of them")
        total = sum(part.proportion for part in self.parts.values())
        if total <= 0 or (abs(total - 1) > 1e-6 and not self.renormalise):
            raise ValueError(
                f"the proportions of its parts add up to {total:g}, not to 1; if a part is left out on purpose, say "
                "renormalise: true"
            )
        return self

    @property
    def places(self) -> dict[str, Place]:
        """What stands before a place's keys, "" or "parts.<name>." -> the place. A part of proportion 0 is left out."""
        if self.parts is None:
            return {"": self}
        return {f"parts.{name}.": part for name, part in self.parts.items() if part.proportion > 0}

    @property
    def paired(self) -> bool:
        return any(place.paired_with is not None for place in self.places.values())

    def bytes_of_tokens(self, width: int) -> int | None:
        """An upper estimate of the bytes to store, at `width` bytes per token; None if it is not known."""
        bounds = [None if self.tokens is None else self.tokens * width]
        if self.local is not None:
            sizes = [(f.stat().st_size, 1 if f.suffix == ".parquet" else 2) for f in self.files()]
            bounds.append(round(self.share * sum(size * width // bytes_each for size, bytes_each in sizes)))
        elif self.documents is not None:
            bounds.append(self.documents * 1000 * width)
        return min((bound for bound in bounds if bound is not None), default=None)

    def texts(self) -> Iterator[str]:
        """The role's documents in order, at most `documents`; the same ones each time."""
        limited = self.documents is not None or self.tokens is not None
        texts = self.all_texts() if self.parts is None else blend(self.parts, again=limited)
        return islice(texts, self.documents)


def blend(parts: Mapping[str, Part], again: bool) -> Iterator[str]:
    """Documents of all parts, the next one always from the part that has the least of its proportion so far.

    Proportions are of characters. When a part is exhausted, it is read `again`, or the blend ends.
    """
    used = {name: part for name, part in parts.items() if part.proportion > 0}
    taken = dict.fromkeys(used, 0)
    texts = {name: part.all_texts() for name, part in used.items()}
    while True:
        name = min(used, key=lambda name: taken[name] / used[name].proportion)
        text = next(texts[name], None)
        if text is None and again:
            print(f"{name}: all of it was read; it starts over", flush=True)
            texts[name] = used[name].all_texts()
            text = next(texts[name], None)
        if text is None:
            return
        taken[name] += len(text)
        yield text


def made_questions(text: str) -> Iterator[str]:
    """Questions and answers by rule, as documents."""
    from undo.prepare_data.write_questions.definitions import definitions

    return (question.text for question in definitions(text))


def read(file: Path, column: str | tuple[str, ...]) -> Iterator[str]:
    """The texts of one file. Raises ConfigError that names file and line."""
    try:
        match file.suffix:
            case ".parquet":
                yield from _parquet(file, column)
            case ".txt" | ".tokens":
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


def _json(file: Path, column: str | tuple[str, ...]) -> Iterator[str]:
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


def _array(file: Path, column: str | tuple[str, ...]) -> Iterator[str]:
    if file.stat().st_size > 2**30:
        raise ConfigError(f"{file}: an array of more than 1 GiB would not fit the memory; write one object a line")
    text = "".join(line for _, line in _lines(file))
    try:
        rows = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{file}: is not JSON: {error}") from None
    for index, row in enumerate(rows):
        yield _text(row, column, f"{file} entry {index}")


def _columns(column: str | tuple[str, ...]) -> list[str]:
    return [column] if isinstance(column, str) else list(column)


def _text(row: object, column: str | tuple[str, ...], where: str) -> str:
    if not isinstance(row, dict):
        raise ConfigError(f"{where}: is not an object with a column {column!r}")
    parts = []
    for name in _columns(column):
        if name not in row:
            raise ConfigError(f"{where}: has no column {name!r}; it has {', '.join(sorted(map(str, row)))}")
        if not isinstance(row[name], str):
            raise ConfigError(f"{where}: column {name!r} holds {type(row[name]).__name__}, not text")
        parts.append(row[name])
    return "\n\n".join(parts)


def _parquet(file: Path, column: str | tuple[str, ...]) -> Iterator[str]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(file)
        names = _columns(column)
        for name in names:
            if name not in table.schema_arrow.names:
                raise ConfigError(f"{file}: has no column {name!r}; it has {', '.join(table.schema_arrow.names)}")
            kind = table.schema_arrow.field(name).type
            if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
                raise ConfigError(f"{file}: column {name!r} holds {kind}, not text")
        for batch in table.iter_batches(batch_size=1024, columns=names):
            rows = zip(*(batch.column(name).to_pylist() for name in names), strict=True)
            yield from ("\n\n".join(text or "" for text in texts) for texts in rows)
    except pyarrow.ArrowInvalid as error:
        raise ConfigError(f"{file}: is not a parquet file, or is damaged: {str(error).splitlines()[0]}") from None
