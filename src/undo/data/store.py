"""The token store: documents packed once into rows, memory-mapped, mixed by role, and random access by step.

A store is a folder: `tokens.bin` holds the tokens of all rows end to end, in as few bytes each as the vocabulary needs
(little-endian: 2 to 65,536, 3 for Gemma's 256,000, so that 1 B tokens take 3 GB); `pieces.bin` holds where each piece
of a document starts in it, `rows.bin` where each row starts in the pieces (both int64). A document longer than a row
is cut into pieces; pieces are packed best-fit, so nothing is thrown away and short documents stay whole. In a store of
pairs tokens have 4 bytes, and the highest bit marks those that the other document of the pair does not have there.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar

import numpy as np

from undo.config import ConfigError, Role
from undo.run import write_atomically

if TYPE_CHECKING:
    import torch

IGNORE: Final = -100  # the label of a position without a target
MARK: Final = 1 << 31  # beside the token, in stores of pairs: the other document of the pair has another token there
WINDOW: Final = 1 << 16  # documents that are packed together, at most
WINDOW_TOKENS: Final = 1 << 24  # or as many documents as hold so many tokens
FILES: Final = ("tokens.bin", "pieces.bin", "rows.bin")


@dataclass(frozen=True)
class Tokens:
    """A batch of packed rows. `labels[b, t]` is the token that follows `input_ids[b, t]` in its document, or IGNORE.

    input_ids, positions, labels: int64 [rows, length]. A position of 0 starts a document: attention does not reach
    across it. `total` is the number of labels, and `documents` that of documents with labels, in the *whole* batch of
    the step, over all micro-batches and devices: losses are sums divided by one of them, so that micro-batch gradients
    add up to the gradient of the whole batch. `marked`, bool [rows, length], is where an input differs from the other
    document of its pair; None: nowhere.
    """

    input_ids: "torch.Tensor"
    positions: "torch.Tensor"
    labels: "torch.Tensor"
    total: int
    documents: int
    marked: "torch.Tensor | None" = None

    def rows(self, start: int, stop: int | None = None, step: int = 1) -> Self:
        part = slice(start, stop, step)
        return replace(
            self,
            input_ids=self.input_ids[part],
            positions=self.positions[part],
            labels=self.labels[part],
            marked=None if self.marked is None else self.marked[part],
        )

    def labelled(self, where: "torch.Tensor") -> Self:
        """Without the labels outside `where`, bool [rows, length]. `total` and `documents` stay those of the batch."""
        return replace(self, labels=self.labels.masked_fill(~where, IGNORE))

    def micro_batches(self, rows: int | None) -> Iterator[Self]:
        size = rows or len(self.input_ids)
        for start in range(0, len(self.input_ids), size):
            yield self.rows(start, start + size)

    @cached_property
    def _labelled(self) -> "torch.Tensor":
        """Where the labels are in the flattened rows, [labels]."""
        return (self.labels.flatten() != IGNORE).nonzero()[:, 0]

    @property
    def document(self) -> "torch.Tensor":
        """The number of the document that each position belongs to, counted over all rows: [rows, length]."""
        return (self.positions == 0).flatten().cumsum(0).reshape(self.positions.shape)

    def at_labels(self, values: "torch.Tensor") -> "torch.Tensor":
        """The labelled positions of [rows, length, ...] -> [labels, ...]."""
        return values.flatten(0, 1).index_select(0, self._labelled)

    def to(self, device: "torch.device") -> Self:
        moved = replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=True),
            positions=self.positions.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            marked=None if self.marked is None else self.marked.to(device, non_blocking=True),
        )
        moved.__dict__["_labelled"] = self._labelled.to(device, non_blocking=True)  # a GPU would be waited for
        return moved


Batch = Mapping[str, Tokens]


def collate(rows: Iterable[list[np.ndarray]], length: int | None = None) -> Tokens:
    """Rows of document pieces -> Tokens, padded on the right with id 0 to `length` or to the longest row."""
    import torch

    rows = list(rows)
    width = length or max(sum(map(len, row)) for row in rows)
    ids = np.zeros((len(rows), width), dtype=np.int64)
    positions = np.zeros((len(rows), width), dtype=np.int64)
    labels = np.full((len(rows), width), IGNORE, dtype=np.int64)
    marked = np.zeros((len(rows), width), dtype=bool)
    for i, row in enumerate(rows):
        end = 0
        for piece in row:
            start, end = end, end + len(piece)
            ids[i, start:end] = piece & (MARK - 1)
            positions[i, start:end] = np.arange(len(piece))
            labels[i, start : end - 1] = ids[i, start + 1 : end]
            marked[i, start:end] = piece >= MARK
        positions[i, end:] = np.arange(width - end)  # padding is a document of its own
    total, documents = int((labels != IGNORE).sum()), sum(len(piece) > 1 for row in rows for piece in row)
    return Tokens(
        torch.from_numpy(ids),
        torch.from_numpy(positions),
        torch.from_numpy(labels),
        total,
        documents,
        torch.from_numpy(marked) if marked.any() else None,
    )


def best_fit(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Pack items into bins of `capacity`, longest first, each into the fullest bin that takes it -> indices by bin."""
    bins: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # bins with that much room left
    rooms = 0  # bit r is set: by_room[r] is not empty
    for item in np.argsort(-lengths, kind="stable").tolist():
        size = int(lengths[item])
        fits = rooms >> size
        if fits:
            room = size + (fits & -fits).bit_length() - 1
            target = by_room[room].pop()
            if not by_room[room]:
                rooms &= ~(1 << room)
            bins[target].append(item)
        else:
            room, target = capacity, len(bins)
            bins.append([item])
        left = room - size
        if left:
            by_room[left].append(target)
            rooms |= 1 << left
    return bins


