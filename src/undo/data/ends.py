"""How a document begins and ends: one convention for training, cross entropy and multiple choice, that of its family.

Positions keep packed documents apart, not these tokens: a family without a beginning (Qwen) has none here.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np

from undo.config.mistakes import ConfigError
from undo.runs.directory import RunDirectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Ends(NamedTuple):
    """The tokens before and behind a document; None: there is none."""

    bos: int | None
    eos: int | None

    def enclose(self, ids: Sequence[int]) -> np.ndarray:
        """<bos> ids <eos>, uint32 [tokens]."""
        before, behind = ([] if token is None else [token] for token in self)
        return np.array([*before, *ids, *behind], dtype=np.uint32)


def family_ends(tokenizer: "PreTrainedTokenizerBase", add_bos: bool | None = None, add_eos: bool | None = None) -> Ends:
    """The convention of a tokenizer's family.

    A document begins with <bos> if the tokenizer puts it there when it is asked for no more than a text's tokens
    (Gemma and Llama do, Qwen and Phi do not). It ends with <eos> where there is one: tokenizers leave the end to
    whoever makes the rows. add_bos, add_eos: say otherwise. Raises ConfigError where they ask for a token that is not
    there.
    """
    bos, eos = cast(tuple[int | None, int | None], (tokenizer.bos_token_id, tokenizer.eos_token_id))
    for key, wanted, token in (("add_bos", add_bos, bos), ("add_eos", add_eos, eos)):
        if wanted and token is None:
            end = "beginning" if key == "add_bos" else "end"
            raise ConfigError(f"{key}=true, but the tokenizer has no token for the {end} of a document; leave it out")
    if add_bos is None:
        add_bos = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
    return Ends(bos if add_bos else None, None if add_eos is False else eos)


def recorded_ends(data: RunDirectory, tokenizer: "PreTrainedTokenizerBase") -> Ends:
    """The convention of a prepare run, which its run.json holds; the family's where it holds none."""
    facts = data.facts if data.done else {}
    return Ends(facts["bos"], facts["eos"]) if "bos" in facts else family_ends(tokenizer)
