"""The token store: documents packed once into rows, memory-mapped, mixed by role, and random access by step.

A store is a folder: `tokens.bin` holds the tokens of all rows end to end, in as few bytes each as the vocabulary needs
(little-endian: 2 to 65,536, 3 for Gemma's 256,000, so that 1 B tokens take 3 GB); `pieces.bin` holds where each piece
of a document starts in it, `rows.bin` where each row starts in the pieces (both int64). A document longer than a row
is cut into pieces; pieces are packed best-fit, so nothing is thrown away and short documents stay whole. In a store of
pairs tokens have 4 bytes, and the highest bit marks those that the other document of the pair does not have there.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np

from undo.config.files import write_atomically
from undo.config.mistakes import ConfigError
from undo.lm.tokens import MARK, Tokens, collate

WINDOW: Final = 1 << 16  # documents that are packed together, at most
WINDOW_TOKENS: Final = 1 << 24  # or as many documents as hold so many tokens
SMALL: Final = 1 << 26  # bytes: of files up to this size the digest is compared when a store is opened
FILES: Final = ("tokens.bin", "pieces.bin", "rows.bin")


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

    After each window the caller's `state` is on disk with it, so that another process that opens the same folder can
    continue from there.
    """

    def __init__(self, folder: Path, length: int, vocab_size: int, paired: bool = False) -> None:
        self.folder, self.length, self.vocab_size, self.paired = folder, length, vocab_size, paired
        self.width = token_bytes(vocab_size, paired)
        self._partial = partial_of(folder)
        self._partial.mkdir(parents=True, exist_ok=True)
        self._progress = self._partial / "progress.json"
        try:
            found = json.loads(self._progress.read_text()) if self._progress.exists() else None
            self.state: dict[str, Any] | None = found and found["state"]
            self.tokens, self._pieces, self._rows, self._largest = found["written"] if found else (0, 0, 0, 0)
        except (ValueError, TypeError, LookupError):
            raise damage(self._progress, "is damaged") from None
        kept = (self.tokens * self.width, 8 * (self._pieces + 1), 8 * (self._rows + 1)) if found else (0, 0, 0)
        for name, size in zip(FILES, kept, strict=True):
            with open(self._partial / name, "ab") as file:
                if file.tell() < size:
                    raise damage(self._partial / name, f"has {file.tell():,} bytes, not {size:,}")
                file.truncate(size)
        if not found:
            for name in FILES[1:]:
                self._append(name, np.zeros(1, dtype="<i8"))

    def add(self, documents: Sequence[np.ndarray], state: dict[str, Any]) -> None:
        """Cut documents into pieces, pack them, and leave `state` (plain values) for whoever has to continue."""
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
            self._largest = max(self._largest, int(largest))
        written = [self.tokens, self._pieces, self._rows, self._largest]
        write_atomically(self._progress, json.dumps({"written": written, "state": state}))

    def finish(self, **more: Any) -> "TokenStore":
        """`more`: plain values that are to stand in store.json, too."""
        facts = {"length": self.length, "vocab_size": self.vocab_size, "width": self.width, "paired": self.paired}
        facts |= {
            "files": {name: _file_facts(self._partial / name) for name in FILES},
            "largest": self._largest,
            **more,
        }
        write_atomically(self._partial / "store.json", json.dumps(facts))
        self._partial.rename(self.folder)
        (self.folder / self._progress.name).unlink(missing_ok=True)
        return TokenStore(self.folder)

    def _append(self, name: str, numbers: np.ndarray) -> None:
        with open(self._partial / name, "ab") as file:
            file.write((numbers if numbers.dtype == np.uint8 else numbers.astype("<i8")).tobytes())
            file.flush()
            os.fsync(file.fileno())


def _file_facts(file: Path) -> dict[str, Any]:
    """The size of a file, and a digest unless reading it would take long."""
    size = file.stat().st_size
    if size > SMALL:
        return {"bytes": size}
    with open(file, "rb") as opened:
        return {"bytes": size, "blake2b": hashlib.file_digest(opened, "blake2b").hexdigest()[:32]}


def token_bytes(vocab_size: int, paired: bool = False) -> int:
    """Bytes per token in a store."""
    return 4 if paired else max(2, ((vocab_size - 1).bit_length() + 7) // 8)


def partial_of(folder: Path) -> Path:
    """The folder of a store while it is being written."""
    return folder.with_name(folder.name + ".partial")


def pack(
    documents: Iterable[np.ndarray], folder: Path, length: int, vocab_size: int, paired: bool = False
) -> "TokenStore":
    """Write a store of rows of at most `length` tokens in one go, discarding what an earlier attempt left."""
    shutil.rmtree(partial_of(folder), ignore_errors=True)
    writer = StoreWriter(folder, length, vocab_size, paired)
    for window in batched(documents, WINDOW, WINDOW_TOKENS):
        writer.add(window, {})
    return writer.finish()


Sized = TypeVar("Sized", np.ndarray, str)


def batched(items: Iterable[Sized], count: int, size: int) -> Iterator[list[Sized]]:
    """Lists of at most `count` items; a list ends early once the total length of its items reaches `size`."""
    batch, total = [], 0
    for item in items:
        batch.append(item)
        total += len(item)
        if len(batch) == count or total >= size:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


def damage(file: Path, what: str) -> ConfigError:
    """What is wrong with a file of a prepare run, and the way out."""
    return ConfigError(f"{file}: {what}\nmake the data again: the command of the stage prepare with --force")


class TokenStore:
    """A packed corpus on disk; `store[i]` is row i as its pieces. Opening reads no more than SMALL bytes of a file."""

    def __init__(self, folder: Path) -> None:
        """Raises ConfigError that names the file if one is missing, damaged or not as long as it was."""
        self.folder = folder
        try:
            self.facts: dict[str, Any] = json.loads((folder / "store.json").read_text())
            self.length: int = self.facts["length"]
            self.vocab_size: int = self.facts["vocab_size"]
            self.paired: bool = self.facts["paired"]  # whether its documents are marked
            self.largest: int = self.facts["largest"]  # token in it
            self._width: int = self.facts["width"]
            expected = [self.facts["files"][name] for name in FILES]
        except OSError as error:
            raise damage(folder / "store.json", f"cannot be read ({error.strerror})") from None
        except (ValueError, TypeError, KeyError):
            raise damage(folder / "store.json", "is damaged") from None
        for name, facts in zip(FILES, expected, strict=True):
            try:
                found = _file_facts(folder / name)
            except OSError as error:
                raise damage(folder / name, f"cannot be read ({error.strerror})") from None
            if found["bytes"] != facts["bytes"]:
                raise damage(folder / name, f"has {found['bytes']:,} bytes, not {facts['bytes']:,}")
            if found != facts:
                raise damage(folder / name, "is not what was written")
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

    def lengths(self, rows: Sequence[int]) -> np.ndarray:
        """Of all pieces of these rows, in order: int64 [pieces]. No token is read."""
        chosen = np.array(rows, dtype=np.int64)
        first, behind = np.asarray(self._rows[chosen]), np.asarray(self._rows[chosen + 1])
        counts = behind - first
        pieces = np.arange(counts.sum()) + np.repeat(behind - counts.cumsum(), counts)
        return np.asarray(self._pieces[pieces + 1] - self._pieces[pieces])

    @property
    def tokens(self) -> int:
        return int(self._pieces[-1])

    def batches(self, indices: Sequence[int], rows: int) -> Iterator[Tokens]:
        """The rows of these indices once, in order, for evaluation."""
        for start in range(0, len(indices), rows):
            yield collate((self[i] for i in indices[start : start + rows]), self.length)