class StoreWriter:
    """Writes a store window by window, in bounded memory. The folder appears only when it is complete.

    After each window the caller's `state` is on disk with it: another process that opens the same folder finds the
    last one, and goes on from there.
    """

    def __init__(self, folder: Path, length: int, vocab_size: int, paired: bool = False) -> None:
        self.folder, self.length, self.vocab_size, self.paired = folder, length, vocab_size, paired
        self.width = token_bytes(vocab_size, paired)
        self._partial = partial_of(folder)
        self._partial.mkdir(parents=True, exist_ok=True)
        self._progress = self._partial / "progress.json"
        found = json.loads(self._progress.read_text()) if self._progress.exists() else None
        self.state: dict[str, Any] | None = found and found["state"]
        self.tokens, self._pieces, self._rows = found["written"] if found else (0, 0, 0)
        kept = (self.tokens * self.width, 8 * (self._pieces + 1), 8 * (self._rows + 1)) if found else (0, 0, 0)
        for name, size in zip(FILES, kept, strict=True):
            with open(self._partial / name, "ab") as file:
                file.truncate(size)
        if not found:
            for name in FILES[1:]:
                self._append(name, np.zeros(1, dtype="<i8"))

    def add(self, documents: Sequence[np.ndarray], state: dict[str, Any]) -> None:
        """Cut documents to rows, pack them, and leave `state` (plain values) for whoever has to continue."""
        pieces = [doc[i : i + self.length] for doc in documents for i in range(0, len(doc), self.length)]
        if pieces:
            lengths = np.array([len(piece) for piece in pieces])
            bins = best_fit(lengths, self.length)
            order = [index for row in bins for index in row]
            tokens = np.concatenate([pieces[index] for index in order])
            largest = (tokens & (MARK - 1) if self.paired else tokens).max()
            if largest >= self.vocab_size:
                raise ConfigError(f"token id {largest} does not fit a vocabulary of {self.vocab_size}")
            self._append("tokens.bin", tokens.astype("<u4").view(np.uint8).reshape(-1, 4)[:, : self.width])
            self._append("pieces.bin", self.tokens + lengths[order].cumsum())
            self._append("rows.bin", self._pieces + np.cumsum([len(row) for row in bins]))
            self.tokens += len(tokens)
            self._pieces += len(order)
            self._rows += len(bins)
        written = [self.tokens, self._pieces, self._rows]
        write_atomically(self._progress, json.dumps({"written": written, "state": state}))

    def finish(self) -> "TokenStore":
        facts = {"length": self.length, "vocab_size": self.vocab_size, "width": self.width, "paired": self.paired}
        write_atomically(self._partial / "store.json", json.dumps(facts))
        self._partial.rename(self.folder)
        (self.folder / self._progress.name).unlink(missing_ok=True)
        return TokenStore(self.folder)

    def _append(self, name: str, numbers: np.ndarray) -> None:
        with open(self._partial / name, "ab") as file:
            file.write((numbers if numbers.dtype == np.uint8 else numbers.astype("<i8")).tobytes())
            file.flush()
            os.fsync(file.fileno())


