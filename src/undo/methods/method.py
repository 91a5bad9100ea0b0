"""What every unlearning method has."""

from typing import TYPE_CHECKING, ClassVar

from undo.config import Frozen
from undo.prepare_models import ReducedGemma2

if TYPE_CHECKING:
    import torch
    from transformers import Gemma2ForCausalLM

    from undo.train import Objective


class Method(Frozen):
    """A method is its hyper-parameters and its equation, nothing else: loop, data and records are not its own.

    A config is read without torch, so a method imports `undo.losses` where it uses it, inside `objective`.
    """

    needs_reference: ClassVar[bool] = False  # whether `objective` reads the frozen model it started from

    def objective(
        self, model: "Gemma2ForCausalLM", reference: "Gemma2ForCausalLM | None", rng: "torch.Generator"
    ) -> "Objective":
        """A function from a batch with the roles `retain` and `forget` to named, weighted loss terms.

        `reference` is frozen, and None unless `needs_reference`. Whatever is random is drawn from `rng`.
        """
        raise TypeError(f"{type(self).__name__} has no objective")

    def trains(self, parameter: str) -> bool:
        """Whether the parameter of this name is trained."""
        return True

    def flops_per_token(self, model: ReducedGemma2, length: int) -> int:
        """Of one step. The default: forward and backward through the whole model (3 forward passes)."""
        return 3 * model.forward_flops(length)
