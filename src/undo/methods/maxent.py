from typing import Literal

from undo.methods.method import Method


class MaxEnt(Method):
    """L_uniform + L_retain: KL(U || p) on forget tokens, cross entropy on retain tokens. Section 4, Method B."""

    name: Literal["maxent"] = "maxent"

    @property
    def forget_terms(self) -> tuple[str, ...]:
        return ("uniform",)

    def objective(self, model, reference, rng):
        from undo.losses import cross_entropy, uniform_kl

        return lambda batch: {
            "uniform": uniform_kl(model, batch["forget"]),
            "retain": cross_entropy(model, batch["retain"]),
        }
