"""A whole setting, in order, to its table and figures: prepare -> pretrain -> unlearn -> distill, undo -> relearn.

The stages are one graph of jobs: a run starts as soon as its own parents are done. Overrides carry the name of their
stage (undo.noise.beta=0.5); seed and sweep.seed go to every stage that trains.
"""

import argparse
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Final

from undo.config.mistakes import ConfigError
from undo.config.sweep import parse_overrides
from undo.experiments import cli
from undo.experiments.choose import pick, wanted
from undo.experiments.hyperparameters import hyperparameters
from undo.experiments.plan import PlannedRun, beside_the_main, find_configs, plan, sources
from undo.settings.publish import publish
from undo.settings.stages import STAGES
from undo.train.stage import TrainingStage

EXAMPLE: Final = "demo pretrain.training.steps=50 sweep.seed=[0,1,2] --only '*seed_0' --dry-run"


def route(overrides: dict[str, Any], without_seeds: Collection[str] = ()) -> dict[str, dict[str, Any]]:
    """Overrides by stage; the seeds of all go to every stage that trains but those `without_seeds`."""
    routed: dict[str, dict[str, Any]] = {name: {} for name in STAGES}
    for key, value in overrides.items():
        stage, _, rest = key.partition(".")
        if stage in STAGES and rest:
            routed[stage][rest] = value
        elif key in ("seed", "sweep.seed"):
            for name, known in STAGES.items():
                if issubclass(known.schema, TrainingStage) and name not in without_seeds:  # the data stay the same
                    routed[name][key] = value
        else:
            raise ConfigError(f"{key!r}: say which stage it is for, as in pretrain.{key}; stages: {', '.join(STAGES)}")
    return routed


def planned(args: argparse.Namespace) -> tuple[list[PlannedRun], Path]:
    """The runs of all stages that the setting has a YAML for, parents before children.

    <stage>_<name>.yaml beside the main one is taken with `--with name`, or where `--only` matches nothing else.
    """
    return planned_in(find_configs(args.config, "unlearn")[0].parent, args, tuple(STAGES))


def planned_in(
    folder: Path,
    args: argparse.Namespace,
    stages: Collection[str],
    without_seeds: Collection[str] = (),
    stand_ins: bool = False,
) -> tuple[list[PlannedRun], Path]:
    """`planned`, of some stages of the setting in `folder`; `stand_ins` as in `plan`."""
    routed = route(parse_overrides(args.overrides), without_seeds)
    found = {name: sources(folder, name) for name in STAGES if name in stages}
    for name, changes in route(parse_overrides(args.overrides), tuple(STAGES)).items():
        if changes and not sources(folder, name):
            key, there = next(iter(changes)), ", ".join(stage for stage in STAGES if sources(folder, stage))
            raise ConfigError(f"{name}.{key}: {folder.name} has no stage {name}; its stages: {there}")
    every = [path for paths in found.values() for path in paths]
    cli.check_extra(args.extra, every)

    def plans(names: Sequence[str]) -> list[PlannedRun]:
        chosen = {name: wanted(paths, name, names) for name, paths in found.items() if paths}
        return [
            run
            for name, paths in chosen.items()
            for run in plan(STAGES[name], paths, routed[name], args.runs, stand_ins)
        ]

    return pick(plans, args.extra, beside_the_main(every), args.only, with_parents=True), folder


def main() -> int:
    parser = cli.parser("All stages of configs/<setting>/, to the table and the figures.", EXAMPLE)
    parser.add_argument("--tables", action="store_true", help="print the setting's hyper-parameters, and do nothing")
    args = parser.parse_intermixed_args()
    if args.tables:
        print(hyperparameters(find_configs(args.config, "unlearn")[0].parent, STAGES), end="")
        return 0
    status = cli.launch(args, planned, STAGES)
    if args.dry_run or status == 130:
        return status
    folder = find_configs(args.config, "unlearn")[0].parent
    if any((args.runs / folder.resolve().name).glob("*/*/run.json")):
        publish(folder, args.runs)
    return status
