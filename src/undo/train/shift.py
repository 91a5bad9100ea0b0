"""Weights moved for a second gradient, and put back to the last bit."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from undo.train.gradient import Gradients


@contextmanager
def shifted(weights: Sequence[nn.Parameter], offsets: Iterable[Tensor | None]) -> Iterator[None]:
    """The weights plus their offsets (None: no offset) for as long as the context lasts.

    It holds a copy of the weights meanwhile. The offsets may be freed once they are added.
    """
    kept = [weight.detach().clone() for weight in weights]
    try:
        with torch.no_grad():
            for weight, offset in zip(weights, offsets, strict=True):
                if offset is not None:
                    weight.add_(offset)
                offset = None  # the last one, too, is gone when the gradient is taken
        yield
    finally:
        with torch.no_grad():
            for weight, value in zip(weights, kept, strict=True):
                weight.copy_(value)


def to_length(gradients: "Gradients", length: float) -> Iterator[Tensor | None]:
    """All gradients scaled together to a global 2-norm of `length`, or zero if they are all zero.

    They come one by one, since all of them together would be as large as the model.
    """
    norm = global_norm(gradients)
    factor = torch.where(norm > 0, length / norm, 0.0)
    return (None if g is None else g * factor for g in gradients)


def global_norm(gradients: "Gradients") -> Tensor:
    """The 2-norm over all gradients together, 0 if there are none. Scalar."""
    from undo.train import shard

    found = [g for g in gradients if g is not None]
    return shard.norm(found) if found else torch.zeros(())


def add(a: "Gradients", b: Iterable[Tensor | None], factor: Tensor | float = 1.0) -> "Gradients":
    """a + factor b, weight by weight."""
    return [x if y is None else factor * y if x is None else x + factor * y for x, y in zip(a, b, strict=True)]


def dot(a: "Gradients", b: Iterable[Tensor | None]) -> Tensor:
    """The inner product over all weights together. Scalar."""
    products = [(x * y).sum() for x, y in zip(a, b, strict=True) if x is not None and y is not None]
    return torch.stack(products).sum() if products else torch.zeros(())
