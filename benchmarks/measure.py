"""Side by side: each side is a process of its own, and one at a time is asked to do its work once more.

So every side has its own allocator settings and its own peak of memory, and a noisy moment of the machine hits all
sides alike. Ratios are medians over rounds of baseline / ours: larger is better. Every value is compared, too.
"""

import argparse
import contextlib
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

from undo.launch.local import MALLOC

PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}  # dense bf16
MARK = "@measure "  # before what a side says; the libraries talk on the same channel


@dataclass(frozen=True)
class Side:
    """Who does the work, and how."""

    ours: bool
    bf16: bool = False  # autocast
    tuned_malloc: bool = False
    fixes: bool = False  # of the baseline, a line each: autocast, fused AdamW, batched generation


SIDES = {
    "published": Side(ours=False),
    "published_tuned": Side(ours=False, tuned_malloc=True),
    "fixed": Side(ours=False, bf16=True, tuned_malloc=True, fixes=True),
    "ours": Side(ours=True),
    "ours_tuned": Side(ours=True, tuned_malloc=True),
    "ours_bf16": Side(ours=True, bf16=True, tuned_malloc=True),
}
# What a table shows: title -> (baseline, ours)
RATIOS = {
    "published / ours, default malloc": ("published", "ours"),
    "published / ours as launched (bf16, tuned malloc)": ("published", "ours_bf16"),
    "published / ours bf16, tuned malloc both": ("published_tuned", "ours_bf16"),
    "fixed / ours bf16, tuned malloc both": ("fixed", "ours_bf16"),
}
RATIOS_ON_CUDA = {"published / ours": ("published", "ours"), "fixed / ours": ("fixed", "ours")}
ON_CUDA = {  # malloc does not matter there, and the authors' runs use autocast
    "published": Side(ours=False, bf16=True),
    "fixed": Side(ours=False, bf16=True, fixes=True),
    "ours": Side(ours=True, bf16=True),
}


@dataclass(frozen=True)
class Case:
    """One workload, and what it amounts to."""

    tokens: int  # that a repetition is about: padding and recomputation do not count
    flops: float | None = None
    tolerance: float = 1e-3  # relative, of the values that two sides return in the same precision
    sides: Sequence[str] = tuple(SIDES)


def cuda() -> bool:
    """Without torch: the parent of the sides has no use for it."""
    return os.path.exists("/dev/nvidia0") and os.environ.get("CUDA_VISIBLE_DEVICES") != ""


