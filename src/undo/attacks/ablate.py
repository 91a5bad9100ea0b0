"""Ablation: one direction of the activations is removed, that in which forget text differs from retain text.

An unlearned model that merely steers such text elsewhere gets its old ways back. Arditi et al. 2024 (2406.11717) took
refusals from models so.
"""

from typing import TYPE_CHECKING, Any, Literal

from undo.attacks.attack import Attack, Means
from undo.config.schema import Count, Role

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


class Ablate(Attack):
    """h' = h - (h . d) d at the output of `layer` (0-based), or of every block; d: mean on forget - mean on retain.

    Each layer has a direction of its own, of length 1, from `tokens` of each role. The weights stay as they are.
    """

    name: Literal["ablate"] = "ablate"
    layer: int | None = None
    tokens: Count = 16_384

    @property
    def title(self) -> str:
        return "direction ablated" + (" everywhere" if self.layer is None else "")

    def apply(self, model: "PreTrainedModel", means: Means) -> None:
        from undo.lm.read import blocks

        every = blocks(model)
        for layer in range(len(every)) if self.layer is None else (self.layer,):
            mean = {role: mean_state(model, means, role, layer, self.tokens) for role in ("forget", "retain")}
            direction = mean["forget"] - mean["retain"]
            every[layer].register_forward_hook(_without(direction / direction.norm().clamp_min(1e-12)))


def _without(direction: "Tensor") -> Any:
    """A hook that takes a direction, [hidden], out of what a block puts out."""

    def hook(_: Any, __: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        along = direction.to(hidden)
        left = hidden - (hidden @ along)[..., None] * along
        return (left, *output[1:]) if isinstance(output, tuple) else left

    return hook


def mean_state(model: "PreTrainedModel", means: Means, role: Role, layer: int, tokens: int) -> "Tensor":
    """The mean output of a block over the text of a role, fp32 [hidden]."""
    import torch

    from undo.lm.read import hidden_states

    total, count = torch.zeros(model.config.hidden_size, device=model.device), 0
    with torch.no_grad():
        for batch in means.batches(role, tokens):
            states = batch.at_labels(hidden_states(model, batch, layer))
            total, count = total + states.float().sum(0), count + len(states)
    return total / max(1, count)
