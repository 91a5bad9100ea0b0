"""Losses from hidden states and the head. No tensor of [tokens, vocabulary] is ever held in full.

Logits are formed for a chunk of tokens at a time, and the gradient of the chunk while it is still at hand, so peak
memory does not grow with the number of tokens. Every loss is a sum over the labelled positions of a batch divided by
`tokens.total`. Under autocast the products with the head are bf16; whatever is done to logits is fp32 (fp64 for fp64
inputs). Without gradients the same functions only evaluate.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from undo.config import ConfigError
from undo.models import Head, head, hidden_states
from undo.tokens import Tokens


def cross_entropy(model: PreTrainedModel, tokens: Tokens) -> Tensor:
    """Mean of -log p(label) over the labels. Scalar."""
    target = CrossEntropy(tokens.at_labels(tokens.labels))
    return linear_loss(tokens.at_labels(hidden_states(model, tokens)), head(model), target) / tokens.total


def uniform_kl(model: PreTrainedModel, tokens: Tokens) -> Tensor:
    """Mean of KL(U || p) over the labelled positions, U uniform over the vocabulary (Section 4, Method B). Scalar."""
    return linear_loss(tokens.at_labels(hidden_states(model, tokens)), head(model), UniformKL()) / tokens.total


def forward_kl(student: PreTrainedModel, teacher: PreTrainedModel, tokens: Tokens) -> Tensor:
    """Mean of KL(teacher || student) over the labelled positions (Section 4, Unlearn-and-Distill). Scalar."""
    with torch.no_grad():
        target = ForwardKL(tokens.at_labels(hidden_states(teacher, tokens)), head(teacher))
    return linear_loss(tokens.at_labels(hidden_states(student, tokens)), head(student), target) / tokens.total


def undial_kl(student: PreTrainedModel, teacher: PreTrainedModel, tokens: Tokens, strength: float) -> Tensor:
    """Mean of KL(q || student), q = softmax(teacher's logits - strength x onehot(label)), over the labels. Scalar."""
    with torch.no_grad():
        target = LoweredKL(
            tokens.at_labels(hidden_states(teacher, tokens)), head(teacher), tokens.at_labels(tokens.labels), strength
        )
    return linear_loss(tokens.at_labels(hidden_states(student, tokens)), head(student), target) / tokens.total


def document_losses(model: PreTrainedModel, tokens: Tokens) -> Tensor:
    """-log p of each document that has labels, in order, without a gradient. [documents]"""
    with torch.no_grad():
        hidden = tokens.at_labels(hidden_states(model, tokens))
        return _add_up(linear_losses(hidden, head(model), CrossEntropy(tokens.at_labels(tokens.labels))), tokens)[0]


def of_documents(
    hidden: Sequence[Tensor], head: Head, tokens: Tokens, outer: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Sum over documents of outer(-log p(document) as read from each of `hidden`, its number of labels). Scalar.

    hidden: each [rows, length, width]; outer: [len(hidden), documents] and [documents] -> [documents], any smooth
    function. So the gradient of a token's loss depends on its whole document: the losses are evaluated once for their
    values, and once more weighted with the derivative of `outer`.
    """
    target = CrossEntropy(tokens.at_labels(tokens.labels))
    read = [tokens.at_labels(h) for h in hidden]
    sums, document = zip(*(_add_up(linear_losses(h, head, target), tokens) for h in read), strict=True)
    lengths = document[0].bincount(minlength=len(sums[0])).to(sums[0].dtype)
    with torch.enable_grad():
        value = outer(nll := torch.stack(sums).requires_grad_(), lengths).sum()
        (weights,) = torch.autograd.grad(value, nll)
    if not torch.is_grad_enabled():
        return value.detach()
    every = CrossEntropy(target.labels.repeat(len(read)))  # all at once: one gradient of the head, not one for each
    weighted = linear_loss(torch.cat(read), head, every, weights[:, document[0]].flatten())
    return weighted + (value - weighted).detach()  # the gradient of the first, the value of the second


def _add_up(losses: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """Losses of the labels, summed by document: [documents], and which of them each label belongs to."""
    kinds, document = tokens.at_labels(tokens.document).unique(return_inverse=True)
    return losses.new_zeros(len(kinds)).index_add_(0, document, losses), document


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


def activation_mse(hidden: Tensor, target: Tensor, tokens: Tokens) -> Tensor:
    """Mean squared difference over the labelled positions and all dimensions.

    hidden: [rows, length, width]; target: the same shape, or [width]. Scalar.
    """
    target = tokens.at_labels(target) if target.ndim == hidden.ndim else target
    return (tokens.at_labels(hidden).float() - target.float()).square().mean(-1).sum() / tokens.total


# --- from hidden states to a sum over tokens, tile by tile ---------------------------------------------------------


class Grid(NamedTuple):
    """Logits are formed for `rows` tokens at a time, in tiles of `columns` words of the vocabulary."""

    rows: int
    columns: int


def grid(weight: Tensor, tokens: int) -> Grid:
    """On a CPU a tile stays in the cache for all that is done to it; a GPU wants few and large operations."""
    vocabulary = weight.shape[0]
    if weight.is_cuda:
        rows, columns = (1 << 29) // vocabulary, vocabulary  # 2 GiB of fp32 logits at once
    else:
        rows, columns = min(512, (1 << 25) // vocabulary), min(2048, vocabulary)  # 128 MiB at most
    return Grid(max(1, min(rows, tokens)), columns)


class Logits:
    """Logits of a chunk of tokens: `tiles` hold them divided by `scale`, `log_z` is their log-sum-exp, [tokens, 1]."""

    def __init__(self, head: Head, grid: Grid, precision: torch.dtype) -> None:
        self.softcap, self.scale = head.softcap, head.softcap or 1.0
        self.weights = [weight.to(precision) for weight in head.weight.split(grid.columns)]
        self._biases = None if head.bias is None else (head.bias / self.scale).split(grid.columns)
        shape = len(self.weights), grid.rows, grid.columns  # one buffer for all chunks: fresh memory costs page faults
        self._buffer = head.weight.new_empty(shape, dtype=torch.promote_types(head.weight.dtype, torch.float32))

    def products(self, hidden: Tensor) -> Iterator[Tensor]:
        """(hidden @ weight.T + bias) / scale, tile by tile, without the softcap."""
        hidden = (hidden / self.scale).to(self.weights[0].dtype)
        for i, (weight, buffer) in enumerate(zip(self.weights, self._buffer, strict=True)):
            tile = _product(hidden, weight.T, out=buffer[: len(hidden), : len(weight)])
            yield tile if self._biases is None else tile.add_(self._biases[i])

    def read(self, hidden: Tensor) -> None:
        self.tiles, sums = [], []
        for tile in self.products(hidden):
            sums.append(_fused(_squash, tile, self.softcap))
            self.tiles.append(tile)
        self.log_z = torch.cat(sums, 1).logsumexp(1, keepdim=True)


@dataclass(frozen=True)
class CrossEntropy:
    """-log p(label)."""

    labels: Tensor  # [tokens]
    teacher = None

    def pull(self, p: Logits, q: Logits | None, chunk: slice, start: int, i: int, form: "Form") -> "Pull":
        return _fused(_cross_entropy, p.tiles[i], p.log_z, p.scale, self.labels[chunk, None] - start, form)


@dataclass(frozen=True)
class UniformKL:
    """KL(U || p) = log-sum-exp(z) - mean(z) - log V."""

    teacher = None

    def pull(self, p: Logits, q: Logits | None, chunk: slice, start: int, i: int, form: "Form") -> "Pull":
        return _fused(_uniform_kl, p.tiles[i], p.log_z, p.scale, sum(map(len, p.weights)), form)


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
        return _fused(_forward_kl, p.tiles[i], p.log_z, p.scale, q.tiles[i], q.log_z, q.scale, share, form)


class Form(NamedTuple):
    """What is wanted of a tile."""

    gradient: torch.dtype | None  # None: only the loss
    capped: bool


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
    form = Form(None if grad_hidden is grad_weight is grad_bias is None else precision, head.softcap is not None)
    student, teacher = Logits(head, size, precision), None
    if target.teacher is not None:
        same_vocabulary(len(target.teacher[1].weight), len(head.weight))
        teacher = Logits(target.teacher[1], size, precision)
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
            loss, grad = target.pull(student, teacher, chunk, start, i, form)
            losses[chunk] += loss.flatten()
            if grad is not None and weights is not None:
                grad *= weights[chunk, None]
            if grad is not None and grad_hidden is not None:
                _add_product(grad_hidden[chunk], grad, weight, anew=i == 0)
            if grad is not None and grad_weight is not None:
                _add_product(grad_weight[start : start + len(weight)], grad.T, inputs, anew=first == 0)
            if grad is not None and grad_bias is not None:
                part = grad_bias[start : start + len(weight)]
                part.copy_(grad.sum(0, dtype=part.dtype) if first == 0 else part + grad.sum(0, dtype=part.dtype))
    return losses if weights is None else losses * weights


def same_vocabulary(teacher: int, student: int) -> None:
    """Raises ConfigError where a student cannot learn from a teacher, word by word."""
    if teacher != student:
        raise ConfigError(
            f"the teacher has a vocabulary of {teacher}, the student one of {student}\n"
            f"a student learns from a teacher's probabilities of the same words: choose models of one family"
        )


# --- products in `precision` with fp32 results ---------------------------------------------------------------------


def _product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=out.dtype, out=out)  # pyright: ignore[reportCallIssue]
    return out.copy_(torch.mm(a, b))  # a CPU rounds bf16 products


def _add_product(total: Tensor, a: Tensor, b: Tensor, anew: bool) -> None:
    """total += a @ b, or total = a @ b."""
    if a.dtype == total.dtype:
        total.addmm_(a, b, beta=0 if anew else 1)
    elif anew:
        _product(a, b, out=total)
    else:
        total += torch.mm(a, b, out_dtype=total.dtype) if a.is_cuda else torch.mm(a, b)  # pyright: ignore[reportCallIssue]


# --- what is done to a tile of logits. Compiled on a GPU, where every pass over memory counts ----------------------


def _fused(function: Callable[..., Any], tile: Tensor, *others: Any) -> Any:
    return (_compiled(function) if tile.is_cuda else function)(tile, *others)


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)


def _squash(tile: Tensor, softcap: float | None) -> Tensor:
    """Products -> logits / scale, in place; returns the log-sum-exp of the logits, [tokens, 1]."""
    if softcap is None:
        return tile.logsumexp(1, keepdim=True)
    if softcap > 64:  # exp could overflow
        return tile.tanh_().mul(softcap).logsumexp(1, keepdim=True)
    return tile.tanh_().mul(softcap).exp_().sum(1, keepdim=True).log_()


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