def token_bytes(vocab_size: int, paired: bool = False) -> int:
    """What a token takes in a store."""
    return 4 if paired else max(2, ((vocab_size - 1).bit_length() + 7) // 8)


def partial_of(folder: Path) -> Path:
    """Where a store lies while it is written."""
    return folder.with_name(folder.name + ".partial")


def pack(
    documents: Iterable[np.ndarray], folder: Path, length: int, vocab_size: int, paired: bool = False
) -> "TokenStore":
    """Write a store of rows of at most `length` tokens in one go, whatever an earlier attempt has left."""
    shutil.rmtree(partial_of(folder), ignore_errors=True)
    writer = StoreWriter(folder, length, vocab_size, paired)
    for window in batched(documents, WINDOW, WINDOW_TOKENS):
        writer.add(window, {})
    return writer.finish()


Sized = TypeVar("Sized", np.ndarray, str)


def batched(items: Iterable[Sized], count: int, size: int) -> Iterator[list[Sized]]:
    """Lists of at most `count` items, each ended early by the item with which its total length reaches `size`."""
    batch, total = [], 0
    for item in items:
        batch.append(item)
        total += len(item)
        if len(batch) == count or total >= size:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


class TokenStore:
    """A packed corpus on disk; `store[i]` is row i as its pieces. Opening reads no tokens."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        facts = json.loads((folder / "store.json").read_text())
        self.length: int = facts["length"]
        self.vocab_size: int = facts["vocab_size"]
        self.paired: bool = facts.get("paired", False)  # whether its documents are marked
        self._width: int = facts["width"]
        self._pieces = np.memmap(folder / "pieces.bin", dtype="<i8", mode="r")
        self._rows = np.memmap(folder / "rows.bin", dtype="<i8", mode="r")

    @cached_property
    def _tokens(self) -> np.ndarray:
        return np.memmap(self.folder / "tokens.bin", dtype=np.uint8, mode="r").reshape(-1, self._width)

    def __len__(self) -> int:
        return len(self._rows) - 1

    def __getitem__(self, row: int) -> list[np.ndarray]:
        bounds = self._pieces[self._rows[row] : self._rows[row + 1] + 1].tolist()
        stored = self._tokens[bounds[0] : bounds[-1]]
        tokens = np.zeros((len(stored), 4), dtype=np.uint8)
        tokens[:, : self._width] = stored
        return np.split(tokens.view("<u4")[:, 0], np.array(bounds[1:-1]) - bounds[0])

    @property
    def tokens(self) -> int:
        return int(self._pieces[-1])

    def batches(self, indices: Sequence[int], rows: int) -> Iterator[Tokens]:
        """The rows of these indices once, in order, for evaluation."""
        for start in range(0, len(indices), rows):
            yield collate((self[i] for i in indices[start : start + rows]), self.length)


class MixedStream:
    """An endless stream of batches mixed from stores by share. `batch(step)` depends on the seed and the step alone.

    Each slot of the stream draws its role by the shares; each role's rows come in a new random order every epoch.
    """

    def __init__(
        self, stores: Mapping[Role, TokenStore], shares: Mapping[Role, float], rows: int, steps: int, seed: int
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
