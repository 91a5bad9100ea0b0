from typing import ClassVar, Literal

from undo.config.schema import Role
from undo.lm.shape import Shape
from undo.unlearn.method import Weighted


class MaxEnt(Weighted):
    """L_uniform + L_retain: KL(U || p) on forget tokens, cross entropy on retain tokens. Section 4, Method B.

    On WMDP (Appendix D.2.3) it is (1 - alpha) L_uniform + alpha L_retain, and L_retain is KL(p_0 || p), p_0 the model
    it started from: `convex` and `retain: kl`.
    """

    name: Literal["maxent"] = "maxent"
    title: ClassVar = "MaxEnt"
    mark: ClassVar = "o"
    color: ClassVar = "#D55E00"
    student_color: ClassVar = "#0072B2"
    presets: ClassVar = {
        "faithful": {"alpha": 1.0, "retain": "cross_entropy"},
        "undo_paper_wmdp": {"convex": True, "retain": "kl", "alpha": 0.3},  # Table 10, bio, the best
    }

    retain: Literal["cross_entropy", "kl"] = "cross_entropy"

    @property
    def needs_reference(self) -> bool:
        return self.retain == "kl"

    @property
    def forget_terms(self) -> tuple[str, ...]:
        return ("uniform",)

    @property
    def zero_at_first(self) -> tuple[str, ...]:
        return ("retain",) if self.retain == "kl" and self.alpha else ()

    def objective(self, model, reference, rng):
        from undo.losses import cross_entropy, forward_kl, uniform_kl
        from undo.losses.terms import OnDemand

        def retain(tokens):
            if self.retain == "cross_entropy":
                return cross_entropy(model, tokens)
            assert reference is not None
            return forward_kl(model, reference, tokens)

        def terms(batch):
            found = {"uniform": lambda: self.forget_weight * uniform_kl(model, batch["forget"])}
            if self.alpha:
                found["retain"] = lambda: self.alpha * retain(batch["retain"])
            return OnDemand(found)

        return terms

    def role_flops(self, role: Role, model: Shape, length: int) -> int:
        extra = model.forward_flops(length) if role == "retain" and self.needs_reference and self.alpha else 0
        return super().role_flops(role, model, length) + extra
