"""The prepare stage: texts by role, generated or given, become a tokenizer, token stores and validation problems."""

import shutil
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, model_validator

from undo.config.mistakes import ConfigError
from undo.config.schema import ROLES, Count, Frozen, RunName
from undo.data.problems import OPERATIONS, write_problems
from undo.prepare_data.arithmetic import ArithmeticWorld
from undo.prepare_data.preconditions import check_texts, check_tokenizer, reach, taken_apart, vocabulary_of
from undo.prepare_data.text import Texts
from undo.prepare_data.tokenizer import fetch_tokenizer, load_tokenizer, train_byte_pairs, train_words
from undo.runs.directory import RunDirectory
from undo.runs.run import Run
from undo.train.stage import Stage

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

    from undo.data.ends import Ends
    from undo.data.store import TokenStore


class WordTokenizer(Frozen):
    """A tokenizer made from the world's own words."""

    name: Literal["words"] = "words"
    vocab_size: Count


class BytePairTokenizer(Frozen):
    """A byte-level BPE tokenizer trained on the beginning of each role's text."""

    name: Literal["byte_pairs"] = "byte_pairs"
    vocab_size: Count
    characters: Count = 10_000_000  # of each role
    split_digits: bool = True  # as Gemma-2 does; False: a frequent number is one token


class Prepare(Texts):
    """What to generate or read, how to tokenise it, and how long the packed rows are."""

    world: ArithmeticWorld | None = None
    tokenizer: Annotated[WordTokenizer | BytePairTokenizer, Field(discriminator="name")] | str | None = (
        None  # str: a folder or a hub id
    )
    tokenizer_from: RunName | None = None  # instead: another prepare run's
    add_bos: bool | None = None  # a token before each document; None: as the tokenizer's family has it
    add_eos: bool | None = None  # a token behind each document; None: where the tokenizer has one

    def check(self) -> None:
        if isinstance(self.tokenizer, str):
            check_tokenizer(self.tokenizer)
        check_texts(self)

    def notes(self) -> Iterator[str]:
        return taken_apart(self)

    @model_validator(mode="after")
    def _every_role_has_one_origin(self) -> Self:
        generated = set(OPERATIONS) if self.world else set()
        if twice := generated & set(self.data):
            raise ValueError(f"data.{min(twice)} is given, but the world generates it")
        missing = {"retain", "forget"} - generated - set(self.data)
        if missing and set(self.data) != {"auxiliary"}:  # what one distills on may be of neither role
            every = f"; `data.*` applies to every variant, {self.variant} too: use variants.<name>.data.* for one"
            raise ValueError(
                f"data.{max(missing)} is missing: give data.{max(missing)}.path or .hub, or a world"
                + every * bool(self.variant)
            )
        if (self.tokenizer is None) == (self.tokenizer_from is None):
            raise ValueError("give `tokenizer`, or `tokenizer_from`, a prepare run that has one")
        if isinstance(self.tokenizer, WordTokenizer) and self.data:
            raise ValueError("tokenizer.name=words knows a world's own words only; use byte_pairs, or a folder")
        return self


def prepare(cfg: Prepare, run: Run) -> None:
    from undo.prepare_data.documents import documents
    from undo.prepare_data.split import fingerprints, shared, split_text

    cfg.check()
    check_disk(cfg, run.folder)
    reach(cfg)
    problems = [problem for role in OPERATIONS for problem in cfg.world.validation(role)] if cfg.world else []
    if problems:
        write_problems(run.folder / "problems.jsonl", problems)
    tokenizer, vocab_size = make_tokenizer(cfg, (p.text for p in problems), run)
    ends = document_ends(cfg, tokenizer, run)
    stores: dict[str, TokenStore] = {}
    in_both: dict[str, int] = {}
    for role in ROLES:
        if role in cfg.data:
            made = split_text(cfg, role, tokenizer, ends, vocab_size, run.folder)
            for other in ROLES[: ROLES.index(role)]:
                if other in cfg.data:
                    in_both[f"{other}, {role}"] = shared(run.folder, other, role)
        elif cfg.world is not None and role in OPERATIONS:
            held_out = (p.text for p in problems if p.role == role and p.seen)
            made = []
            for part, texts in (("train", (p.text for p in cfg.world.train(role))), ("validation", held_out)):
                found = (document.ids for document in documents(texts, tokenizer, ends, f"{part}/{role}"))
                made.append(store(found, run.folder / part / role, cfg.length, vocab_size))
        else:
            continue
        stores |= {f"{part}/{role}": s for part, s in zip(("train", "validation"), made, strict=True)}
    places = {f"{role}{key and '.' + key[:-1]}": p for role, s in cfg.data.items() for key, p in s.places.items()}
    run.finish(
        sources={key: place.label for key, place in places.items()},
        vocab_size=vocab_size,
        bos=ends.bos,
        eos=ends.eos,
        tokens={name: store.tokens for name, store in stores.items()},
        fill={name: round(store.tokens / (len(store) * store.length), 4) for name, store in stores.items()},
        documents={role: stores[f"train/{role}"].facts["documents"] for role in cfg.data},
        shared=in_both,
        problems=len(problems),
    )
    shutil.rmtree(fingerprints(run.folder), ignore_errors=True)


