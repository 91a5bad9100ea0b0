"""What a loss does to a tile of logits: each formula, and beside it its gradient by the logits.

A tile holds the logits of a chunk of tokens for some columns of the vocabulary. `target.pull(p, q, chunk, start, i,
form)` gives the share of tile i, which begins at column `start`, in each token's loss, and the gradient by the head's
products. p and q are the student's and the teacher's logits of the chunk.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from undo.lm.read import Head
from undo.losses.logits import Logits, fused


class Form(NamedTuple):
    """What is wanted of a tile."""

    gradient: torch.dtype | None  # None: only the loss
    capped: bool


@dataclass(frozen=True)
class CrossEntropy:
    """-log p(label)."""

    labels: Tensor  # [tokens]
    teacher = None

    def pull(self, p: Logits, q: Logits | None, chunk: slice, start: int, i: int, form: "Form") -> "Pull":
        return fused(_cross_entropy, p.tiles[i], p.log_z, p.scale, self.labels[chunk, None] - start, form)


@dataclass(frozen=True)
class UniformKL:
    """KL(U || p) = log-sum-exp(z) - mean(z) - log V."""

    teacher = None

    def pull(self, p: Logits, q: Logits | None, chunk: slice, start: int, i: int, form: "Form") -> "Pull":
        return fused(_uniform_kl, p.tiles[i], p.log_z, p.scale, sum(map(len, p.weights)), form)


@dataclass(frozen=True)
class ForwardKL:
    """KL(q || p), q the teacher's distribution."""

    hidden: Tensor  # [tokens, teacher's hidden]
    head: Head

    @property
    def teacher(self) -> tuple[Tensor, Head]:
        return self.hidden, self.head

    def pull(self, p: Logits, q: Logits | None, chunk: slice, start: int, i: int, form: "Form") -> "Pull":
        assert q is not None
        share = len(p.weights[i]) / sum(map(len, p.weights))
        return fused(_forward_kl, p.tiles[i], p.log_z, p.scale, q.tiles[i], q.log_z, q.scale, share, form)


@dataclass(frozen=True)
class LoweredKL(ForwardKL):
    """KL(q' || p), q' the teacher's distribution after its logit of the label was lowered by `strength`."""

    labels: Tensor  # [tokens]
    strength: float

    def lower(self, q: Logits, chunk: slice) -> None:
        """Change the teacher's logits of a chunk, and their log-sum-exp, in place."""
        labels, start, sums = self.labels[chunk, None], 0, []
        for tile in q.tiles:
            here = ((labels >= start) & (labels < start + tile.shape[1])).to(tile.dtype)
            column = (labels - start).clamp(0, tile.shape[1] - 1)
            tile.scatter_add_(1, column, -here * (self.strength / q.scale))
            sums.append((tile * q.scale).logsumexp(1, keepdim=True))  # anew: a sure label would cancel
            start += tile.shape[1]
        q.log_z = torch.cat(sums, 1).logsumexp(1, keepdim=True)


Target = CrossEntropy | UniformKL | ForwardKL | LoweredKL
Pull = tuple[Tensor, Tensor | None]  # a tile's share of each token's loss, and the gradient by its products


def _probabilities(tile: Tensor, log_z: Tensor, scale: float) -> Tensor:
    return torch.add(-log_z, tile, alpha=scale).exp_()


def _through_softcap(gradient: Tensor, tile: Tensor, form: Form) -> Tensor:
    if form.capped:
        gradient = torch.ops.aten.tanh_backward(gradient, tile)
    return gradient.to(form.gradient)


def _cross_entropy(tile: Tensor, log_z: Tensor, scale: float, labels: Tensor, form: Form) -> Pull:
    """labels: [tokens, 1], counted from the tile's first column; most are in another tile."""
    here = ((labels >= 0) & (labels < tile.shape[1])).to(tile.dtype)
    labels = labels.clamp(0, tile.shape[1] - 1)
    loss = here * (log_z - scale * tile.gather(1, labels))
    if form.gradient is None:
        return loss, None
    return loss, _through_softcap(_probabilities(tile, log_z, scale).scatter_add_(1, labels, -here), tile, form)


def _uniform_kl(tile: Tensor, log_z: Tensor, scale: float, vocabulary: int, form: Form) -> Pull:
    loss = ((log_z[:, 0] - math.log(vocabulary)) * tile.shape[1] - scale * tile.sum(1)) / vocabulary
    if form.gradient is None:
        return loss, None
    return loss, _through_softcap(_probabilities(tile, log_z, scale).sub_(1 / vocabulary), tile, form)


def _forward_kl(
    tile: Tensor,
    log_z: Tensor,
    scale: float,
    teacher: Tensor,
    teacher_log_z: Tensor,
    teacher_scale: float,
    share: float,
    form: Form,
) -> Pull:
    """`share` of the vocabulary is in the tile: what does not depend on the word is spread over the tiles."""
    q = _probabilities(teacher, teacher_log_z, teacher_scale)
    difference = torch.sub(teacher, tile, alpha=scale / teacher_scale).mul_(q)
    loss = difference.sum(1) * teacher_scale + (log_z - teacher_log_z)[:, 0] * share
    if form.gradient is None:
        return loss, None
    return loss, _through_softcap(_probabilities(tile, log_z, scale).sub_(q), tile, form)
