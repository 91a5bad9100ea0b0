"""Shrink-and-perturb: theta' = (1 - alpha) theta + alpha beta N (Section 5; pseudocode in Appendix C)."""

from typing import TYPE_CHECKING, Any, Literal, cast

from undo.config.schema import Frozen, NonNegative, Share

if TYPE_CHECKING:
    import torch
    from torch import nn


class Noise(Frozen):
    """How much of the weights to replace by noise, and by which noise.

    distribution: `xavier` is the paper's: Xavier-uniform for matrices, zero for vectors. `init` draws what a fresh
    model of the same architecture would, so that alpha = beta = 1 is exactly a random initialisation.
    norms: `paper` shrinks vectors like all other weights; `keep` leaves them alone. None decides vector by vector, as
    the architecture needs. A vector that a fresh model starts at 0 is shrunk (biases, and Gemma's norms, which
    multiply by 1 + w). One that starts elsewhere is kept (the norms of Llama or Qwen multiply by w, and shrinking them
    breaks the model).
    """

    alpha: Share
    beta: NonNegative = 0.1
    distribution: Literal["xavier", "init"] = "xavier"
    norms: Literal["paper", "keep"] | None = None

    def apply(self, model: "nn.Module", fresh: "nn.Module | None" = None, rng: "torch.Generator | None" = None) -> None:
        """Perturb `model` in place.

        fresh: a random initialisation of the same architecture; only `distribution: init` needs it. Without it each
        vector's own module is initialised anew, to see where the architecture starts it. rng: of the Xavier noise;
        None: torch's global generator. A tied matrix is visited once. Raises ValueError for a weight of more than two
        dimensions, and where a fresh model is needed and not given.
        """
        import torch

        if fresh is None and self.distribution == "init":
            raise ValueError("distribution: init draws from a fresh model of the same architecture; give it as `fresh`")
        initial = None if fresh is None else dict(fresh.named_parameters())
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.ndim > 2:
                    raise ValueError(f"no noise is defined for {name} of shape {tuple(weight.shape)}")
                if weight.ndim < 2 and self._keeps(name, model, initial):
                    continue
                if self.distribution == "init":
                    assert initial is not None
                    sample = initial[name]
                elif weight.ndim == 2:
                    drawn_on = None if rng is None else rng.device  # a run's is a CPU's: the same on every device
                    sample = torch.empty_like(weight, device=drawn_on)
                    torch.nn.init.xavier_uniform_(sample, generator=rng)
                else:
                    sample = torch.zeros_like(weight)
                weight.mul_(1 - self.alpha).add_(sample.to(weight.device), alpha=self.alpha * self.beta)

    def _keeps(self, name: str, model: "nn.Module", initial: "dict[str, nn.Parameter] | None") -> bool:
        """Whether the vector of this name is left alone."""
        if self.norms is not None:
            return self.norms == "keep"
        return not starts_at_zero(name, model) if initial is None else bool(initial[name].any())


def starts_at_zero(name: str, model: "nn.Module") -> bool:
    """Whether the model's architecture initialises the vector of this name to 0, without a second model.

    Copies the module that holds it and initialises the copy by the model's own rule (transformers' `_init_weights`)
    or by torch's. Layers with a matrix are not copied: their biases start at 0 in transformers.
    """
    from copy import deepcopy

    import torch

    path, _, key = name.rpartition(".")
    module = model.get_submodule(path)
    if any(weight.ndim > 1 for weight in module.parameters(recurse=False)):
        return key == "bias"
    copy = deepcopy(module)
    setattr(copy, key, torch.nn.Parameter(torch.full_like(getattr(module, key), torch.nan)))
    initialise = cast(Any, getattr(model, "_init_weights", None))
    with torch.random.fork_rng(), torch.no_grad():
        if initialise is not None:
            initialise(copy)
        elif hasattr(copy, "reset_parameters"):
            cast(Any, copy).reset_parameters()
    return not bool(getattr(copy, key).any())  # not-a-number, which nothing initialised, is not 0
