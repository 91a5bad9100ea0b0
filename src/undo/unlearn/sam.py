from typing import ClassVar, Literal

from undo.config.schema import Count, NonNegative, Positive, Role
from undo.lm.shape import Shape
from undo.unlearn.on_top import OnTop


class SAM(OnTop):
    """Sharpness-aware minimisation of a base method: gradients at w + rho g / ||g||. Section 6, Appendix D.1, Table 8.

    ascent: forget   g = grad L_forget(w); the step is grad L_forget(w + rho g / ||g||) + grad L_retain(w): Fan et al.
                     (2025)
    ascent: total    g = grad L(w), and the step is grad L(w + rho g / ||g||): the authors of UNDO

    `official` is on NPO as its code has it: its beta and weight belong to an NLL that is the mean over a batch.
    """

    name: Literal["sam"] = "sam"
    title: ClassVar = "SAM"
    mark: ClassVar = "P"
    color: ClassVar = "#999933"
    student_color: ClassVar = "#CFCF8F"
    presets: ClassVar = {
        "faithful": {"ascent": "total", "rho": 0.01},  # Table 8, D.2.6, and the code behind them
        "official": {
            "ascent": "forget",
            "rho": 0.01,
            "base": {"name": "npo", "nll": "batch_mean", "beta": 0.015, "retain_weight": 2.25},
        },
    }

    rho: NonNegative = 0.01
    ascent: Literal["forget", "total"] = "forget"  # not `on`, which YAML reads as true

    @property
    def held_per_weight(self) -> int:
        if self.ascent == "forget":
            return 8  # the sharp gradient and the sum
        return 4 + self.base.held_per_weight  # the copy of the weights

    def step(self, gradient, rng):
        from undo.train.shift import add, shifted, to_length

        names = self.base.forget_terms if self.ascent == "forget" else None
        terms, ascent = gradient(names)
        with shifted(gradient.weights, to_length(ascent, self.rho)):
            del ascent  # as large as the model
            _, sharp = gradient(names)
        if names is None:
            return terms, sharp
        others, rest = gradient(without=names)
        return {**terms, **others}, add(sharp, rest)

    def role_flops(self, role: Role, model: Shape, length: int) -> int:
        passes = 2 if role == "forget" or self.ascent == "total" else 1
        return passes * super().role_flops(role, model, length)


class Smoothing(OnTop):
    """Random smoothing (Fan et al. 2025): the forget gradient is the mean over `samples` of w + sigma N(0, 1).

    `faithful` is on NPO as its code has it, as in SAM's `official`. The recorded forget loss is the last
    sample's: another pass would be needed for that at w.
    """

    name: Literal["smoothing"] = "smoothing"
    title: ClassVar = "smoothing"
    mark: ClassVar = "v"
    color: ClassVar = "#AA4499"
    student_color: ClassVar = "#D8A5CF"
    presets: ClassVar = {
        "faithful": {
            "sigma": 1e-4,
            "samples": 3,
            "base": {"name": "npo", "nll": "batch_mean", "beta": 0.0125, "retain_weight": 2.0},
        }
    }

    sigma: Positive = 1e-4
    samples: Count = 3

    @property
    def held_per_weight(self) -> int:
        return 8  # the mean so far, and the copy of the weights or a sum

    def step(self, gradient, rng):
        import torch

        from undo.train.shift import add, shifted

        names, terms = self.base.forget_terms, {}
        smooth = [None] * len(gradient.weights)
        for _ in range(self.samples):
            noise = (self.sigma * torch.randn(w.shape, generator=rng).to(w) for w in gradient.weights)
            with shifted(gradient.weights, noise):
                terms, part = gradient(names)
            smooth = add(smooth, part, 1 / self.samples)
            del part  # as large as the model
        others, rest = gradient(without=names)
        return {**terms, **others}, add(smooth, rest)

    def role_flops(self, role: Role, model: Shape, length: int) -> int:
        return (self.samples if role == "forget" else 1) * super().role_flops(role, model, length)
