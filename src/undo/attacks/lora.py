"""LoRA: W + (scale / rank) B A, where A and B alone are trained. Hu et al. 2021 (2106.09685)."""

from typing import TYPE_CHECKING, ClassVar, Literal

from undo.attacks.attack import Attack, Means
from undo.config.mistakes import ConfigError
from undo.config.schema import Count, Positive

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class LoRA(Attack):
    """An adapter on the linear layers of the blocks in whose name `targets`, a regular expression, is found; None: all.

    Evaluations see what the merged model computes: the sum is formed in each forward pass. That is why it is not
    peft's, which adds the adapter's output to the layer's and merges with another rounding.
    """

    finetunes: ClassVar[bool] = True
    starts_unchanged: ClassVar[bool] = True

    name: Literal["lora"] = "lora"
    rank: Count = 16
    scale: Positive = 32.0  # `lora_alpha` in peft
    targets: str | None = None

    @property
    def title(self) -> str:
        return f"LoRA, rank {self.rank}" + ("" if self.targets is None else f", {self.targets}")

    def trains(self, parameter: str) -> bool:
        return False

    def apply(self, model: "PreTrainedModel", means: Means) -> None:
        from undo.lm.matrices import adapt

        if not adapt(model, self.rank, self.scale / self.rank, means.rng, self.targets):
            raise ConfigError(f"attack.targets={self.targets}: is in the name of no linear layer of the blocks")
