"""Mean cross entropy per token on packed validation text, by role."""

from typing import TYPE_CHECKING, ClassVar, Literal

from undo.config import Count
from undo.evaluate.evaluator import SHARE, EvaluationConfig, Evaluator, Measured
from undo.run import RunDirectory
from undo.tokens import TokenStore

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


class TokenCrossEntropy(EvaluationConfig):
    """Cross entropy in nats: token-weighted, so that it depends neither on the batch size nor on padding."""

    name: Literal["cross_entropy"] = "cross_entropy"
    higher_is_better: ClassVar[bool] = False
    unit: ClassVar[str] = "cross entropy (nats)"

    rows: Count = 16

    def load(self, data: RunDirectory, device: "torch.device") -> Evaluator:
        parts = {}  # role -> batches of the subset, batches of the rest
        for role in ("retain", "forget"):
            store = TokenStore(data.folder / "validation" / role)
            parts[role] = [
                [tokens.to(device) for tokens in store.batches(indices, self.rows)]
                for indices in self.split(len(store))
            ]

        whole = sum(t.total for both in parts.values() for some in both for t in some)

        def measure(model: "PreTrainedModel", full: bool) -> Measured:
            import torch

            from undo.losses import cross_entropy

            batches = {role: subset + rest if full else subset for role, (subset, rest) in parts.items()}
            sums = [torch.stack([cross_entropy(model, t) * t.total for t in some]).sum() for some in batches.values()]
            totals = [sum(t.total for t in some) for some in batches.values()]
            by_role = zip(batches, torch.stack(sums).tolist(), totals, strict=True)
            values = {role: value / total for role, value, total in by_role}
            if (share := sum(totals) / whole) < 1:
                values[SHARE] = share
            return Measured(values, sum(t.input_ids.numel() for some in batches.values() for t in some))

        return measure
