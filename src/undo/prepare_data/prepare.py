"""The prepare stage of a world that is generated."""

import json
import shutil
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

TEXTS_AT_ONCE = 10_000


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
        stores[f"train/{role}"] = _store(
            (p.text for p in cfg.world.train(role)), tokenizer, run.folder / "train" / role, cfg
        )
        stores[f"validation/{role}"] = _store(validation, tokenizer, run.folder / "validation" / role, cfg)
        print(f"{role}: {stores[f'train/{role}'].tokens:,} training tokens")
    run.finish(
        vocab_size=len(tokenizer),
        tokens={name: store.tokens for name, store in stores.items()},
        fill={name: round(store.tokens / (len(store) * store.length), 4) for name, store in stores.items()},
    )


def _store(texts: Iterable[str], tokenizer: "PreTrainedTokenizerBase", folder: Path, cfg: Prepare) -> TokenStore:
    """Pack texts; what an interrupted run had finished is kept."""
    if folder.exists():
        return TokenStore(folder)
    return pack(documents(texts, tokenizer), folder, cfg.length, cfg.tokenizer.vocab_size)


def documents(texts: Iterable[str], tokenizer: "PreTrainedTokenizerBase") -> Iterator[np.ndarray]:
    """<bos> text <eos>, as int64 arrays, tokenised many at a time."""
    texts, bos, eos = iter(texts), tokenizer.bos_token_id, tokenizer.eos_token_id
    while some := list(islice(texts, TEXTS_AT_ONCE)):
        for ids in tokenizer(some, add_special_tokens=False)["input_ids"]:
            yield np.array([bos, *ids, eos])


STAGE = Stage("prepare", Prepare, prepare, ("-m", "undo.prepare_data"))
