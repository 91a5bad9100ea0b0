"""What does a rank wait for its batch, and for the masks of a micro-batch? On a CPU; the step beside it is modelled.

    uv run benchmarks/batches.py [--rows 400] [--length 2048] [--ranks 1 2 8] [--out FILE]

`whole` is what every rank did before: all rows, of which it keeps 1/N. `own` is what it does now. Times are the
process's CPU time on one thread, so that others on the machine count less. The ways take turns, and a ratio is the
median over rounds of the first way's time over the way's. Shares are of a modelled step on N H200s: tokens / N / the
tokens/s of one. There the kernels of the step before hide `own`, which is not measured here.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import measure
import numpy as np
import torch

from undo.config.schema import Role
from undo.data.store import TokenStore, pack
from undo.data.stream import MixedStream
from undo.lm import attention
from undo.lm.place import place
from undo.lm.tokens import Tokens
from undo.prepare_models.reduced_gemma2 import ReducedGemma2

ROLES: Final[tuple[Role, ...]] = ("retain", "forget")
VOCABULARY: Final = 256_000
MODELLED: Final = {
    "cross entropy as it was": 215_000,
    "cross entropy, new kernels": 325_000,
}  # tokens/s of an H200, 0.1B


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 8])
    parser.add_argument("--micro-rows", type=int, default=4, help="of the micro-batch whose masks are made")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, help="append the JSON line to this file as well")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        stores: dict[Role, TokenStore] = {
            role: store(Path(folder) / role, 4 * args.rows, args.length, seed) for seed, role in enumerate(ROLES)
        }
        stream = MixedStream(stores, dict.fromkeys(ROLES, 0.5), args.rows, seed=0)
        first = stream.batch(0)
        ways: dict[str, Callable[[int], object]] = {"whole": stream.batch}
        ways |= {f"own, of {n}": lambda step, n=n: stream.batch(step, 0, n) for n in args.ranks}
        batches = medians(ways, args.repeats)
    masks = medians(mask_ways(first.rows(0, args.micro_rows), args.length // 4), args.repeats)
    line = {
        "name": "batches",
        "rows": args.rows,
        "length": args.length,
        "filled": round((first.total + first.documents) / first.input_ids.numel(), 3),
        "batch_cpu_ms": {way: round(1e3 * ms, 2) for way, (ms, _) in batches.items()},
        "ratio": {way: round(ratio, 2) for way, (_, ratio) in batches.items()},
        "share_of_step": {name: shares(batches, args, speed) for name, speed in MODELLED.items()},
        "mask_cpu_ms": {way: round(1e3 * ms, 2) for way, (ms, _) in masks.items()},
        "mask_ratio": {way: round(ratio, 2) for way, (_, ratio) in masks.items()},
        "micro_rows": args.micro_rows,
        "repeats": args.repeats,
        "load": os.getloadavg()[0],
        **measure.environment(),
    }
    print(json.dumps(line), flush=True)
    if args.out:
        with open(args.out, "a") as file:
            file.write(json.dumps(line) + "\n")


def store(folder: Path, rows: int, length: int, seed: int) -> TokenStore:
    """Documents of 50 to 2,000 tokens, as of a web corpus, in about so many rows."""
    rng = np.random.default_rng(seed)
    sizes = np.exp(rng.uniform(np.log(50), np.log(2000), size=rows * length // 500)).astype(int)
    sizes = sizes[: int(np.searchsorted(sizes.cumsum(), rows * length))]
    return pack((rng.integers(0, VOCABULARY, size).astype(np.uint32) for size in sizes), folder, length, VOCABULARY)


def medians(ways: dict[str, Callable[[int], object]], repeats: int) -> dict[str, tuple[float, float]]:
    """Way -> CPU seconds, and the median over rounds of the first way's over its own. The first round warms up."""
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for step in range(repeats + 1):
        for way in list(ways) if step % 2 else reversed(ways):
            began = time.process_time()
            ways[way](step)
            seconds[way].append(time.process_time() - began)
    first = next(iter(seconds.values()))[1:]
    ratios = {way: statistics.median(a / b for a, b in zip(first, s[1:], strict=True)) for way, s in seconds.items()}
    return {way: (statistics.median(s[1:]), ratios[way]) for way, s in seconds.items()}


def shares(batches: dict[str, tuple[float, float]], args: argparse.Namespace, speed: int) -> dict[str, list[float]]:
    """For each number of ranks: the share of the modelled step that the whole batch takes, and that of its own rows."""
    steps = {n: args.rows * args.length / n / speed for n in args.ranks}
    return {
        f"of {n}": [round(batches[way][0] / step, 3) for way in ("whole", f"own, of {n}")] for n, step in steps.items()
    }


def mask_ways(tokens: Tokens, window: int) -> dict[str, Callable[[int], object]]:
    """A CPU's masks of a micro-batch, of full and of sliding layers, as teacher and student ask for them."""
    shape = ReducedGemma2(
        vocab_size=8,
        hidden_size=16,
        intermediate_size=16,
        layers=2,
        heads=1,
        kv_heads=1,
        head_dim=16,
        sliding_window=window,
    )
    models = [place(shape.build(0), torch.device("cpu")) for _ in ("teacher", "student")]

    def each(_step: int) -> None:
        for model in models:
            attention.masks(model, tokens)

    def shared(step: int) -> None:
        with attention.shared():
            each(step)

    return {"each its own": each, "shared": shared}


if __name__ == "__main__":
    main()
