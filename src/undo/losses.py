"""Losses from hidden states and the head. No tensor of [tokens, vocabulary] is ever held in full.

Logits are formed for a chunk of tokens at a time, and the gradient of the chunk while it is still at hand, so peak
memory does not grow with the number of tokens. Every loss is a sum over the labelled positions of a batch divided by
`tokens.total`. Reductions are fp32 (fp64 for fp64 inputs).
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Gemma2ForCausalLM

from undo.models import Head, head, hidden_states
from undo.tokens import IGNORE, Tokens

CHUNK_ELEMENTS = 1 << 25  # logits held at once: 128 MiB in fp32


def cross_entropy(model: Gemma2ForCausalLM, tokens: Tokens) -> Tensor:
    """Mean of -log p(label) over the labels. Scalar."""
    mask = tokens.labels != IGNORE
    return (
        linear_loss(hidden_states(model, tokens)[mask], head(model), CrossEntropy(tokens.labels[mask])) / tokens.total
    )


def uniform_kl(model: Gemma2ForCausalLM, tokens: Tokens) -> Tensor:
    """Mean of KL(U || p) over the labelled positions, U uniform over the vocabulary (Section 4, Method B). Scalar."""
    mask = tokens.labels != IGNORE
    return linear_loss(hidden_states(model, tokens)[mask], head(model), UniformKL()) / tokens.total


def forward_kl(student: Gemma2ForCausalLM, teacher: Gemma2ForCausalLM, tokens: Tokens) -> Tensor:
    """Mean of KL(teacher || student) over the labelled positions (Section 4, Unlearn-and-Distill). Scalar."""
    mask = tokens.labels != IGNORE
    with torch.no_grad():
        target = ForwardKL(hidden_states(teacher, tokens)[mask], head(teacher))
    return linear_loss(hidden_states(student, tokens)[mask], head(student), target) / tokens.total


def activation_mse(hidden: Tensor, target: Tensor, tokens: Tokens) -> Tensor:
    """Mean squared difference over the labelled positions and all dimensions.

    hidden: [rows, length, width]; target: the same shape, or [width]. Scalar.
    """
    mask = tokens.labels != IGNORE
    target = target[mask] if target.ndim == hidden.ndim else target
    return (hidden[mask].float() - target.float()).square().mean(-1).sum() / tokens.total


# --- from hidden states to a sum over tokens, chunk by chunk -------------------------------------------------------


@dataclass(frozen=True)
class CrossEntropy:
    """-log p(label)."""

    labels: Tensor  # [tokens]

    def rows(self, chunk: slice, logits: Tensor) -> tuple[Tensor, Tensor]:
        labels = self.labels[chunk, None]
        log_z = logits.logsumexp(-1, keepdim=True)
        loss = (log_z - logits.gather(1, labels)).squeeze(1)
        gradient = logits.sub_(log_z).exp_()
        return loss, gradient.scatter_add_(1, labels, gradient.new_full(labels.shape, -1.0))


@dataclass(frozen=True)
class UniformKL:
    """KL(U || p) = log-sum-exp(z) - mean(z) - log V."""

    def rows(self, chunk: slice, logits: Tensor) -> tuple[Tensor, Tensor]:
        vocabulary = logits.shape[-1]
        log_z = logits.logsumexp(-1, keepdim=True)
        loss = log_z.squeeze(1) - logits.mean(-1) - math.log(vocabulary)
        return loss, logits.sub_(log_z).exp_().sub_(1 / vocabulary)


@dataclass(frozen=True)
class ForwardKL:
    """KL(q || p), q the teacher's distribution."""

    hidden: Tensor  # [tokens, teacher's hidden]
    head: Head

    def rows(self, chunk: slice, logits: Tensor) -> tuple[Tensor, Tensor]:
        log_q = project(self.hidden[chunk], self.head)
        log_q -= log_q.logsumexp(-1, keepdim=True)
        log_p = logits.sub_(logits.logsumexp(-1, keepdim=True))
        q = log_q.exp()
        loss = torch.linalg.vecdot(q, log_q.sub_(log_p))
        return loss, log_p.exp_().sub_(q)


Target = CrossEntropy | UniformKL | ForwardKL


def project(hidden: Tensor, head: Head) -> Tensor:
    """[tokens, hidden] -> logits [tokens, vocabulary], fp32 at least; the product itself follows autocast."""
    logits = hidden @ head.weight.T
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits if head.softcap is None else (logits / head.softcap).tanh_().mul_(head.softcap)


def linear_loss(hidden: Tensor, head: Head, target: Target) -> Tensor:
    """Sum of the target's loss over tokens. hidden: [tokens, width]. Scalar; 0 for no tokens."""
    return _LinearLoss.apply(hidden, head.weight, head.softcap, target)  # pyright: ignore[reportReturnType]


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, softcap: float | None, target: Target) -> Tensor:
        with_hidden, with_weight, *_ = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden) if with_hidden else None
        grad_weight = torch.zeros_like(weight) if with_weight else None
        total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        rows = max(1, CHUNK_ELEMENTS // weight.shape[0])
        for start in range(0, hidden.shape[0], rows):
            chunk = slice(start, start + rows)
            logits = project(hidden[chunk], Head(weight, softcap))
            slope = None
            if softcap is not None and (with_hidden or with_weight):
                slope = 1 - (logits / softcap).square_()  # of softcap * tanh(z / softcap)
            loss, grad = target.rows(chunk, logits)
            total += loss.sum()
            if slope is not None:
                grad *= slope
            grad = grad.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[chunk] = grad @ weight
            if grad_weight is not None:
                grad_weight += grad.T @ hidden[chunk]
        ctx.save_for_backward(*(g for g in (grad_hidden, grad_weight) if g is not None))
        ctx.wants = with_hidden, with_weight
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        saved = iter(ctx.saved_tensors)
        grads = [next(saved) * grad_output if wanted else None for wanted in ctx.wants]
        return grads[0], grads[1], None, None
