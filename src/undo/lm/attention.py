"""Attention over packed rows: the masks that keep documents apart, and exact softcapped attention for a CPU."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, Final, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

from undo.config.mistakes import ConfigError
from undo.lm.tokens import Tokens

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


BLOCK: Final = 128  # queries


class Blocks(NamedTuple):
    """The mask of blocked attention: for each block of queries, its first query, its first key, and which it sees."""

    starts: list[int]
    first_keys: list[int]
    masks: list[Tensor]  # additive, [rows, 1, 1, queries, keys]; the last key is the block's last query


_shared: list[dict[Any, tuple[Tensor, Any]]] = []  # positions, which keep their id as long as they stand here; a mask


@contextmanager
def shared() -> Iterator[None]:
    """While it lasts, a mask is made once for all that read the same positions in one way: teacher and student.

    The masks end with it. Batches that are kept longer, for evaluation, would hold more in masks than in tokens.
    """
    _shared.append({})
    try:
        yield
    finally:
        _shared.pop()


def masks(model: PreTrainedModel, tokens: Tokens) -> "Tensor | BlockMask | Blocks | dict[str, Any]":
    """A token sees itself and what precedes it in its own document, in sliding layers not beyond their window.

    By kind of layer for a model that has kinds, else the one mask that all its layers share.
    """
    config, length = model.config, tokens.positions.shape[1]
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    window = window if window is not None and length > window else None  # else sliding layers see what all see
    if kinds is None:
        return _mask(model, tokens, window)
    if unknown := sorted(set(kinds) - {"full_attention", "sliding_attention"}):
        raise unsupported(model, f"documents cannot be separated in layers of {', '.join(unknown)}")
    full = _mask(model, tokens, None) if window is None or "full_attention" in kinds else None
    return {"full_attention": full, "sliding_attention": full if window is None else _mask(model, tokens, window)}


def _mask(model: PreTrainedModel, tokens: Tokens, window: int | None) -> "Tensor | BlockMask | Blocks":
    device, attention = tokens.positions.device.type, cast(str, model.config._attn_implementation)
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else model.dtype
    if not _shared:
        return _made(tokens.positions, attention, window, dtype)
    kind = (id(tokens.positions), attention, window, dtype)
    if kind not in _shared[-1]:
        _shared[-1][kind] = tokens.positions, _made(tokens.positions, attention, window, dtype)
    return _shared[-1][kind][1]


def _made(positions: Tensor, attention: str, window: int | None, dtype: torch.dtype) -> "Tensor | BlockMask | Blocks":
    document = (positions == 0).cumsum(1)
    if attention == "flex_attention":
        return _block_mask(document, window)
    if attention == "blocked":
        return _blocks(positions, document, dtype, window)
    visible = (document[:, None, :, None] == document[:, None, None, :]).tril()  # [rows, 1, length, length]
    if window is not None:
        visible = visible.triu(1 - window)
    return visible if attention == "sdpa" else _additive(visible, dtype)


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill_(~visible, torch.finfo(dtype).min)


def _blocks(positions: Tensor, document: Tensor, dtype: torch.dtype, window: int | None) -> Blocks:
    length = positions.shape[1]
    where = torch.arange(length, device=positions.device)
    first_keys = (where - positions).amin(0)  # where the earliest document begins that a query of any row belongs to
    if window is not None:
        first_keys = first_keys.maximum(where - window + 1)
    starts = list(range(0, length, BLOCK))
    firsts = first_keys[starts].tolist()
    masks = []
    for start, first in zip(starts, firsts, strict=True):
        queries, keys = slice(start, min(start + BLOCK, length)), slice(first, min(start + BLOCK, length))
        visible = document[:, queries, None] == document[:, None, keys]
        visible &= where[queries, None] >= where[keys]
        if window is not None:
            visible &= where[queries, None] - where[keys] < window
        masks.append(_additive(visible[:, None, None], dtype))
    return Blocks(starts, firsts, masks)


def blocked_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | Blocks | None,
    scaling: float,
    softcap: float | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Exact softcapped attention for a CPU: blocks of queries against the keys that one of them can see.

    Keys in the future or in earlier documents are never multiplied, and a block's scores stay in the cache.
    query: [rows, heads, length, width]; key, value: [rows, kv heads, length, width] -> [rows, length, heads, width].
    """
    if not isinstance(attention_mask, Blocks):  # a call that is not ours, such as generate()
        return eager_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, softcap=softcap, **options
        )
    rows, heads, length, width = query.shape
    kv_heads = key.shape[1]
    query = query.reshape(rows, kv_heads, heads // kv_heads, length, width) * (scaling / (softcap or 1.0))
    key, value = key.unsqueeze(2), value.unsqueeze(2)
    outputs = []
    for start, first, mask in zip(*attention_mask, strict=True):
        end = first + mask.shape[-1]
        scores = query[..., start:end, :] @ key[..., first:end, :].mT
        scores = mask + scores if softcap is None else torch.add(mask, scores.tanh_(), alpha=softcap)
        weights = scores.softmax(-1, dtype=torch.float32 if scores.dtype == torch.bfloat16 else None)
        outputs.append(weights.to(value.dtype) @ value[..., first:end, :])
    return torch.cat(outputs, 3).reshape(rows, heads, length, width).transpose(1, 2), None


AttentionInterface.register("blocked", blocked_attention)
AttentionMaskInterface.register("blocked", eager_mask)


def _block_mask(document: Tensor, window: int | None) -> "BlockMask":
    """Blocks that no token sees are skipped by the kernel. On CUDA the mask is compiled: it is never held densely."""

    def sees(row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        own = (query >= key) & (document[row, query] == document[row, key])
        return own if window is None else own & (query - key < window)

    rows, length = document.shape
    with torch.no_grad(), torch.autocast(document.device.type, enabled=False):  # else it is compiled for each way anew
        return _create_block_mask(document.is_cuda)(sees, rows, None, length, length, document.device)


@cache
def _create_block_mask(compiled: bool) -> "Callable[..., BlockMask]":
    """torch's own. Where it is compiled, once for all masks."""
    from torch.nn.attention.flex_attention import create_block_mask

    return torch.compile(create_block_mask) if compiled else create_block_mask


def unsupported(model: PreTrainedModel, reason: str) -> ConfigError:
    return ConfigError(f"{type(model).__name__} cannot be used here: {reason}")
