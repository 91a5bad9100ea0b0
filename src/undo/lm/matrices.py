"""The matrices of a model's blocks, as quantisation, pruning and adapters change them."""

import math
import re
from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D  # GPT-2's linear layer, which keeps the transpose

from undo.lm.read import blocks


def linear_layers(model: PreTrainedModel, pattern: str | None = None) -> Iterator[tuple[str, nn.Module]]:
    """The linear layers of the blocks by name, those in whose name `pattern`, a regular expression, is found.

    Embedding and head are not among them, as in the libraries that quantise and prune.
    """
    for name, module in blocks(model).named_modules():
        if isinstance(module, nn.Linear | Conv1D) and (pattern is None or re.search(pattern, name)):
            yield name, module


def matrix(layer: nn.Module) -> Tensor:
    """The weight of a linear layer as [outputs, inputs], without its gradient, to be read or changed in place."""
    weight = cast(Tensor, layer.weight).detach()
    return weight.T if isinstance(layer, Conv1D) else weight


class LowRank(nn.Module):
    """weight -> weight + scale * up @ down. down: [rank, inputs], starts as noise; up: [outputs, rank], starts at 0."""

    def __init__(self, layer: nn.Module, rank: int, scale: float, rng: torch.Generator) -> None:
        super().__init__()
        outputs, inputs = matrix(layer).shape
        down = nn.init.kaiming_uniform_(torch.empty(rank, inputs), a=math.sqrt(5), generator=rng)
        self.down, self.up = (nn.Parameter(part.to(matrix(layer))) for part in (down, torch.zeros(outputs, rank)))
        self.scale, self.transposed = scale, isinstance(layer, Conv1D)

    def forward(self, weight: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):  # a sum of fp32 weights, as in a merged model
            change = self.scale * (self.up @ self.down)
            return weight + (change.T if self.transposed else change)


def adapt(model: PreTrainedModel, rank: int, scale: float, rng: torch.Generator, pattern: str | None = None) -> int:
    """Freeze the model and add a LowRank to the linear layers that match -> their number.

    From here on each layer's `weight` is the sum, formed anew in each forward pass.
    """
    model.requires_grad_(False)
    layers = list(linear_layers(model, pattern))
    for _, layer in layers:
        parametrize.register_parametrization(layer, "weight", LowRank(layer, rank, scale, rng))
    return len(layers)
