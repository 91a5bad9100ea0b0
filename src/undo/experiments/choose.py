"""Choosing among planned runs: --with adds experiments, --only selects runs in them."""

import fnmatch
from collections.abc import Callable, Sequence
from pathlib import Path

from undo.config.mistakes import ConfigError
from undo.experiments.plan import PlannedRun


def wanted(found: Sequence[Path], stage: str, extra: Sequence[str]) -> list[Path]:
    """The main YAML of a stage, where there is one, and <stage>_<name>.yaml for each name in `extra`."""
    names = {stage, *(f"{stage}_{name}" for name in extra)}
    return [path for path in found if path.stem in names]


def matches(name: str, pattern: str) -> bool:
    """Whether a run's name, with or without its stage, matches the glob."""
    return any(fnmatch.fnmatch(n, pattern) for n in (name, name.partition("/")[2]))


def select(planned: Sequence[PlannedRun], pattern: str | None, with_parents: bool = False) -> list[PlannedRun]:
    """The runs whose name (with or without the stage) matches the glob; `with_parents` adds all their ancestors."""
    if pattern is None:
        return list(planned)
    chosen = {p.name for p in planned if matches(p.name, pattern)}
    if not chosen:
        some = ", ".join(p.config.name for p in planned[:12]) + ", ..." * (len(planned) > 12)
        raise ConfigError(f"--only {pattern!r} matches none of: {some}")
    if with_parents:
        for run in reversed(planned):  # stages come in order, so parents come later here
            if run.name in chosen:
                chosen.update(run.config.parents())
    return [p for p in planned if p.name in chosen]


def pick(
    plans: Callable[[Sequence[str]], Sequence[PlannedRun]],
    asked: Sequence[str],
    beside: Sequence[str],
    only: str | None,
    with_parents: bool = False,
) -> list[PlannedRun]:
    """Apply --only to the main YAML and the --with YAMLs (`asked`); if nothing matches, try those `beside` in order.

    plans: from the names of extra experiments to their planned runs.
    """
    for names in (asked, *([*asked, name] for name in beside)):
        planned = plans(names)
        if only is None or any(matches(run.name, only) for run in planned):
            return select(planned, only, with_parents)
    return select(plans([*asked, *beside]), only, with_parents)
