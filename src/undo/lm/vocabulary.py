"""The tokenizer that lies in a model folder: its files, and whether two of them have the same tokens."""

import filecmp
import shutil
from pathlib import Path
from typing import Final

FILES: Final = (  # of a tokenizer and of its templates
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "chat_template*",
    "*chat_templates/*",
)


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of the tokenizer in a model folder; none if there is no tokenizer."""
    found = {path for pattern in FILES for path in folder.glob(pattern) if path.is_file()}
    return sorted(found) if any(path.name.startswith(("tokenizer", "vocab", "tekken")) for path in found) else []


def copy_tokenizer(folder: Path, to: Path) -> None:
    """Copy a tokenizer byte for byte, and the config of its model, which may be what says whose tokenizer it is."""
    config = [path for path in (folder / "config.json",) if path.exists()]
    for file in [*config, *tokenizer_files(folder)]:
        target = to / file.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)


def same_tokens(one: Path, other: Path) -> bool:
    """Whether the tokenizers of two folders give a text the same ids. Tokens that were added to one may differ.

    Where one of them has no tokenizer, nothing speaks against it.
    """
    if not (tokenizer_files(one) and tokenizer_files(other)):
        return True
    files = [folder / "tokenizer.json" for folder in (one, other)]
    if all(file.exists() for file in files) and filecmp.cmp(*files, shallow=False):
        return True
    return ordinary_tokens(one) == ordinary_tokens(other)


def ordinary_tokens(folder: Path) -> dict[str, int]:
    """The tokens that a folder's tokenizer makes of text, without those that were added, and their ids."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return dict(tokenizer.get_vocab().items() - tokenizer.get_added_vocab().items())


def shared_width(one: Path, other: Path, widths: tuple[int, int]) -> int | None:
    """How many logits two models of these widths share. None where they differ in more than padding, or may do so."""
    least = min(widths)
    if widths[0] == widths[1]:
        return least
    known = tokenizer_files(one) and tokenizer_files(other) and same_tokens(one, other)
    return least if known and max(ordinary_tokens(one).values()) < least else None
