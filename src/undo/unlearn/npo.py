from typing import ClassVar, Literal

from undo.config.schema import NonNegative, Positive, Role
from undo.lm.shape import Shape
from undo.unlearn.method import Method


class NPO(Method):
    """-(2 / beta) E log sigmoid(beta (NLL - NLL_0)) + retain_weight L_retain. Zhang et al. (2024), eq. 3.

    nll: document_sum  summed over a document (a piece of at most a row), E the mean over documents: the publication.
                       With long documents the sum saturates the sigmoid: the same beta means something else on other
                       lengths
         batch_mean    the mean over all labels of the batch, so that E is of one value: Fan et al.'s code (2025), whose
                       beta and weight belong to it. Exact over micro-batches and devices
    """

    name: Literal["npo"] = "npo"
    title: ClassVar = "NPO"
    mark: ClassVar = "X"
    color: ClassVar = "#882255"
    student_color: ClassVar = "#C98DA9"
    presets: ClassVar = {"faithful": {"beta": 0.1}}

    beta: Positive = 0.1
    retain_weight: NonNegative = 1.0
    nll: Literal["document_sum", "batch_mean"] = "document_sum"

    @property
    def needs_reference(self) -> bool:
        return True

    @property
    def held_per_weight(self) -> int:
        return 4 if self.nll == "batch_mean" and self.retain_weight else 0  # the one gradient, while the other is taken

    def objective(self, model, reference, rng):
        import torch
        from torch.nn.functional import logsigmoid

        from undo.lm.read import head, hidden_states
        from undo.losses import cross_entropy, document_losses, of_documents
        from undo.losses.terms import OnDemand

        assert reference is not None

        def outer(risen):
            return -2 / self.beta * logsigmoid(self.beta * risen)

        def by_document(forget):
            before = document_losses(reference, forget)
            hidden = [hidden_states(model, forget)]
            return forget.per_document(
                of_documents(hidden, head(model), forget, lambda nll, length: outer(nll[0] - before))
            )

        def risen_on_average(forget):
            with torch.no_grad():
                before = cross_entropy(reference, forget)
            return cross_entropy(model, forget) - before

        mean = self.nll == "batch_mean"

        def terms(batch):
            found = {"forget": lambda: (risen_on_average if mean else by_document)(batch["forget"])}
            if self.retain_weight:
                found["retain"] = lambda: self.retain_weight * cross_entropy(model, batch["retain"])
            return OnDemand(found, {"forget": outer} if mean and batch["forget"].total else {})

        return terms

    def role_flops(self, role: Role, model: Shape, length: int) -> int:
        if role == "retain":
            return 3 * model.forward_flops(length) if self.retain_weight else 0
        again = model.head_flops if self.nll == "document_sum" else 0  # the head once more, for the weights of labels
        return 4 * model.forward_flops(length) + again


class SimNPO(Method):
    """-forget_weight (2 / beta) E log sigmoid(beta NLL / length - gamma) + retain_weight L_retain.

    Fan et al. (2024), eq. 4; E is the mean over documents (pieces of at most a row). gamma is the margin as the
    publication has it. open-unlearning has it inside, beta (NLL / length - delta): gamma is beta times its delta.
    """

    name: Literal["simnpo"] = "simnpo"
    title: ClassVar = "SimNPO"
    mark: ClassVar = "D"
    color: ClassVar = "#44AA99"
    student_color: ClassVar = "#A5D6CD"
    presets: ClassVar = {
        "faithful": {"beta": 2.5, "gamma": 0.0, "forget_weight": 0.1375},  # TOFU, forget05
        "open_unlearning": {"beta": 4.5, "gamma": 0.0, "forget_weight": 0.125},  # its gamma is this forget_weight
    }

    beta: Positive = 2.5
    gamma: NonNegative = 0.0  # the margin: beta times open-unlearning's delta
    forget_weight: Positive = 1.0
    retain_weight: NonNegative = 1.0

    def objective(self, model, reference, rng):
        from torch.nn.functional import logsigmoid

        from undo.lm.read import head, hidden_states
        from undo.losses import cross_entropy, of_documents
        from undo.losses.terms import OnDemand

        def outer(nll, length):
            return -2 / self.beta * logsigmoid(self.beta * nll[0] / length - self.gamma)

        def by_document(forget):
            value = of_documents([hidden_states(model, forget)], head(model), forget, outer)
            return forget.per_document(self.forget_weight * value)

        def terms(batch):
            found = {"forget": lambda: by_document(batch["forget"])}
            if self.retain_weight:
                found["retain"] = lambda: self.retain_weight * cross_entropy(model, batch["retain"])
            return OnDemand(found)

        return terms

    def role_flops(self, role: Role, model: Shape, length: int) -> int:
        if role == "retain":
            return 3 * model.forward_flops(length) if self.retain_weight else 0
        return 3 * model.forward_flops(length) + model.head_flops  # the head once more, for the weights of labels
