"""From hidden states and the head to a sum of losses over tokens, tile by tile.

Logits are formed for a chunk of tokens at a time, and the gradient of the chunk while its logits are still at hand, so
peak memory does not grow with the number of tokens. Under autocast the products with the head are bf16; everything
done to logits is fp32 (fp64 for fp64 inputs).
"""

from typing import Any

import torch
from torch import Tensor

from undo.config.mistakes import ConfigError
from undo.lm import flops
from undo.lm.read import Head
from undo.losses.logits import Logits, add_product, grid
from undo.losses.targets import LoweredKL, Target


@torch.no_grad()
def most_likely(hidden: Tensor, head: Head) -> Tensor:
    """The arg-max of each token's logits; the softcap is monotone and does not matter. -> int64 [tokens]."""
    kind, size = hidden.device.type, grid(head.weight, len(hidden))
    precision = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    with torch.autocast(kind, enabled=False):
        logits = Logits(head, size, precision)
        found = [hidden.new_empty(0, dtype=torch.int64)]
        for chunk in hidden.split(size.rows):
            best = [tile.max(1) for tile in logits.products(chunk)]
            values, columns = (torch.stack(part, 1) for part in zip(*best, strict=True))
            first = values.argmax(1, keepdim=True)  # the tile
            found.append((columns.gather(1, first) + first * size.columns)[:, 0])
        return torch.cat(found)


def linear_loss(hidden: Tensor, head: Head, target: Target, weights: Tensor | None = None) -> Tensor:
    """Sum of the target's loss over tokens, times `weights` [tokens] where given. hidden: [tokens, width].

    Scalar; 0 for no tokens.
    """
    kind = hidden.device.type  # autocast is asked here once, and from here on every precision is explicit
    precision = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    with torch.autocast(kind, enabled=False):
        if not torch.is_grad_enabled():
            return _sum_of_tiles(hidden, head, target, precision, weights).sum()
        return _LinearLoss.apply(hidden, head.weight, head.bias, head.softcap, target, precision, weights)  # pyright: ignore[reportReturnType]


@torch.no_grad()
def linear_losses(hidden: Tensor, head: Head, target: Target) -> Tensor:
    """The target's loss of each token, [tokens], without a gradient."""
    kind = hidden.device.type
    precision = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    with torch.autocast(kind, enabled=False):
        return _sum_of_tiles(hidden, head, target, precision, None)


class _LinearLoss(torch.autograd.Function):
    """The gradients are formed in the forward pass, while a tile's logits are at hand; backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        softcap: float | None,
        target: Target,
        precision: torch.dtype,
        weights: Tensor | None,
    ) -> Tensor:
        exact = torch.promote_types(hidden.dtype, torch.float32)
        wanted = zip((hidden, weight, bias), ctx.needs_input_grad, strict=False)
        ctx.gradients = [torch.empty_like(t, dtype=exact) if t is not None and want else None for t, want in wanted]
        return _sum_of_tiles(hidden, Head(weight, softcap, bias), target, precision, weights, *ctx.gradients).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("the gradient of a linear loss is scaled in place: it can be taken once only")
        return *(None if g is None else g.mul_(grad_output) for g in gradients), None, None, None, None


def _sum_of_tiles(
    hidden: Tensor,
    head: Head,
    target: Target,
    precision: torch.dtype,
    weights: Tensor | None,
    grad_hidden: Tensor | None = None,
    grad_weight: Tensor | None = None,
    grad_bias: Tensor | None = None,
) -> Tensor:
    """Each token's loss, summed over its tiles: [tokens]. Its gradients overwrite the last three, where given.

    Raises ConfigError for a teacher of another vocabulary.
    """
    size = grid(head.weight, len(hidden))
    gradient = None if grad_hidden is grad_weight is grad_bias is None else precision
    student, teacher = Logits(head, size, precision), None
    if target.teacher is not None:
        same_vocabulary(len(target.teacher[1].weight), len(head.weight))
        teacher = Logits(target.teacher[1], size, precision)
    products = 1 + (grad_hidden is not None) + (grad_weight is not None)
    flops.add(2 * len(hidden) * head.weight.numel() * products)
    if target.teacher is not None:
        flops.add(2 * len(hidden) * target.teacher[1].weight.numel())
    losses = hidden.new_zeros(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32))
    for total in (grad_weight, grad_bias):
        if len(hidden) == 0 and total is not None:
            total.zero_()
    for first in range(0, len(hidden), size.rows):
        chunk = slice(first, first + size.rows)
        student.read(hidden[chunk])
        if teacher is not None and target.teacher is not None:
            teacher.read(target.teacher[0][chunk])
            if isinstance(target, LoweredKL):
                target.lower(teacher, chunk)
        inputs = hidden[chunk].to(precision)
        for i, weight in enumerate(student.weights):
            start = i * size.columns
            loss, grad = target.pull(student, teacher, chunk, start, i, gradient)
            losses[chunk] += loss.flatten()
            if grad is not None and weights is not None:
                grad *= weights[chunk, None]
            if grad is not None and grad_hidden is not None:
                add_product(grad_hidden[chunk], grad, weight, anew=i == 0)
            if grad is not None and grad_weight is not None:
                add_product(grad_weight[start : start + len(weight)], grad.T, inputs, anew=first == 0)
            if grad is not None and grad_bias is not None:
                part = grad_bias[start : start + len(weight)]
                part.copy_(grad.sum(0, dtype=part.dtype) if first == 0 else part + grad.sum(0, dtype=part.dtype))
            if hidden.is_cuda:  # half of all logits; on a CPU a tile, and malloc would give it back to the system
                del grad
    return losses if weights is None else losses * weights


def same_vocabulary(teacher: int, student: int) -> None:
    """Raises ConfigError where a student cannot learn from a teacher, word by word."""
    if teacher != student:
        raise ConfigError(
            f"the teacher has a vocabulary of {teacher}, the student one of {student}\n"
            f"a student needs the probabilities of the same tokens: choose models of one family"
        )
