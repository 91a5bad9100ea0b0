"""What a language model reads: a batch of packed rows, and how documents are laid into one."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Final, Self

import numpy as np

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


IGNORE: Final = -100  # the label of a position without a target
MARK: Final = 1 << 31  # beside the token, in stores of pairs: the other document of the pair has another token there


@dataclass(frozen=True)
class Tokens:
    """A batch of packed rows. `labels[b, t]` is the token that follows `input_ids[b, t]` in its document, or IGNORE.

    input_ids, positions, labels: int64 [rows, length]. A position of 0 starts a document: attention does not reach
    across it. `total` is the number of labels, and `documents` that of documents with labels, in the *whole* batch of
    the step, over all micro-batches and devices: losses are sums divided by one of them, so that micro-batch gradients
    add up to the gradient of the whole batch. `marked`, bool [rows, length], is where an input differs from the other
    document of its pair; None: nowhere. `counted_in_all` is the number of positions of documents with labels in the
    whole batch; None: `total` + `documents`, as where each token but a document's first is a label.
    """

    input_ids: "torch.Tensor"
    positions: "torch.Tensor"
    labels: "torch.Tensor"
    total: int
    documents: int
    marked: "torch.Tensor | None" = None
    counted_in_all: int | None = None

    @classmethod
    def of(
        cls,
        input_ids: "torch.Tensor",
        attention_mask: "torch.Tensor | None" = None,
        labels: "torch.Tensor | None" = None,
    ) -> Self:
        """A batch as a Hugging Face tokenizer makes it, each row a document: the door to the losses from outside.

        input_ids: int [rows, length]. attention_mask: [rows, length], 0 where a row is padded, on the left or on the
        right; None: nowhere. labels: as transformers has them, not shifted, and -100 where there is no target; None:
        every token is one. Raises ValueError for other shapes, or a mask with holes.
        """
        import torch

        if input_ids.ndim != 2:
            raise ValueError(f"input_ids must be [rows, length], not of shape {tuple(input_ids.shape)}")
        real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        targets = input_ids if labels is None else labels
        if real.shape != input_ids.shape or targets.shape != input_ids.shape:
            raise ValueError("attention_mask and labels must have the shape of input_ids")
        starts = real & ~torch.cat([torch.zeros_like(real[:, :1]), real[:, :-1]], 1)  # where a document begins
        if bool((starts.sum(1) > 1).any()):
            raise ValueError("attention_mask has a hole: the tokens of a row must stand side by side")
        where = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        ends = ~real & torch.cat([torch.zeros_like(real[:, :1]), real[:, :-1]], 1)  # where padding begins again
        positions = where - torch.where(starts | ends, where, 0).cummax(1).values
        shifted = torch.full_like(input_ids, IGNORE, dtype=torch.int64)
        follows = real[:, :-1] & real[:, 1:]
        shifted[:, :-1] = targets[:, 1:].masked_fill(~follows, IGNORE)
        has_labels = (shifted != IGNORE).any(1)
        labelled, documents = int((shifted != IGNORE).sum()), int(has_labels.sum())
        counted = int(real[has_labels].sum())
        return cls(input_ids.long(), positions, shifted, labelled, documents, counted_in_all=counted)

    def rows(self, start: int, stop: int) -> Self:
        part = slice(start, stop)
        return replace(
            self,
            input_ids=self.input_ids[part],
            positions=self.positions[part],
            labels=self.labels[part],
            marked=None if self.marked is None else self.marked[part],
        )

    def labelled(self, where: "torch.Tensor") -> Self:
        """Without the labels outside `where`, bool [rows, length]. `total` and `documents` stay those of the batch."""
        return replace(self, labels=self.labels.masked_fill(~where, IGNORE))

    def per_label(self, total: "torch.Tensor") -> "torch.Tensor":
        """A sum over labels as a mean over those of the whole batch; a batch without any has the mean 0."""
        return total / max(1, self.total)

    def per_document(self, total: "torch.Tensor") -> "torch.Tensor":
        """A sum over documents as a mean over those of the whole batch; a batch without any has the mean 0."""
        return total / max(1, self.documents)

    def micro_batches(self, rows: int | None) -> Iterator[Self]:
        size = rows or len(self.input_ids)
        for start in range(0, len(self.input_ids), size):
            yield self.rows(start, start + size)

    @cached_property
    def _labelled(self) -> "torch.Tensor":
        """Where the labels are in the flattened rows, [labels]."""
        return (self.labels.flatten() != IGNORE).nonzero()[:, 0]

    @property
    def content(self) -> tuple[int, bytes]:
        """What a model reads of this, byte for byte: batches that are equal in it have the same hidden states."""
        here: Tokens = self.__dict__.get("_before_it_moved", self)  # a GPU would be waited for
        return here.input_ids.shape[1], b"".join(t.cpu().numpy().tobytes() for t in (here.input_ids, here.positions))

    @property
    def counted(self) -> "torch.Tensor":
        """Whether each position belongs to a document with a label, its last one included: bool [rows, length]."""
        document = self.document.flatten() - 1
        labels = self.labels.new_zeros(len(document)).index_add_(0, document, (self.labels.flatten() != IGNORE).long())
        return labels[document].view(self.labels.shape) > 0

    @property
    def positions_counted(self) -> int:
        """The number of `counted` positions in the whole batch of the step."""
        return self.total + self.documents if self.counted_in_all is None else self.counted_in_all

    @property
    def document(self) -> "torch.Tensor":
        """The number of the document that each position belongs to, counted over all rows: [rows, length]."""
        return (self.positions == 0).flatten().cumsum(0).reshape(self.positions.shape)

    def at_labels(self, values: "torch.Tensor") -> "torch.Tensor":
        """The labelled positions of [rows, length, ...] -> [labels, ...]."""
        return values.flatten(0, 1).index_select(0, self._labelled)

    def to(self, device: "torch.device") -> Self:
        moved = replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=True),
            positions=self.positions.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            marked=None if self.marked is None else self.marked.to(device, non_blocking=True),
        )
        moved.__dict__["_labelled"] = self._labelled.to(device, non_blocking=True)  # a GPU would be waited for
        moved.__dict__["_before_it_moved"] = self.__dict__.get("_before_it_moved", self)
        return moved


Batch = Mapping[str, Tokens]


def check_tokens(tokens: object) -> None:
    """Raises TypeError with the way out for whatever is not a Tokens: a tensor, or a batch of a tokenizer."""
    if not isinstance(tokens, Tokens):
        raise TypeError(
            f"this needs a Tokens, not a {type(tokens).__name__}; make one with Tokens.of(input_ids, attention_mask)"
        )


def token_ids(texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    """The ids of each text, without <bos> and <eos>. A control token that is spelled in it is text."""
    if not texts:  # the library wants one
        return []
    return tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)["input_ids"]  # pyright: ignore[reportReturnType]


def counts(lengths: np.ndarray) -> tuple[int, int]:
    """How many labels pieces of these lengths have, and how many of the pieces have one: no token need be read."""
    return int(lengths.sum()) - len(lengths), int((lengths > 1).sum())


def collate(rows: Iterable[list[np.ndarray]], length: int | None = None) -> Tokens:
    """Rows of document pieces -> Tokens, padded on the right with id 0 to `length` or to the longest row."""
    import torch

    rows = list(rows)
    width = length or max(sum(map(len, row)) for row in rows)
    ids = np.zeros((len(rows), width), dtype=np.int64)
    positions = np.zeros((len(rows), width), dtype=np.int64)
    labels = np.full((len(rows), width), IGNORE, dtype=np.int64)
    marked = np.zeros((len(rows), width), dtype=bool)
    for i, row in enumerate(rows):
        end = 0
        for piece in row:
            start, end = end, end + len(piece)
            ids[i, start:end] = piece & (MARK - 1)
            positions[i, start:end] = np.arange(len(piece))
            labels[i, start : end - 1] = ids[i, start + 1 : end]
            marked[i, start:end] = piece >= MARK
        positions[i, end:] = np.arange(width - end)  # padding is a document of its own
    total, documents = counts(np.array([len(piece) for row in rows for piece in row], dtype=np.int64))
    return Tokens(
        torch.from_numpy(ids),
        torch.from_numpy(positions),
        torch.from_numpy(labels),
        total,
        documents,
        torch.from_numpy(marked) if marked.any() else None,
    )
