from typing import ClassVar, Literal

from undo.config.schema import NonNegative, Positive, Role
from undo.lm.shape import Shape
from undo.unlearn.method import Method


class UNDIAL(Method):
    """KL(q || p) on forget tokens, q = softmax(z_0 - strength x onehot(label)), z_0 the start model's logits.

    Dong et al. (2024); a baseline of Section 6. The same gradient as their cross entropy with q, and 0 at the optimum.
    Label positions only: open-unlearning also lowers vocabulary entry V - 100 wherever there is no label.
    """

    name: Literal["undial"] = "undial"
    title: ClassVar = "UNDIAL"
    mark: ClassVar = ">"
    color: ClassVar = "#117733"
    student_color: ClassVar = "#8FC09E"
    presets: ClassVar = {"faithful": {"strength": 5.0}, "open_unlearning": {"strength": 10.0}}

    strength: Positive = 5.0
    retain_weight: NonNegative = 0.0  # of cross entropy on retain tokens; the publication has none

    @property
    def needs_reference(self) -> bool:
        return True

    def objective(self, model, reference, rng):
        from undo.losses import cross_entropy, undial_kl
        from undo.losses.terms import OnDemand

        assert reference is not None

        def terms(batch):
            found = {"forget": lambda: undial_kl(model, reference, batch["forget"], self.strength)}
            if self.retain_weight:
                found["retain"] = lambda: self.retain_weight * cross_entropy(model, batch["retain"])
            return OnDemand(found)

        return terms

    def role_flops(self, role: Role, model: Shape, length: int) -> int:
        passes = 4 if role == "forget" else 3 if self.retain_weight else 0
        return passes * model.forward_flops(length)
