"""WMDP: unlearn, noise, distill and attack a pretrained model. Section 6, Appendix D.2, Figures 8 and 11.

    prepare   data and the model, which is fetched (in wmdp_small: pretrained)
    search    unlearn over alpha and learning rates on one seed, and choose three points of each method, without the
              runs that diverge
    unlearn   every method at its points, over the seeds
    undo      distill the best-retaining points into noised copies of themselves
    relearn   every adversary on every model
    figures   Figures 8 and 11, Tables 10 and 13, claims, costs

Without --stage it runs all of them in this order, and the search only if the setting's unlearn.yaml says `points:
search` (wmdp_bio and wmdp_cyber have the points of Table 10). It is run_all.py in two parts, with a choice in between.
--only chooses among all runs; if it selects a run that needs the points, the whole search is made first.
"""

import argparse
from collections.abc import Collection
from pathlib import Path
from typing import Final

from undo.config.files import write_atomically
from undo.config.mistakes import ConfigError
from undo.config.sweep import parse_overrides, read_yaml
from undo.experiments import cli
from undo.experiments.choose import select
from undo.experiments.hyperparameters import hyperparameters
from undo.experiments.plan import PlannedRun, find_configs, plan, sources
from undo.experiments.points import FILE, searches
from undo.results.attacked import Result
from undo.results.selection import Point, across_the_frontier, as_raw
from undo.settings.publish import publish
from undo.settings.stages import STAGES
from undo.settings.whole import planned_in, route
from undo.unlearn.stage import Unlearn

PARTS: Final = {
    "prepare": ("prepare", "base", "pretrain"),
    "search": ("prepare", "base", "pretrain"),  # and unlearn_search.yaml
    "unlearn": ("unlearn",),
    "undo": ("undo",),
    "relearn": ("relearn",),
}
EXAMPLE: Final = "wmdp_small unlearn.training.steps=50 sweep.seed=[0,1] --dry-run"
SEARCH: Final = "unlearn_search"
BASE: Final = ("pretrain",)  # one model serves all seeds, as the hub's does: seed and sweep.seed leave it alone


def with_model(overrides: list[str], folder: Path) -> list[str]:
    """`model=X` sets the model of the base stage, and the tokenizer of the data to that of the model."""
    routed = []
    for text in overrides:
        key, _, value = text.partition("=")
        if key == "model" and not (folder / "base.yaml").exists():
            raise ConfigError(f"model: {folder.name} pretrains its own; change it with pretrain.model.<key>=")
        routed += [f"base.model={value}", f"prepare.tokenizer={value}"] if key == "model" else [text]
    return routed


def search(args: argparse.Namespace, folder: Path) -> list[PlannedRun]:
    """All runs that the points are chosen from, and their parents. --only and --with do not change the search."""
    everything = argparse.Namespace(**{**vars(args), "only": None, "extra": []})
    before, _ = planned_in(folder, everything, PARTS["search"], BASE)
    overrides = route(parse_overrides(args.overrides))["unlearn"]
    # the points are chosen on the search's own seed, and serve all seeds
    overrides = {key: value for key, value in overrides.items() if key not in ("points", "seed", "sweep.seed")}
    found = [path for path in sources(folder, "unlearn") if path.stem == SEARCH]
    if not found:
        raise ConfigError(f"{folder} has no {SEARCH}.yaml: there is nothing to choose the points from")
    return [*before, *plan(STAGES["unlearn"], found, overrides, args.runs)]


