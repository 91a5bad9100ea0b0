"""The gradient of a whole batch, exact over micro-batches and devices, as often as a step asks for it."""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from undo.lm.tokens import Batch

if TYPE_CHECKING:
    from accelerate import PartialState


Objective = Callable[[Batch], dict[str, Tensor]]  # named, already weighted terms; the loss is their sum
Terms = dict[str, Tensor]  # their values, of a whole batch
Gradients = Sequence[Tensor | None]  # one for each trained weight, None where the terms do not depend on it


class Gradient(Protocol):
    """The gradient of the sum of the named terms (None: all) on the step's whole batch, at the weights as they are.

    It is exact over micro-batches and devices, and may be called any number of times in a step. `progress` is the share
    of the training that is done, from 0 to 1; `weights` are the trained ones.
    """

    @property
    def weights(self) -> Sequence[nn.Parameter]: ...

    @property
    def progress(self) -> float: ...

    def __call__(self, names: Collection[str] | None = None) -> tuple[Terms, Gradients]: ...


Step = Callable[[Gradient], tuple[Terms, Gradients]]  # what the optimiser takes as the gradient, and what is recorded


def plain(gradient: Gradient) -> tuple[Terms, Gradients]:
    """The gradient of the loss: the step of most methods."""
    return gradient()


@dataclass(frozen=True)
class BatchGradient:
    """Gradient, by backward passes over the micro-batches of this process's part of the batch."""

    objective: Objective
    batch: Batch
    weights: Sequence[nn.Parameter]
    progress: float
    micro_rows: int | None
    devices: "PartialState"
    autocast: torch.autocast

    def __call__(self, names: Collection[str] | None = None) -> tuple[Terms, Gradients]:
        terms: Terms = {}
        mine = [t.rows(self.devices.process_index, step=self.devices.num_processes) for t in self.batch.values()]
        for parts in zip(*(tokens.micro_batches(self.micro_rows) for tokens in mine), strict=True):
            with self.autocast:
                part = self.objective({n: t.to(self.devices.device) for n, t in zip(self.batch, parts, strict=True)})
            wanted = [value for name, value in part.items() if names is None or name in names]
            if wanted:
                torch.stack(wanted).sum().backward()
            for name, value in part.items():
                terms[name] = terms.get(name, 0) + value.detach()
        gradients: Gradients = [weight.grad for weight in self.weights]
        for weight in self.weights:
            weight.grad = None
        own = (
            g for g in gradients if g is not None and not isinstance(g, DTensor)
        )  # what is divided is summed already
        _add_up_over_devices([*terms.values(), *own], self.devices)
        return terms, gradients


def _add_up_over_devices(parts: Iterable[Tensor], devices: "PartialState") -> None:
    if devices.num_processes > 1:
        for part in parts:
            torch.distributed.all_reduce(part)
