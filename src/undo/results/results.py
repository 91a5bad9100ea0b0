"""Runs -> one table. The worst case over adversaries, and robustness, are defined here and nowhere else."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean, median
from typing import Any, Final, get_args

from undo.config.schema import Raw
from undo.evaluate import Evaluation
from undo.evaluate.evaluator import EvaluationConfig
from undo.runs.directory import RunDirectory

SHOWN: Final = (20, 70)  # relearning steps that the table shows beside the last
Curve = dict[int, float]  # relearning step -> forget performance


@dataclass(frozen=True)
class Result:
    """A finished run, read once."""

    directory: RunDirectory
    config: Raw
    facts: dict[str, Any]

    @property
    def name(self) -> str:
        return self.directory.name

    @property
    def seed(self) -> int:
        return self.config["seed"]

    @cached_property
    def evaluations(self) -> dict[int, dict[str, float]]:
        return self.directory.evaluations()

    def curve(self, role: str) -> Curve:
        return {step: metrics[role] for step, metrics in self.evaluations.items()}

    @property
    def higher_is_better(self) -> bool:
        return self._evaluation.higher_is_better

    @property
    def unit(self) -> str:
        return self._evaluation.unit

    @property
    def _evaluation(self) -> type[EvaluationConfig]:
        kinds: tuple[type[EvaluationConfig], ...] = get_args(get_args(Evaluation)[0])
        name = self.config["evaluation"]["name"]
        return next(kind for kind in kinds if kind.model_fields["name"].default == name)


@dataclass(frozen=True)
class Attacked:
    """A model with all its adversaries: one row of the table."""

    label: str
    model: Result
    adversaries: tuple[Result, ...]

    @cached_property
    def worst_case(self) -> Curve:
        """At each step the best forget performance over all adversaries; a diverged one counts up to its end."""
        best = max if self.model.higher_is_better else min
        curves = [adversary.curve("forget") for adversary in self.adversaries]
        steps = sorted(set().union(*curves))
        return {step: best(curve[step] for curve in curves if step in curve) for step in steps}

    @cached_property
    def average(self) -> Curve:
        """At each step the mean forget performance over the adversaries that got so far."""
        curves = [adversary.curve("forget") for adversary in self.adversaries]
        steps = sorted(set().union(*curves))
        return {step: fmean(curve[step] for curve in curves if step in curve) for step in steps}

    @property
    def last(self) -> float:
        return self.worst_case[max(self.worst_case)]


@dataclass(frozen=True)
class Results:
    """Everything that is done in one setting."""

    setting: str
    runs: tuple[Result, ...]
    stages: tuple[str, ...]

    @classmethod
    def read(cls, runs: Path, setting: str, stages: Sequence[str]) -> "Results":
        """`stages`: their names, in the order of the pipeline (settings/stages.py)."""
        found = []
        for stage in stages:
            for path in sorted((runs / setting / stage).glob("*/run.json")):
                directory = RunDirectory.at(path.parent)
                found.append(Result(directory, directory.config, directory.facts))
        return cls(setting, tuple(found), tuple(stages))

    def of(self, stage: str) -> list[Result]:
        return [run for run in self.runs if run.name.startswith(f"{stage}/")]

    def named(self, name: str) -> Result | None:
        return next((run for run in self.runs if run.name == name), None)

    @property
    def is_wmdp(self) -> bool:
        """Whether the setting's adversaries are of several kinds, as those of Appendix D.2.5."""
        return any(run.config.get("adversary") for run in self.of("relearn"))

    @cached_property
    def start(self) -> dict[str, float]:
        """Performance of the pretrained model that everything was unlearned from; empty where nothing was."""
        return next((run.evaluations[0] for run in self.of("unlearn") if 0 in run.evaluations), {})

    @cached_property
    def attacked(self) -> tuple[Attacked, ...]:
        """Relearn runs grouped by model, in the order of the pipeline."""
        groups: dict[str, list[Result]] = {}
        for run in self.of("relearn"):
            groups.setdefault(run.config["model"], []).append(run)
        models = [(run, groups[run.name]) for run in self.runs if run.name in groups]
        return tuple(Attacked(group[0].config["variant"], model, tuple(group)) for model, group in models)

    @cached_property
    def attack_steps(self) -> tuple[int, ...]:
        """Before, moderate and whole attack: 0, 40 and 500 of the paper's 500 steps, the same shares of fewer ones.

        Steps at which every attacked model was evaluated; fewer than three where there are not so many.
        """
        common = set.intersection(*(set(a.worst_case) for a in self.attacked)) if self.attacked else set()
        later = sorted(common - {0})
        if not later:
            return tuple(common)
        moderate = min(later, key=lambda step: abs(step - later[-1] * 40 / 500))
        return tuple(sorted({0, moderate, later[-1]}))

    def robustness(self, attacked: Attacked) -> float | None:
        """(P - P_unlearned) / (P_oracle - P_unlearned) after the last relearning step (Figure 5).

        Unlearned is as in `unlearned_of`; None where it or the oracle of the seed has not been attacked, or where the
        two are equal.
        """
        unlearned = self.unlearned_of(attacked)
        oracle = self.oracle_of(attacked)
        if attacked.label == "reference" or oracle is None:
            return None
        if attacked is oracle:
            return 1.0
        if unlearned is None or unlearned.last == oracle.last:
            return None
        return (attacked.last - unlearned.last) / (oracle.last - unlearned.last) + 0.0  # never -0.0

    def teacher_of(self, attacked: Attacked) -> Attacked | None:
        """The model it was distilled from, if that has been attacked too."""
        name = attacked.model.config.get("teacher")
        return next((a for a in self.attacked if a.model.name == name), None)

    def unlearned_of(self, attacked: Attacked) -> Attacked | None:
        """What a model's robustness starts from: its own teacher; itself, where a later stage could start from it; for
        any other model without a teacher (SAM, ...) the unlearned model of its seed."""
        if "teacher" in attacked.model.config:
            return self.teacher_of(attacked)
        if attacked.label.startswith("unlearned"):
            return attacked
        return next((a for a in self.attacked if a.label == "unlearned" and a.model.seed == attacked.model.seed), None)

    @cached_property
    def compared(self) -> dict[str, list[Attacked]]:
        """Who takes part in Figures 7 and 11, by label: every unlearning method, and UNDO: at alpha = 0.6, beta = 0.1
        over its retain thresholds (Section 6); on WMDP at alpha = 0.25, beta = 0 (D.2.4)."""
        groups: dict[str, list[Attacked]] = {}
        for a in self.attacked:
            undo = a.label in ("undo_0.6", "undo_maxent", "undo_rmu") or a.label.startswith("undo_0.6_within_")
            if undo or ("teacher" not in a.model.config and a.label not in ("reference", "oracle")):
                groups.setdefault(a.label, []).append(a)
        return groups

    def medians(self, step: int) -> dict[str, tuple[float, float]]:
        """Of all `compared`, over seeds: retain performance before the attack, worst-case forget performance after
        `step` steps of it."""
        return {
            label: (
                median(a.model.facts["evaluation"]["retain"] for a in members),
                median(a.worst_case[step] for a in members),
            )
            for label, members in self.compared.items()
        }

    def compute(self, attacked: Attacked) -> float | None:
        """S_student / S_oracle, S = training steps (Figure 5); None without the oracle."""
        oracle = self.oracle_of(attacked)
        return None if oracle is None else attacked.model.facts["steps"] / oracle.model.facts["steps"]

    def oracle_of(self, attacked: Attacked) -> Attacked | None:
        """The oracle of the same world: its seed is that of the model's teacher, where there is one."""
        teacher = self.named(attacked.model.config.get("teacher", ""))
        seed = (teacher or attacked.model).seed
        return next((a for a in self.attacked if a.label == "oracle" and a.model.seed == seed), None)

    @cached_property
    def shown_steps(self) -> tuple[int, ...]:
        """SHOWN; where no attack is evaluated at either of them, the evaluated steps that are nearest, but the last."""
        steps = {step for attacked in self.attacked for step in attacked.worst_case}
        between = sorted(steps - {0, max(steps, default=0)})
        if not between or steps.intersection(SHOWN):
            return SHOWN
        return tuple(sorted({min(between, key=lambda step: abs(step - shown)) for shown in SHOWN}))

    @property
    def columns(self) -> tuple[str, ...]:
        """Of the table."""
        attack = (*(f"forget_{step}" for step in self.shown_steps), "forget_last")
        return ("model", "seed", "retain", "forget", *attack, "robustness", "steps", "flops")

    def table(self) -> list[dict[str, Any]]:
        """One row a model and seed; columns as in `columns`, None where there is nothing to say.

        steps and flops are those of the run that made the model, not of its parents.
        """
        rows = []
        for attacked in self.attacked:
            facts, curve = attacked.model.facts, attacked.worst_case
            rows.append(
                {
                    "model": attacked.label,
                    "seed": attacked.model.seed,
                    "retain": facts["evaluation"]["retain"],
                    "forget": facts["evaluation"]["forget"],
                    **{f"forget_{step}": curve.get(step) for step in self.shown_steps},
                    "forget_last": attacked.last,
                    "robustness": self.robustness(attacked),
                    "steps": facts["steps"],
                    "flops": facts["flops"],
                }
            )
        return rows