def make_tokenizer(cfg: Prepare, problems: Iterable[str], run: Run) -> "tuple[PreTrainedTokenizerBase, int]":
    """Train it or fetch it, leave it in the run -> the tokenizer, and the vocabulary that a model needs for it."""
    folder, configured = run.folder / "tokenizer", 0
    if cfg.tokenizer_from is not None:
        configured = run.sibling(cfg.tokenizer_from).facts["vocab_size"]
    elif isinstance(cfg.tokenizer, Frozen):
        configured = cfg.tokenizer.vocab_size
    if not folder.exists():
        partial = folder.with_name("tokenizer.partial")
        shutil.rmtree(partial, ignore_errors=True)
        match cfg.tokenizer:
            case None:
                shutil.copytree(run.sibling(cfg.tokenizer_from or "").folder / "tokenizer", partial)
            case str() as name:
                fetch_tokenizer(name, partial)
            case WordTokenizer():
                train_words(chain(generated(cfg), problems), configured, partial)
            case BytePairTokenizer(characters=characters, split_digits=split_digits):
                texts = [*(source.texts() for source in cfg.data.values()), *([generated(cfg)] if cfg.world else [])]
                begun = chain.from_iterable(beginning(text, characters) for text in texts)
                train_byte_pairs(begun, configured, partial, split_digits)
        partial.rename(folder)
    tokenizer = load_tokenizer(str(folder))
    return tokenizer, max(len(tokenizer), configured)


def document_ends(cfg: Prepare, tokenizer: "PreTrainedTokenizerBase", run: Run) -> "Ends":
    """What encloses each document. With another prepare run's tokenizer it is that run's, unless the config says."""
    from undo.data.ends import Ends, family_ends, recorded_ends

    ends = family_ends(tokenizer, cfg.add_bos, cfg.add_eos)
    if cfg.tokenizer_from is not None:
        theirs = recorded_ends(run.sibling(cfg.tokenizer_from), tokenizer)
        ends = Ends(theirs.bos if cfg.add_bos is None else ends.bos, theirs.eos if cfg.add_eos is None else ends.eos)
    names = ["nothing" if token is None else repr(tokenizer.decode([token])) for token in ends]
    print("documents begin with {} and end with {}".format(*names), flush=True)
    return ends


def generated(cfg: Prepare) -> Iterator[str]:
    """The training texts of the world, if there is one."""
    return (p.text for role in OPERATIONS for p in cfg.world.train(role)) if cfg.world else iter(())


def beginning(texts: Iterable[str], characters: int) -> Iterator[str]:
    for text in texts:
        yield text
        characters -= len(text)
        if characters <= 0:
            return


def store(documents: "Iterator[np.ndarray]", folder: Path, length: int, vocab_size: int) -> "TokenStore":
    """Pack documents, unless an interrupted run had already finished this store."""
    from undo.data.store import TokenStore, pack

    return TokenStore(folder) if folder.exists() else pack(documents, folder, length, vocab_size)


def check_disk(cfg: Prepare, folder: Path) -> None:
    """Print how much disk space the text needs. Raises ConfigError if there is not enough."""
    from undo.data.store import token_bytes

    vocabulary = cfg.tokenizer.vocab_size if isinstance(cfg.tokenizer, Frozen) else 1 << 24  # at most, if not known
    sizes = [source.bytes_of_tokens(token_bytes(vocabulary, source.paired)) for source in cfg.data.values()]
    known, free = sum(size for size in sizes if size is not None), shutil.disk_usage(folder).free
    if cfg.data:
        unknown = " and what has no limit: set data.<role>.tokens" if None in sizes else ""
        print(f"needs at most about {known / 1e9:.2f} GB{unknown}; {free / 1e9:.1f} GB are free", flush=True)
    if known > free:
        raise ConfigError(
            f"{folder}: the text needs about {known / 1e9:.1f} GB, {free / 1e9:.1f} GB are free\n"
            f"set data.<role>.tokens to less, or choose another place with --runs"
        )


def vocabulary(cfg: Prepare, run: RunDirectory) -> int | None:
    """The size that is known before a model reads the data: one that is configured, or a local tokenizer's."""
    if isinstance(cfg.tokenizer, Frozen):
        return cfg.tokenizer.vocab_size
    name = str(run.folder / "tokenizer") if run.done else cfg.tokenizer
    return None if name is None else vocabulary_of(name)


STAGE = Stage(
    "prepare",
    Prepare,
    prepare,
    __name__,
    "Data (Appendices A and D.2.2, Table 11)",
    "demo length=64 --dry-run",
    row_tokens=lambda cfg: cfg.length,
    vocabulary=vocabulary,
    imports=("undo.data.store", "transformers:AutoTokenizer"),
)
