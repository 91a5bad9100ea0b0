from typing import ClassVar, Literal

from undo.config.schema import Count, NonNegative, Role
from undo.lm.shape import Shape
from undo.unlearn.method import OnBlocks
from undo.unlearn.on_top import OnTop


class RepNoise(OnTop):
    """A base method + noise_weight MMD(activations, noise) - ascent_weight log(1 + L_forget). Section 6, Table 7.

    Rosati et al. (2024). noise: MMD^2 between the outputs of every MLP on forget tokens and Gaussian noise; ascent:
    the cross entropy of forget tokens, read from every block's output through the final norm and the head, and meaned.
    Table 7 calls the weights alpha (noise) and beta (ascent), the code of both papers the other way round: so we give
    them names. Both terms are taken by document, so that micro-batches add up; the published code takes whole batches,
    in which an activation sequence is one point of 10^6 dimensions.

    Unpaired, as in UNDO, it uses all forget tokens. `paired`, as published, it uses only those that a harmless answer
    to the same prompt does not have at the same place (prepare.data.forget.paired_with names its column). Activations
    are masked at input positions, losses at label positions; the official code uses the input mask for both, and so
    leaves out the first token in which the answers differ.

    Other differences from the published code: its lens also reads the embeddings and counts the final loss twice, and
    its base is cross entropy on harmless answers alone, so `official` has its weights and its pairs on top of `base`.
    Here both terms keep their weight whatever `base` does. The authors of UNDO put them inside the forget term, so that
    on WMDP they are multiplied by (1 - alpha).
    """

    name: Literal["repnoise"] = "repnoise"
    title: ClassVar = "RepNoise"
    mark: ClassVar = "<"
    color: ClassVar = "#661100"
    student_color: ClassVar = "#B58A80"
    presets: ClassVar = {
        "faithful": {"noise_weight": 1.0, "ascent_weight": 1.0},  # Table 7, D.2.6
        "official": {"noise_weight": 0.001, "ascent_weight": 1.0, "paired": True},
    }

    noise_weight: NonNegative = 0.1
    ascent_weight: NonNegative = 0.001
    sample: Count = 128  # positions of a document that are compared with noise, at most
    paired: bool = False

    @property
    def needs_pairs(self) -> bool:
        return self.paired

    def objective(self, model, reference, rng):
        from functools import cache

        import torch

        from undo.lm.read import final_norm, head, recorded
        from undo.losses import of_documents
        from undo.unlearn.discrepancy import noise_distance

        base = self.base.objective(model, reference, rng)
        norm = final_norm(model)
        seed = int(torch.randint(2**62, (), generator=rng))

        def terms(batch):
            forget, found = batch["forget"], {}
            outputs = cache(lambda: recorded(model, forget))  # one pass for both terms
            read = said = forget
            if self.paired:
                differs = torch.zeros_like(forget.labels, dtype=torch.bool) if forget.marked is None else forget.marked
                read, said = forget.labelled(differs), forget.labelled(differs.roll(-1, 1))

            def noise():
                value = noise_distance(outputs()[1], read, self.sample, seed)
                return forget.per_document(self.noise_weight * value)

            def ascent():
                value = of_documents(
                    [norm(block) for block in outputs()[0]],
                    head(model),
                    said,
                    lambda nll, length: torch.log1p((nll / length).mean(0)),
                )
                return forget.per_document(-self.ascent_weight * value)

            if self.noise_weight:
                found["noise"] = noise
            if self.ascent_weight:
                found["ascent"] = ascent
            return base(batch).and_also(found)

        return terms

    def role_flops(self, role: Role, model: Shape, length: int) -> int:
        flops, body = super().role_flops(role, model, length), 3 * model.first(model.layers).forward_flops(length)
        head = 4 * model.layers * model.head_flops  # of every block: values, then values and two gradients
        if isinstance(self.base, OnBlocks):  # the head is not trained, and little of the body
            body, head = sum(self.base.flops_of_passes(model, length, model.layers)), head * 3 // 4
        if role == "forget" and (self.noise_weight or self.ascent_weight):
            flops += body + head * bool(self.ascent_weight)
        return flops
