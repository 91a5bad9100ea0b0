"""Merging: a step on the straight line towards another model, such as the one before unlearning."""

from typing import TYPE_CHECKING, Literal

from undo.attacks.attack import Attack, Means
from undo.config.mistakes import ConfigError
from undo.config.schema import RunName, Share

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Merge(Attack):
    """theta' = (1 - t) theta + t theta_other."""

    name: Literal["merge"] = "merge"
    towards: RunName
    t: Share

    @property
    def title(self) -> str:
        return f"merged {self.t:.0%}"

    def parents(self) -> tuple[RunName, ...]:
        return (self.towards,)

    def apply(self, model: "PreTrainedModel", means: Means) -> None:
        import torch

        other = dict(means.model(self.towards).named_parameters())
        for name, weight in model.named_parameters():
            if name not in other or other[name].shape != weight.shape:
                raise ConfigError(
                    f"attack.towards={self.towards}: is of another architecture: {name} has no counterpart there\n"
                    f"merge towards a model of the same shape"
                )
            with torch.no_grad():
                weight.lerp_(other[name], self.t)
