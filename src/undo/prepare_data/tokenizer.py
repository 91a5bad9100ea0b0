"""A small tokenizer for worlds made of templates: a word, a digit or a sign is a token, with the space before it.

Digits stand alone, as in Gemma-2's own tokenizer, and so do the ids of <pad>, <eos> and <bos>. Decoding is exact.
"""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Final

SPECIAL: Final = ("<pad>", "<eos>", "<bos>", "<unk>")  # their ids are their places
PIECE: Final = r" ?\d+| ?[A-Za-z]+| ?[^A-Za-z\d\s]"


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: Path) -> None:
    """Write a tokenizer of the pieces of `texts`, the most frequent first, that AutoTokenizer loads.

    Raises ValueError if the texts have more pieces than `vocab_size` allows.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    split = pre_tokenizers.Split(Regex(PIECE), behavior="isolated")
    counts = Counter(piece for text in texts for piece, _ in split.pre_tokenize_str(" " + text))
    pieces = [piece for piece, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]
    if len(pieces) + len(SPECIAL) > vocab_size:
        raise ValueError(
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
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    )
    fast.save_pretrained(folder)
