"""An endless stream of batches, mixed from packed documents by role."""

from collections.abc import Mapping

import numpy as np

from undo.config.schema import Role
from undo.data.rows import Rows
from undo.lm.tokens import Tokens, collate


class MixedStream:
    """An endless stream of batches mixed from stores by share. `batch(step)` depends on the seed and the step alone.

    Each slot of the stream draws its role by the shares. Each role's rows come in a new random order every epoch.
    """

    def __init__(
        self, stores: Mapping[Role, Rows], shares: Mapping[Role, float], rows: int, steps: int, seed: int
    ) -> None:
        self._roles: list[Role] = [role for role, share in shares.items() if share > 0]
        self._stores = [stores[role] for role in self._roles]
        self._length = max(store.length for store in self._stores)
        self._seed = seed
        rng = np.random.default_rng([seed, 0])
        probabilities = np.array([shares[role] for role in self._roles])
        self._source = rng.choice(len(self._roles), size=(steps, rows), p=probabilities / probabilities.sum())
        flat = self._source.ravel()
        self._nth = np.empty(flat.shape, dtype=np.int64)  # how many rows of the same role come before
        for i in range(len(self._roles)):
            mine = flat == i
            self._nth[mine] = np.arange(mine.sum())
        self._nth = self._nth.reshape(steps, rows)
        self._orders: dict[int, tuple[int, np.ndarray]] = {}

    def _row(self, source: int, nth: int) -> list[np.ndarray]:
        store = self._stores[source]
        epoch, index = divmod(nth, len(store))
        if self._orders.get(source, (None,))[0] != epoch:
            order = np.random.default_rng([self._seed, 1, source, epoch]).permutation(len(store))
            self._orders[source] = (epoch, order)
        return store[self._orders[source][1][index]]

    def batch(self, step: int) -> Tokens:
        rows = zip(self._source[step].tolist(), self._nth[step].tolist(), strict=True)
        return collate((self._row(source, nth) for source, nth in rows), self._length)
