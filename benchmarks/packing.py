"""How many relearning runs should go side by side on a device? The same sweep through the launcher, several ways.

    uv run run_all.py demo                                     # or any setting whose models are done
    uv run benchmarks/packing.py [--setting demo] [--runs runs] [--only 'undo*'] [--side-by-side 1 2 4 8]

On GPUs `execution.runs_per_gpu` is varied, on a CPU the threads of a run (cores / threads go side by side) and the
runs that share a process. Every way does the whole sweep anew, start-up included; the ways take turns. The ratio is the
first way's time over the way's.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import measure

ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--setting", default="demo")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs", help="where the setting's models are")
    parser.add_argument("--only", default="*", help="glob of the relearning runs")
    parser.add_argument("--side-by-side", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="append the JSON line to this file as well")
    args = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    if measure.cuda():
        ways = {f"runs_per_gpu={n}": [f"execution.runs_per_gpu={n}"] for n in args.side_by_side}
    else:
        ways = {
            f"threads={threads} runs_per_process={together}": [
                f"execution.threads={threads}",
                f"execution.runs_per_process={together}",
            ]
            for threads in (cores, 1)
            for together in (1, 3)
        }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(args.repeats):
        for way, overrides in ways.items():
            seconds[way].append(sweep(args, overrides))
    first, *_ = seconds.values()
    line = {
        "name": f"packing/{args.setting}",
        "ratios": {
            way: round(statistics.median(a / b for a, b in zip(first, s, strict=True)), 2) for way, s in seconds.items()
        },
        "seconds": {way: round(statistics.median(s), 2) for way, s in seconds.items()},
        "only": args.only,
        "repeats": args.repeats,
        **measure.environment(),
    }
    print(json.dumps(line), flush=True)
    if args.out:
        with open(args.out, "a") as file:
            file.write(json.dumps(line) + "\n")


def sweep(args: argparse.Namespace, overrides: list[str]) -> float:
    """Seconds of a whole sweep, in a folder with everything but its runs."""
    with tempfile.TemporaryDirectory() as folder:
        setting = Path(folder) / args.setting
        shutil.copytree(args.runs / args.setting, setting, ignore=shutil.ignore_patterns("relearn", "figures"))
        command = [sys.executable, "run_relearn.py", args.setting, "--only", args.only, "--runs", folder, *overrides]
        begin = time.perf_counter()
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - begin


if __name__ == "__main__":
    main()
