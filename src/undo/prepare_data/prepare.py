"""The prepare stage of a world that is generated."""

import json
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from undo.config import Count, Frozen, StageConfig
from undo.prepare_data.arithmetic import OPERATIONS, ArithmeticWorld
from undo.prepare_data.tokenizer import train_tokenizer
from undo.run import Run, write_atomically
from undo.stage import Stage
from undo.tokens import TokenStore, pack

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEXTS_AT_ONCE = 4096


class WordTokenizer(Frozen):
    """A tokenizer made from the world's own words."""

    name: Literal["words"] = "words"
    vocab_size: Count


class Prepare(StageConfig):
    """What to generate, how to tokenise it, and how long the packed rows are."""

    world: ArithmeticWorld
    tokenizer: WordTokenizer
    length: Count  # tokens in a row


def prepare(cfg: Prepare, run: Run) -> None:
    from transformers import AutoTokenizer

    for partial in run.folder.glob("*/*.partial"):
        shutil.rmtree(partial)
    problems = [problem for role in OPERATIONS for problem in cfg.world.validation(role)]
    write_atomically(run.folder / "problems.jsonl", "".join(json.dumps(asdict(p)) + "\n" for p in problems))
    training = (problem.text for role in OPERATIONS for problem in cfg.world.train(role))
    train_tokenizer(chain(training, (p.text for p in problems)), cfg.tokenizer.vocab_size, run.folder / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(run.folder / "tokenizer")
    stores: dict[str, TokenStore] = {}
    for role in OPERATIONS:
        validation = (p.text for p in problems if p.role == role and p.seen)
        for name, texts in (("train", (p.text for p in cfg.world.train(role))), ("validation", validation)):
            stores[f"{name}/{role}"] = _store(texts, tokenizer, run.folder / name / role, cfg)
    run.finish(
        vocab_size=len(tokenizer),
        tokens={name: store.tokens for name, store in stores.items()},
        fill={name: round(store.tokens / (len(store) * store.length), 4) for name, store in stores.items()},
    )


def _store(texts: Iterable[str], tokenizer: "PreTrainedTokenizerBase", folder: Path, cfg: Prepare) -> TokenStore:
    """Pack texts; what an interrupted run had finished is kept."""
    if folder.exists():
        return TokenStore(folder)
    label = f"{folder.parent.name}/{folder.name}"
    return pack(documents(texts, tokenizer, label), folder, cfg.length, cfg.tokenizer.vocab_size)


def documents(texts: Iterable[str], tokenizer: "PreTrainedTokenizerBase", label: str) -> Iterator[np.ndarray]:
    """<bos> text <eos>, as int64 arrays; progress is printed, and so stands in the launcher's table.

    Many texts at a time: the tokenizer then works on all cores (its own threads; 1.8 times one core's speed on two).
    """
    texts, bos, eos = iter(texts), tokenizer.bos_token_id, tokenizer.eos_token_id
    begin, count, tokens = time.monotonic(), 0, 0
    while some := list(islice(texts, TEXTS_AT_ONCE)):
        encoded = tokenizer(some, add_special_tokens=False)["input_ids"]
        count, tokens = count + len(encoded), tokens + sum(map(len, encoded)) + 2 * len(encoded)
        speed = tokens / max(time.monotonic() - begin, 1e-9)
        print(f"{label}: {count:,} documents, {tokens:,} tokens, {speed:,.0f} tokens/s", flush=True)
        for ids in encoded:
            yield np.array([bos, *ids, eos], dtype=np.uint32)


STAGE = Stage("prepare", Prepare, prepare, ("-m", "undo.prepare_data"))
