"""What every evaluation has."""

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from undo.config import Count, Frozen
from undo.run import RunDirectory

if TYPE_CHECKING:
    import torch
    from transformers import Gemma2ForCausalLM


class Evaluator(NamedTuple):
    """`measure(model)` -> named numbers, always with `retain` and `forget`; `tokens` is how many one call reads."""

    measure: "Callable[[Gemma2ForCausalLM], dict[str, float]]"
    tokens: int


class EvaluationConfig(Frozen):
    """Base of all evaluations."""

    higher_is_better: ClassVar[bool]
    unit: ClassVar[str]  # for axes and tables

    rows: Count = 256  # packed rows in one forward pass

    def load(self, data: RunDirectory, device: "torch.device") -> Evaluator:
        """Read the validation data of a prepare run, tokenise what must be tokenised, once."""
        raise TypeError(f"{type(self).__name__} does not say how to load its data")

    def reaches(self, value: float, target: float, tolerance: float) -> bool:
        """Whether `value` is within `tolerance` (a share of `target`) of the target, or better."""
        return value >= target * (1 - tolerance) if self.higher_is_better else value <= target * (1 + tolerance)
