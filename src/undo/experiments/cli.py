"""The one command line of all stages: plan, check, launch, report."""

import argparse
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Final, get_args

from undo.config import mirror
from undo.config.mistakes import ConfigError
from undo.config.sweep import parse_overrides
from undo.config.units import aligned, si
from undo.experiments.check import Start, check, check_made, jobs, refusals
from undo.experiments.choose import pick, wanted
from undo.experiments.costs import Cost, Costs
from undo.experiments.plan import SUFFIXES, PlannedRun, beside_the_main, find_configs, plan
from undo.launch.devices import visible_gpus
from undo.launch.local import run_jobs
from undo.runs import precision
from undo.train.stage import Stage, TrainingStage

REFUSALS: Final = 3  # that --dry-run prints


class Unbroken(argparse.HelpFormatter):
    """Leaves the example in one line, which a shell can read."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if text.startswith("example: ") else super()._fill_text(text, width, indent)


def main(stage: Stage, stages: Mapping[str, Stage]) -> int:
    """Plan, check and launch the runs of one of `stages` -> the exit status."""
    about = f"The {stage.name} stage: one run for each point of configs/<setting>/{stage.name}.yaml."
    arguments = parser(about, stage.example)

    def planned(args: argparse.Namespace) -> tuple[list[PlannedRun], Path]:
        found = find_configs(args.config, stage.name)
        check_extra(args.extra, found)
        overrides = parse_overrides(args.overrides)

        def plans(names: Sequence[str]) -> list[PlannedRun]:
            given = found if Path(args.config).suffix in SUFFIXES else wanted(found, stage.name, names)
            return plan(stage, given, overrides, args.runs)

        if not plans(args.extra) and args.only is None:
            raise ConfigError(
                f"{found[0].parent} has no {stage.name}.yaml; choose with --with: {', '.join(beside_the_main(found))}"
            )
        return pick(plans, args.extra, beside_the_main(found), args.only), found[0].parent

    return launch(arguments.parse_intermixed_args(), planned, stages)


def check_extra(names: Sequence[str], found: Sequence[Path]) -> None:
    """Raises ConfigError if there is no <stage>_<name>.yaml for one of the names."""
    there = beside_the_main(found)
    for name in names:
        if name not in there:
            folder = found[0].parent
            raise ConfigError(
                f"--with {name}: {folder} holds no <stage>_{name}.yaml; there is: {', '.join(there) or 'none'}"
            )


def parser(description: str, example: str) -> argparse.ArgumentParser:
    """example: arguments that run as they stand, since --help prints them for copying."""
    arguments = argparse.ArgumentParser(
        description=description, epilog=f"example: %(prog)s {example}", formatter_class=Unbroken
    )
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
    arguments.add_argument(
        "--start",
        choices=get_args(Start),
        help="fork (Linux, default without a GPU): import once, fork each process; fresh: each imports for itself",
    )
    arguments.add_argument(
        "--mirror",
        type=Path,
        metavar="FILE",
        help="a YAML that names local files for what the hub has (UNDO_MIRROR)",
    )
    return arguments


def launch(
    args: argparse.Namespace,
    planned: Callable[[argparse.Namespace], tuple[list[PlannedRun], Path]],
    stages: Mapping[str, Stage],
    kept: Collection[str] = (),
) -> int:
    """Plan, check and execute runs -> the exit status. `kept`: names of runs that --force leaves as they are."""
    from undo.experiments.display import LiveTable

    mirror.use(args.mirror)
    runs, configs = planned(args)
    costs = Costs(runs, configs, stages, parse_overrides(args.overrides).get("base.model"))
    if args.dry_run:
        show(runs, costs)
        show_refusals(runs, costs, {run.name for run in runs if args.force} - set(kept))
        return 0
    check(runs, args.force, kept, costs)
    show_notes(runs)
    if said := precision_note(runs):
        print(said)
    with LiveTable(runs) as display:
        try:
            failed = run_jobs(jobs(runs, args.start or start()), display)
        except KeyboardInterrupt:
            display.interrupted(args.force)
            return 130
    return 1 if failed else 0


def start() -> Start:
    """How processes come about where nobody says. Forks have been run on CPUs alone, so on a GPU they are a choice."""
    return "fresh" if visible_gpus() else "fork"


def precision_note(runs: Sequence[PlannedRun]) -> str | None:
    """That runs ask for bf16 where there is no GPU and the CPU multiplies it slowly. A GPU is asked by its worker."""
    asks = any(isinstance(run.config, TrainingStage) and run.config.training.precision == "bf16" for run in runs)
    if not asks or visible_gpus() or precision.cpu_has_fast_bf16():
        return None
    return precision.note("bf16", "fp32")


def show_notes(runs: Sequence[PlannedRun]) -> None:
    for text in dict.fromkeys(note for run in runs if not run.directory.done for note in run.config.notes()):
        print(f"note: {text}")


def show_refusals(runs: Sequence[PlannedRun], costs: Costs, forced: Collection[str]) -> None:
    """What --dry-run knows to be wrong with the runs that it lists."""
    found = list(dict.fromkeys(map(str, refusals(runs, costs, forced))))
    for text in found[:REFUSALS]:
        print(f"would be refused: {text}")
    if len(found) > REFUSALS:
        print(f"would be refused: {len(found) - REFUSALS} more")
    if not found:
        show_notes(runs)


def state_of(run: PlannedRun) -> str:
    """done, to do, or differs: what is there was made with other values, which the refusals name."""
    try:
        check_made(run)
    except ConfigError:
        return "differs"
    return "done" if run.directory.done else "to do"


def show(runs: Sequence[PlannedRun], costs: Costs) -> None:
    """The --dry-run table. Plain text: this is the command that people pipe, grep and run for thousands of runs."""
    rows: list[tuple[str, ...]] = [("run", "parents", "state", "tokens", "FLOPs", "H200 h")]
    total, unknown = Cost(0, 0.0), 0
    for run in runs:
        cost = costs.of(run)
        if cost is not None:
            cells = si(cost.tokens).strip(), si(cost.flops).strip(), f"{cost.h200_hours:.2f}"
            total = Cost(total.tokens + cost.tokens, total.flops + cost.flops)
        else:
            trains = isinstance(run.config, TrainingStage)
            cells = ("-" * trains,) * 3
            unknown += trains
        state = state_of(run)
        rows.append((run.name, ", ".join(run.config.parents()), state, *cells))
    print(*aligned(rows, right=(3, 4, 5)), sep="\n")
    print(
        f"{len(runs)} runs; training at most: {si(total.tokens)}tokens, {si(total.flops)}FLOP, "
        f"{total.h200_hours:.2f} hours of one H200 (modelled, at a quarter of its peak)"
        + f"; without {unknown} run{'s' * (unknown > 1)} of a model whose size is not known before it is fetched"
        * bool(unknown)
    )
