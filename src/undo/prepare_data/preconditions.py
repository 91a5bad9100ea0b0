"""What can be known to be wrong with the texts and the tokenizer of a prepare run before a corpus is tokenised.

Reads no more than the beginning of each file; of the hub, `reach` alone.
"""

import filecmp
import json
import unicodedata
from collections.abc import Iterator
from functools import cache
from itertools import chain, combinations, islice
from pathlib import Path
from typing import Final

from undo.config import mirror
from undo.config.mistakes import ConfigError
from undo.config.schema import ROLES, Role
from undo.data.files import read_texts
from undo.prepare_data.text import Place, Source, Texts

TOKENIZERS: Final = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")  # a folder of one has one of these
FIRST: Final = 200  # documents of a place that are looked at for letters taken apart
MANY_APART: Final = 0.01  # documents of these, from which on it is said
MOST: Final = 1 << 16  # documents that are looked at, of a role


def check_texts(cfg: Texts) -> None:
    """Raises ConfigError for files that are missing, empty, of another column, too few or the same for two roles."""
    for role, source in cfg.data.items():
        for key, place in source.places.items():
            try:
                found = place.files()
            except ConfigError as error:
                raise ConfigError(f"data.{role}: {error}\n{_own_files(cfg, role, key)}") from None
            try:
                for file in found:
                    for column in filter(None, (place.column, place.paired_with)):
                        next(read_texts(file, column), None)
            except ConfigError as error:
                raise ConfigError(f"data.{role}: {error}") from None
    for one, other in combinations(cfg.data, 2):
        if _same(cfg.data[one], cfg.data[other]):
            raise ConfigError(f"data.{one} and data.{other} are the same text; give each role its own")
    for role, source in cfg.data.items():
        if all(place.files() for place in source.places.values()) and not source.reads_again:
            check_enough(cfg, role)


def _own_files(cfg: Texts, role: Role, key: str) -> str:
    where = f"data.{role}.{key}path"
    if cfg.variant:  # for all variants, it would give one file to all of them
        where = f"variants.{cfg.variant}.{where}"
    return f"give your own files with prepare.{where}=... (run_prepare.py: without `prepare.`)"


def reach(cfg: Texts) -> None:
    """Raises ConfigError for a place without a document, after a look at each, also at those of the hub."""
    for role, source in cfg.data.items():
        for key, place in source.places.items():
            try:
                next(place.all_texts())
            except ConfigError as error:
                own = "" if place.local else f"\n{_own_files(cfg, role, key)}"
                raise ConfigError(f"data.{role}: {error}{own}") from None


def taken_apart(cfg: Texts) -> Iterator[str]:
    """A line for each role of local files whose first documents have letters taken apart."""
    for role, source in cfg.data.items():
        if any(place.normalise is not None or not place.files() for place in source.places.values()):
            continue
        texts = chain.from_iterable(islice(place.all_texts(), FIRST) for place in source.places.values())
        apart = [not unicodedata.is_normalized("NFC", text) for text in texts]
        if (share := sum(apart) / max(len(apart), 1)) >= MANY_APART:
            yield apart_in_words(role, share)


def apart_in_words(role: Role, share: float) -> str:
    return (
        f"data.{role}: {share:.0%} of the documents have letters taken apart (not NFC), which may take several times "
        f"the tokens; data.{role}.normalise=NFC puts them together"
    )


def _same(one: Source, other: Source) -> bool:
    """Whether two roles read the same columns of the same files, or of copies of them, or of one dataset."""
    pairs = list(zip(one.places.values(), other.places.values(), strict=False))
    return len(one.places) == len(other.places) and all(_same_place(a, b) for a, b in pairs)


def _same_place(one: Place, other: Place) -> bool:
    if (one.column, one.questions) != (other.column, other.questions):
        return False
    ours, theirs = one.files(), other.files()
    if not ours and not theirs:
        return (one.dataset, one.split) == (other.dataset, other.split)
    return len(ours) == len(theirs) and all(
        a.samefile(b) or filecmp.cmp(a, b, shallow=False) for a, b in zip(ours, theirs, strict=True)
    )


def check_enough(cfg: Texts, role: Role) -> None:
    """Raises ConfigError if too few documents are long enough for one of them to be drawn for validation."""
    import numpy as np

    drawn = np.random.default_rng([cfg.seed, ROLES.index(role)]).random(MOST) < cfg.validation_share  # as split.py does
    needed = 1 + max(int(np.argmax(drawn)) if drawn.any() else MOST, int(np.argmin(drawn)))
    source = cfg.data[role]
    texts = chain.from_iterable(place.all_texts() for place in source.places.values())
    # a token has a byte at least, and a few tokens stand around a document
    long_enough = (text for text in islice(texts, source.documents) if len(text.encode()) + 4 >= cfg.shortest)
    try:
        found = sum(1 for _ in islice(long_enough, needed))
    except ConfigError as error:
        raise ConfigError(f"data.{role}: {error}") from None
    if found < needed:
        raise too_little(cfg, role, "validation" if found else "training", found)


def too_little(cfg: Texts, role: Role, what: str, found: int | None = None) -> ConfigError:
    count = "" if found is None else f" of {found:,} at most"
    return ConfigError(
        f"data.{role}: no document of {cfg.shortest} tokens or more{count} is left for {what}\n"
        f"give more text, or another validation_share (now {cfg.validation_share:g}) or shortest"
    )


def is_local(tokenizer: str) -> bool:
    """Whether it is a folder rather than a hub id."""
    return Path(tokenizer).is_dir() or tokenizer.startswith((".", "/", "~"))


def check_tokenizer(name: str) -> None:
    """Raises ConfigError if the folder, or the mirror's, holds none. One of the hub is known when it is fetched."""
    folder = tokenizer_folder(name)
    if folder is not None and not any((folder / file).is_file() for file in TOKENIZERS):
        raise ConfigError(
            f"tokenizer {name!r} is neither a folder with a tokenizer nor a hub id: "
            f"{'it holds no tokenizer.json' if folder.is_dir() else 'there is no such folder'}"
        )


def tokenizer_folder(name: str) -> Path | None:
    """The local folder of a tokenizer; None for one that comes from the hub."""
    mirrored = mirror.stand_in(name)
    return Path(mirrored or name).expanduser() if mirrored or is_local(name) else None


@cache
def vocabulary_of(tokenizer: str) -> int | None:
    """How many tokens text is made of, from a local tokenizer.json; None if there is none that can be read.

    Added tokens are not counted: a model need not have a place for one that no text holds.
    """
    folder = tokenizer_folder(tokenizer)
    try:
        facts = json.loads(((folder or Path()) / "tokenizer.json").read_text(encoding="utf-8"))
        pieces = facts["model"]["vocab"]  # a mapping, or a list of pairs
        return len({piece if isinstance(piece, str) else piece[0] for piece in pieces})
    except (OSError, ValueError, LookupError, TypeError):
        return None
