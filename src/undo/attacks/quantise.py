"""Quantisation: weights are rounded to a few levels, and small changes of unlearning may be rounded away.

The rounded weights are real: what INT8, INT4 or NF4 store, read back as fp32. Activations are not rounded.
"""

from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, model_validator

from undo.attacks.attack import Attack, Means
from undo.config.schema import Count

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel


class Quantise(Attack):
    """Round-to-nearest, with one scale for each `group` of weights along a matrix's inputs; None: for each output.

    levels `int`: 2^bits - 1 equidistant ones, symmetric around 0. `nf4`: the 16 of QLoRA (2305.14314), of which each
    has the same share of a normal distribution; bitsandbytes has groups of 64.
    """

    name: Literal["quantise"] = "quantise"
    levels: Literal["int", "nf4"] = "int"
    bits: Annotated[int, Field(ge=2, le=8)] = 4
    group: Count | None = None

    @model_validator(mode="after")
    def _nf4_has_four_bits(self) -> Self:
        if self.levels == "nf4" and self.bits != 4:
            raise ValueError(f"bits must be 4 where levels is nf4, not {self.bits}")
        return self

    @property
    def title(self) -> str:
        of = "NF4" if self.levels == "nf4" else f"INT{self.bits}"
        return of + ("" if self.group is None else f", groups of {self.group}")

    def apply(self, model: "PreTrainedModel", means: Means) -> None:
        from undo.lm.matrices import linear_layers, matrix

        for _, layer in linear_layers(model):
            weight = matrix(layer)
            for part in weight.split(self.group or weight.shape[1], dim=1):
                part.copy_(self.rounded(part))

    def rounded(self, weight: "Tensor") -> "Tensor":
        """The nearest levels of [outputs, group], each row with the scale of its largest absolute weight."""
        import torch

        largest = weight.abs().amax(1, keepdim=True)
        scale = largest.where(largest > 0, 1.0)
        if self.levels == "nf4":
            levels = nf4().to(weight)
            between = (levels[1:] + levels[:-1]) / 2
            return levels[torch.bucketize((weight / scale).contiguous(), between)] * scale
        steps = 2 ** (self.bits - 1) - 1
        return (weight / scale * steps).round() * (scale / steps)


def nf4() -> "torch.Tensor":
    """The 16 levels in ascending order, fp64: quantiles of a standard normal distribution, 8 above 0 and 7 below,
    divided by the largest (QLoRA, Section 3; the outermost probability is that of its code)."""
    import torch

    outermost = 0.9677083
    above = torch.special.ndtri(torch.linspace(0.5, outermost, 9, dtype=torch.float64)[1:])
    below = -torch.special.ndtri(torch.linspace(0.5, outermost, 8, dtype=torch.float64)[1:])
    return torch.cat([below.flip(0), torch.zeros(1, dtype=torch.float64), above]) / above[-1]