def main(
    script: str,
    description: str,
    arguments: Callable[[argparse.ArgumentParser], None],
    cases: Callable[[argparse.Namespace], dict[str, Case]],
    build: Callable[[str, Side, argparse.Namespace], Callable[[], float]],
) -> None:
    """`build` makes the function that does a case's work once on one side, and returns a number to compare."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--case", action="append", help="only this one; may be given several times")
    parser.add_argument("--sides", help="comma-separated; default: all of the case's")
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file as well")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments(parser)
    args = parser.parse_args()
    sides = ON_CUDA if cuda() else SIDES
    if args.worker:
        case, side = args.worker
        _work(lambda: build(case, sides[side], args), sides[side], args.threads)
        return
    for name, case in cases(args).items():
        if args.case and name not in args.case:
            continue
        chosen = args.sides.split(",") if args.sides else case.sides
        line = _compare(name, case, {s: sides[s] for s in chosen if s in sides}, args, Path(script).stem)
        print(json.dumps(line), flush=True)
        if args.out:
            with open(args.out, "a") as file:
                file.write(json.dumps(line) + "\n")


def _compare(name: str, case: Case, sides: dict[str, Side], args: argparse.Namespace, script: str) -> dict[str, Any]:
    first: dict[str, dict[str, float]] = {}
    rounds: list[dict[str, dict[str, float]]] = [{} for _ in range(args.repeats)]
    for tuned in (False, True):  # ratios are within a group; all sides at once would not fit the memory
        group = {side: how for side, how in sides.items() if how.tuned_malloc == tuned}
        with contextlib.ExitStack() as stack:
            workers = {side: stack.enter_context(_worker(name, side, how)) for side, how in group.items()}
            first |= {side: _ask(worker) for side, worker in workers.items()}  # warm-up, compilation included
            for number, answers in enumerate(rounds):
                for side in list(workers) if number % 2 else reversed(workers):
                    answers[side] = _ask(workers[side])
    for a in sides:
        for b in sides:
            tolerance = 0.05 if sides[a].bf16 or sides[b].bf16 else case.tolerance
            same = math.isclose(first[a]["value"], first[b]["value"], rel_tol=tolerance, abs_tol=1e-6)
            assert same, f"{name}: {a} and {b} disagree: {first[a]['value']} and {first[b]['value']}"
    seconds = {side: statistics.median(r[side]["seconds"] for r in rounds) for side in sides}
    peak = {side: max(r[side]["peak_mib"] for r in [first, *rounds]) for side in sides}

    def ratio(baseline: str, ours: str) -> float | None:
        if baseline not in sides or ours not in sides:
            return None
        return round(statistics.median(r[baseline]["seconds"] / r[ours]["seconds"] for r in rounds), 2)

    titles = RATIOS_ON_CUDA if cuda() else RATIOS
    best = "ours_bf16" if "ours_bf16" in sides else "ours"
    flops_per_s = None if case.flops is None else case.flops / seconds[best]
    peak_flops = next((value for card, value in PEAK_FLOPS.items() if card in device()), None)
    return {
        "name": f"{script}/{name}",
        "time_ratio": ratio("published", "ours"),
        "memory_ratio": round(peak["published"] / max(1.0, peak["ours"]), 2)
        if {"published", "ours"} <= set(sides)
        else None,
        "tokens_per_s": round(case.tokens / seconds[best]),
        "mfu": round(flops_per_s / peak_flops, 4) if flops_per_s and peak_flops else None,
        "ratios": {title: value for title, pair in titles.items() if (value := ratio(*pair)) is not None},
        "seconds": {side: round(value, 4) for side, value in seconds.items()},
        "first_call_seconds": {side: round(first[side]["seconds"], 3) for side in sides},
        "cpu_seconds": {side: round(statistics.median(r[side]["cpu"] for r in rounds), 4) for side in sides},
        "peak_mib": {side: round(value) for side, value in peak.items()},
        "values": {side: first[side]["value"] for side in sides},
        "tokens": case.tokens,
        "flops_per_s": flops_per_s,
        "repeats": args.repeats,
        "threads": args.threads,
        "load": os.getloadavg()[0],
        **environment(),
    }


def device() -> str:
    if cuda():
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    with open("/proc/cpuinfo") as file:
        return next((line.split(":")[1].strip() for line in file if line.startswith("model name")), platform.machine())


def environment() -> dict[str, Any]:
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "device": device(),
        "cores": os.cpu_count(),
        "versions": {name: version(name) for name in ("torch", "transformers", "numpy")},
        "revision": subprocess.run(git, capture_output=True, text=True).stdout.strip() or None,
    }


# --- a side --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _worker(case: str, side: str, how: Side) -> Iterator[subprocess.Popen[str]]:
    environment = {key: value for key, value in os.environ.items() if key not in MALLOC}
    environment |= MALLOC if how.tuned_malloc else {}
    paths = (str(Path(__file__).parents[1] / "src"), os.environ.get("PYTHONPATH"))  # this code, installed or not
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    command = [sys.executable, *sys.argv, "--worker", case, side]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            assert process.stdout is not None
            _hear(process.stdout)  # ready
            yield process
        finally:
            process.kill()
            process.stdin = None  # what could not be said to a dead process is not missed


def _ask(worker: subprocess.Popen[str]) -> dict[str, float]:
    assert worker.stdin is not None
    assert worker.stdout is not None
    with contextlib.suppress(BrokenPipeError):  # it is dead: said below
        worker.stdin.write("go\n")
        worker.stdin.flush()
    return _hear(worker.stdout)


def _hear(channel: IO[str]) -> dict[str, float]:
    for line in channel:
        if line.startswith(MARK):
            return json.loads(line[len(MARK) :])
    raise SystemExit("a side of the comparison has died, of too little memory if it said nothing")


def _work(build: Callable[[], Callable[[], float]], side: Side, threads: int) -> None:
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(threads)
    gpu = torch.cuda.is_available()
    function = build()

    def say(**values: float) -> None:
        print(MARK + json.dumps(values), flush=True)

    say(ready=1)
    for _ in sys.stdin:
        before = _reset_peak(gpu)
        begin, cpu = time.perf_counter(), time.process_time()
        with torch.autocast("cuda" if gpu else "cpu", torch.bfloat16, enabled=side.bf16):
            value = function()
        if gpu:
            torch.cuda.synchronize()
        seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
        say(seconds=seconds, cpu=cpu, value=value, peak_mib=(_peak(gpu) - before) / 2**20)


def _reset_peak(gpu: bool) -> int:
    """-> bytes in use now: what a side holds between repetitions, weights and optimiser state, is no peak."""
    if gpu:
        import torch

        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    return _status("VmRSS")


def _peak(gpu: bool) -> int:
    if gpu:
        import torch

        return torch.cuda.max_memory_allocated()
    return _status("VmHWM")


def _status(key: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key + ":"))
