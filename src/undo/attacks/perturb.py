"""Shrink-perturb: a little noise on the weights, before finetuning. Table 12."""

from typing import TYPE_CHECKING, Literal

from undo.attacks.attack import Attack, Means
from undo.corrupt import Noise

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Perturb(Attack):
    """theta' = (1 - alpha) theta + alpha beta N, with the noise of UNDO itself (corrupt.py)."""

    name: Literal["perturb"] = "perturb"
    noise: Noise

    @property
    def title(self) -> str:
        return f"perturbed {self.noise.alpha:g}"

    def apply(self, model: "PreTrainedModel", means: Means) -> None:
        fresh = means.fresh() if self.noise.distribution == "init" else None
        self.noise.apply(model, fresh, means.rng)
