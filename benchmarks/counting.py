"""Deterministic costs, without a clock or a GPU: kernels, and bytes through tensors of logits. CI holds them down.

Every operation that PyTorch dispatches is one kernel, views and metadata left out. A pass is one reading or writing of
[tokens, vocabulary] in fp32.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

INSIDE = {  # further passes within an operation that is dispatched as one: max, subtract, exp, sum
    torch.ops.aten.logsumexp.default: 5,
}


class Counter(TorchDispatchMode):
    """Counts while it is entered. A tensor counts as logits if it has at least `logits` elements."""

    def __init__(self, logits: int = 1 << 62) -> None:
        super().__init__()
        self.logits = logits
        self.kernels = 0
        self.logits_bytes = 0
        self.largest = 0  # elements of the largest tensor made
        self.shapes: set[tuple[int, ...]] = set()  # of all tensors made

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        made = tensors(result)
        taken = tensors((args, {key: value for key, value in (kwargs or {}).items() if key != "out"}))
        memory = {_address(t) for t in taken}
        if (made and func.is_view) or func is torch.ops.aten.detach.default:
            return result
        self.kernels += 1
        self.shapes |= {tuple(t.shape) for t in made}
        self.largest = max([self.largest, *(t.numel() for t in made if _address(t) not in memory)])
        if func in ALLOCATIONS:
            return result
        moved = [t for t in (*taken, *made) if t.numel() >= self.logits]
        size = sum(t.numel() * t.element_size() for t in moved)
        self.logits_bytes += size * (1 + INSIDE.get(func, 0))
        return result


class Held(TorchDispatchMode):
    """The bytes that tensors hold at most while it is entered, of those made in it."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {tensor.untyped_storage()._cdata for tensor in tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for tensor in tensors(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in given:  # a view, or changed in place
                reference = StorageWeakRef(storage)
                self._alive[reference.cdata] = reference, storage.nbytes()
        self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return result


ALLOCATIONS = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.empty_like.default,
}


def tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Products(TorchDispatchMode):
    """FLOPs of matrix products while it is entered: `linear` with weights, `batched` of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = self.batched = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            a, b = args[-2:]
            self.linear += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        elif name == "bmm":
            a, b = args
            self.batched += 2 * a.shape[0] * a.shape[1] * a.shape[2] * b.shape[2]
        return func(*args, **(kwargs or {}))


def passes(loss: Callable[[], torch.Tensor], tokens: int, vocabulary: int) -> float:
    """fp32 passes over [tokens, vocabulary] of a loss's forward and backward."""
    with Counter(logits=round(0.9 * tokens * vocabulary)) as counter:
        loss().backward()
    return counter.logits_bytes / (4 * tokens * vocabulary)
