"""The precision that a run computes in: bf16 only where the machine multiplies it fast."""

import platform
from functools import cache
from pathlib import Path
from typing import Final, Literal

Precision = Literal["fp32", "bf16"]
FAST_BF16: Final = frozenset({"avx512_bf16", "amx_bf16"})
KINDS: Final = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")  # what changes results or speed


@cache
def cpu() -> dict[str, object]:
    """The processor's name and the instruction sets that decide how it rounds and how fast it multiplies."""
    name, features = platform.processor() or platform.machine(), list[str]()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            name = value.strip()
        elif key.strip() in ("flags", "Features") and not features:  # x86, ARM
            features = [kind for kind in KINDS if kind in value.split()]
    return {"name": name, "features": features}


def cpu_has_fast_bf16() -> bool:
    features = cpu()["features"]
    return isinstance(features, list) and not FAST_BF16.isdisjoint(features)


def taken(asked: Precision) -> Precision:
    """What this process computes in, of what the config asks. Without the instructions bf16 is a thirtieth of fp32."""
    import torch

    on_gpu = torch.cuda.is_available()
    fast = torch.cuda.is_bf16_supported(including_emulation=False) if on_gpu else cpu_has_fast_bf16()
    return asked if fast else "fp32"


def note(asked: Precision, took: Precision) -> str | None:
    """The line that says so where they differ."""
    if asked == took:
        return None
    return (
        f"training.precision={asked} is taken as {took}: this machine has no fast {asked} (CUDA from Ampere on, "
        "AVX512-BF16 or AMX)"
    )
