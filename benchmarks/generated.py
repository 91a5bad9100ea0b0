"""What a GPU's kernels do to logits, read off the Triton code that inductor generates for an H200. Needs no GPU.

    uv run benchmarks/generated.py [--hidden 320] [--tokens 2097] [--code FOLDER]

The losses run on fake tensors, which have shapes and no values: what PyTorch dispatches is counted, and what it
compiles is generated and counted in place of launched. A pass is one reading or writing of [tokens, vocabulary] in
fp32; a product is taken to read and to write each of its matrices once.
"""

import argparse
import contextlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Final, NamedTuple
from unittest.mock import patch

import measure
import torch
import torch._inductor.config
from counting import ALLOCATIONS, Held, tensors
from torch._inductor.codecache import PyCodeCache
from torch._inductor.runtime.hints import DeviceProperties
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from undo.lm.read import Head
from undo.losses.linear import linear_loss
from undo.losses.targets import CrossEntropy, ForwardKL, LoweredKL, UniformKL

H200: Final = {
    "major": 9,
    "multi_processor_count": 132,
    "regs_per_multiprocessor": 65536,
    "max_threads_per_multi_processor": 2048,
    "max_threads_per_block": 1024,
    "warp_size": 32,
}
KINDS: Final = ("ce", "uniform", "kl", "lowered kl")
SOFTCAP: Final = 30.0
ACCESS: Final = re.compile(r"tl\.(load|store|atomic_add)\((\w+) \+ (.+?), ")  # up to the mask: the pointer, the index


@contextlib.contextmanager
def pretended() -> Iterator[None]:
    """Inductor generates code for an H200 from fake CUDA tensors, and its kernels are counted in place of launched."""
    properties = SimpleNamespace(name="NVIDIA H200", minor=0, **H200)
    device = DeviceProperties(type="cuda", index=0, cc=90, **H200)  # pyright: ignore[reportArgumentType]
    interface, guards = "torch._dynamo.device_interface.CudaInterface", "torch._C._dynamo.guards"
    replaced = {
        "torch.cuda.get_device_properties": lambda *_: properties,
        f"{interface}.get_device_properties": lambda *_: properties,
        f"{interface}.is_bf16_supported": lambda *_, **__: True,
        "torch.cuda.is_bf16_supported": lambda *_, **__: True,
        "torch.cuda.amp.common.amp_definitely_not_available": lambda: False,
        "torch.cuda.get_device_capability": lambda *_: (9, 0),
        "torch.cuda.current_device": lambda: 0,
        "torch.cuda.set_device": lambda *_: None,
        "torch.cuda._DeviceGuard": lambda *_: contextlib.nullcontext(),
        "torch._C._cuda_getCurrentRawStream": lambda *_: 0,
        "torch._inductor.runtime.hints.DeviceProperties.create": lambda *_: device,
        "torch._inductor.scheduler.has_triton": lambda *_: True,
        "torch._inductor.async_compile.AsyncCompile.triton": lambda _, name, code, **__: Kernel(name, code),
        "torch.utils._triton.triton_hash_with_backend": lambda: "no driver",
        f"{guards}._empty_strided_cuda": lambda *shape: torch.empty_strided(*shape[:2], dtype=shape[2], device="cuda"),
        f"{guards}._reinterpret_tensor": torch.as_strided,
        f"{guards}.copy_if_misaligned": lambda tensor: tensor,
    }
    # constants would be folded on the device; processes that compile are not worth their start
    options = {"joint_graph_constant_folding": False, "compile_threads": 1, "force_disable_caches": True}
    with contextlib.ExitStack() as stack:
        for name, value in replaced.items():
            stack.enter_context(patch(name, value))
        stack.enter_context(torch._inductor.config.patch(options))
        stack.enter_context(FakeTensorMode())
        stack.callback(PyCodeCache.cache_clear)
        stack.callback(torch._dynamo.reset)
        torch._dynamo.reset()
        yield


class Launch(NamedTuple):
    """Of a kernel: the bytes of each tensor of logits that it loads and stores, once for each time."""

    name: str
    loads: list[int]
    stores: list[int]


class Kernel:
    """Takes the place of a compiled Triton kernel, and tells `traffic` of each launch."""

    traffic: ClassVar["Traffic | None"] = None
    made: ClassVar[list["Kernel"]] = []

    def __init__(self, name: str, code: str) -> None:
        self.name, self.code = name, code
        signature = re.search(rf"def {name}\((.+?)\)", code)
        assert signature is not None
        self.pointers = signature[1].split(", ")
        # an index with a loaded value in it is of one word of each token
        self.accesses = [(kind, pointer) for kind, pointer, index in ACCESS.findall(code) if "tmp" not in index]
        Kernel.made.append(self)

    def run(self, *arguments: Any, **_: Any) -> None:
        if Kernel.traffic is None:
            return
        given = dict(zip(self.pointers, arguments, strict=False))
        sizes = [(kind, Kernel.traffic.of_logits(given[pointer])) for kind, pointer in self.accesses]
        loads, stores = ([size for kind, size in sizes if size and (kind == "load") == load] for load in (True, False))
        Kernel.traffic.launches.append(Launch(self.name, loads, stores))


