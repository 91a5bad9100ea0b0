"""The prepare stage: texts by role, generated or given, become a tokenizer, token stores and validation problems."""

import json
import shutil
import time
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from undo.config.files import write_atomically
from undo.config.mistakes import ConfigError
from undo.config.schema import ROLES, Count, Frozen, Role, RunName, Share, StageConfig
from undo.data.problems import OPERATIONS
from undo.prepare_data.arithmetic import ArithmeticWorld
from undo.prepare_data.text import Paired, Source
from undo.prepare_data.tokenizer import fetch_tokenizer, load_tokenizer, train_byte_pairs, train_words
from undo.runs.run import Run
from undo.train.stage import Stage

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

    from undo.data.documents import Ends
    from undo.data.store import TokenStore

TEXTS_AT_ONCE, CHARACTERS_AT_ONCE = 4096, 8_000_000


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


class Prepare(StageConfig):
    """What to generate or read, how to tokenise it, and how long the packed rows are."""

    world: ArithmeticWorld | None = None
    data: dict[Role, Source] = Field(default={})  # text, of the roles that no world generates
    tokenizer: Annotated[WordTokenizer | BytePairTokenizer, Field(discriminator="name")] | str | None = (
        None  # str: a folder or a hub id
    )
    tokenizer_from: RunName | None = None  # instead: another prepare run's
    add_bos: bool | None = None  # a token before each document; None: as the tokenizer's family has it
    add_eos: bool | None = None  # a token behind each document; None: where the tokenizer has one
    length: Count  # tokens in a row
    shortest: Count = 50  # shorter documents of text are dropped (Appendix A)
    validation_share: Share = 5e-4  # of the documents of text
    validation_tokens: Count = 500_000  # of each role's text, at most
    seed: int = 42  # of the split into training and validation

    def check(self) -> None:
        for role, source in self.data.items():
            for key, place in source.places.items():
                try:
                    place.files()
                except ConfigError as error:
                    where = f"data.{role}.{key}path"
                    if self.variant:  # for all variants, it would give one file to all of them
                        where = f"variants.{self.variant}.{where}"
                    raise ConfigError(
                        f"data.{role}: {error}\n"
                        f"give your own files with prepare.{where}=... "
                        f"(run_prepare.py: without `prepare.`)"
                    ) from None

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
    check_disk(cfg, run.folder)
    problems = [problem for role in OPERATIONS for problem in cfg.world.validation(role)] if cfg.world else []
    if problems:
        write_atomically(run.folder / "problems.jsonl", "".join(json.dumps(asdict(p)) + "\n" for p in problems))
    tokenizer, vocab_size = make_tokenizer(cfg, (p.text for p in problems), run)
    ends = document_ends(cfg, tokenizer, run)
    stores: dict[str, TokenStore] = {}
    for role in ROLES:
        if role in cfg.data:
            made = split_text(cfg, role, tokenizer, ends, vocab_size, run.folder)
        elif cfg.world is not None and role in OPERATIONS:
            held_out = (p.text for p in problems if p.role == role and p.seen)
            made = [
                store(
                    documents(texts, tokenizer, ends, f"{part}/{role}"),
                    run.folder / part / role,
                    cfg.length,
                    vocab_size,
                )
                for part, texts in (("train", (p.text for p in cfg.world.train(role))), ("validation", held_out))
            ]
        else:
            continue
        stores |= {f"{part}/{role}": s for part, s in zip(("train", "validation"), made, strict=True)}
    run.finish(
        vocab_size=vocab_size,
        bos=ends.bos,
        eos=ends.eos,
        tokens={name: store.tokens for name, store in stores.items()},
        fill={name: round(store.tokens / (len(store) * store.length), 4) for name, store in stores.items()},
    )


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
    from undo.data.documents import Ends, family_ends, recorded_ends

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


