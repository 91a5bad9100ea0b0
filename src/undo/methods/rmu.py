import re
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from undo.config import NonNegative, Positive
from undo.methods.method import Method
from undo.prepare_models import ReducedGemma2


class RMU(Method):
    """L_misdirect + alpha L_preserve, squared errors of activations. Section 4, Method C; Table 5.

    On forget tokens the output of block `layer` is pushed to c u, u a random unit vector; on retain tokens it is held
    to the reference model's. Only mlp.down_proj of the blocks `trained_layers` is trained.
    """

    name: Literal["rmu"] = "rmu"
    needs_reference: ClassVar[bool] = True

    layer: Annotated[int, Field(ge=0)]  # 0-based: the output of this block
    trained_layers: tuple[Annotated[int, Field(ge=0)], ...]
    c: Positive = 6.5
    alpha: NonNegative = 1200.0

    @model_validator(mode="after")
    def _trained_layers_get_a_gradient(self) -> Self:
        if not self.trained_layers or max(self.trained_layers) > self.layer:
            raise ValueError(f"trained_layers must name blocks up to layer {self.layer}: above it there is no gradient")
        return self

    def objective(self, model, reference, rng):
        import torch

        from undo.losses import activation_mse
        from undo.models import hidden_states

        assert reference is not None
        direction = torch.randn(model.config.hidden_size, generator=rng)
        target = (self.c * direction / direction.norm()).to(model.device)

        def terms(batch):
            with torch.no_grad():
                kept = hidden_states(reference, batch["retain"], self.layer)
            forget = hidden_states(model, batch["forget"], self.layer)
            retain = hidden_states(model, batch["retain"], self.layer)
            return {
                "misdirect": activation_mse(forget, target, batch["forget"]),
                "preserve": self.alpha * activation_mse(retain, kept, batch["retain"]),
            }

        return terms

    def trains(self, parameter: str) -> bool:
        match = re.search(r"\blayers\.(\d+)\.mlp\.down_proj\.", parameter)
        return match is not None and int(match[1]) in self.trained_layers

    def flops_per_token(self, model: ReducedGemma2, length: int) -> int:
        used = model.model_copy(update={"layers": self.layer + 1, "vocab_size": 0})  # nothing above, and no head
        return round(3.5 * used.forward_flops(length))  # forward and backward, and the reference on half the tokens
