"""A whole setting, in order, to its table and figures: prepare -> pretrain -> unlearn -> distill, undo -> relearn.

    uv run run_all.py demo [stage.key=value ...] [--only GLOB] [--with NAME] [--dry-run] [--force]

The stages are one graph of jobs: a run starts as soon as its own parents are done. Overrides carry the name of their
stage (undo.noise.beta=0.5); seed and sweep.seed go to every stage that has a seed.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import run_distill
import run_figures
import run_pretrain
import run_relearn
import run_undo
import run_unlearn
from undo import cli
from undo.config import ConfigError, parse_overrides
from undo.experiment import PlannedRun, find_configs, plan, select, sources
from undo.prepare_data import prepare
from undo.tables import hyperparameters

STAGES = {
    module.STAGE.name: module.STAGE
    for module in (prepare, run_pretrain, run_unlearn, run_distill, run_undo, run_relearn)
}


def route(overrides: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Overrides by stage."""
    routed: dict[str, dict[str, Any]] = {name: {} for name in STAGES}
    for key, value in overrides.items():
        stage, _, rest = key.partition(".")
        if stage in STAGES and rest:
            routed[stage][rest] = value
        elif key in ("seed", "sweep.seed"):
            for name, known in STAGES.items():
                if "seed" in known.schema.model_fields:
                    routed[name][key] = value
        else:
            raise ConfigError(f"{key!r}: say which stage it is for, as in pretrain.{key}; stages: {', '.join(STAGES)}")
    return routed


def planned(args: argparse.Namespace) -> tuple[list[PlannedRun], Path]:
    """The runs of all stages that the setting has a YAML for, parents before children.

    Experiments beside the main ones, <stage>_<name>.yaml, are taken with `--with name`.
    """
    routed = route(parse_overrides(args.overrides))
    folder = find_configs(args.config, "pretrain")[0].parent
    wanted = {name: [source for source in sources(folder, name) if _is_wanted(source, name, args)] for name in STAGES}
    if unknown := set(args.experiments) - {s.stem.partition("_")[2] for found in wanted.values() for s in found}:
        raise ConfigError(f"{folder} holds no <stage>_{min(unknown)}.yaml")
    runs = [
        run for name, found in wanted.items() if found for run in plan(STAGES[name], found, routed[name], args.runs)
    ]
    return select(runs, args.only, with_parents=True), folder


def _is_wanted(source: Path, stage: str, args: argparse.Namespace) -> bool:
    return source.stem == stage or source.stem.removeprefix(f"{stage}_") in args.experiments


def main() -> int:
    parser = cli.parser("All stages of configs/<setting>/, to the table and the figures.")
    parser.add_argument(
        "--with",
        nargs=1,
        action="extend",
        default=[],
        dest="experiments",
        metavar="NAME",
        help="also <stage>_NAME.yaml",
    )
    parser.add_argument("--tables", action="store_true", help="print the setting's hyper-parameters, and do nothing")
    args = parser.parse_intermixed_args()
    if args.tables:
        print(hyperparameters(find_configs(args.config, "pretrain")[0].parent, STAGES), end="")
        return 0
    status = cli.launch(args, planned)
    if args.dry_run or status == 130:
        return status
    setting = planned(args)[0][0].directory.setting
    if any((args.runs / setting).glob("*/*/run.json")):
        run_figures.publish(setting, args.runs)
    return status


if __name__ == "__main__":
    sys.exit(cli.guarded(main))
