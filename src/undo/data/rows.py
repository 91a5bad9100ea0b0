"""Packed rows as a stream reads them, from a store on disk or from documents in memory."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from undo.config.mistakes import ConfigError
from undo.data.store import best_fit
from undo.lm.tokens import MARK


class Rows(Protocol):
    """`rows[i]` is row i as its pieces, each a piece of one document."""

    length: int  # tokens of a row, at most
    vocab_size: int

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> list[np.ndarray]: ...

    def lengths(self, rows: Sequence[int], /) -> np.ndarray:
        """Of all pieces of these rows, in order: int [pieces]. No token is read."""
        ...


class PackedDocuments:
    """Documents in memory, cut to pieces of at most `length` tokens and packed best-fit, as in a store on disk."""

    def __init__(self, documents: Sequence[np.ndarray], length: int, vocab_size: int) -> None:
        """documents: each int [tokens]. Raises ValueError where there is none, or a token is not in the vocabulary."""
        self.length, self.vocab_size = length, vocab_size
        self._pieces = [doc[i : i + length] for doc in documents for i in range(0, len(doc), length)]
        if not self._pieces:
            raise ValueError("there is no text to train on")
        if (largest := max(int(piece.max()) for piece in self._pieces)) >= vocab_size:
            raise ValueError(f"token id {largest} does not fit the model's vocabulary of {vocab_size}")
        self._rows = best_fit(np.array([len(piece) for piece in self._pieces]), length)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int, /) -> list[np.ndarray]:
        return [self._pieces[index] for index in self._rows[row]]

    def lengths(self, rows: Sequence[int], /) -> np.ndarray:
        return np.array([len(self._pieces[index]) for row in rows for index in self._rows[row]], dtype=np.int64)


def few(rows: Rows, documents: int, seed: int) -> PackedDocuments:
    """So many documents of a store, or pieces of long ones, from rows in a random order: all that an attacker has.

    Raises ConfigError where the store holds fewer.
    """
    found = list[np.ndarray]()
    for row in np.random.default_rng(seed).permutation(len(rows)):
        found += (piece & (MARK - 1) for piece in rows[row])
        if len(found) >= documents:
            return PackedDocuments(found[:documents], rows.length, rows.vocab_size)
    raise ConfigError(f"examples={documents}, but there are {len(found)} documents: take fewer")
