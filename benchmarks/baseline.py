"""The plain way, written from the formulas in the manner of the authors' code: the other side of every ratio.

Full logits in fp32, text padded to the maximum length, one prompt decoded at a time, every layer and the head run
whether or not they are used. `fixed` marks what a reader of that code would mend in one line each.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  # its usual name
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from undo.data.problems import Problem
from undo.lm.tokens import IGNORE


def capped(hidden: Tensor, weight: Tensor, softcap: float = 30.0) -> Tensor:
    """As the model's own forward does: product, division, tanh, multiplication, each a new tensor."""
    logits = hidden @ weight.T
    logits = logits / softcap
    logits = torch.tanh(logits)
    return logits * softcap


def shifted(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and the tokens that follow them, as copies: [rows, length, ...] -> [rows, length - 1, ...]."""
    return logits[:, :-1, :].contiguous(), labels[:, 1:].contiguous()


def forward_kl(teacher: Tensor, student: Tensor, labels: Tensor) -> Tensor:
    """Logits of both models, and the text; the softmax of the teacher is taken twice, each time from a masked copy."""
    teacher, targets = shifted(teacher, labels)
    student, _ = shifted(student, labels)
    mask = targets != IGNORE
    target, log_target = F.softmax(teacher[mask], -1), F.log_softmax(teacher[mask], -1)
    return (target * (log_target - F.log_softmax(student[mask], -1))).sum(-1).mean()


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    logits, targets = shifted(logits, labels)
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORE, reduction="none").mean()


def uniform_kl(logits: Tensor, labels: Tensor) -> Tensor:
    logits, targets = shifted(logits, labels)
    uniform = torch.ones_like(logits)
    target, log_target = F.softmax(uniform, -1), F.log_softmax(uniform, -1)
    divergence = (target * (log_target - F.log_softmax(logits, -1))).sum(-1)
    mask = targets != IGNORE
    return (divergence * mask).sum() / mask.sum()


def rmu(model: PreTrainedModel, reference: PreTrainedModel, ids: Tensor, layer: int, target: Tensor) -> Tensor:
    """Three forward passes through all layers and the head, of which one hidden state each is used."""
    forget, retain = ids
    hidden = model(forget, output_hidden_states=True).hidden_states[layer + 1]
    kept = model(retain, output_hidden_states=True).hidden_states[layer + 1]
    with torch.no_grad():
        frozen = reference(retain, output_hidden_states=True).hidden_states[layer + 1]
    return F.mse_loss(hidden, target.expand_as(hidden)) + 1200 * F.mse_loss(kept, frozen)


def padded(documents: Sequence[np.ndarray], rows: int, length: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Batches of `rows` documents, each cut or padded to `length`: input_ids, attention_mask, labels."""
    for start in range(0, len(documents), rows):
        part = documents[start : start + rows]
        ids, mask = np.zeros((len(part), length), np.int64), np.zeros((len(part), length), np.int64)
        for i, document in enumerate(part):
            kept = document[:length]
            ids[i, : len(kept)], mask[i, : len(kept)] = kept, 1
        labels = np.full_like(ids, IGNORE)
        labels[:, :-1] = np.where(mask[:, 1:] == 1, ids[:, 1:], IGNORE)
        yield torch.from_numpy(ids), torch.from_numpy(mask), torch.from_numpy(labels)


def validation_loss(model: PreTrainedModel, documents: Sequence[np.ndarray], rows: int, length: int) -> float:
    """Mean cross entropy per token, from full logits of padded batches."""
    total, count = 0.0, 0
    for ids, mask, labels in padded(documents, rows, length):
        ids, mask, labels = (t.to(model.device) for t in (ids, mask, labels))
        logits = model(ids, attention_mask=mask, use_cache=False).logits
        total += F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum").item()
        count += int((labels != IGNORE).sum())
    return total / count


def accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    at_once: int = 1,
    new_tokens: int = 4,
) -> float:
    """Greedy decoding with the library's generate(), `at_once` prompts at a time, padded on the left."""
    hits, tokenizer.padding_side = 0, "left"
    for start in range(0, len(problems), at_once):
        part = problems[start : start + at_once]
        inputs = tokenizer([p.prompt for p in part], return_tensors="pt", padding=True, return_token_type_ids=False)
        inputs = inputs.to(model.device)
        written = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)  # pyright: ignore
        texts = tokenizer.batch_decode(written, skip_special_tokens=True)
        hits += sum(text.strip() == p.text.strip() for text, p in zip(texts, part, strict=True))
    return hits / len(problems)
