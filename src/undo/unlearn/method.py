"""What every unlearning method has."""

import re
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

from pydantic import Field, model_validator

from undo.config.schema import Frozen, NonNegative, Role
from undo.lm.shape import Shape

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from undo.train.gradient import Gradient, Gradients, Objective, Terms


class Method(Frozen):
    """A method is its hyper-parameters and its equation. The loop, the data and the records are elsewhere.

    Configs are read without torch, so a method imports `undo.losses` inside `objective`, where it uses it.
    """

    title: ClassVar[str] = ""  # in figures and tables; "": its name
    mark: ClassVar[str] = "h"  # of its points: a matplotlib marker
    color: ClassVar[str] = ""  # of its models in figures; "": one that no method here has
    student_color: ClassVar[str] = ""  # of models that are distilled from them
    presets: ClassVar[dict[str, dict[str, Any]]] = {}  # name -> values of keys; keys given beside a preset win

    preset: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _fill_in_the_preset(cls, values: Any) -> Any:
        name = values.get("preset") if isinstance(values, dict) else None
        if not isinstance(name, str):  # None, or a mistake that is named as one of type
            return values
        if name not in cls.presets:
            raise ValueError(f"there is no preset {name!r}; presets of this method: {', '.join(cls.presets) or 'none'}")
        return cls.presets[name] | values

    @property
    def needs_reference(self) -> bool:
        """Whether `objective` reads the frozen model it started from."""
        return False

    @property
    def needs_pairs(self) -> bool:
        """Whether `objective` reads where a forget document differs from a harmless answer to the same prompt."""
        return False

    @property
    def forget_terms(self) -> tuple[str, ...]:
        """The terms of `objective` that make the model forget."""
        return ("forget",)

    @property
    def zero_at_first(self) -> tuple[str, ...]:
        """The terms whose gradient is zero as long as the model is its reference."""
        return ()

    def objective(
        self, model: "PreTrainedModel", reference: "PreTrainedModel | None", rng: "torch.Generator"
    ) -> "Objective":
        """A function from a batch with the roles `retain` and `forget` to named, weighted loss terms.

        Terms that are OnDemand run only where a step asks for them; a dict runs whole. `reference` is frozen, and None
        unless `needs_reference`. Draw everything random from `rng` before returning the function: it may be called
        several times in a step, and must give the same answer each time.
        """
        raise TypeError(f"{type(self).__name__} has no objective")

    def step(self, gradient: "Gradient", rng: "torch.Generator") -> "tuple[Terms, Gradients]":
        """What the optimiser takes as the gradient. The default: the gradient of the sum of all terms."""
        return gradient()

    @property
    def held_per_weight(self) -> int:
        """Most bytes per trained weight that `step` holds beside the one fp32 gradient that is being formed.

        Used by the memory estimate. Counts tensors kept alive while a second gradient is computed or two are summed.
        """
        return 0

    def trains(self, parameter: str) -> bool:
        """Whether the parameter of this name is trained."""
        return True

    def role_flops(self, role: Role, model: Shape, length: int) -> int:
        """FLOPs of a step per token of a role, for estimates: a run counts what it does (lm/flops.py).

        The default: forward and backward through the whole model, 3 forward passes.
        """
        return 3 * model.forward_flops(length)

    def flops_per_token(self, model: Shape, length: int) -> int:
        """The mean over the roles, which have as many tokens each."""
        return sum(self.role_flops(role, model, length) for role in ("forget", "retain")) // 2


class Weighted(Method):
    """Base of methods whose loss is forget + alpha retain or, `convex`, (1 - alpha) forget + alpha retain (D.2.3)."""

    alpha: NonNegative = 1.0
    convex: bool = False

    @model_validator(mode="after")
    def _alpha_is_a_share(self) -> Self:
        if self.convex and not 0 < self.alpha < 1:
            raise ValueError(f"alpha must be between 0 and 1 where convex is true, not {self.alpha:g}")
        return self

    @property
    def forget_weight(self) -> float:
        return 1 - self.alpha if self.convex else 1.0

    def role_flops(self, role: Role, model: Shape, length: int) -> int:
        return super().role_flops(role, model, length) if role == "forget" or self.alpha else 0


class OnBlocks(Method):
    """Base of methods on the output of block `layer` that train mlp.down_proj of the blocks `trained_layers` alone.

    Blocks are counted from 0, and `layer` is the block whose *output* is used. In the terms of transformers that is
    hidden_states[layer + 1], so the authors' `end_layer` is layer + 1 and a hook on block `layer` is `layer`.
    """

    layer: int
    trained_layers: Annotated[tuple[int, ...], Field(strict=False)]  # a list will do

    @model_validator(mode="after")
    def _trained_layers_get_a_gradient(self) -> Self:
        if min(self.layer, *self.trained_layers, 0) < 0:
            raise ValueError("blocks are counted from 0")
        if not self.trained_layers or max(self.trained_layers) > self.layer:
            raise ValueError(f"trained_layers must name blocks up to layer {self.layer}: above it there is no gradient")
        return self

    @property
    def needs_reference(self) -> bool:
        return True

    def trains(self, parameter: str) -> bool:
        match = re.search(r"\blayers\.(\d+)\.mlp\.down_proj\.", parameter)
        return match is not None and int(match[1]) in self.trained_layers

    def flops_of_passes(self, model: Shape, length: int, layers: int | None = None) -> tuple[int, int]:
        """FLOPs per token of a forward and of a backward pass through the blocks up to `layer`, or the first `layers`.

        Backward, gradients of activations reach down to the lowest trained block; they cost one forward pass, that of
        attention two. Only the trained matrices have gradients of their own.
        """
        used, untouched = model.first(layers or self.layer + 1), model.first(min(self.trained_layers) + 1)
        linear, whole = (used.forward_flops(n) - untouched.forward_flops(n) for n in (0, length))
        own = 2 * model.hidden_size * model.intermediate_size * len(set(self.trained_layers))
        return used.forward_flops(length), linear + 2 * (whole - linear) + own
