"""The losses, each a function of a model and tokens. Their gradients stand beside their formulas in `targets.py`.

Every loss is a mean over the labelled positions of a batch, all its micro-batches together, and 0 where it has none. No
tensor of [tokens, vocabulary] is ever held in full (`linear.py`). Without gradients the same functions only evaluate.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from undo.lm.read import Head, head, hidden_states
from undo.lm.tokens import Tokens, check_tokens
from undo.losses.linear import linear_loss, linear_losses
from undo.losses.targets import CrossEntropy, ForwardKL, LoweredKL, UniformKL


def cross_entropy(model: PreTrainedModel, tokens: Tokens) -> Tensor:
    """Mean of -log p(label) over the labels. Scalar."""
    check_tokens(tokens)
    target = CrossEntropy(tokens.at_labels(tokens.labels))
    return tokens.per_label(linear_loss(tokens.at_labels(hidden_states(model, tokens)), head(model), target))


def uniform_kl(model: PreTrainedModel, tokens: Tokens) -> Tensor:
    """Mean of KL(U || p) over the labelled positions, U uniform over the vocabulary (Section 4, Method B). Scalar."""
    check_tokens(tokens)
    return tokens.per_label(linear_loss(tokens.at_labels(hidden_states(model, tokens)), head(model), UniformKL()))


def forward_kl(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    tokens: Tokens,
    vocabulary: int | None = None,
    read: Callable[[PreTrainedModel, Tokens], Tensor] = hidden_states,
) -> Tensor:
    """Mean of KL(teacher || student) over the labelled positions (Section 4, Unlearn-and-Distill). Scalar.

    vocabulary: compare the first so many logits, each side normalised over them, where two models of one tokenizer are
    padded to different widths; a student's padding beyond is not trained. None: their heads must be of one width.
    read: how the teacher's hidden states are had, if they are remembered.
    """
    check_tokens(tokens)
    with torch.no_grad():
        target = ForwardKL(tokens.at_labels(read(teacher, tokens)), head(teacher).first(vocabulary))
    hidden = tokens.at_labels(hidden_states(student, tokens))
    return tokens.per_label(linear_loss(hidden, head(student).first(vocabulary), target))


def undial_kl(student: PreTrainedModel, teacher: PreTrainedModel, tokens: Tokens, strength: float) -> Tensor:
    """Mean of KL(q || student), q = softmax(teacher's logits - strength x onehot(label)), over the labels. Scalar."""
    check_tokens(tokens)
    with torch.no_grad():
        target = LoweredKL(
            tokens.at_labels(hidden_states(teacher, tokens)), head(teacher), tokens.at_labels(tokens.labels), strength
        )
    return tokens.per_label(linear_loss(tokens.at_labels(hidden_states(student, tokens)), head(student), target))


def document_losses(model: PreTrainedModel, tokens: Tokens) -> Tensor:
    """-log p of each document that has labels, in order, without a gradient. [documents]"""
    check_tokens(tokens)
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


def activation_mse(hidden: Tensor, target: Tensor, tokens: Tokens) -> Tensor:
    """Mean squared difference over all positions of documents with a label, and all dimensions.

    hidden: [rows, length, width]; target: the same shape, or [width]. Scalar.
    """
    squared = (hidden.float() - target.float()).square().mean(-1)
    return torch.where(tokens.counted, squared, 0.0).sum() / max(1, tokens.positions_counted)
