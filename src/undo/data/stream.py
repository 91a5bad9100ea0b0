"""An endless stream of batches, mixed from packed documents by role."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

import numpy as np

from undo.config.schema import Role
from undo.data.rows import Rows
from undo.lm.tokens import Tokens, collate, counts

DRAWN_AT_ONCE: Final = 1 << 16  # rows: a training of any length holds the draws of so many


class MixedStream:
    """An endless stream of batches mixed from stores by share. `batch(step)` depends on the seed and the step alone.

    Each slot of the stream draws its role by the shares. Each role's rows come in a new random order every epoch.
    """

    def __init__(self, stores: Mapping[Role, Rows], shares: Mapping[Role, float], rows: int, seed: int) -> None:
        self._roles: list[Role] = [role for role, share in shares.items() if share > 0]
        self._stores = [stores[role] for role in self._roles]
        self._length = max(store.length for store in self._stores)
        self._seed = seed
        self._rows = rows
        self._steps = max(1, DRAWN_AT_ONCE // rows)  # of a block
        weights = np.array([shares[role] for role in self._roles])
        self._probabilities = weights / weights.sum()
        self._orders: dict[int, tuple[int, np.ndarray]] = {}
        self._rewind()

    def _rewind(self) -> None:
        self._rng = np.random.default_rng([self._seed, 0])
        self._next = 0  # the block to draw next
        self._taken = np.zeros(len(self._roles), dtype=np.int64)  # rows of each role in the blocks before it

    def _draw(self) -> None:
        """The next block: which role each row has, and how many rows of the same role come before it."""
        self._source = self._rng.choice(len(self._roles), size=self._steps * self._rows, p=self._probabilities)
        self._nth = np.empty_like(self._source)
        for i in range(len(self._roles)):
            mine = self._source == i
            self._nth[mine] = self._taken[i] + np.arange(mine.sum())
            self._taken[i] += mine.sum()
        self._next += 1

    def _row(self, source: int, nth: int) -> int:
        """Which row of its store the n-th one of a role is."""
        epoch, index = divmod(nth, size := len(self._stores[source]))
        if self._orders.get(source, (None,))[0] != epoch:
            order = np.random.default_rng([self._seed, 1, source, epoch]).permutation(size)
            self._orders[source] = (epoch, order)
        return int(self._orders[source][1][index])

    def batch(self, step: int, rank: int = 0, ranks: int = 1) -> Tokens:
        """The rows rank, rank + ranks, ... of the step's batch; its `total` and `documents` are those of all rows.

        Of the other ranks' rows the lengths of the pieces are read, and no tokens: `collate` labels all of a piece but
        its last token, so lengths say what it would count, and ranks need not ask each other.
        """
        block, index = divmod(step, self._steps)
        if block < self._next - 1:
            self._rewind()
        while self._next <= block:
            self._draw()
        part = slice(index * self._rows, (index + 1) * self._rows)
        drawn = zip(self._source[part].tolist(), self._nth[part].tolist(), strict=True)
        rows = [(source, self._row(source, nth)) for source, nth in drawn]
        lengths = [store.lengths([row for s, row in rows if s == i]) for i, store in enumerate(self._stores)]
        total, documents = counts(np.concatenate(lengths))
        mine = collate((self._stores[source][row] for source, row in rows[rank::ranks]), self._length)
        return replace(mine, total=total, documents=documents)
