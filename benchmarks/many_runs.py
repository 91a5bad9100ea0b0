"""How long a launcher and the figures take to read many finished runs, and how much memory.

    uv run python benchmarks/many_runs.py [--runs 10000] [--keep FOLDER]

Makes a tree of finished demo runs over many seeds, with invented performances, and times the commands that only read
it. Prints seconds, milliseconds a run and peak memory of each command.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from undo.config.files import dump_yaml
from undo.config.schema import as_raw
from undo.experiments import cli
from undo.experiments.plan import PlannedRun
from undo.runs.directory import identity_of
from undo.settings.whole import planned
from undo.train.stage import TrainingStage

ROOT = Path(__file__).parents[1]


def plan(seeds: int, runs: Path) -> list[PlannedRun]:
    arguments = ["demo", f"sweep.seed={list(range(seeds))}", "--runs", str(runs)]
    return planned(cli.parser("", "").parse_intermixed_args(arguments))[0]


def make(run: PlannedRun, identities: dict[str, str], rng: np.random.Generator) -> None:
    """Leave the run finished: what a worker writes, without a model. `identities`: of the runs before it, by name."""
    folder, config = run.directory.folder, run.config
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_yaml(as_raw(config)))
    parents = {name: identities[name] for name in config.parents()}
    identities[run.name] = identity_of(as_raw(config), parents)
    facts = {"name": run.name, "variant": config.variant, "identity": identities[run.name], "parents": parents}
    facts |= {"seconds": 1.0, "finished": "2026-01-01T00:00:00+00:00", "device": "none", "devices": 1, "threads": 1}
    facts |= {"peak_rss_bytes": 1 << 30, "peak_device_bytes": None, "git_revision": None, "versions": {"undo": "0.1.0"}}
    lines = []
    if isinstance(config, TrainingStage):
        for step in range(config.training.steps + 1):
            if config.training.evaluates(step):
                values = {"retain": float(rng.random()), "forget": float(rng.random())}
                facts["evaluation"] = values
                lines.append({"step": step, **values})
            lines.append({"step": step + 1, "loss": 1.0, "loss/ce": 1.0, "grad_norm": 1.0, "learning_rate": 1e-3})
        steps = config.training.steps
        facts |= {"steps": steps, "tokens": 1000 * steps, "flops": 1e9 * steps, "evaluation_flops": 1e9}
    else:
        facts["vocab_size"] = 448
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "run.json").write_text(json.dumps(facts))


def timed(*command: str) -> tuple[float, float, float]:
    """Wall seconds, CPU seconds and peak GiB of a command."""
    began = time.monotonic()
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, command
    return time.monotonic() - began, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 2**20


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    arguments.add_argument("--runs", type=int, default=10_000, metavar="N", help="about so many (default: 10000)")
    arguments.add_argument("--keep", type=Path, metavar="FOLDER", help="where the tree goes (default: a temporary one)")
    args = arguments.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        runs = args.keep or Path(temporary) / "runs"
        seeds = max(1, round(args.runs / len(plan(1, runs))))
        rng, identities, every = np.random.default_rng(0), dict[str, str](), plan(seeds, runs)
        for run in every:
            if not run.directory.done:
                make(run, identities, rng)
        attacks = sum(run.name.startswith("relearn/") for run in every)
        sweep = f"sweep.seed={list(range(seeds))}"
        print(f"{len(every)} finished runs, {attacks} of them attacks")
        for what, count, command in (
            ("--dry-run of all stages", len(every), ("run_all.py", "demo", sweep, "--dry-run")),
            ("skip the attacks that are done", attacks, ("run_relearn.py", "demo", sweep)),
            ("table, figures and report", len(every), ("run_figures.py", "demo")),
        ):
            wall, cpu, peak = timed(*command, "--runs", str(runs))
            print(f"{what:32}{wall:8.1f} s{1000 * wall / count:8.2f} ms a run{cpu:8.1f} s of CPU{peak:8.2f} GiB")


if __name__ == "__main__":
    main()
