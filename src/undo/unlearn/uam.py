from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from undo.config.schema import NonNegative, Positive, Role
from undo.lm.shape import Shape
from undo.unlearn.method import Method, OnBlocks


class UAM(Method):
    """Unlearning-aware minimisation (Kim et al. 2025, Algorithm 2): retain loss at the point that forgets the most.

    w_hat = w + rho g / ||g||, g = grad L_forget(w); the step is [I - gamma P] grad L_retain(w_hat), P = g g' / ||g||^2
    (eq. 15). gamma = 0 is the code the authors published, 1 the equation with a full projection. `when: conflict`
    projects only where the step would undo forgetting (inner product with g above 0); `schedule: cosine` takes rho
    to 0. `loss: representation` measures both losses at the output of block `layer`, as squared distance to the start
    model's, and trains as RMU does; there the distance is 0 at first, and so would be its gradient: so the start
    model's activations are moved by `offset` in a random direction. `loss: cross_entropy` needs neither.
    No rho is published for language models, nor `offset`: the defaults are ours.
    """

    name: Literal["uam"] = "uam"
    title: ClassVar = "UAM"
    mark: ClassVar = "p"
    color: ClassVar = "#332288"
    student_color: ClassVar = "#A19ACB"
    presets: ClassVar = {
        "faithful": {"gamma": 1.0},  # eq. 15 to the letter; its losses at a layer are `language_model`'s
        "official": {"gamma": 0.0},
        # "we set beta = 1.05": no beta is in Algorithm 2, and gamma is what it can mean
        "language_model": {"gamma": 1.05, "loss": "representation", "layer": 7, "trained_layers": [5, 6, 7]},
    }

    rho: NonNegative = 0.05
    gamma: NonNegative = 1.0
    when: Literal["always", "conflict"] = "always"
    schedule: Literal["constant", "cosine"] = "constant"
    loss: Literal["cross_entropy", "representation"] = "cross_entropy"
    layer: Annotated[int, Field(ge=0)] | None = None
    trained_layers: Annotated[tuple[int, ...], Field(strict=False)] = ()
    offset: Positive = 1e-3

    @model_validator(mode="after")
    def _blocks_are_named(self) -> Self:
        if self.loss == "representation":
            if self.layer is None:
                raise ValueError("loss: representation needs `layer` and `trained_layers`")
            self._blocks()
        elif self.layer is not None or self.trained_layers:
            raise ValueError("layer and trained_layers belong to loss: representation")
        return self

    def _blocks(self) -> OnBlocks:
        assert self.layer is not None
        return OnBlocks(layer=self.layer, trained_layers=self.trained_layers)

    @property
    def needs_reference(self) -> bool:
        return self.loss == "representation"

    @property
    def held_per_weight(self) -> int:
        return 8  # the forget gradient, and the copy of the weights or a sum

    def trains(self, parameter: str) -> bool:
        return self.loss == "cross_entropy" or self._blocks().trains(parameter)

    @property
    def zero_at_first(self) -> tuple[str, ...]:
        return ("retain",) if self.loss == "representation" else ()

    def objective(self, model, reference, rng):
        import torch

        from undo.lm.read import hidden_states
        from undo.losses import activation_mse, cross_entropy
        from undo.losses.terms import OnDemand

        if self.loss == "cross_entropy":

            def loss(role, tokens):
                return cross_entropy(model, tokens)

        else:
            assert reference is not None
            direction = torch.randn(model.config.hidden_size, generator=rng)
            moved = {"forget": (self.offset * direction / direction.norm()).to(model.device), "retain": 0.0}

            def loss(role, tokens):
                with torch.no_grad():
                    start = hidden_states(reference, tokens, self.layer) + moved[role]
                return activation_mse(hidden_states(model, tokens, self.layer), start, tokens)

        def terms(batch):
            return OnDemand({role: lambda role=role: loss(role, batch[role]) for role in ("forget", "retain")})

        return terms

    def step(self, gradient, rng):
        import math

        import torch

        from undo.train.shift import add, dot, shifted, to_length

        rho = self.rho * (1 if self.schedule == "constant" else (1 + math.cos(math.pi * gradient.progress)) / 2)
        terms, forget = gradient(["forget"])
        with shifted(gradient.weights, to_length(forget, rho)):
            at_w_hat, retain = gradient(["retain"])
        along = dot(retain, to_length(forget, 1.0))
        if self.when == "conflict":
            along = torch.clamp(along, min=0.0)
        return {**terms, "retain": at_w_hat["retain"]}, add(retain, to_length(forget, 1.0), -self.gamma * along)

    def role_flops(self, role: Role, model: Shape, length: int) -> int:
        if self.loss == "cross_entropy":
            return super().role_flops(role, model, length)
        forward, backward = self._blocks().flops_of_passes(model, length)
        return 2 * forward + backward  # the start model runs, too
