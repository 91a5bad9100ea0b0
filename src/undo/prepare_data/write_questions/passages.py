"""Passages of a corpus that a model is asked about."""

import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from undo.data.files import read_texts

SHORTEST: Final = 200  # characters of a passage
PROSE: Final = 0.7  # at least this share of a passage is letters and blanks; what has less is a table or code


class Passage(NamedTuple):
    rank: float  # passages are taken in this order
    id: str  # file:document:character
    source: str  # the file
    text: str


def passages(files: Sequence[Path], column: str, characters: int, seed: int) -> Iterator[Passage]:
    """All passages of all documents, in order, each with a random rank that depends on the seed and its place."""
    ranks = random.Random(seed)
    for file, name in zip(files, names(files), strict=True):
        for number, text in enumerate(read_texts(file, column)):
            for start, passage in cut(text, characters):
                yield Passage(ranks.random(), f"{name}:{number}:{start}", name, passage)


def names(files: Sequence[Path]) -> list[str]:
    """Short and different ones, that do not depend on where the command was called from."""
    paths = [file.absolute() for file in files]
    above = Path(os.path.commonpath([path.parent for path in paths]))
    return [str(path.relative_to(above)) for path in paths]


def cut(text: str, characters: int) -> Iterator[tuple[int, str]]:
    """Pieces of at most so many characters with their starts: they end with a paragraph, a line, a sentence or a word.

    Pieces of less than 200 characters are left out, and those that are mostly figures and signs.
    """
    start = 0
    while start < len(text):
        end = min(start + characters, len(text))
        if end < len(text):
            for mark in ("\n\n", "\n", ". ", " "):
                found = text.rfind(mark, start + characters // 2, end)
                if found >= 0:
                    end = found + len(mark)
                    break
        piece = text[start:end].strip()
        prose = sum(letter.isalpha() or letter.isspace() for letter in piece)
        if len(piece) >= SHORTEST and prose >= PROSE * len(piece):
            yield start, piece
        start = end
