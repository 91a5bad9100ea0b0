"""A finished run, and a model with all its adversaries. The worst case over them is defined here and nowhere else."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import isfinite, nan
from statistics import fmean
from typing import Any, Final, get_args

from undo.config.schema import Raw
from undo.evaluate import Evaluation
from undo.evaluate.evaluator import EvaluationConfig
from undo.results.arms import Arm
from undo.runs.directory import RunDirectory

KINDS: Final[dict[str, type[EvaluationConfig]]] = {
    kind.model_fields["name"].default: kind for kind in get_args(get_args(Evaluation)[0])
}
Curve = dict[int, float]  # relearning step -> forget performance


@dataclass(frozen=True)
class Result:
    """A finished run, read once."""

    directory: RunDirectory
    config: Raw
    facts: dict[str, Any]
    arm: Arm | None = None  # what the model is that it made

    @property
    def name(self) -> str:
        return self.directory.name

    @property
    def label(self) -> str:
        """The row of the table that it belongs to: text for people. Its own name where no variant was given."""
        return self.config.get("variant") or self.name.partition("/")[2]

    @property
    def seed(self) -> int:
        return self.config.get("seed", 0)

    @cached_property
    def evaluations(self) -> dict[int, dict[str, float]]:
        return self.directory.evaluations()

    def curve(self, role: str) -> Curve:
        return {step: metrics[role] for step, metrics in self.evaluations.items()}

    def final(self, role: str) -> float | None:
        """Performance of the model it made; None where none was measured, as for a model that was only fetched."""
        return self.facts.get("evaluation", {}).get(role)

    @property
    def evaluation(self) -> type[EvaluationConfig]:
        """The kind of evaluation that made its curves."""
        return KINDS[self.config["evaluation"]["name"]]

    @property
    def higher_is_better(self) -> bool:
        return self.evaluation.higher_is_better

    @property
    def unit(self) -> str:
        return self.evaluation.unit


def worst_case(curves: Sequence[Curve], higher_is_better: bool) -> Curve:
    """At each step the best forget performance over several adversaries.

    A diverged one counts up to its end, and not where its performance is not finite. No step where none counts.
    """
    best = max if higher_is_better else min
    return {step: best(values) for step, values in _by_step(curves).items()}


def _by_step(curves: Sequence[Curve]) -> dict[int, list[float]]:
    """The finite performances at each step at which there is one."""
    found = {step: [c[step] for c in curves if isfinite(c.get(step, nan))] for step in sorted(set().union(*curves))}
    return {step: values for step, values in found.items() if values}


@dataclass(frozen=True)
class Attacked:
    """A model with all its adversaries: one row of the table.

    What is better, and in which unit, is said by the evaluation that made the adversaries' curves. The model may have
    been evaluated otherwise.
    """

    label: str
    model: Result
    adversaries: tuple[Result, ...]

    @property
    def arm(self) -> Arm | None:
        return self.model.arm

    @property
    def higher_is_better(self) -> bool:
        return self.adversaries[0].higher_is_better

    @property
    def unit(self) -> str:
        return self.adversaries[0].unit

    @cached_property
    def _whole(self) -> Result | None:
        """An adversary that changes nothing before its first step: its evaluation there is the model's own."""
        return next((a for a in self.adversaries if not a.config.get("noise") and 0 in a.evaluations), None)

    def before(self, role: str) -> float | None:
        """Performance before the attack; of a model that was only fetched, as the attack measured it first."""
        own = self.model.final(role)
        return own if own is not None or self._whole is None else self._whole.curve(role)[0]

    @property
    def before_unit(self) -> str:
        """That of `before`."""
        return self.unit if self.model.final("retain") is None else self.model.unit

    @cached_property
    def worst_case(self) -> Curve:
        """Over all adversaries."""
        return worst_case([adversary.curve("forget") for adversary in self.adversaries], self.higher_is_better)

    @cached_property
    def average(self) -> Curve:
        """At each step the mean forget performance over the adversaries that got so far."""
        curves = [adversary.curve("forget") for adversary in self.adversaries]
        return {step: fmean(values) for step, values in _by_step(curves).items()}

    @property
    def last(self) -> float:
        """NaN where no adversary ever had a finite performance."""
        return self.worst_case[max(self.worst_case)] if self.worst_case else nan
