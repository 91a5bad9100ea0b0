"""Every evaluation of every run as one tidy table, a row each: what the figures draw, for whoever plots otherwise."""

from collections.abc import Iterator
from typing import Any, Final

from undo.results.arms import Arm, Undo, method_of
from undo.results.attacked import Result
from undo.results.results import Results

COLUMNS: Final = (
    "stage", "run", "arm", "method", "alpha", "beta", "within", "variant", "seed",
    "adversary", "learning_rate", "step", "tokens", "retain", "forget",
)  # fmt: skip


def curves(results: Results) -> Iterator[dict[str, Any]]:
    """Rows in the columns of COLUMNS, None where there is nothing to say; docs/results.md says what each holds.

    Of an attack, arm to variant are those of the attacked model.
    """
    labels = {attacked.model.name: attacked.label for attacked in results.attacked}
    for run in results.runs:
        stage = run.name.partition("/")[0]
        attacks = stage in ("relearn", "attack")
        model = results.named(run.config["model"]) if attacks else run
        about = {
            "stage": stage,
            "run": run.name,
            **_of_an_arm(None if model is None else model.arm),
            "variant": labels.get(model.name, run.label) if model is not None else run.label,
            "seed": run.seed,
            "adversary": run.config.get("adversary") or None if attacks else None,
            "learning_rate": run.config.get("training", {}).get("learning_rate"),
        }
        for step, measured in run.evaluations.items():
            row = {"step": step, "tokens": _tokens(run, step)}
            yield about | row | {role: measured.get(role) for role in ("retain", "forget")}


def _of_an_arm(arm: Arm | None) -> dict[str, Any]:
    noise = arm if isinstance(arm, Undo) else None
    return {
        "arm": None if arm is None else type(arm).__name__.lower(),
        "method": method_of(arm),
        "alpha": noise and noise.alpha,
        "beta": noise and noise.beta,
        "within": noise and noise.within,
    }


def _tokens(run: Result, step: int) -> int | None:
    """That the run was trained on up to a step: every step has as many. None for a run that diverged."""
    steps, tokens = run.facts.get("steps"), run.facts.get("tokens")
    return round(tokens * step / steps) if isinstance(tokens, int) and steps else None