class Traffic(TorchDispatchMode):
    """Bytes through tensors of logits, and through fp32 ones of the head's shape, [vocabulary, hidden]."""

    def __init__(self, vocabulary: int, hidden: int) -> None:
        super().__init__()
        self.vocabulary, self.head = vocabulary, (vocabulary, hidden)
        self.products = self.others = self.heads = 0
        self.launches: list[Launch] = []

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def of_logits(self, tensor: torch.Tensor) -> int:
        """Its bytes, or 0 if it holds no logits and no gradient by them."""
        logits = self.vocabulary in tensor.shape and tuple(tensor.shape) not in (self.head, self.head[::-1])
        return tensor.numel() * tensor.element_size() if logits and tensor.ndim == 2 else 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        made = tensors(result)
        if not made or func.is_view or func in (*ALLOCATIONS, torch.ops.aten.empty_strided.default):
            return result
        moved = [*tensors((args, {key: value for key, value in (kwargs or {}).items() if key != "out"})), *made]
        if "mm" in func.overloadpacket.__name__:
            self.products += sum(map(self.of_logits, moved))
        else:
            self.others += sum(map(self.of_logits, moved))
        self.heads += sum(4 * t.numel() for t in moved if t.shape == self.head and t.dtype == torch.float32)
        return result


class HeldOnGPU(Held):
    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True


class Counts(NamedTuple):
    """Of one loss."""

    launches: list[Launch]  # of the kernels that touch logits
    kernels: float  # passes of theirs
    products: float  # passes
    others: float  # passes of operations that are not compiled
    heads: float  # through fp32 tensors of the head's shape, as passes over logits
    held: int  # bytes at most, beside what was given

    @property
    def passes(self) -> float:
        return self.kernels + self.products + self.others


def work(
    kind: str,
    softcap: float | None = SOFTCAP,
    gradient: bool = True,
    *,
    tokens: int,
    hidden: int,
    vocabulary: int,
    precision: torch.dtype = torch.bfloat16,
    device: str = "cuda",
) -> Callable[[], None]:
    """One of KINDS, with its gradient by hidden states and head or without, under autocast. All tensors are given."""

    def new(*shape: int) -> torch.Tensor:
        return torch.ones(shape, device=device)

    student, weight, labels = new(tokens, hidden), new(vocabulary, hidden), new(tokens).long()
    taught = new(tokens, hidden), Head(new(vocabulary, hidden), softcap)
    for trained in (student, weight):
        trained.requires_grad_(gradient)
    target = {
        "ce": lambda: CrossEntropy(labels),
        "uniform": UniformKL,
        "kl": lambda: ForwardKL(*taught),
        "lowered kl": lambda: LoweredKL(*taught, labels, 10.0),
    }[kind]()

    def run() -> None:
        with torch.autocast(device, precision, enabled=precision != torch.float32), torch.set_grad_enabled(gradient):
            linear_loss(student, Head(weight, softcap), target)  # forms the gradients, too

    return run


def count(
    kind: str,
    softcap: float | None = SOFTCAP,
    gradient: bool = True,
    *,
    tokens: int = 2097,
    hidden: int = 320,
    vocabulary: int = 256_000,
) -> Counts:
    """To be called in `pretended`."""
    run = work(kind, softcap, gradient, tokens=tokens, hidden=hidden, vocabulary=vocabulary)
    run()  # compiles
    with Traffic(vocabulary, hidden) as Kernel.traffic:
        run()
    traffic, Kernel.traffic = Kernel.traffic, None
    with HeldOnGPU() as held:
        run()
    large = [launch for launch in traffic.launches if launch.loads or launch.stores]
    moved = sum(sum(launch.loads) + sum(launch.stores) for launch in large)
    one = 4 * tokens * vocabulary
    return Counts(large, moved / one, traffic.products / one, traffic.others / one, traffic.heads / one, held.peak)


def rows(tokens: int, hidden: int) -> Iterator[str]:
    """Of a table in Markdown."""
    head = (
        "loss, softcap, gradient, kernels, loads, stores, passes of kernels, products, others, **all**, heads, GB held"
    )
    yield "| " + head.replace(", ", " | ") + " |"
    yield "|" + " --- |" * 12
    for kind in KINDS:
        for softcap in (SOFTCAP, None):
            for gradient in (True, False):
                with pretended():
                    got = count(kind, softcap, gradient, tokens=tokens, hidden=hidden)
                cells = [kind, softcap or "none", "yes" if gradient else "no", len(got.launches)]
                cells += [sum(len(launch.loads) for launch in got.launches)]
                cells += [sum(len(launch.stores) for launch in got.launches)]
                passes = got.kernels, got.products, got.others, got.passes, got.heads, got.held / 1e9
                yield "| " + " | ".join([*map(str, cells), *(f"{value:.2f}" for value in passes)]) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2097, help="2,097 are one chunk of 256,000 words")
    parser.add_argument("--hidden", type=int, default=320)
    parser.add_argument("--code", type=Path, help="write the kernels to this folder")
    args = parser.parse_args()
    for row in rows(args.tokens, args.hidden):
        print(row, flush=True)
    print(json.dumps(measure.environment()))
    if args.code:
        args.code.mkdir(parents=True, exist_ok=True)
        for number, kernel in enumerate(Kernel.made):
            (args.code / f"{number:02}_{kernel.name[:80]}.py").write_text(kernel.code)


if __name__ == "__main__":
    main()
