"""Shrink-and-perturb: theta' = (1 - alpha) theta + alpha beta N (Section 5; pseudocode in Appendix C)."""

from typing import TYPE_CHECKING, Literal

from undo.config.schema import Frozen, NonNegative, Share

if TYPE_CHECKING:
    import torch
    from torch import nn


class Noise(Frozen):
    """How much of the weights to replace by noise, and by which.

    distribution: `xavier`, the paper's: Xavier-uniform for matrices, zero for vectors. `init`: what a fresh model of
    the same architecture would draw, so that alpha = beta = 1 is exactly a random initialisation.
    norms: `paper` shrinks vectors like all other weights, `keep` leaves them alone. None: as the architecture needs it,
    vector by vector. One that a fresh model starts at 0 is shrunk (biases, and Gemma's norms, which multiply by 1 + w);
    one that it starts elsewhere is kept (the norms of Llama or Qwen multiply by w: without it nothing comes through).
    """

    alpha: Share
    beta: NonNegative = 0.1
    distribution: Literal["xavier", "init"] = "xavier"
    norms: Literal["paper", "keep"] | None = None

    def apply(self, model: "nn.Module", fresh: "nn.Module", rng: "torch.Generator") -> None:
        """Perturb `model` in place. `fresh` is a random initialisation of the same architecture.

        A tied matrix is visited once. Raises ValueError for a weight of more than two dimensions.
        """
        import torch

        initial = dict(fresh.named_parameters())
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.ndim > 2:
                    raise ValueError(f"no noise is defined for {name} of shape {tuple(weight.shape)}")
                if weight.ndim < 2 and (bool(initial[name].any()) if self.norms is None else self.norms == "keep"):
                    continue
                if self.distribution == "init":
                    sample = initial[name]
                elif weight.ndim == 2:
                    sample = torch.empty_like(weight)
                    torch.nn.init.xavier_uniform_(sample, generator=rng)
                else:
                    sample = torch.zeros_like(weight)
                weight.mul_(1 - self.alpha).add_(sample, alpha=self.alpha * self.beta)
