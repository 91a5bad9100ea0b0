"""The gradient of a whole batch, exact over micro-batches and devices, as often as a step asks for it."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from undo.lm import attention
from undo.lm.tokens import Batch
from undo.losses.terms import OnDemand

if TYPE_CHECKING:
    from accelerate import PartialState


Objective = Callable[[Batch], Mapping[str, Tensor]]  # named, already weighted terms; the loss is their sum
Terms = dict[str, Tensor]  # their values, of a whole batch
Gradients = Sequence[Tensor | None]  # one for each trained weight, None where the terms do not depend on it


class Gradient(Protocol):
    """The gradient of the sum of some terms on the step's whole batch, at the weights as they are; and their values.

    names: which terms; None: all. without: those that are left out. It is exact over micro-batches and devices, and may
    be called any number of times in a step. A term that is not asked for does not run if the objective is OnDemand.
    `progress` is the share of the training that is done, from 0 to 1; `weights` are the trained ones.
    """

    @property
    def weights(self) -> Sequence[nn.Parameter]: ...

    @property
    def progress(self) -> float: ...

    def __call__(
        self, names: Collection[str] | None = None, *, without: Collection[str] = ()
    ) -> tuple[Terms, Gradients]: ...


Step = Callable[[Gradient], tuple[Terms, Gradients]]  # what the optimiser takes as the gradient, and what is recorded


def plain(gradient: Gradient) -> tuple[Terms, Gradients]:
    """The gradient of the loss: the step of most methods."""
    return gradient()


@dataclass(frozen=True)
class BatchGradient:
    """Gradient, by backward passes over the micro-batches of this process's part of the batch."""

    objective: Objective
    batch: Batch  # the rows of this process, which know the totals of all
    weights: Sequence[nn.Parameter]
    progress: float
    micro_rows: int | None
    devices: "PartialState"
    autocast: torch.autocast

    def __call__(
        self, names: Collection[str] | None = None, *, without: Collection[str] = ()
    ) -> tuple[Terms, Gradients]:
        def asked(name: str) -> bool:
            return (names is None or name in names) and name not in without

        outer: dict[str, Callable[[Tensor], Tensor]] = {}
        terms, gradients = self._sums(asked, outer)
        for name, function in outer.items():
            sums, own = self._sums(lambda n, name=name: n == name)
            value, slope = _slope(function, sums[name])
            terms[name], gradients = value, _add_in_place(gradients, own, slope)
        return terms, gradients

    def _sums(
        self, asked: Callable[[str], bool], outer: dict[str, Callable[[Tensor], Tensor]] | None = None
    ) -> tuple[Terms, Gradients]:
        """The terms' sums over the whole batch, and their gradient. Curved terms go to `outer` instead, where given."""
        terms: Terms = {}
        for parts in zip(*(tokens.micro_batches(self.micro_rows) for tokens in self.batch.values()), strict=True):
            with self.autocast, attention.shared():
                part = self.objective({n: t.to(self.devices.device) for n, t in zip(self.batch, parts, strict=True)})
                curved = part.outer if isinstance(part, OnDemand) else {}
                if outer is not None:
                    outer |= {name: curved[name] for name in curved if asked(name)}
                wanted = {
                    name: part.summand(name) if isinstance(part, OnDemand) else part[name]
                    for name in part
                    if asked(name) and (outer is None or name not in curved)
                }
            if wanted:
                torch.stack([*wanted.values()]).sum().backward()
            for name, value in wanted.items():
                terms[name] = terms.get(name, 0) + value.detach()
        gradients: Gradients = [weight.grad for weight in self.weights]
        for weight in self.weights:
            weight.grad = None
        own = (
            g for g in gradients if g is not None and not isinstance(g, DTensor)
        )  # what is divided is summed already
        _add_up_over_devices([*terms.values(), *own], self.devices)
        return terms, gradients


def _slope(function: Callable[[Tensor], Tensor], at: Tensor) -> tuple[Tensor, float]:
    """A function's value and its derivative."""
    with torch.enable_grad():
        value = function(at := at.detach().requires_grad_())
        (slope,) = torch.autograd.grad(value, at)
    return value.detach(), float(slope)


def _add_in_place(total: Gradients, own: Gradients, factor: float) -> Gradients:
    """total + factor own, in the memory of either."""
    return [
        (None if y is None else y.mul_(factor)) if x is None else x if y is None else x.add_(y, alpha=factor)
        for x, y in zip(total, own, strict=True)
    ]


def _add_up_over_devices(parts: Iterable[Tensor], devices: "PartialState") -> None:
    if devices.num_processes > 1:
        for part in parts:
            torch.distributed.all_reduce(part)
