"""KL, cross entropy and MaxEnt from hidden states, against the authors' way: full logits, formula by formula.

    uv run benchmarks/losses.py [--tokens 512] [--vocabulary 256000] [--hidden 320] [--threads 1] [--tuned-malloc]

Forward and backward of one loss, fp32, with Gemma-2's softcap. Both sides run in this process, in turn, each warmed
up; the ratios are medians of baseline / ours, larger is better. Memory is the peak resident size of a fresh process
above what it holds before the loss. Each line ends in JSON.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

SOFTCAP = 30.0


def parse() -> argparse.Namespace:
    arguments = argparse.ArgumentParser(description="Fused losses against the authors' way.")
    arguments.add_argument("--tokens", type=int, default=512)
    arguments.add_argument("--vocabulary", type=int, default=256_000)
    arguments.add_argument("--hidden", type=int, default=320)
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--repeats", type=int, default=3)
    arguments.add_argument(
        "--tuned-malloc", action="store_true", help="keep freed memory, on both sides (see launch.py)"
    )
    arguments.add_argument("--memory-of", help=argparse.SUPPRESS)  # <side>:<kind>, in a process of its own
    return arguments.parse_args()


def sides(args: argparse.Namespace) -> dict[str, tuple[Callable[[], float], Callable[[], float]]]:
    """{kind: (baseline, ours)}: functions that do forward and backward once, and return the loss."""
    import torch
    from torch.nn import functional as F  # noqa: N812  # its usual name

    from undo.losses import CrossEntropy, ForwardKL, Head, Target, UniformKL, linear_loss

    torch.set_num_threads(args.threads)
    rng = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng) * 0.5

    hidden, weight = (
        draw(args.tokens, args.hidden).requires_grad_(),
        draw(args.vocabulary, args.hidden).requires_grad_(),
    )
    teacher_hidden, teacher_weight = draw(args.tokens, args.hidden), draw(args.vocabulary, args.hidden)
    labels = torch.randint(args.vocabulary, (args.tokens,), generator=rng)
    mask = torch.ones(args.tokens, dtype=torch.bool)

    def logits(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.tanh(h @ w.T / SOFTCAP) * SOFTCAP

    def authors_kl() -> torch.Tensor:
        with torch.no_grad():
            q = logits(teacher_hidden, teacher_weight)
        p = logits(hidden, weight)
        target, log_target = F.softmax(q[mask], -1), F.log_softmax(q[mask], -1)
        return (target * (log_target - F.log_softmax(p[mask], -1))).sum(-1).mean()

    def authors_ce() -> torch.Tensor:
        return F.cross_entropy(logits(hidden, weight), labels, reduction="none").mean()

    def authors_maxent() -> torch.Tensor:
        z = logits(hidden, weight)
        uniform = torch.ones_like(z)
        target, log_target = F.softmax(uniform, -1), F.log_softmax(uniform, -1)
        return (target * (log_target - F.log_softmax(z, -1))).sum(-1).mean()

    targets = {
        "kl": (authors_kl, ForwardKL(teacher_hidden, Head(teacher_weight, SOFTCAP))),
        "ce": (authors_ce, CrossEntropy(labels)),
        "maxent": (authors_maxent, UniformKL()),
    }

    def step(loss: torch.Tensor) -> float:
        loss.backward()
        hidden.grad = weight.grad = None
        return loss.item()

    def pair(authors: Callable[[], torch.Tensor], target: Target) -> tuple[Callable[[], float], Callable[[], float]]:
        ours = lambda: step(linear_loss(hidden, Head(weight, SOFTCAP), target) / args.tokens)  # noqa: E731
        return (lambda: step(authors())), ours

    return {kind: pair(*both) for kind, both in targets.items()}


def high_water_kib() -> int:
    """Of this process image. getrusage would also count what the parent held when it forked."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM:"))


def peak_mib(args: argparse.Namespace, side: int, kind: str) -> float:
    """In a fresh process, so that no earlier peak hides this one."""
    command = [sys.executable, __file__, *sys.argv[1:], "--memory-of", f"{side}:{kind}"]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    args = parse()
    malloc = {"MALLOC_MMAP_THRESHOLD_": "8589934592", "MALLOC_TRIM_THRESHOLD_": "8589934592"}
    if args.tuned_malloc and any(os.environ.get(key) != value for key, value in malloc.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **malloc})  # glibc reads them at start
    functions = sides(args)
    if args.memory_of:
        side, _, kind = args.memory_of.partition(":")
        before = high_water_kib()
        functions[kind][int(side)]()
        print((high_water_kib() - before) / 1024)
        return
    for kind, pair in functions.items():
        values = [function() for function in pair]  # warm-up, and parity
        assert math.isclose(*values, rel_tol=1e-4), (kind, values)  # fp32 full logits round more: see tests for float64
        seconds: list[list[float]] = [[], []]
        for repeat in range(args.repeats):
            for side in (0, 1) if repeat % 2 else (1, 0):
                begin = time.perf_counter()
                pair[side]()
                seconds[side].append(time.perf_counter() - begin)
        memory = [peak_mib(args, side, kind) for side in (0, 1)]
        ratio = statistics.median(a / b for a, b in zip(*seconds, strict=True))
        line = {
            "name": f"losses/{kind}",
            "time_ratio": round(ratio, 2),
            "memory_ratio": round(memory[0] / max(1.0, memory[1]), 2),
            "tokens_per_s": round(args.tokens / statistics.median(seconds[1])),
            "mfu": None,
            "seconds": [round(statistics.median(s), 3) for s in seconds],
            "peak_mib": [round(m) for m in memory],
            "relative_error": abs(values[0] - values[1]) / abs(values[0]),
            "tokens": args.tokens,
            "threads": args.threads,
            "tuned_malloc": args.tuned_malloc,
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
