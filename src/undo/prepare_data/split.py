"""The text of a role, split by document into a training store and a validation store in one reading.

All copies of a document are on one side: those of a training document too, those of a validation document are left
out. Documents that several roles have are counted, and two roles of the same documents are refused.
"""

import unicodedata
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from undo.config.mistakes import ConfigError
from undo.config.schema import ROLES, Role
from undo.data import store
from undo.data.ends import Ends
from undo.data.store import StoreWriter, TokenStore, batched, pack
from undo.prepare_data.documents import Fingerprints, documents, fingerprint
from undo.prepare_data.preconditions import MANY_APART, apart_in_words, too_little
from undo.prepare_data.text import Texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Split:
    """One role's reading, which an interrupted run continues after the last window that was written.

    Earlier documents are then read, but not tokenised.
    """

    def __init__(
        self, cfg: Texts, role: Role, tokenizer: "PreTrainedTokenizerBase", ends: Ends, vocab_size: int, folder: Path
    ) -> None:
        self.role: Role = role
        self.cfg, self.tokenizer, self.ends, self.source = cfg, tokenizer, ends, cfg.data[role]
        self.writer = StoreWriter(folder / "train" / role, cfg.length, vocab_size, self.source.paired)
        self.rng = np.random.default_rng([cfg.seed, ROLES.index(role)])
        state = self.writer.state or {}
        if state:
            self.rng.bit_generator.state = state["rng"]
        self.complete: bool = state.get("complete", False)
        self.read: int = state.get("documents", 0)
        self.last: int = state.get("last", 0)  # a checksum of the last document's tokens
        self.held_out = [np.array(ids, dtype=np.uint32) for ids in state.get("held_out", ())]
        self.validation = set[int](state.get("validation", ()))
        self.training = Fingerprints(fingerprints(folder) / role, state.get("training", 0))
        self.counts: dict[str, int] = state.get("counts") or {"short": 0, "left_out": 0, "apart": 0}

    def run(self) -> None:
        """Write the training store, but for its last step: `finish` makes it appear when the other one is there."""
        if self.complete:
            return
        for window in batched(self._for_training(), store.WINDOW, store.WINDOW_TOKENS):
            self.writer.add(window, self._reached(complete=False))
        if self.writer.tokens == 0 or not self.held_out:
            raise too_little(self.cfg, self.role, "training" if self.writer.tokens == 0 else "validation")
        self.writer.add([], self._reached(complete=True))

    def _for_training(self) -> Iterator[np.ndarray]:
        cfg, source = self.cfg, self.source
        room, tokens = cfg.validation_tokens - sum(map(len, self.held_out)), self.writer.tokens
        if source.tokens is not None and tokens >= source.tokens:
            return
        again = min(self.read, 1)  # the last document that an earlier attempt read: is it still where it was?
        texts = islice(source.texts(), self.read - again, None)
        found = documents(
            texts, self.tokenizer, self.ends, f"train/{self.role}", source.tokens, self.read - again, tokens
        )
        if again and ((document := next(found, None)) is None or zlib.crc32(document.ids.tobytes()) != self.last):
            raise ConfigError(
                f"data.{self.role}: the text has changed since it was read in part; its document {self.read:,} is "
                f"another one\nprepare it afresh with --force"
            )
        for text, ids in found:
            self.read, self.last = self.read + 1, zlib.crc32(ids.tobytes())
            self.counts["apart"] += not unicodedata.is_normalized("NFC", text)
            if len(ids) < cfg.shortest:
                self.counts["short"] += 1
                continue
            mark, drawn = fingerprint(text), self.rng.random() < cfg.validation_share
            if mark in self.validation:
                self.counts["left_out"] += 1
                continue
            if drawn and room > 0 and mark not in self.training:
                self.held_out.append(ids[:room])
                self.validation.add(mark)
                room -= len(self.held_out[-1])
                continue
            self.training.add(mark)
            yield ids
            tokens += len(ids)
            if source.tokens is not None and tokens >= source.tokens:
                return

    def _reached(self, complete: bool) -> dict[str, Any]:
        self.training.write()
        return {
            "documents": self.read,
            "last": self.last,
            "held_out": [ids.tolist() for ids in self.held_out],
            "validation": sorted(self.validation),
            "training": len(self.training),
            "counts": self.counts,
            "complete": complete,
            "rng": self.rng.bit_generator.state,
        }

    def finish(self, validation: Path) -> list[TokenStore]:
        """Let both stores appear, the validation store first: where the other is, both are there."""
        held_out, distinct = sum(map(len, self.held_out)), len(self.training.distinct())
        print(f"validation/{self.role}: {held_out:,} tokens of at most {self.cfg.validation_tokens:,}", flush=True)
        facts = {"read": self.read, **self.counts, "copies": len(self.training) - distinct}
        if facts["copies"] or facts["left_out"]:
            print(
                f"train/{self.role}: {facts['copies']:,} of {len(self.training):,} documents are copies of others; "
                f"{facts['left_out']:,} copies of validation documents are left out",
                flush=True,
            )
        if (share := facts["apart"] / self.read) >= MANY_APART:
            print(apart_in_words(self.role, share), flush=True)
        for mark in self.validation:  # other roles are compared with both
            self.training.add(mark)
        self.training.write()
        if not validation.exists():
            pack(self.held_out, validation, self.cfg.length, self.writer.vocab_size, self.source.paired)
        return [self.writer.finish(documents=facts), TokenStore(validation)]


def split_text(
    cfg: Texts, role: Role, tokenizer: "PreTrainedTokenizerBase", ends: Ends, vocab_size: int, folder: Path
) -> list[TokenStore]:
    """The stores of training and validation text of a role."""
    train, validation = (folder / part / role for part in ("train", "validation"))
    if train.exists():
        return [TokenStore(train), TokenStore(validation)]
    split = Split(cfg, role, tokenizer, ends, vocab_size, folder)
    split.run()
    return split.finish(validation)


def fingerprints(folder: Path) -> Path:
    """Where those of each role's documents are, until all roles are there."""
    return folder / "fingerprints"


def shared(folder: Path, one: Role, other: Role) -> int:
    """How many documents two roles share. Raises ConfigError if they have the same ones."""
    a, b = (Fingerprints(fingerprints(folder) / role).distinct() for role in (one, other))
    both = len(np.intersect1d(a, b, assume_unique=True))
    if both == len(a) == len(b):
        raise ConfigError(f"data.{one} and data.{other} hold the same {both:,} documents; give each role its own text")
    if both:
        print(f"{both:,} documents are in {one} ({len(a):,}) and in {other} ({len(b):,})", flush=True)
    return both
