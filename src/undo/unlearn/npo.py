from typing import ClassVar, Literal

from undo.config.schema import NonNegative, Positive
from undo.lm.shape import Shape
from undo.unlearn.method import Method


class NPO(Method):
    """-(2 / beta) E log sigmoid(beta (NLL - NLL_0)) + retain_weight L_retain, NLL summed over a document.

    Zhang et al. (2024), eq. 3. E is the mean over documents (pieces of at most a row). With long documents the sum
    saturates the sigmoid: the same beta means something else on other lengths.
    """

    name: Literal["npo"] = "npo"
    title: ClassVar = "NPO"
    mark: ClassVar = "X"
    color: ClassVar = "#882255"
    student_color: ClassVar = "#C98DA9"
    presets: ClassVar = {"faithful": {"beta": 0.1}}

    beta: Positive = 0.1
    retain_weight: NonNegative = 1.0

    @property
    def needs_reference(self) -> bool:
        return True

    def objective(self, model, reference, rng):
        from torch.nn.functional import logsigmoid

        from undo.lm.read import head, hidden_states
        from undo.losses import cross_entropy, document_losses, of_documents

        assert reference is not None

        def terms(batch):
            forget = batch["forget"]
            before = document_losses(reference, forget)
            loss = of_documents(
                [hidden_states(model, forget)],
                head(model),
                forget,
                lambda nll, length: -2 / self.beta * logsigmoid(self.beta * (nll[0] - before)),
            )
            found = {"forget": loss / forget.documents}
            if self.retain_weight:
                found["retain"] = self.retain_weight * cross_entropy(model, batch["retain"])
            return found

        return terms

    def flops_per_token(self, model: Shape, length: int) -> int:
        return 4 * model.forward_flops(length)  # on half the tokens: the reference, and the head twice


class SimNPO(Method):
    """-forget_weight (2 / beta) E log sigmoid(beta NLL / length - gamma) + retain_weight L_retain.

    Fan et al. (2024), eq. 4; E is the mean over documents (pieces of at most a row).
    """

    name: Literal["simnpo"] = "simnpo"
    title: ClassVar = "SimNPO"
    mark: ClassVar = "D"
    color: ClassVar = "#44AA99"
    student_color: ClassVar = "#A5D6CD"
    presets: ClassVar = {
        "faithful": {"beta": 2.5, "gamma": 0.0, "forget_weight": 0.1375},  # TOFU, forget05
        "open_unlearning": {"beta": 4.5, "gamma": 0.0, "forget_weight": 0.125},  # its delta is gamma, its gamma this
    }

    beta: Positive = 2.5
    gamma: NonNegative = 0.0  # the margin
    forget_weight: Positive = 1.0
    retain_weight: NonNegative = 1.0

    def objective(self, model, reference, rng):
        from torch.nn.functional import logsigmoid

        from undo.lm.read import head, hidden_states
        from undo.losses import cross_entropy, of_documents

        def terms(batch):
            forget = batch["forget"]
            loss = of_documents(
                [hidden_states(model, forget)],
                head(model),
                forget,
                lambda nll, length: -2 / self.beta * logsigmoid(self.beta * nll[0] / length - self.gamma),
            )
            found = {"forget": self.forget_weight * loss / forget.documents}
            if self.retain_weight:
                found["retain"] = self.retain_weight * cross_entropy(model, batch["retain"])
            return found

        return terms

    def flops_per_token(self, model: Shape, length: int) -> int:
        return round(3.5 * model.forward_flops(length))  # the head twice on half the tokens
