"""What it costs to start processes: a launch of six tiny runs, each in a fresh process, and forked.

    uv run python benchmarks/starts.py [--rounds 3] [--before CHECKOUT] >> benchmarks/results/<date>-starts.md

The runs pretrain for two steps, so that they are starts and little else. Prints the CPU time of the launch with all of
its processes, its wall time, and the largest sum of proportional set sizes. Fails if the weights differ by one bit.
`--before` measures another checkout, too, such as one from before processes were forked.
"""

import argparse
import hashlib
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from undo.launch.devices import cores
from undo.launch.nanny import descendants
from undo.runs import precision

ROOT = Path(__file__).parents[1]
WORLD = "world={problems: 2000, largest_term: 8, largest_factor: 5, validation_per_cell: 6}"
MODEL = ["model.hidden_size=16", "model.intermediate_size=32", "model.heads=2", "model.kv_heads=1"]
TINY = [*MODEL, "training.steps=2", "training.batch_rows=2", "training.evaluate_every=2", "sweep.seed=[0,1,2]"]
SECONDS = 0.5  # between looks at the memory


class Launch(NamedTuple):
    cpu: float  # seconds of all its processes
    wall: float  # seconds
    memory: float  # GiB: the largest sum of proportional set sizes


def launch(checkout: Path, script: str, *arguments: str) -> Launch:
    """Of a script, with all of its processes: each has been waited for by the one above it."""
    before, began, memory = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter(), 0
    environment = {**os.environ, "PYTHONPATH": str(checkout / "src"), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(checkout / script), "demo", *arguments]
    process = subprocess.Popen(command, cwd=checkout, env=environment, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        memory = max(memory, sum(map(proportional, [process.pid, *descendants(process.pid)])))
        time.sleep(SECONDS)
    if process.returncode:
        sys.exit(f"{script} ended with status {process.returncode}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Launch(cpu, time.perf_counter() - began, memory / 2**30)


def proportional(pid: int) -> int:
    """Bytes of a process, where those that it shares are divided by how many share them."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:  # it has ended
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


def bits(runs: Path) -> str:
    """A digest of all weights and records."""
    files = sorted([*runs.glob("*/pretrain/*/model/*.safetensors"), *runs.glob("*/pretrain/*/metrics.jsonl")])
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--before", type=Path, metavar="CHECKOUT")
    args = arguments.parse_args()
    ways = {way: (ROOT, ["--start", way]) for way in ("fresh", "fork")}
    if args.before:
        ways = {"before": (args.before.resolve(), []), **ways}
    measured: dict[str, list[Launch]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as folder:
        digests = set[str]()
        data = Path(folder) / "data"
        launch(ROOT, "run_prepare.py", WORLD, "--runs", str(data))
        for number in range(args.rounds):
            for way, (checkout, switch) in ways.items():
                runs = Path(folder) / f"{way}-{number}"
                shutil.copytree(data, runs)
                measured[way].append(launch(checkout, "run_pretrain.py", *TINY, "--runs", str(runs), *switch))
                digests.add(bits(runs))
    if len(digests) > 1:
        sys.exit("the weights differ")
    show(measured)


def show(measured: dict[str, list[Launch]]) -> None:
    """Medians, and how many times as much a fresh start takes."""
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    print(f"{len(cores())} cores of {precision.cpu()['name']}; Python {platform.python_version()}, {libraries}.")
    print(f"Load average at the end: {os.getloadavg()[0]:.1f}. Medians of {len(measured['fork'])} rounds, in turn.\n")
    print(
        "| start | CPU s | a run | wall s | memory, GiB | CPU s of each round |\n| --- | --- | --- | --- | --- | --- |"
    )
    median = {way: Launch(*map(statistics.median, zip(*launches, strict=True))) for way, launches in measured.items()}
    for way, (cpu, wall, memory) in median.items():
        rounds = ", ".join(f"{launch.cpu:.1f}" for launch in measured[way])
        print(f"| {way} | {cpu:.1f} | {cpu / 6:.1f} | {wall:.1f} | {memory:.2f} | {rounds} |")
    for way in [way for way in median if way != "fork"]:
        ratios = [a / b for a, b in zip(median[way][:2], median["fork"][:2], strict=True)]
        print(f"\n{way} / fork: {ratios[0]:.2f} in CPU, {ratios[1]:.2f} in wall time. The weights have the same bits.")


if __name__ == "__main__":
    main()
