"""Mean cross entropy per token on packed validation text, by role, with multiple choice beside it if configured."""

import math
from typing import TYPE_CHECKING, ClassVar, Literal

from undo.config.mistakes import ConfigError
from undo.config.schema import Count
from undo.evaluate.evaluator import SHARE, EvaluationConfig, Evaluator, Measured, Outcomes
from undo.evaluate.multiple_choice import MultipleChoice
from undo.runs.directory import RunDirectory

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


class TokenCrossEntropy(EvaluationConfig):
    """Cross entropy in nats: token-weighted, so that it depends neither on the batch size nor on padding."""

    name: Literal["cross_entropy"] = "cross_entropy"
    higher_is_better: ClassVar[bool] = False
    unit: ClassVar[str] = "cross entropy (nats)"

    rows: Count = 16
    choices: MultipleChoice | None = None  # asked in full evaluations only: accuracy/retain, accuracy/forget, ...

    def check(self) -> None:
        if self.choices is not None:
            try:
                self.choices.check()
            except ConfigError as error:
                raise ConfigError(f"choices.{error}") from None

    def load(self, data: RunDirectory, device: "torch.device") -> Evaluator:
        import torch

        from undo.data.store import TokenStore
        from undo.losses import cross_entropy

        parts = {}  # role -> batches of the subset, batches of the rest
        for role in ("retain", "forget"):
            store = TokenStore(data.folder / "validation" / role)
            parts[role] = [
                [tokens.to(device) for tokens in store.batches(indices, self.rows)]
                for indices in self.split(len(store))
            ]

        choices = self.choices.load(data, device) if self.choices is not None else None
        whole = sum(t.total for both in parts.values() for some in both for t in some)

        @torch.no_grad()
        def measure(model: "PreTrainedModel", full: bool) -> Measured:
            batches = {role: subset + rest if full else subset for role, (subset, rest) in parts.items()}
            each = [torch.stack([cross_entropy(model, t) * t.total for t in some]) for some in batches.values()]
            sums = [nats.sum() for nats in each]
            totals = [sum(t.total for t in some) for some in batches.values()]
            by_role = zip(batches, torch.stack(sums).tolist(), totals, strict=True)
            values = {role: value / total if total else math.nan for role, value, total in by_role}
            if (share := sum(totals) / max(1, whole)) < 1:
                values[SHARE] = share
            tokens = sum(t.input_ids.numel() for some in batches.values() for t in some)
            if full and choices is not None:
                asked = choices(model, True)
                values |= {f"accuracy/{name}": value for name, value in asked.values.items()}
                tokens += asked.tokens
            outcomes = {
                role: Outcomes(nats.tolist(), [float(t.total) for t in some])
                for (role, some), nats in zip(batches.items(), each, strict=True)
            }
            return Measured(values, tokens, outcomes)

        return measure
