"""Texts become documents of token ids, in bounded memory; fingerprints tell which documents are the same."""

import time
from array import array
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from undo.data.ends import Ends
from undo.data.store import batched, damage
from undo.lm.tokens import MARK, token_ids
from undo.prepare_data.text import Paired

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEXTS_AT_ONCE, CHARACTERS_AT_ONCE = 4096, 8_000_000
PIECE: Final = 1_000_000  # characters that a tokenizer gets as one text: it takes up to 160 bytes for each


class Document(NamedTuple):
    text: str
    ids: np.ndarray  # uint32 [tokens], <bos> text <eos>


def documents(
    texts: Iterable[str],
    tokenizer: "PreTrainedTokenizerBase",
    ends: Ends,
    label: str,
    budget: int | None = None,
    count: int = 0,
    tokens: int = 0,
) -> Iterator[Document]:
    """Tokenise; progress is printed, and so stands in the launcher's table.

    Of a pair, the tokens are marked that the other document does not have at the same place.
    `count` documents with `tokens` tokens were read by an earlier attempt. Many texts at a time: the tokenizer then
    works on all cores (its own threads; 1.8 times one core's speed on two).
    """
    begin, before, around = time.monotonic(), tokens, sum(token is not None for token in ends)
    for some in batched(texts, TEXTS_AT_ONCE, CHARACTERS_AT_ONCE):
        encoded = encode(some, tokenizer)
        count, tokens = count + len(encoded), tokens + sum(map(len, encoded)) + around * len(encoded)
        speed = (tokens - before) / max(time.monotonic() - begin, 1e-9)
        of = "" if budget is None else f" of {budget:,} ({min(1, tokens / budget):.0%})"
        print(f"{label}: {count:,} documents, {tokens:,}{of} tokens, {speed:,.0f} tokens/s", flush=True)
        others = iter(encode([text.other for text in some if isinstance(text, Paired)], tokenizer))
        for text, ids in zip(some, encoded, strict=True):
            made = ends.enclose(ids)
            if isinstance(text, Paired):
                other = ends.enclose(next(others))
                shared = min(len(made), len(other))
                differs = np.ones(len(made), dtype=bool)
                differs[:shared] = made[:shared] != other[:shared]
                made[differs] |= np.uint32(MARK)
            yield Document(text, made)


def encode(texts: Iterable[str], tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    """The ids of each text. A very long one is tokenised in pieces, which changes a token at a seam at most."""
    cut = [pieces(text) for text in texts]
    flat = batched(chain.from_iterable(cut), TEXTS_AT_ONCE, CHARACTERS_AT_ONCE)
    ids = chain.from_iterable(token_ids(some, tokenizer) for some in flat)
    return [[*chain.from_iterable(islice(ids, len(part)))] for part in cut]


def pieces(text: str) -> list[str]:
    """The text in pieces of at most PIECE characters, cut before a blank or a line's end where there is one."""
    found, start = [], 0
    while len(text) - start > PIECE:
        end = max(text.rfind(blank, start + 1, start + PIECE) for blank in " \n")
        end = start + PIECE if end < 0 else end
        found.append(text[start:end])
        start = end
    return [*found, text[start:]]


def fingerprint(text: str) -> int:
    """64 bits of the text without the blanks around it: 10 million have two alike by chance in 3 of 10^6 cases."""
    return int.from_bytes(blake2b(text.strip().encode(), digest_size=8).digest(), "little")


class Fingerprints:
    """Those of many documents: 8 bytes each, in memory and, for an interrupted run, in a file."""

    def __init__(self, file: Path, count: int | None = None) -> None:
        """The first `count` of the file (None: all); what an attempt wrote behind them is dropped."""
        self._all, self._file = array("Q"), file
        if count != 0:
            self._all.frombytes(file.read_bytes()[: None if count is None else 8 * count])
        if count is not None and len(self._all) < count:
            raise damage(file, f"holds {len(self._all):,} documents, not {count:,}")
        self._written = len(self._all)

    def __len__(self) -> int:
        return len(self._all)

    def __contains__(self, value: int) -> bool:
        return bool((np.asarray(self._all) == np.uint64(value)).any())

    def distinct(self) -> np.ndarray:
        """uint64, in order."""
        return np.unique(np.array(self._all, dtype=np.uint64))

    def add(self, value: int) -> None:
        self._all.append(value)

    def write(self) -> None:
        self._file.parent.mkdir(exist_ok=True)
        with open(self._file, "ab") as file:
            file.truncate(8 * self._written)
            file.write(self._all[self._written :].tobytes())
        self._written = len(self._all)
