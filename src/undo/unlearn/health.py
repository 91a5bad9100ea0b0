"""Checks and records of an unlearning run, so that one that cannot work is noticed before its model is used.

A filter that matches no parameter, or a term without a gradient, is an error. Every run records how many weights it
trains, the gradient norm of each term at the first step, how far the weights moved, and the forget cross entropy
beside ln V, that of a uniform guess.
"""

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final

import torch
from torch import nn

from undo.config.mistakes import ConfigError
from undo.data.store import TokenStore
from undo.lm import flops
from undo.losses import cross_entropy
from undo.runs.directory import RunDirectory
from undo.train import shard
from undo.train.gradient import Gradient, Gradients, Objective, Step, Terms
from undo.train.shift import global_norm
from undo.unlearn.method import Method

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROWS: Final = 32  # of forget text for the cross entropy


def begin(
    method: Method,
    model: "PreTrainedModel",
    reference: "PreTrainedModel | None",
    rng: torch.Generator,
    record: Callable[[int, Mapping[str, float]], None],
) -> tuple[Objective, Step]:
    """What the loop needs of a method: the objective, and a step that records each term's gradient norm at first.

    model: as it is before anything was unlearned. Sets which of its weights are trained. Raises ConfigError as
    `choose_weights` and `gradient_norms` do.
    """
    choose_weights(model, method)
    objective = method.objective(model, reference, rng)

    def step(gradient: Gradient) -> tuple[Terms, Gradients]:
        if gradient.progress == 0:
            with flops.uncounted():
                record(0, gradient_norms(gradient, method))
        return method.step(gradient, rng)

    return objective, step


def choose_weights(model: nn.Module, method: Method) -> None:
    """Train what the method trains, and nothing else. Raises ConfigError if that is nothing."""
    for parameter, weight in model.named_parameters():
        weight.requires_grad_(method.trains(parameter))
    if not any(weight.requires_grad for weight in model.parameters()):
        raise ConfigError(
            "the method trains no parameter of this model: trained_layers names blocks that it does not have, or its "
            "blocks have no mlp.down_proj"
        )


def gradient_norms(gradient: Gradient, method: Method) -> dict[str, float]:
    """Each term's own gradient norm, as "gradient/<term>", before any clipping.

    Raises ConfigError for a term that has none.
    """
    terms, _ = gradient()
    norms = {}
    for term in terms:
        _, alone = gradient([term])
        norms[f"gradient/{term}"] = norm = float(global_norm(alone))
        if norm == 0 and term not in method.zero_at_first:
            raise ConfigError(
                f"the loss term {term!r} has no gradient at the first step, so it would change nothing\n"
                f"its weight is 0, or it does not depend on any trained weight: check the keys of method"
            )
    return norms


def recorded_norms(run: RunDirectory) -> dict[str, float]:
    """The gradient norms of the first step, recorded by this process or by an interrupted one before it."""
    lines = (record for record in run.records() if any(key.startswith("gradient/") for key in record))
    return {key: value for key, value in next(lines, {}).items() if key != "step"}


@torch.no_grad()
def of(model: "PreTrainedModel", start: nn.Module, data: RunDirectory) -> dict[str, float]:
    """The state of the trained `model`, `start` being what it was before."""
    before = dict(start.named_parameters())
    trained = {name: shard.whole(weight) for name, weight in model.named_parameters() if weight.requires_grad}
    store = TokenStore(data.folder / "validation" / "forget")
    tokens = next(store.batches(range(min(ROWS, len(store))), ROWS))
    return {
        "trained_weights": sum(weight.numel() for weight in trained.values()),
        "relative_weight_change": float(
            global_norm([weight - before[name] for name, weight in trained.items()])
            / global_norm([before[name] for name in trained])
        ),
        "forget_cross_entropy": float(cross_entropy(model, tokens.to(model.device))),
        "ln_vocabulary": math.log(model.config.vocab_size),
    }


def as_line(health: Mapping[str, float]) -> str:
    """For people."""
    norms = ", ".join(f"{k.partition('/')[2]} {v:.3g}" for k, v in health.items() if k.startswith("gradient/"))
    return (
        f"health: {health['trained_weights']:,.0f} weights trained, moved by {health['relative_weight_change']:.2%}; "
        f"first gradients: {norms}; forget cross entropy {health['forget_cross_entropy']:.2f} "
        f"(ln V = {health['ln_vocabulary']:.2f})"
    )
