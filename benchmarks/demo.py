"""How near the demo is to the arithmetic it does: wall time over T, and where the rest went.

    uv run benchmarks/demo.py [--out FILE.md] [run_all.py's overrides]     # on a machine with nothing beside it

T = the FLOPs of the demo's training and evaluation / (cores x one core's fp32 GEMM peak at the shapes of its training
step). The peak is measured before and after in the same call. The demo runs in a fresh folder, as a user calls it.
Everything is in core seconds, cores x wall in all: what CPUs were charged for is split by what each run.json says.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import measure

from undo.launch.devices import cores
from undo.runs.directory import RunDirectory

ROOT: Final = Path(__file__).parents[1]
TOKENS: Final = 32 * 64  # of a pretraining step of the demo
WIDTHS: Final = ((80, 64), (80, 32), (80, 32), (64, 80), (80, 320), (80, 320), (320, 80)) * 2 + ((80, 448),)  # in, out


@dataclass(frozen=True)
class Account:
    """Where the core seconds of a demo went. They add up to cores x wall."""

    wall: float
    cores: int
    peak: float  # FLOP/s of one core
    flops: float  # of training and evaluation
    parts: dict[str, float]

    @property
    def limit(self) -> float:
        """T, in seconds."""
        return self.flops / (self.cores * self.peak)


def account(runs: Sequence[Mapping[str, Any]], wall: float, cpu: float, cores: int, peak: float) -> Account:
    """`runs`: what each run.json says. cpu: seconds that all processes of the demo were charged for."""
    training = evaluating = steps = evaluations = preparing = others = 0.0
    for facts in runs:
        if not facts.get("flops"):
            preparing += facts["seconds"]
            continue
        stepping = facts["tokens"] / facts["tokens_per_second"]
        training += facts["flops"] / peak
        steps += stepping
        evaluating += facts["evaluation_flops"] / peak
        evaluations += facts["evaluation_seconds"]
        others += facts["seconds"] - stepping - facts["evaluation_seconds"]
    outside = cpu - steps - evaluations - preparing - others
    parts = {
        "the arithmetic of training, at the peak": training,
        "the rest of the steps: other operations, Python": steps - training,
        "the arithmetic of evaluation, at the peak": evaluating,
        "the rest of evaluation": evaluations - evaluating,
        "the rest of the runs: imports, loading and saving models": others,
        "preparing the data": preparing,
        "outside the runs: process starts, planning, figures and report": outside,
        "waiting: for parents, or for a process that starts": cores * wall - cpu,
    }
    flops = sum(facts[key] for facts in runs if facts.get("flops") for key in ("flops", "evaluation_flops"))
    return Account(wall, cores, peak, flops, parts)


def stages(runs: Sequence[Mapping[str, Any]], peak: float) -> list[str]:
    """A row of each stage that trains: how fast its steps are, and how much of its runs they are."""
    found = defaultdict(list)
    for facts in runs:
        if facts.get("flops"):
            found[facts["name"].partition("/")[0]].append(facts)
    lines = ["| stage | runs | GFLOP/s in steps | of the peak | seconds | in steps | in evaluation |"]
    lines.append("| --- |" + " --- |" * 6)
    for stage, members in found.items():
        steps = sum(facts["tokens"] / facts["tokens_per_second"] for facts in members)
        rate = sum(facts["flops"] for facts in members) / steps
        seconds, evaluation = (sum(facts[key] for facts in members) for key in ("seconds", "evaluation_seconds"))
        cells = [stage, str(len(members)), f"{rate / 1e9:.1f}", f"{rate / peak:.0%}", f"{seconds:.0f}"]
        cells += [f"{steps / seconds:.0%}", f"{evaluation / seconds:.0%}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def page(found: Account, runs: Sequence[Mapping[str, Any]], peaks: Sequence[float], load: float, command: str) -> str:
    facts, all_of_it = measure.environment(), found.cores * found.wall
    lines = [
        f"# The demo's limit, {facts['date']}, {facts['device']}",
        "",
        f"{found.cores} cores; {', '.join(f'{name} {version}' for name, version in facts['versions'].items())}; "
        f"revision {facts['revision']}; load before {load:.2f}. Made by `{command}`.",
        "",
        f"- wall time: {found.wall:.0f} s",
        f"- one core's fp32 GEMM peak at the shapes of a step, before and after: "
        f"{', '.join(f'{peak / 1e9:.1f}' for peak in peaks)} GFLOP/s; {found.peak / 1e9:.1f} is taken",
        f"- training and evaluation: {found.flops / 1e12:.2f} TFLOP; T = {found.limit:.0f} s",
        f"- **wall / T = {found.wall / found.limit:.2f}** (goal: 1.5)",
        "",
        "| where the core seconds went | s | of the whole | in T |",
        "| --- | --- | --- | --- |",
    ]
    for name, seconds in found.parts.items():
        share, in_t = seconds / all_of_it, seconds / found.cores / found.limit
        lines.append(f"| {name} | {seconds:.0f} | {share:.0%} | {in_t:.2f} |")
    return "\n".join([*lines, "", *stages(runs, found.peak), ""])


def peak_of_one_core(repeats: int = 15) -> float:
    """FLOP/s of the products of one pretraining step, forward and both gradients, each at its median time."""
    import torch

    torch.set_num_threads(1)
    flops = seconds = 0.0
    for inputs, outputs in WIDTHS:
        x, weight, slope = torch.randn(TOKENS, inputs), torch.randn(outputs, inputs), torch.randn(TOKENS, outputs)
        for a, b in ((x, weight.T), (slope, weight), (slope.T, x)):
            taken, out = [], torch.mm(a, b)
            for _ in range(repeats):
                began = time.perf_counter()
                torch.mm(a, b, out=out)
                taken.append(time.perf_counter() - began)
            seconds += statistics.median(taken)
            flops += 2 * TOKENS * inputs * outputs
    return flops / seconds


def peaks_in_a_process(times: int) -> list[float]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, __file__, "--peaks", str(times)]
    said = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(said.splitlines()[-1])


def finished(folder: Path) -> list[dict[str, Any]]:
    return [RunDirectory.at(path.parent).facts for path in sorted(folder.glob("*/*/run.json"))]


def run_demo(overrides: Sequence[str], runs: Path) -> tuple[float, float]:
    """-> wall seconds, and CPU seconds of all its processes. Raises SystemExit if it fails."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "TMPDIR": str(runs.parent)}  # slots of its own
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    command = [sys.executable, str(ROOT / "run_all.py"), "demo", "--runs", str(runs), *overrides]
    status = subprocess.run(command, env=environment, stdout=sys.stderr).returncode
    after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic() - began
    if status:
        raise SystemExit(f"the demo failed: status {status}")
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<date>-demo.md")
    parser.add_argument("--peaks", type=int, help=argparse.SUPPRESS)
    args, overrides = parser.parse_known_args()
    if args.peaks:
        print(json.dumps([peak_of_one_core() for _ in range(args.peaks)]))
        return
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        peaks = peaks_in_a_process(3)
        wall, cpu = run_demo(overrides, Path(folder) / "runs")
        peaks += peaks_in_a_process(3)
        runs = finished(Path(folder) / "runs/demo")
    found = account(runs, wall, cpu, len(cores()), statistics.median(peaks))
    text = page(found, runs, peaks, load, " ".join(["uv run benchmarks/demo.py", *overrides]))
    out = args.out or ROOT / f"benchmarks/results/{measure.environment()['date']}-demo.md"
    out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
