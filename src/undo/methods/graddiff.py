from typing import Literal

from undo.config import NonNegative
from undo.methods.method import Method


class GradDiff(Method):
    """-L_forget + alpha L_retain, both cross entropies. Section 4, Method A; alpha is Appendix D.1's."""

    name: Literal["graddiff"] = "graddiff"
    alpha: NonNegative = 1.0

    def objective(self, model, reference, rng):
        from undo.losses import cross_entropy

        def terms(batch):
            found = {"forget": -cross_entropy(model, batch["forget"])}
            if self.alpha:
                found["retain"] = self.alpha * cross_entropy(model, batch["retain"])
            return found

        return terms
