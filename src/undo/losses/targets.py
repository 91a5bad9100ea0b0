"""What a loss does to a tile of logits: each formula, and beside it its gradient by the logits.

A tile holds the logits of a chunk of tokens for some columns of the vocabulary. `target.pull(p, q, chunk, start, i,
precision)` gives the share of tile i, which begins at column `start`, in each token's loss, and in that precision the
gradient by the head's products, unless it is None. p and q are the student's and the teacher's logits of the chunk.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from undo.lm.read import Head
from undo.losses.logits import Logits, fused, in_one_kernel, less_at, located, log_sum_exp, over_scale


@dataclass(frozen=True)
class CrossEntropy:
    """-log p(label)."""

    labels: Tensor  # [tokens]
    teacher = None

    def pull(self, p: Logits, q: Logits | None, chunk: slice, start: int, i: int, precision: "Precision") -> "Pull":
        return fused(_cross_entropy, p.tiles[i], p.log_z, p.softcap, self.labels[chunk, None] - start, precision)


@dataclass(frozen=True)
class UniformKL:
    """KL(U || p) = log-sum-exp(z) - mean(z) - log V."""

    teacher = None

    def pull(self, p: Logits, q: Logits | None, chunk: slice, start: int, i: int, precision: "Precision") -> "Pull":
        return fused(_uniform_kl, p.tiles[i], p.log_z, p.softcap, sum(map(len, p.weights)), precision)


@dataclass(frozen=True)
class ForwardKL:
    """KL(q || p), q the teacher's distribution."""

    hidden: Tensor  # [tokens, teacher's hidden]
    head: Head

    @property
    def teacher(self) -> tuple[Tensor, Head]:
        return self.hidden, self.head

    def pull(self, p: Logits, q: Logits | None, chunk: slice, start: int, i: int, precision: "Precision") -> "Pull":
        assert q is not None
        share = len(p.weights[i]) / sum(map(len, p.weights))
        tiles = p.tiles[i], p.log_z, p.softcap, q.tiles[i], q.log_z, q.softcap
        return fused(_forward_kl, *tiles, share, precision, self.lowered(q, chunk, start, i))

    def lowered(self, q: Logits, chunk: slice, start: int, i: int) -> "tuple[Tensor, Tensor] | None":
        """At which columns, and by how much, the teacher's tile i is yet to be lowered. [tokens, 1] each."""
        return None


@dataclass(frozen=True)
class LoweredKL(ForwardKL):
    """KL(q' || p), q' the teacher's distribution after its logit of the label was lowered by `strength`."""

    labels: Tensor  # [tokens]
    strength: float

    def lower(self, q: Logits, chunk: slice) -> None:
        """The teacher's log-sum-exp anew: as a correction of the old one, a sure label would cancel."""
        start, sums = 0, []
        for i, tile in enumerate(q.tiles):
            sums.append(fused(_lowered_log_z, tile, q.softcap, *self._amounts(q, chunk, start, i)))
            start += tile.shape[1]
        q.log_z = torch.cat(sums, 1).logsumexp(1, keepdim=True)

    def lowered(self, q: Logits, chunk: slice, start: int, i: int) -> "tuple[Tensor, Tensor] | None":
        return self._amounts(q, chunk, start, i) if in_one_kernel(q.tiles[i]) else None  # else `lower` did it in place

    def _amounts(self, q: Logits, chunk: slice, start: int, i: int) -> "tuple[Tensor, Tensor]":
        columns, here = located(self.labels[chunk, None] - start, q.tiles[i])
        return columns, here * (self.strength / q.scale)


Target = CrossEntropy | UniformKL | ForwardKL | LoweredKL
Precision = torch.dtype | None  # of the gradient; None: only the loss
Pull = tuple[Tensor, Tensor | None]  # a tile's share of each token's loss, and the gradient by its products


def _probabilities(tile: Tensor, log_z: Tensor, scale: float) -> Tensor:
    return torch.add(-log_z, tile, alpha=scale).exp_()


def _through_softcap(gradient: Tensor, tile: Tensor, softcap: float | None, precision: torch.dtype) -> Tensor:
    if softcap is not None:
        gradient = torch.ops.aten.tanh_backward(gradient, tile)
    return gradient.to(precision)


def _cross_entropy(tile: Tensor, log_z: Tensor, softcap: float | None, labels: Tensor, precision: Precision) -> Pull:
    """labels: [tokens, 1], counted from the tile's first column; most are in another tile."""
    tile, scale = over_scale(tile, softcap), softcap or 1.0
    columns, here = located(labels, tile)
    loss = here * (log_z - scale * tile.gather(1, columns))
    if precision is None:
        return loss, None
    return loss, _through_softcap(less_at(_probabilities(tile, log_z, scale), columns, here), tile, softcap, precision)


def _uniform_kl(tile: Tensor, log_z: Tensor, softcap: float | None, vocabulary: int, precision: Precision) -> Pull:
    tile, scale = over_scale(tile, softcap), softcap or 1.0
    loss = ((log_z[:, 0] - math.log(vocabulary)) * tile.shape[1] - scale * tile.sum(1)) / vocabulary
    if precision is None:
        return loss, None
    return loss, _through_softcap(_probabilities(tile, log_z, scale).sub_(1 / vocabulary), tile, softcap, precision)


def _forward_kl(
    tile: Tensor,
    log_z: Tensor,
    softcap: float | None,
    teacher: Tensor,
    teacher_log_z: Tensor,
    teacher_softcap: float | None,
    share: float,
    precision: Precision,
    lowered: tuple[Tensor, Tensor] | None,
) -> Pull:
    """`share` of the vocabulary is in the tile: what does not depend on the word is spread over the tiles."""
    tile, scale = over_scale(tile, softcap), softcap or 1.0
    teacher, teacher_scale = over_scale(teacher, teacher_softcap), teacher_softcap or 1.0
    if lowered is not None:
        teacher = less_at(teacher, *lowered)
    q = _probabilities(teacher, teacher_log_z, teacher_scale)
    difference = torch.sub(teacher, tile, alpha=scale / teacher_scale).mul_(q)
    loss = difference.sum(1) * teacher_scale + (log_z - teacher_log_z)[:, 0] * share
    if precision is None:
        return loss, None
    return loss, _through_softcap(_probabilities(tile, log_z, scale).sub_(q), tile, softcap, precision)


def _lowered_log_z(tile: Tensor, softcap: float | None, columns: Tensor, amounts: Tensor) -> Tensor:
    """The log-sum-exp, [tokens, 1], of a tile that was read, lowered over its scale at one column of each token."""
    return log_sum_exp(less_at(over_scale(tile, softcap), columns, amounts) * (softcap or 1.0))
