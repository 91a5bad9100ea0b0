"""A second device that is only pretended: tensors that say they are on a card, and refuse to meet a CPU's.

They compute on the CPU, by the CPU's paths. So a machine without a card can ask what most often breaks on one: a tensor
or a constant that was left behind, or is drawn there from a CPU's generator. It cannot ask about kernels, compilation,
precision and speed. `UNDO_TESTS_ON=pretend uv run pytest` runs the device-independent tests on it, at a third of the
speed.
"""

from typing import Any, Final

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

DEVICE: Final = torch.device("cuda:0")
BETWEEN: Final = ("aten::_to_copy", "aten::copy_")  # what may see tensors of two devices, beside indexing


class Elsewhere(torch.Tensor):
    """A CPU's tensor that says it is on DEVICE. To C++ it is on no device at all, so that no driver is asked for."""

    inner: torch.Tensor
    device = property(lambda self: DEVICE)  # pyright: ignore[reportAssignmentType]
    is_meta = property(lambda self: False)  # pyright: ignore[reportAssignmentType]

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "Elsewhere":
        size, strides, offset = inner.size(), inner.stride(), inner.storage_offset()
        return torch.Tensor._make_wrapper_subclass(cls, size, strides, offset, dtype=inner.dtype, device="meta")

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    def __repr__(self, **_: Any) -> str:
        return f"elsewhere({self.inner!r})"

    def __getitem__(self, index: Any) -> torch.Tensor:  # torch would make a tensor of a list without asking
        return super().__getitem__(Elsewhere(torch.tensor(index)) if isinstance(index, list) else index)

    def tolist(self) -> Any:
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})


class Pretend(TorchDispatchMode):
    """What makes a tensor on DEVICE of nothing, or of a CPU's."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})


def computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operation, on the CPU; its result is where a card's would be. Raises RuntimeError where a card does."""
    name, tensors = func._schema.name, [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    strict = name in ("aten::stack", "aten::cat")  # elsewhere a CPU's single number will do
    places = {isinstance(t, Elsewhere) for t in tensors if strict or t.dim() > 0 or isinstance(t, Elsewhere)}
    if len(places) > 1 and name not in BETWEEN and "index" not in name:
        raise RuntimeError(f"{func}: Expected all tensors to be on the same device")
    asked = kwargs.get("device")
    targets = tensors[:1] if name == "aten::copy_" else tensors
    elsewhere = any(isinstance(t, Elsewhere) for t in targets)
    if asked is not None:
        elsewhere = torch.device(asked).type in (DEVICE.type, "meta")  # meta: like a tensor of ours
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if elsewhere and isinstance(kwargs.get("generator"), torch.Generator):
        raise RuntimeError(f"{func}: Expected a '{DEVICE.type}' device type for generator but found 'cpu'")
    inner_args, inner_kwargs = tree_map(lambda t: t.inner if isinstance(t, Elsewhere) else t, (args, kwargs))
    with _disable_current_modes():
        out = func(*inner_args, **inner_kwargs)
    if not elsewhere:
        return out
    out = tree_map(lambda t: Elsewhere(t) if isinstance(t, torch.Tensor) else t, out)
    if any(returned.alias_info is not None for returned in func._schema.returns):
        return return_and_correct_aliasing(func, args, kwargs, out)
    return out


def begin() -> torch.device:
    """From now on, for the whole process."""
    torch.cuda._lazy_init = lambda: None  # every `device=` would look for a driver
    torch.__future__.set_swap_module_params_on_conversion(True)  # tied weights stay one
    Pretend().__enter__()
    return DEVICE
