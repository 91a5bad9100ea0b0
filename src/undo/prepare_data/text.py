"""Documents of a role: from the user's files (data/files.py) or streamed from the Hugging Face hub."""

import unicodedata
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from undo.config import mirror
from undo.config.mistakes import ConfigError
from undo.config.schema import Count, Role, Seed, Share, StageConfig
from undo.data.files import PACKED, PLAIN, find_files, kind_of, read_texts, text_of
from undo.data.hub import HubDataset
from undo.prepare_data.corpora import origin


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
    share: Annotated[float, Field(gt=0, le=1)] = 1.0  # of the documents, drawn at random: they may be sorted by source
    normalise: Literal["NFC"] | None = None  # NFC: letters in one piece; macOS takes those of file names apart
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
        return (
            self.dataset
            if local is None
            else local
            if self.path
            else f"{self.dataset} (mirrored by {mirror.named(local)})"
        )

    def files(self) -> list[Path]:
        """The files that are read, in order. Raises ConfigError if there is none, or one that cannot be read."""
        pattern = self.local
        if pattern is None:
            return []
        try:
            found = find_files(pattern)
        except ConfigError as error:
            where = origin(pattern)
            raise ConfigError(f"{error}" + (f"\n{where}" if where else "")) from None
        for file in found:
            if self.paired_with is not None and kind_of(file) in PLAIN:
                raise ConfigError(f"{file}: has no columns, so no paired_with; give .jsonl, .json, .csv or .parquet")
        return found

    def all_texts(self) -> Iterator[str]:
        """The documents that are not blank, or a `share` of them, in order and the same each time."""
        import numpy as np

        texts = self._read(self.column)
        if self.paired_with is not None:
            texts = map(Paired, texts, self._read(self.paired_with))
        found, draws = False, np.random.default_rng(42)
        for text in texts:
            other = text.other if isinstance(text, Paired) else text
            if text.strip() and other.strip() and draws.random() < self.share:
                found = True
                yield from (text,) if self.questions is None else made_questions(text)
        if not found:
            raise ConfigError(f"{self.label}: holds no text in column {self.column!r}")

    def _read(self, column: str | tuple[str, ...]) -> Iterator[str]:
        if self.local is None:
            texts = (text_of(row, column, self.dataset) for row in self.rows())
        else:
            texts = (text for file in self.files() for text in read_texts(file, column))
        form = self.normalise
        return texts if form is None else (unicodedata.normalize(form, text) for text in texts)


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

    @property
    def reads_again(self) -> bool:
        """Whether a part that is exhausted starts over: where there is a limit."""
        return self.parts is not None and (self.documents is not None or self.tokens is not None)

    def bytes_of_tokens(self, width: int) -> int | None:
        """An upper estimate of the bytes to store, at `width` bytes per token; None if it is not known."""
        bounds = [None if self.tokens is None else self.tokens * width]
        if self.local is not None:
            tokens = sum(file.stat().st_size * tokens_per_byte(file) for file in self.files())
            bounds.append(round(self.share * tokens * width))
        elif self.documents is not None:
            bounds.append(self.documents * 1000 * width)
        return min((bound for bound in bounds if bound is not None), default=None)

    def texts(self) -> Iterator[str]:
        """The role's documents in order, at most `documents`; the same ones each time."""
        texts = self.all_texts() if self.parts is None else blend(self.parts, self.reads_again)
        return islice(texts, self.documents)


class Texts(StageConfig):
    """The text of each role, and how it is cut into rows and split into training and validation."""

    data: dict[Role, Source] = Field(default={})  # of the roles that no world generates
    length: Annotated[int, Field(ge=2)]  # tokens in a row; one alone has nothing to predict
    shortest: Count = 50  # shorter documents are dropped (Appendix A)
    validation_share: Annotated[float, Field(gt=0, lt=1)] = 5e-4  # of the documents
    validation_tokens: Count = 500_000  # of each role, at most
    seed: Seed = 42  # of the split


def tokens_per_byte(file: Path) -> float:
    """Of a file, at most, in any usual text: 1 token for 2 bytes."""
    return 2 if file.suffix in PACKED else 1 if kind_of(file) == ".parquet" else 0.5


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
