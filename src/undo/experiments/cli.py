"""The one command line of all stage scripts, and the worker on its other side."""

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from undo import ranks
from undo.config import ConfigError, parse_overrides, validate
from undo.display import LiveTable, si
from undo.experiment import Cost, Costs, PlannedRun, beside_the_main, check, find_configs, jobs, pick, plan, wanted
from undo.launch import run_jobs
from undo.run import INTERRUPTED, Follower, Interrupted, Run
from undo.stage import Stage, TrainingStage

EXAMPLE = "example: %(prog)s demo training.steps=50 sweep.seed=[0,1,2] --only '*seed_0' --dry-run"


def main(stage: Stage) -> None:
    """Of a stage script: plan, check and launch its runs; with --work, execute them."""
    if sys.argv[1:2] == ["--work"]:
        sys.exit(work(stage, [Path(folder) for folder in sys.argv[2:]]))
    arguments = parser(f"The {stage.name} stage: one run for each point of configs/<setting>/{stage.name}.yaml.")

    def planned(args: argparse.Namespace) -> tuple[list[PlannedRun], Path]:
        found = find_configs(args.config, stage.name)
        check_extra(args.extra, found)
        overrides = parse_overrides(args.overrides)

        def plans(names: Sequence[str]) -> list[PlannedRun]:
            return plan(stage, wanted(found, stage.name, names), overrides, args.runs)

        return pick(plans, args.extra, beside_the_main(found), args.only), found[0].parent

    sys.exit(guarded(lambda: launch(arguments.parse_intermixed_args(), planned)))


def check_extra(names: Sequence[str], found: Sequence[Path]) -> None:
    """Raises ConfigError if there is no <stage>_<name>.yaml for one of the names."""
    there = beside_the_main(found)
    for name in names:
        if name not in there:
            folder = found[0].parent
            raise ConfigError(
                f"--with {name}: {folder} holds no <stage>_{name}.yaml; there is: {', '.join(there) or 'none'}"
            )


def parser(description: str) -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(description=description, epilog=EXAMPLE)
    arguments.add_argument("config", help="a setting (demo: configs/demo/<stage>.yaml), or a path to a YAML file")
    arguments.add_argument(
        "overrides", nargs="*", metavar="key=value", help="keys of the YAML, dotted; they beat its sweep"
    )
    arguments.add_argument("--only", metavar="GLOB", help="runs whose name matches")
    arguments.add_argument(
        "--with", action="append", default=[], dest="extra", metavar="NAME", help="also the runs of <stage>_NAME.yaml"
    )
    arguments.add_argument("--dry-run", action="store_true", help="list the runs, their parents and their FLOPs")
    arguments.add_argument("--force", action="store_true", help="delete the selected runs and make them afresh")
    arguments.add_argument(
        "--runs", type=Path, default=Path("runs"), metavar="DIR", help="where runs live (default: runs/)"
    )
    return arguments


def launch(
    args: argparse.Namespace,
    planned: Callable[[argparse.Namespace], tuple[list[PlannedRun], Path]],
    kept: Collection[str] = (),
) -> int:
    """Plan, check, run, report -> the exit status. `kept`: names of runs that --force leaves as they are."""
    runs, configs = planned(args)
    if args.dry_run:
        show(runs, Costs(runs, configs, parse_overrides(args.overrides).get("base.model")))
        return 0
    check(runs, args.force, kept)
    with LiveTable(runs) as display:
        try:
            failed = run_jobs(jobs(runs), display)
        except KeyboardInterrupt:
            display.interrupted()
            return 130
    return 1 if failed else 0


def guarded(action: Callable[[], int]) -> int:
    """Exit status 2 and the message alone for a mistake of the user's."""
    try:
        return action()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def show(runs: Sequence[PlannedRun], costs: Costs) -> None:
    """The --dry-run table."""
    table = Table(box=None, pad_edge=False)
    for column in ("run", "parents", "state"):
        table.add_column(column, overflow="fold")
    for column in ("tokens", "FLOPs", "H200 h"):
        table.add_column(column, justify="right")
    total, unknown = Cost(0, 0.0), 0
    for run in runs:
        cost = costs.of(run)
        if cost is not None:
            cells = si(cost.tokens), si(cost.flops), f"{cost.h200_hours:.2f}"
            total = Cost(total.tokens + cost.tokens, total.flops + cost.flops)
        else:
            trains = isinstance(run.config, TrainingStage)
            cells = ("-" * trains,) * 3
            unknown += trains
        state = "done" if run.directory.done else "to do"
        table.add_row(run.name, ", ".join(run.config.parents()), state, *cells)
    console = Console(width=None if sys.stdout.isatty() else 180)
    console.print(table)
    console.print(
        f"{len(runs)} runs; training at most: {si(total.tokens)}tokens, {si(total.flops)}FLOP, "
        f"{total.h200_hours:.2f} hours of one H200 (modelled, at a quarter of its peak)"
        + f"; without {unknown} run{'s' * (unknown > 1)} of a model whose size is not known before it is fetched"
        * bool(unknown),
        highlight=False,
    )


# --- the worker: what a launched process does ----------------------------------------------------------------------


def work(stage: Stage, folders: Sequence[Path]) -> int:
    """Execute runs one after the other. A run that fails is recorded as failed and the next one is taken.

    One of the processes of a run on several devices does the same, but writes only if it is the leader.
    """
    Run.stop_on_signals()
    status = 0
    for folder in folders:
        run = Run.at(folder) if ranks.leads() else Follower.at(folder)
        with run.lock(wait=True):
            if ranks.of_the_leader(run.done):
                continue
            _write_to(run.log, quiet=not run.leads)
            try:
                config = validate(stage.schema, run.config, str(folder / "config.yaml"))
                run.open(config)
                stage.execute(config, run)
            except Interrupted:
                print("interrupted; the same command goes on from here")
                return INTERRUPTED
            except Exception as error:
                if ranks.count() > 1 and run.stop_requested:  # another rank has left already, and so did its connection
                    print(f"interrupted while waiting for another process: {error}", file=sys.stderr)
                    return INTERRUPTED
                traceback.print_exc()
                run.fail(
                    f"{type(error).__name__}: {error}".splitlines()[0]
                    if not isinstance(error, ConfigError)
                    else str(error)
                )
                status = 1
        if run.stop_requested:
            return INTERRUPTED
    return status


def _write_to(log: Path, quiet: bool) -> None:
    """Send this process's output, and that of its libraries, to the log of the run in hand; if quiet, errors only."""
    sys.stdout.flush()
    sys.stderr.flush()
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(file, 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY) if quiet else file, 1)
    os.close(file)
