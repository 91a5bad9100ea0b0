from typing import ClassVar, Literal

from undo.unlearn.method import Weighted


class GradDiff(Weighted):
    """-L_forget + alpha L_retain, both cross entropies. Section 4, Method A; alpha is Appendix D.1's."""

    name: Literal["graddiff"] = "graddiff"
    title: ClassVar = "GradDiff"
    mark: ClassVar = "s"
    color: ClassVar = "#E69F00"
    student_color: ClassVar = "#56B4E9"
    presets: ClassVar = {"faithful": {"alpha": 1.0}, "faithful_arithmetic": {"alpha": 15.0}}  # D.1

    def objective(self, model, reference, rng):
        from undo.losses import cross_entropy
        from undo.losses.terms import OnDemand

        def terms(batch):
            found = {"forget": lambda: -self.forget_weight * cross_entropy(model, batch["forget"])}
            if self.alpha:
                found["retain"] = lambda: self.alpha * cross_entropy(model, batch["retain"])
            return OnDemand(found)

        return terms
