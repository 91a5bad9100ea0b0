"""Pruning: weights become 0, the smallest ones, or those that matter on forget text and not on retain text."""

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from undo.attacks.attack import Attack, Means
from undo.config.schema import Count, Role

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

Part = Annotated[float, Field(gt=0, lt=1)]


class Prune(Attack):
    """The `share` of smallest weights of each matrix becomes 0."""

    name: Literal["prune"] = "prune"
    share: Part

    @property
    def title(self) -> str:
        return f"pruned {self.share:.0%}"

    def apply(self, model: "PreTrainedModel", means: Means) -> None:
        from undo.lm.matrices import linear_layers, matrix

        for _, layer in linear_layers(model):
            weight = matrix(layer)
            weight[highest(-weight.abs(), self.share)] = 0


class SetDifference(Attack):
    """The weights that are among the `forget` share that matters most on forget text, and not among the `retain` share
    that matters most on retain text, become 0. Wei et al. 2024 (2402.05162), who so removed a model's refusals.

    How much a weight matters is Wanda's score (2306.11695): |w| times the norm of its input over `tokens` of a role.
    """

    name: Literal["set_difference"] = "set_difference"
    forget: Part = 0.05
    retain: Part = 0.05
    tokens: Count = 16_384  # of each role

    @property
    def title(self) -> str:
        return f"set difference {self.forget:.0%} - {self.retain:.0%}"

    def apply(self, model: "PreTrainedModel", means: Means) -> None:
        from undo.lm.matrices import linear_layers, matrix

        norms = {role: input_norms(model, means, role, self.tokens) for role in ("forget", "retain")}
        for name, layer in linear_layers(model):
            weight = matrix(layer)
            matters = {
                role: highest(weight.abs() * norms[role][name], share)
                for role, share in (("forget", self.forget), ("retain", self.retain))
            }
            weight[matters["forget"] & ~matters["retain"]] = 0


def highest(scores: "Tensor", share: float) -> "Tensor":
    """Where the highest `share` of the scores is, rounded down to whole ones; of equals the first: bool, same shape."""
    import torch

    order = scores.flatten().argsort(descending=True, stable=True)
    found = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    found[order[: int(share * scores.numel())]] = True
    return found.view(scores.shape)


def input_norms(model: "PreTrainedModel", means: Means, role: Role, tokens: int) -> "dict[str, Tensor]":
    """For each linear layer the norm of each of its inputs over the text of a role: [inputs]."""
    import torch

    from undo.lm.matrices import linear_layers, matrix
    from undo.lm.read import hidden_states

    squares = {name: torch.zeros_like(matrix(layer)[0]) for name, layer in linear_layers(model)}
    real = None  # bool [rows, length]: positions that are no padding

    def add(name: str, given: "tuple[Tensor, ...]") -> None:
        squares[name] += given[0].detach().flatten(0, -2)[real].float().square().sum(0)

    def hook(name: str) -> "nn.Module":
        return lambda _, given: add(name, given)  # pyright: ignore[reportReturnType]

    hooks = [layer.register_forward_pre_hook(hook(name)) for name, layer in linear_layers(model)]
    try:
        with torch.no_grad():
            for batch in means.batches(role, tokens):
                real = batch.counted.flatten()
                hidden_states(model, batch)
    finally:
        for one in hooks:
            one.remove()
    return {name: total.sqrt() for name, total in squares.items()}
