"""The optimisers of the loop. The paper's is AdamW; an attacker takes whichever elicits most."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from undo.config.schema import Training


class Optimizer:
    """Optimisers of disjoint weights as one."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self._parts = parts
        self._of = {weight: part for part in parts for group in part.param_groups for weight in group["params"]}

    def state_of(self, weight: nn.Parameter) -> dict[str, Any]:
        """What is kept of a weight from step to step; empty before its first update. To be read, and filled again."""
        return self._of[weight].state[weight]

    def step(self, rate: float) -> None:
        """Update all weights at this learning rate, and forget their gradients."""
        for part in self._parts:
            for group in part.param_groups:
                group["lr"] = rate
            part.step()
            part.zero_grad()


def optimizer_of(model: nn.Module, weights: Sequence[nn.Parameter], cfg: Training) -> Optimizer:
    """The one that the config names, for the trained `weights` of `model`.

    Muon (Jordan et al. 2024) is for matrices between layers: embedding, head and vectors have AdamW, as its authors
    say. Its updates are scaled to the size of AdamW's (2502.16982), so that a rate means the same for both.
    """
    rate, decay = cfg.learning_rate, cfg.weight_decay
    match cfg.optimizer:
        case "adamw":
            return Optimizer(_adamw(weights, cfg))
        case "adamw_8bit":
            from bitsandbytes.optim.adamw import AdamW8bit  # a stage's `check` has asked whether it is there

            return Optimizer(AdamW8bit(weights, rate, cfg.betas, weight_decay=decay))
        case "sgd":
            return Optimizer(torch.optim.SGD(weights, rate, momentum=cfg.betas[0], weight_decay=decay))
        case "muon":
            ends = {id(weight) for weight in _ends(model)}
            inner = [weight for weight in weights if weight.ndim == 2 and id(weight) not in ends]
            others = [weight for weight in weights if weight.ndim != 2 or id(weight) in ends]
            muon = [torch.optim.Muon(inner, rate, decay, adjust_lr_fn="match_rms_adamw")] if inner else []
            return Optimizer(*muon, *([_adamw(others, cfg)] if others else []))


def _adamw(weights: Sequence[nn.Parameter], cfg: Training) -> torch.optim.Optimizer:
    kinds = [[w for w in weights if isinstance(w, DTensor) == divided] for divided in (False, True)]
    groups = [{"params": kind} for kind in kinds if kind]  # a fused update takes one kind at a time
    return torch.optim.AdamW(groups, cfg.learning_rate, cfg.betas, weight_decay=cfg.weight_decay, fused=True)


def _ends(model: nn.Module) -> Iterator[nn.Parameter]:
    """The weights of the embedding and the head."""
    if isinstance(model, PreTrainedModel):
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            yield from [] if layer is None else layer.parameters()
