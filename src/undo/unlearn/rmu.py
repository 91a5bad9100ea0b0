from typing import ClassVar, Final, Literal

from undo.config.schema import NonNegative, Positive, Role
from undo.lm.shape import Shape
from undo.unlearn.method import OnBlocks, Weighted

LANGUAGE: Final = {"layer": 11, "trained_layers": [5, 6, 7, 8, 9, 10, 11], "c": 6.5, "alpha": 1200.0}  # Table 5, D.1


class RMU(Weighted, OnBlocks):
    """L_misdirect + alpha L_preserve, squared errors of activations. Section 4, Method C; Table 5.

    On forget tokens the output of block `layer` is pushed to c u, u a random unit vector; on retain tokens it is held
    to the reference model's. Only mlp.down_proj of the blocks `trained_layers` is trained. On WMDP (D.2.3) the loss is
    (1 - alpha) L_misdirect + alpha L_preserve: `convex`.
    The paper's end layer is `layer`. In its code that is an index into hidden_states, so the code pushes the block
    below, and the last trained block has no gradient: `layer: 10` with trained_layers 5 to 10 is what the code did.
    `direction`: u from a normal distribution (authors of UNDO), or from U[0, 1), which is nearly the all-ones vector
    (Li et al.'s code). `coefficient: adaptive`: c is multiplied by the norm of the reference's activation at that token
    (Adaptive RMU; its code takes one mean norm from the first batch, padding included).
    """

    name: Literal["rmu"] = "rmu"
    title: ClassVar = "RMU"
    mark: ClassVar = "d"
    color: ClassVar = "#CC79A7"
    student_color: ClassVar = "#009E73"
    presets: ClassVar = {
        "faithful": LANGUAGE,
        "official": {"layer": 7, "trained_layers": [5, 6, 7], "c": 20.0, "alpha": 100.0, "direction": "uniform"},
        "published_zephyr": {
            "layer": 7,
            "trained_layers": [5, 6, 7],
            "c": 6.5,
            "alpha": 1200.0,
            "direction": "uniform",
        },
        "undo_paper": LANGUAGE,
        "undo_paper_arithmetic": {**LANGUAGE, "c": 6.0, "alpha": 200.0},
        "undo_paper_wmdp": {  # Table 9; alpha: Table 10, the best
            "layer": 15,
            "trained_layers": [10, 11, 12, 13, 14, 15],
            "c": 80.0,
            "alpha": 0.5,
            "convex": True,
        },
    }

    c: Positive = 6.5
    alpha: NonNegative = 1200.0
    direction: Literal["normal", "uniform"] = "normal"
    coefficient: Literal["fixed", "adaptive"] = "fixed"

    @property
    def forget_terms(self) -> tuple[str, ...]:
        return ("misdirect",)

    @property
    def zero_at_first(self) -> tuple[str, ...]:
        return ("preserve",) if self.alpha else ()

    def objective(self, model, reference, rng):
        import torch

        from undo.lm.read import hidden_states
        from undo.losses import activation_mse
        from undo.losses.terms import OnDemand

        assert reference is not None
        draw = torch.randn if self.direction == "normal" else torch.rand
        direction = draw(model.config.hidden_size, generator=rng)
        push = (self.c * direction / direction.norm()).to(model.device)

        @torch.no_grad()
        def activations(of, tokens):
            return hidden_states(of, tokens, self.layer)

        def misdirect(tokens):
            target = push
            if self.coefficient == "adaptive":
                target = activations(reference, tokens).float().norm(dim=-1, keepdim=True) * push
            return activation_mse(hidden_states(model, tokens, self.layer), target, tokens)

        def preserve(tokens):
            kept = activations(reference, tokens)
            return activation_mse(hidden_states(model, tokens, self.layer), kept, tokens)

        def terms(batch):
            found = {"misdirect": lambda: self.forget_weight * misdirect(batch["forget"])}
            if self.alpha:
                found["preserve"] = lambda: self.alpha * preserve(batch["retain"])
            return OnDemand(found)

        return terms

    def role_flops(self, role: Role, model: Shape, length: int) -> int:
        forward, backward = self.flops_of_passes(model, length)
        runs_reference = role == "retain" or self.coefficient == "adaptive"
        return (1 + runs_reference) * forward + backward if role == "forget" or self.alpha else 0
