"""Mean cross entropy per token on packed validation text, by role."""

from typing import TYPE_CHECKING, ClassVar, Literal

from undo.config import Count
from undo.evaluate.evaluator import EvaluationConfig, Evaluator
from undo.run import RunDirectory
from undo.tokens import TokenStore

if TYPE_CHECKING:
    import torch
    from transformers import Gemma2ForCausalLM


class TokenCrossEntropy(EvaluationConfig):
    """Cross entropy in nats: token-weighted, so that it depends neither on the batch size nor on padding."""

    name: Literal["cross_entropy"] = "cross_entropy"
    higher_is_better: ClassVar[bool] = False
    unit: ClassVar[str] = "cross entropy (nats per token)"

    rows: Count = 16

    def load(self, data: RunDirectory, device: "torch.device") -> Evaluator:
        batches = {
            role: [tokens.to(device) for tokens in TokenStore(data.folder / "validation" / role).batches(self.rows)]
            for role in ("retain", "forget")
        }

        def measure(model: "Gemma2ForCausalLM") -> dict[str, float]:
            from undo.losses import cross_entropy

            return {
                role: sum(float(cross_entropy(model, t)) * t.total for t in parts) / sum(t.total for t in parts)
                for role, parts in batches.items()
            }

        return Evaluator(measure, sum(t.input_ids.numel() for parts in batches.values() for t in parts))