def split_text(
    cfg: Prepare, role: Role, tokenizer: "PreTrainedTokenizerBase", ends: "Ends", vocab_size: int, folder: Path
) -> "list[TokenStore]":
    """Stores of training and validation text, split by document in one reading.

    An interrupted reading continues after the last window written; earlier documents are read but not tokenised.
    """
    import numpy as np

    from undo.data.store import WINDOW, WINDOW_TOKENS, StoreWriter, TokenStore, batched

    source, (train, validation) = cfg.data[role], (folder / part / role for part in ("train", "validation"))
    if train.exists():
        return [TokenStore(train), TokenStore(validation)]
    writer = StoreWriter(train, cfg.length, vocab_size, source.paired)
    rng = np.random.default_rng([cfg.seed, ROLES.index(role)])
    state = writer.state or {
        "documents": 0,
        "held_out": [],
        "rng": rng.bit_generator.state,
        "complete": False,
        "last": 0,
    }
    rng.bit_generator.state = state["rng"]
    held_out = [np.array(ids, dtype=np.uint32) for ids in state["held_out"]]
    read, last = state["documents"], state["last"]  # documents, and a checksum of the last one's tokens

    def training() -> "Iterator[np.ndarray]":
        nonlocal read, last
        room, tokens = cfg.validation_tokens - sum(map(len, held_out)), writer.tokens
        if source.tokens is not None and tokens >= source.tokens:
            return
        again = min(read, 1)  # the last document that an earlier attempt read: is it still where it was?
        texts = islice(source.texts(), read - again, None)
        found = documents(texts, tokenizer, ends, f"train/{role}", source.tokens, read - again, tokens)
        if again and zlib.crc32(next(found, np.zeros(0)).tobytes()) != last:
            raise ConfigError(
                f"data.{role}: the text has changed since it was read in part; its document {read:,} is another one\n"
                f"prepare it afresh with --force"
            )
        for ids in found:
            read, last = read + 1, zlib.crc32(ids.tobytes())
            if len(ids) < cfg.shortest:
                continue
            if rng.random() < cfg.validation_share and room > 0:
                held_out.append(ids[:room])
                room -= len(held_out[-1])
                continue
            yield ids
            tokens += len(ids)
            if source.tokens is not None and tokens >= source.tokens:
                return

    def reached(complete: bool) -> dict[str, Any]:
        kept = [ids.tolist() for ids in held_out]
        state = {"documents": read, "last": last, "held_out": kept, "complete": complete}
        return state | {"rng": rng.bit_generator.state}

    if not state["complete"]:
        for window in batched(training(), WINDOW, WINDOW_TOKENS):
            writer.add(window, reached(complete=False))
        if writer.tokens == 0 or not held_out:
            what = "training" if writer.tokens == 0 else "validation"
            raise ConfigError(
                f"data.{role}: no document of {cfg.shortest} tokens or more is left for {what}\n"
                f"give more text, or another validation_share (now {cfg.validation_share:g}) or shortest"
            )
        writer.add([], reached(complete=True))
    print(f"validation/{role}: {sum(map(len, held_out)):,} tokens of at most {cfg.validation_tokens:,}", flush=True)
    # before the other appears: then both are there
    made = store(iter(held_out), validation, cfg.length, vocab_size, source.paired)
    return [writer.finish(), made]


def store(
    texts: "Iterator[np.ndarray]", folder: Path, length: int, vocab_size: int, paired: bool = False
) -> "TokenStore":
    """Pack documents, unless an interrupted run had already finished this store."""
    from undo.data.store import TokenStore, pack

    return TokenStore(folder) if folder.exists() else pack(texts, folder, length, vocab_size, paired)


def documents(
    texts: Iterable[str],
    tokenizer: "PreTrainedTokenizerBase",
    ends: "Ends",
    label: str,
    budget: int | None = None,
    count: int = 0,
    tokens: int = 0,
) -> "Iterator[np.ndarray]":
    """<bos> text <eos>, as uint32 arrays; progress is printed, and so stands in the launcher's table.

    Of a pair, the tokens are marked that the other document does not have at the same place.
    `count` documents with `tokens` tokens were read by an earlier attempt. Many texts at a time: the tokenizer then
    works on all cores (its own threads; 1.8 times one core's speed on two).
    """
    import numpy as np

    from undo.data.store import batched
    from undo.lm.tokens import MARK

    around = sum(token is not None for token in ends)
    begin, before = time.monotonic(), tokens
    for some in batched(texts, TEXTS_AT_ONCE, CHARACTERS_AT_ONCE):
        encoded = tokenizer(some, add_special_tokens=False)["input_ids"]
        count, tokens = count + len(encoded), tokens + sum(map(len, encoded)) + around * len(encoded)
        speed = (tokens - before) / max(time.monotonic() - begin, 1e-9)
        of = "" if budget is None else f" of {budget:,} ({min(1, tokens / budget):.0%})"
        print(f"{label}: {count:,} documents, {tokens:,}{of} tokens, {speed:,.0f} tokens/s", flush=True)
        pairs = [text.other for text in some if isinstance(text, Paired)]
        others: Iterator[list[int]] = iter(tokenizer(pairs, add_special_tokens=False)["input_ids"] if pairs else [])
        for text, ids in zip(some, encoded, strict=True):
            made = ends.enclose(ids)
            if isinstance(text, Paired):
                other = ends.enclose(next(others))
                shared = min(len(made), len(other))
                differs = np.ones(len(made), dtype=bool)
                differs[:shared] = made[:shared] != other[:shared]
                made[differs] |= np.uint32(MARK)
            yield made


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


STAGE = Stage(
    "prepare", Prepare, prepare, __name__, "Data (Appendices A and D.2.2, Table 11)", row_tokens=lambda cfg: cfg.length
)
