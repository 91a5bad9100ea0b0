"""Tokenizers: words for a world made of templates, byte pairs for any text, or one that exists already.

Tokenizers made here keep Gemma-2's ids of <pad>, <eos> and <bos>, and decode exactly.
"""

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from undo.config import mirror
from undo.config.mistakes import ConfigError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

SPECIAL: Final = ("<pad>", "<eos>", "<bos>", "<unk>")  # their ids are their places
PIECE: Final = r" ?\d+| ?[A-Za-z]+| ?[^A-Za-z\d\s]"


def load_tokenizer(name: str) -> "PreTrainedTokenizerBase":
    """A tokenizer from a folder, the hub or the mirror. Raises ConfigError if it is missing or gated."""
    from huggingface_hub.errors import GatedRepoError
    from transformers import AutoTokenizer

    from undo.config.secrets import find_token

    try:
        return AutoTokenizer.from_pretrained(located(name), token=find_token("hf_token.txt", "HF_TOKEN"))
    except (OSError, ValueError) as error:
        if isinstance(error, GatedRepoError) or isinstance(error.__cause__, GatedRepoError):
            raise ConfigError(
                f"tokenizer {name} is gated: ask for access at https://huggingface.co/{name},\n"
                f"then put your token into tokens/hf_token.txt or HF_TOKEN; or give a folder with tokenizer=<path>"
            ) from None
        raise ConfigError(
            f"tokenizer {name!r} is neither a folder with a tokenizer nor a hub id that can be reached\n"
            f"give another one with tokenizer=<path>; a gated one needs a token in tokens/hf_token.txt; or --mirror"
        ) from None


def located(name: str) -> str:
    """The folder that a name means, of the user's own or of the mirror; else the hub id that it is."""
    return os.path.expanduser(name) if Path(name).expanduser().is_dir() else mirror.stand_in(name) or name


def fetch_tokenizer(name: str, folder: Path) -> None:
    """Copy a tokenizer from a folder, the mirror or the hub, byte for byte. Raises ConfigError as `load_tokenizer`."""
    from huggingface_hub import snapshot_download

    from undo.config.secrets import find_token
    from undo.lm.vocabulary import FILES, copy_tokenizer

    load_tokenizer(name)
    source = Path(located(name))
    if not source.is_dir():
        token = find_token("hf_token.txt", "HF_TOKEN")
        source = Path(snapshot_download(name, token=token, allow_patterns=[*FILES, "config.json"]))
    copy_tokenizer(source, folder)


def train_byte_pairs(texts: Iterable[str], vocab_size: int, folder: Path, split_digits: bool = True) -> None:
    """Byte-level BPE. Raises ConfigError if the texts are too few for the size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    splits = [pre_tokenizers.Digits(individual_digits=True)] if split_digits else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() < vocab_size:
        raise ConfigError(
            f"the text gives {tokenizer.get_vocab_size()} tokens only; set tokenizer.vocab_size to that or less"
        )
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="<bos> $A", special_tokens=[("<bos>", SPECIAL.index("<bos>"))]
    )
    _wrap(PreTrainedTokenizerFast, tokenizer).save_pretrained(folder)


def _wrap(kind: Any, tokenizer: "Tokenizer") -> "PreTrainedTokenizerBase":
    return kind(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>")


def train_words(texts: Iterable[str], vocab_size: int, folder: Path) -> None:
    """Each word, digit or sign is a token, together with the space before it. The most frequent get the lowest ids.

    Raises ConfigError if the texts have more pieces than `vocab_size` allows.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    split = pre_tokenizers.Split(Regex(PIECE), behavior="isolated")
    counts = Counter(piece for text in texts for piece, _ in split.pre_tokenize_str(" " + text))
    pieces = [piece for piece, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]
    if len(pieces) + len(SPECIAL) > vocab_size:
        raise ConfigError(
            f"the texts have {len(pieces)} different words; with {len(SPECIAL)} special ones they exceed {vocab_size}"
        )
    vocabulary = {piece: i for i, piece in enumerate((*SPECIAL, *pieces))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = split  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.normalizer = normalizers.Prepend(" ")  # the first word is the same token as elsewhere
    tokenizer.decoder = decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 1, 0)])  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="<bos> $A", special_tokens=[("<bos>", SPECIAL.index("<bos>"))]
    )
    _wrap(PreTrainedTokenizerFast, tokenizer).save_pretrained(folder)