def search_first(args: argparse.Namespace, folder: Path, stages: Collection[str]) -> tuple[int, list[str], bool]:
    """Run the search, or its part that --only selects, and choose -> exit status, its runs' names, whether that is all.

    Without --stage the later runs are planned first, with stand-ins for the points, so that a mistake in them, or an
    --only that matches nothing, is reported before hours of search.
    """
    every = part = search(args, folder)
    last = args.stage == "search"
    if not last:
        then, _ = planned_in(folder, args, stages, BASE, stand_ins=True)
        last = {run.name for run in then} <= {run.name for run in every}  # --only wants nothing behind the points
    if last:
        part = select(every, args.only, with_parents=True)
    status, names = cli.launch(args, lambda args: (part, folder), STAGES), [run.name for run in part]
    if args.dry_run or status == 130 or any(not run.directory.done and not diverged(run) for run in part):
        return status, names, last
    if not any(isinstance(run.config, Unlearn) for run in part):  # --only wants data, or the model
        return status, names, last
    missing = [run for run in every if isinstance(run.config, Unlearn) and not run.directory.done]
    if all(diverged(run) for run in missing):
        choose(every, args.runs / folder.resolve().name)
        return 0, names, last
    print(f"{len(missing)} runs of the search are still to be made; the points are chosen when it is complete")
    return status, names, last


def diverged(run: PlannedRun) -> bool:
    """Whether a run of the search ended because its numbers were not finite: an outcome that stops nothing."""
    return isinstance(run.config, Unlearn) and run.directory.diverged


def choose(runs: list[PlannedRun], folder: Path) -> None:
    """Write the chosen points of every method into the setting's folder of runs, and print them."""
    from omegaconf import OmegaConf

    by_method: dict[str, list[Result]] = {}
    for run in runs:
        if not isinstance(run.config, Unlearn):
            continue
        found = by_method.setdefault(run.config.method.name, [])
        if run.directory.done:
            found.append(Result(run.directory, run.directory.config, run.directory.facts))
        else:
            print(f"left out of the choice: {run.name}: {run.directory.failure}")
    chosen = {}
    for method, results in by_method.items():
        if not results:
            raise ConfigError(f"{method}: every run of the search diverged; search lower learning rates")
        points = [_point(result) for result in results]
        start = results[0].curve("forget")[0]
        chosen[method] = across_the_frontier(points, start, results[0].higher_is_better)
        for rank, p in chosen[method].items():
            values = f"alpha {p.alpha:g}, rate {p.learning_rate:g}: {p.retain:.3f} / {p.forget:.3f}"
            print(f"{method} {rank}: {values} ({p.run})")
    write_atomically(folder / FILE, OmegaConf.to_yaml(OmegaConf.create(as_raw(chosen))))


def _point(result: Result) -> Point:
    evaluation, config = result.facts["evaluation"], result.config
    values = config["method"]["alpha"], config["training"]["learning_rate"]
    return Point(result.name, *values, evaluation["retain"], evaluation["forget"])


def main() -> int:
    parser = cli.parser("WMDP, from a pretrained model to Figures 8 and 11.", EXAMPLE)
    parser.add_argument("--stage", choices=[*PARTS, "figures"], help="only this one; the runs before it must be done")
    parser.add_argument("--tables", action="store_true", help="print the setting's hyper-parameters, and do nothing")
    args = parser.parse_intermixed_args()
    folder = find_configs(args.config, "unlearn")[0].parent
    args.overrides = with_model(args.overrides, folder)
    if args.tables:
        print(hyperparameters(folder, STAGES), end="")
        return 0
    setting = folder.resolve().name
    if args.stage == "figures":
        publish(folder, args.runs)
        return 0
    stages = PARTS[args.stage] if args.stage else [name for names in PARTS.values() for name in names]
    overrides, made = route(parse_overrides(args.overrides))["unlearn"], list[str]()
    searched = searches(read_yaml(folder / "unlearn.yaml"), overrides)
    if args.stage == "search" or (args.stage is None and searched):
        status, made, last = search_first(args, folder, stages)
        if status or last:
            return status
        if args.dry_run and not (args.runs / setting / FILE).exists():
            print("unlearn, undo and relearn: their runs are known when the points are chosen from these")
            return 0
    status = cli.launch(args, lambda args: planned_in(folder, args, stages, BASE), STAGES, kept=made)
    if args.stage is None and not args.dry_run and status != 130:
        publish(folder, args.runs)
    return status
