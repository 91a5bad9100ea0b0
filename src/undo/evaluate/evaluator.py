"""What all evaluations share."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Final, NamedTuple

from undo.config.schema import Count, Frozen
from undo.runs.directory import RunDirectory

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


SHARE: Final = "validation_share"  # how much of the set was used; stands beside the numbers of a subset


class Outcomes(NamedTuple):
    """Of one role, item by item: what was scored, and out of how much. Their sums' quotient is the performance.

    An item is what chance decides over as a whole: a problem or question (1 or 0 of 1), a batch of packed documents
    (nats of so many tokens).
    """

    scored: list[float]
    weights: list[float]


class Measured(NamedTuple):
    """Named numbers, always with `retain` and `forget`, the number of tokens it took, and the items behind them."""

    values: dict[str, float]
    tokens: int
    outcomes: Mapping[str, Outcomes] = {}  # by role; none where nobody kept them


# Given the model, and whether to use the whole validation set or the config's fixed subset of it. Takes no gradient.
Evaluator = Callable[["PreTrainedModel", bool], Measured]


class EvaluationConfig(Frozen):
    """Base of all evaluations."""

    higher_is_better: ClassVar[bool]
    unit: ClassVar[str]  # for axes and tables

    rows: Count = 256  # packed rows in one forward pass
    subset: Count | None = None  # size of the fixed subset for periodic evaluations; None: always the whole set

    def check(self) -> None:
        """Raises ConfigError for mistakes in the evaluation's own files, before a model is loaded."""

    def load(self, data: RunDirectory, device: "torch.device") -> Evaluator:
        """Read the validation data of a prepare run, and tokenise once what must be tokenised."""
        raise TypeError(f"{type(self).__name__} does not say how to load its data")

    def reaches(self, value: float, target: float, tolerance: float) -> bool:
        """Whether `value` is within `tolerance` (a share of `target`) of the target, or better."""
        return value >= target * (1 - tolerance) if self.higher_is_better else value <= target * (1 + tolerance)

    def split(self, size: int) -> tuple[Sequence[int], Sequence[int]]:
        """Indices of the subset, evenly spaced over the set, and of the rest. A full evaluation reads both."""
        import numpy as np

        if self.subset is None or self.subset >= size:
            return range(size), ()
        chosen = np.linspace(0, size, self.subset, endpoint=False).astype(int).tolist()
        return chosen, sorted(set(range(size)).difference(chosen))
