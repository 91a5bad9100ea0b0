"""FLOPs of what runs, counted as it runs, so that no method has to say what it costs.

2 for each position and weight of a matrix, forward, and as much again for each gradient that a backward pass takes: of
the weight, of what was multiplied with it. Attention counts by its causal formula, over the whole row, whatever its
kernel skips. Norms, activations, and what gradient checkpointing runs again do not count.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn
from transformers import PreTrainedModel

from undo.lm.shape import Attention, seen_twice
from undo.lm.tokens import Tokens


class Flops:
    """What was counted while a `counted` context lasted, and in backward passes through what ran in it."""

    def __init__(self) -> None:
        self.total = 0


Blocks = Sequence[nn.Module] | nn.ModuleList
_open: list[Flops] = []


@contextmanager
def counted() -> Iterator[Flops]:
    count = Flops()
    _open.append(count)
    try:
        yield count
    finally:
        _open.remove(count)


@contextmanager
def uncounted() -> Iterator[None]:
    """For what is not part of the training: no context around this one counts it."""
    kept = _open.copy()
    _open.clear()
    try:
        yield
    finally:
        _open[:] = kept


def add(flops: int) -> None:
    _add(_open, flops)


def body_ran(model: PreTrainedModel, blocks: Blocks, tokens: Tokens, output: Tensor) -> None:
    """A forward pass through `blocks`, the model's first ones; a backward pass counts when `output` gets a gradient."""
    if not _open:
        return
    positions, length = tokens.input_ids.numel(), tokens.input_ids.shape[1]
    forward, backward = _per_position(model, blocks, length)
    add(positions * forward)
    if output.requires_grad:
        counts = tuple(_open)
        output.register_hook(lambda _: _add(counts, positions * backward))


def _add(counts: Iterable[Flops], flops: int) -> None:
    for count in counts:
        count.total += flops


def _per_position(model: PreTrainedModel, blocks: Blocks, length: int) -> tuple[int, int]:
    """Of a forward pass, and of the backward pass behind it: down to the lowest trained weight, and not further."""
    attention, forward, backward = Attention.of(model.config, len(blocks)), 0, 0
    below = any(weight.requires_grad for weight in model.get_input_embeddings().parameters())
    for block, slides in zip(blocks, attention.slides, strict=True):
        reaches = below or any(w.requires_grad for name, w in block.named_parameters() if "att" in name)
        seen = seen_twice(length, attention.window if slides else None)
        scores = 2 * seen * attention.heads * attention.head_dim
        forward, backward = forward + scores, backward + 2 * scores * reaches
        for weight in block.parameters():  # in the order in which they are used
            if weight.ndim > 1:
                forward += 2 * weight.numel()
                backward += 2 * weight.numel() * (weight.requires_grad + below)
            below = below or weight.requires_grad
    return forward, backward
