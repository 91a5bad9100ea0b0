"""Runs -> one table. Robustness is defined here and nowhere else."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from math import nan
from pathlib import Path
from typing import Any, Final

from undo.config.mistakes import ConfigError
from undo.config.schema import Raw
from undo.results.arms import Arm, Oracle, Reference, Undo, Unlearned, arm_of, method_of
from undo.results.attacked import Attacked, Result
from undo.results.labels import distinct
from undo.results.seeds import median
from undo.results.shown import SPARE, Look, Shown
from undo.runs.directory import RunDirectory

SHOWN: Final = (20, 70)  # relearning steps that the table shows beside the last
UNKNOWN: Final = Look("", "h", *SPARE[-1])


@contextmanager
def _noted(unread: list[str]) -> Iterator[None]:
    """A damaged run is a line, and stops nothing."""
    try:
        yield
    except ConfigError as error:
        unread.append(str(error).splitlines()[0])


@dataclass(frozen=True)
class Results:
    """Everything that is done in one setting."""

    setting: str
    runs: tuple[Result, ...]
    stages: tuple[str, ...]  # in the order of the pipeline
    shown: Shown = field(default_factory=Shown)
    looks: Mapping[str, Look] = field(default_factory=dict)  # of unlearning methods, by name
    unread: tuple[str, ...] = ()  # runs that are left out because they are damaged: one line for each

    @classmethod
    def read(
        cls,
        runs: Path,
        setting: str,
        stages: Sequence[str],
        shown: Shown | None = None,
        looks: Mapping[str, Look] | None = None,
    ) -> "Results":
        """`stages`: their names, in the order of the pipeline (settings/stages.py)."""
        directories = [
            RunDirectory.at(path.parent)
            for stage in stages
            for path in sorted((runs / setting / stage).glob("*/run.json"))
        ]
        configs, found, unread = dict[str, Raw](), list[Result](), list[str]()
        for directory in directories:
            with _noted(unread):
                configs[directory.name] = directory.config
        for directory in directories:
            if (config := configs.get(directory.name)) is not None:
                with _noted(unread):
                    result = Result(directory, config, directory.facts, arm_of(directory.name, configs.get))
                    _ = result.evaluations  # read now: what is damaged is left out of everything
                    found.append(result)
        return cls(setting, tuple(found), tuple(stages), shown or Shown(), looks or {}, tuple(unread))

    def of(self, stage: str) -> list[Result]:
        return [run for run in self.runs if run.name.startswith(f"{stage}/")]

    @cached_property
    def _by_name(self) -> dict[str, Result]:
        return {run.name: run for run in self.runs}

    def named(self, name: str) -> Result | None:
        return self._by_name.get(name)

    def look(self, arm: Arm | None) -> Look:
        """Of the unlearning method behind a model; a neutral one where there is none, or nobody knows it."""
        method = method_of(arm) or ""
        return self.looks.get(method, UNKNOWN._replace(title=method))

    @cached_property
    def start(self) -> dict[str, float]:
        """Performance of the pretrained model that everything was unlearned from; empty where nothing was."""
        return next((run.evaluations[0] for run in self.of("unlearn") if 0 in run.evaluations), {})

    @cached_property
    def taught(self) -> frozenset[str]:
        """Names of the models that something was distilled from."""
        return frozenset(run.config["teacher"] for run in self.runs if "teacher" in run.config)

    @cached_property
    def attacked(self) -> tuple[Attacked, ...]:
        """Relearn runs grouped by model, in the order of the pipeline.

        Raises ConfigError where their curves are of different kinds, such as accuracies and cross entropies: nothing
        that is said of them together would mean anything.
        """
        groups: dict[str, list[Result]] = {}
        attacks = self.of("relearn")
        for run in attacks:
            if run.evaluation is not attacks[0].evaluation:
                raise ConfigError(
                    f"{attacks[0].name} was evaluated by {attacks[0].unit}, {run.name} by {run.unit}\n"
                    f"attacks of different kinds cannot be compared: move one kind to another --runs folder"
                )
            groups.setdefault(run.config["model"], []).append(run)
        found = [(run, groups[run.name]) for run in self.runs if run.name in groups]
        labels = distinct(
            [group[0].config.get("variant") or model.label for model, group in found], [m for m, _ in found]
        )
        return tuple(Attacked(label, model, tuple(group)) for label, (model, group) in zip(labels, found, strict=True))

    @cached_property
    def _attacked_by_name(self) -> dict[str, Attacked]:
        return {attacked.model.name: attacked for attacked in self.attacked}

    def attacked_as(self, kind: type) -> list[Attacked]:
        """All attacked models of one kind of arm."""
        return [attacked for attacked in self.attacked if isinstance(attacked.arm, kind)]

    @cached_property
    def attack_steps(self) -> tuple[int, ...]:
        """Before, moderate and whole attack: 0, 40 and 500 of the paper's 500 steps, the same shares of fewer ones.

        Steps at which every attacked model was evaluated, but one that was never finite; fewer than three where there
        are not so many.
        """
        evaluated = [set(a.worst_case) for a in self.attacked if a.worst_case]
        common = set.intersection(*evaluated) if evaluated else set()
        later = sorted(common - {0})
        if not later:
            return tuple(common)
        moderate = min(later, key=lambda step: abs(step - later[-1] * 40 / 500))
        return tuple(sorted({0, moderate, later[-1]}))

    def robustness(self, attacked: Attacked) -> float | None:
        """(P - P_unlearned) / (P_oracle - P_unlearned) after the last relearning step (Figure 5).

        Unlearned is as in `unlearned_of`; None for the reason in `why_no_robustness`.
        """
        unlearned, oracle = self.unlearned_of(attacked), self.oracle_of(attacked)
        if self.why_no_robustness(attacked) is not None or oracle is None:
            return None
        if attacked is oracle or unlearned is None:
            return 1.0
        return (attacked.last - unlearned.last) / (oracle.last - unlearned.last) + 0.0  # never -0.0

    def why_no_robustness(self, attacked: Attacked) -> str | None:
        """What a model's robustness lacks; None where it has one."""
        unlearned, oracle = self.unlearned_of(attacked), self.oracle_of(attacked)
        if isinstance(attacked.arm, Reference):
            return "nothing was unlearned in it here"
        if oracle is None:
            return "no oracle of its seed (a model that never saw the forget data) has been attacked"
        if attacked is oracle:
            return None
        if unlearned is None:
            return "the unlearned model that it started from has not been attacked"
        return "the oracle relearns as fast as the unlearned model" if unlearned.last == oracle.last else None

    def teacher_of(self, attacked: Attacked) -> Attacked | None:
        """The model it was distilled from, if that has been attacked too."""
        return self._attacked_by_name.get(attacked.model.config.get("teacher", ""))

    def unlearned_of(self, attacked: Attacked) -> Attacked | None:
        """What a model's robustness starts from: its own teacher; itself, if something is distilled from it or nothing
        is from any model of its seed; for another model (SAM, ...) the one of its seed that UNDO starts from."""
        if "teacher" in attacked.model.config:
            return self.teacher_of(attacked)
        if attacked.model.name in self.taught:
            return attacked
        starts = self._undo_starts_from.get(attacked.model.seed)
        if starts is None and isinstance(attacked.arm, Unlearned):
            return attacked
        return starts

    @cached_property
    def _undo_starts_from(self) -> dict[int, Attacked]:
        """Seed -> the attacked teacher of the UNDO models of `series`, or of the first distilled model."""
        found: dict[int, Attacked] = {}
        for run in [*self.series, *self.of("undo"), *self.of("distill")]:
            teacher = self._attacked_by_name.get(run.config["teacher"])
            if teacher is not None and isinstance(teacher.arm, Unlearned):
                found.setdefault(teacher.model.seed, teacher)
        return found

    # --- UNDO models that differ in alpha ---------------------------------------------------------------------------

    def _series_of(self, run: Result) -> tuple[Any, ...]:
        """What two UNDO models have in common that differ in alpha and seed alone."""
        assert isinstance(run.arm, Undo)
        teacher = self.named(run.config["teacher"])
        arm = run.arm
        return (run.config["teacher"] if teacher is None else teacher.label, arm.beta, arm.distribution, arm.within)

    @cached_property
    def series(self) -> list[Result]:
        """The UNDO models over alpha: of all groups that differ in alpha alone the one with most alphas; of equals the
        one in which the point of `shown.figure_7` is, and then the first."""
        groups: dict[tuple[Any, ...], list[Result]] = {}
        for run in self.of("undo"):
            groups.setdefault(self._series_of(run), []).append(run)

        def worth(group: list[Result]) -> tuple[int, bool]:
            arms = [run.arm for run in group if isinstance(run.arm, Undo)]
            return len({arm.alpha for arm in arms}), any(self.is_shown(arm) for arm in arms)

        return max(groups.values(), key=worth, default=[])

    @property
    def within(self) -> float | None:
        """The retain threshold of `series`."""
        return next((run.arm.within for run in self.series if isinstance(run.arm, Undo)), None)

    def is_shown(self, arm: Undo) -> bool:
        """Whether an UNDO model stands in Figures 7 and 11: at their point, or of a method that has none there."""
        return self._is_at_the_point(arm) or method_of(arm) not in self._methods_at_the_point

    def _is_at_the_point(self, arm: Undo) -> bool:
        point = self.shown.figure_7
        return point is None or (point.alpha, point.beta) == (arm.alpha, arm.beta)

    @cached_property
    def _methods_at_the_point(self) -> frozenset[str | None]:
        arms = (run.arm for run in self.of("undo"))
        return frozenset(method_of(arm) for arm in arms if isinstance(arm, Undo) and self._is_at_the_point(arm))

    # --- comparisons ------------------------------------------------------------------------------------------------

    @cached_property
    def compared(self) -> dict[str, list[Attacked]]:
        """Who takes part in Figures 7 and 11, by label: every unlearned model, and UNDO as `shown.figure_7` says."""
        groups: dict[str, list[Attacked]] = {}
        for a in self.attacked:
            if isinstance(a.arm, Unlearned) or (isinstance(a.arm, Undo) and self.is_shown(a.arm)):
                groups.setdefault(a.label, []).append(a)
        return groups

    def medians(self, step: int) -> dict[str, tuple[float, float]]:
        """Of all `compared`, over seeds: retain performance before the attack, worst-case forget performance after
        `step` steps of it."""
        return {
            label: (
                median(a.model.facts["evaluation"]["retain"] for a in members),
                median(a.worst_case.get(step, nan) for a in members),
            )
            for label, members in self.compared.items()
        }

    @property
    def directions(self) -> tuple[bool, bool]:
        """Whether more is better in each number of `medians`."""
        first = next(iter(self.compared.values()))[0]
        return first.model.higher_is_better, first.higher_is_better

    def compute(self, attacked: Attacked) -> float | None:
        """S_student / S_oracle, S = training tokens (Figure 5); None without the oracle.

        The paper's S is training steps. Where a step of distillation has fewer rows than one of pretraining, as in its
        language setting (240 and 400), that overstates what distillation takes.
        """
        oracle = self.oracle_of(attacked)
        return None if oracle is None else attacked.model.facts["tokens"] / oracle.model.facts["tokens"]

    def oracle_of(self, attacked: Attacked) -> Attacked | None:
        """The oracle of the same world: its seed is that of the model's teacher, where there is one."""
        teacher = self.named(attacked.model.config.get("teacher", ""))
        return self._oracles.get((teacher or attacked.model).seed)

    @cached_property
    def _oracles(self) -> dict[int, Attacked]:
        return {a.model.seed: a for a in reversed(self.attacked_as(Oracle))}

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
            model, curve = attacked.model, attacked.worst_case
            rows.append(
                {
                    "model": attacked.label,
                    "seed": model.seed,
                    "retain": attacked.before("retain"),
                    "forget": attacked.before("forget"),
                    **{f"forget_{step}": curve.get(step) for step in self.shown_steps},
                    "forget_last": attacked.last,
                    "robustness": self.robustness(attacked),
                    "steps": model.facts.get("steps"),
                    "flops": model.facts.get("flops"),
                }
            )
        return rows
