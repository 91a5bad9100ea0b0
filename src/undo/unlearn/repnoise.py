from typing import ClassVar, Literal

from undo.config.schema import Count, NonNegative
from undo.lm.shape import Shape
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
        import torch

        from undo.lm.read import final_norm, head, recorded
        from undo.losses import of_documents
        from undo.unlearn.discrepancy import noise_distance

        base = self.base.objective(model, reference, rng)
        norm = final_norm(model)
        seed = int(torch.randint(2**62, (), generator=rng))

        def terms(batch):
            found, forget = base(batch), batch["forget"]
            blocks, mlps = recorded(model, forget)
            read = said = forget
            if self.paired:
                differs = torch.zeros_like(forget.labels, dtype=torch.bool) if forget.marked is None else forget.marked
                read, said = forget.labelled(differs), forget.labelled(differs.roll(-1, 1))
            if self.noise_weight:
                noise = noise_distance(mlps, read, self.sample, seed)
                found["noise"] = self.noise_weight * noise / forget.documents
            if self.ascent_weight:
                ascent = of_documents(
                    [norm(block) for block in blocks],
                    head(model),
                    said,
                    lambda nll, length: torch.log1p((nll / length).mean(0)),
                )
                found["ascent"] = -self.ascent_weight * ascent / forget.documents
            return found

        return terms

    def flops_per_token(self, model: Shape, length: int) -> int:
        body, head = model.first(model.layers).forward_flops(length), 2 * model.vocab_size
        own = 3 * body + 4 * model.layers * head * model.hidden_size
        return self.base.flops_per_token(model, length) + own // 2  # on half the tokens
