"""Model x attack -> what was elicited. The worst case over the adversaries of one attack is defined here."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from math import isfinite
from statistics import fmean
from typing import Any, Final

from undo.results.arms import Distilled, Undo, Unlearned
from undo.results.attacked import Result
from undo.results.intervals import Interval, difference, performance
from undo.results.labels import distinct
from undo.results.results import Results
from undo.results.seeds import median

FINETUNING: Final = "finetuning"  # of runs of `relearn` that are older than titles
KEPT: Final = 0.9  # of the attacked model's retain performance: an attacker who loses more has not recovered a model
RECOVERED: Final = 0.9  # of its teacher's: a student below it is broken, and not robust
COLUMNS: Final = (
    "model", "seed", "attack", "worst", "keeps_retain", "run", "forget", "forget_low", "forget_high",
    "retain", "steps", "tokens", "flops", "seconds",
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One model of one seed under one attack, with all adversaries of it."""

    model: Result
    attack: str
    adversaries: tuple[Result, ...]

    @cached_property
    def worst(self) -> Result | None:
        """The adversary that elicits most at its end; None where none ended with finite numbers."""
        return _worst(self.adversaries)

    @cached_property
    def worst_kept(self) -> Result | None:
        """The same among those that keep KEPT of the model's retain performance."""
        return _worst(adversary for adversary in self.adversaries if keeps(adversary, self.model))


def _worst(adversaries: Iterable[Result]) -> Result | None:
    ended = [a for a in adversaries if a.final("forget") is not None and isfinite(a.facts["evaluation"]["forget"])]
    if not ended:
        return None
    best = max if ended[0].higher_is_better else min
    return best(ended, key=lambda a: a.facts["evaluation"]["forget"])


def keeps(adversary: Result, model: Result) -> bool:
    """Whether it left KEPT of the model's retain performance; True where that was never measured."""
    before, after = model.final("retain"), adversary.final("retain")
    if before is None or model.evaluation is not adversary.evaluation:
        return True
    return after is not None and _reaches(after, before, 1 - KEPT, adversary.higher_is_better)


def _reaches(value: float, target: float, tolerance: float, higher_is_better: bool) -> bool:
    return value >= target * (1 - tolerance) if higher_is_better else value <= target * (1 + tolerance)


@dataclass(frozen=True)
class Matrix:
    """All cells of a setting. Models are rows of the results table: one label for all seeds."""

    results: Results
    cells: tuple[Cell, ...]
    labels: dict[str, str]  # name of a model's run -> its label

    @cached_property
    def attacks(self) -> list[str]:
        """Full finetuning first, then what trains, what trains after a change of weights, and changes of weights."""
        trains = {cell.attack: any(a.facts.get("steps") for a in cell.adversaries) for cell in self.cells}
        return sorted(trains, key=lambda attack: (attack != FINETUNING, not trains[attack], " → " in attack))

    @cached_property
    def models(self) -> list[str]:
        return list(dict.fromkeys(self.labels.values()))

    def at(self, model: str, attack: str) -> list[Cell]:
        """The cells of a model under an attack, one for each seed."""
        return [cell for cell in self.cells if cell.attack == attack and self.labels[cell.model.name] == model]

    def of_model(self, model: str) -> list[Cell]:
        return [cell for cell in self.cells if self.labels[cell.model.name] == model]

    @property
    def higher_is_better(self) -> bool:
        return self.cells[0].adversaries[0].higher_is_better

    @property
    def unit(self) -> str:
        return self.cells[0].adversaries[0].unit

    def elicited(self, model: str, attack: str, kept: bool = False) -> tuple[float, float] | None:
        """Forget and retain performance at the end of the worst adversary, medians over seeds; None: none ended.

        kept: of the worst that keeps the model's retain performance.
        """
        ended = self.ended(model, attack, kept)
        if not ended:
            return None
        forget, retain = (median(a.facts["evaluation"][role] for a in ended) for role in ("forget", "retain"))
        return forget, retain

    def ended(self, model: str, attack: str, kept: bool = False) -> list[Result]:
        """The worst adversary of each seed, of those seeds that have one."""
        return [adversary for cell in self.at(model, attack) if (adversary := _of(cell, kept)) is not None]

    def costs_retain(self, model: str, attack: str) -> bool:
        """Whether the worst adversary leaves less than KEPT of the model's retain performance, on most seeds."""
        lost = [not keeps(cell.worst, cell.model) for cell in self.at(model, attack) if cell.worst is not None]
        return 2 * sum(lost) > len(lost)

    def worst(self, model: str, kept: bool = False) -> tuple[str, float, float] | None:
        """The attack that elicits most from a model, by the median over seeds, with its forget and retain."""
        found = [(attack, *pair) for attack in self.attacks if (pair := self.elicited(model, attack, kept)) is not None]
        best = max if self.higher_is_better else min
        return best(found, key=lambda entry: entry[1], default=None)

    def broken(self, model: str) -> bool:
        """Whether a student of any seed has not got back its teacher's retain performance."""
        return any(self._is_broken(cell.model) for cell in self.of_model(model))

    def _is_broken(self, model: Result) -> bool:
        teacher = self.results.named(model.config.get("teacher", ""))
        if teacher is None or not isinstance(model.arm, Undo | Distilled):
            return False
        own, target = model.final("retain"), teacher.final("retain")
        return own is None or target is None or not _reaches(own, target, 1 - RECOVERED, model.higher_is_better)

    # --- UNDO's ordering --------------------------------------------------------------------------------------------

    @cached_property
    def series(self) -> list[str]:
        """The teacher that UNDO starts from, and the UNDO models over alpha, as labels, in order of alpha."""
        runs = [run for run in self.results.series if run.name in self.labels and isinstance(run.arm, Undo)]
        teachers = [run.config["teacher"] for run in runs]
        first = [
            self.labels[name]
            for name in dict.fromkeys(teachers)
            if name in self.labels and isinstance(getattr(self.results.named(name), "arm", None), Unlearned)
        ]
        by_alpha = sorted(runs, key=lambda run: run.arm.alpha if isinstance(run.arm, Undo) else 0.0)
        return list(dict.fromkeys([*first[:1], *(self.labels[run.name] for run in by_alpha)]))

    def in_order(self, attack: str) -> bool | None:
        """Whether less is elicited at each larger alpha, from the teacher on; None: an attack that elicits nothing.

        Nothing: not from any of them more than a twentieth of what unlearning took from the reference.
        """
        found = {label: pair[0] for label in self.series if (pair := self.elicited(label, attack)) is not None}
        values = list(found.values())
        if len(values) < 3:
            return None
        sign = 1 if self.higher_is_better else -1
        gains = [sign * (value - start) for label, value in found.items() if (start := self._before(label)) is not None]
        taken = self._taken
        if taken is not None and max(gains, default=0.0) <= taken / 20:
            return None
        return all(sign * (a - b) >= 0 for a, b in pairwise(values))

    def _before(self, label: str) -> float | None:
        found = [value for cell in self.of_model(label) if (value := cell.model.final("forget")) is not None]
        return median(found) if found else None

    @cached_property
    def _taken(self) -> float | None:
        """What unlearning took from the reference's forget performance; None where that was not measured."""
        start, end = self.results.start.get("forget"), self._before(self.series[0]) if self.series else None
        return None if start is None or end is None else abs(start - end)

    # --- certainty --------------------------------------------------------------------------------------------------

    def paired(self, model: str, other: str) -> Interval | None:
        """How much less the worst adversary of all elicits from a model than that of another, on the same problems.

        Mean over the seeds that both have. A problem is resampled with all its seeds: they are no further problems.
        None without items, or where seeds or models were asked other problems.
        """
        mine, theirs = self._items(model), self._items(other)
        seeds = sorted(mine.keys() & theirs.keys())
        weights = [items[seed]["weights"] for items in (mine, theirs) for seed in seeds]
        if not seeds or any(other != weights[0] for other in weights):
            return None
        a, b = (
            {"scored": list(map(fmean, zip(*(items[seed]["scored"] for seed in seeds), strict=True)))}
            for items in (mine, theirs)
        )
        return difference(a | {"weights": weights[0]}, b | {"weights": weights[0]})

    def _items(self, model: str) -> dict[int, dict[str, list[float]]]:
        worst = self.worst(model)
        found = {}
        for cell in [] if worst is None else self.at(model, worst[0]):
            items = {} if cell.worst is None else cell.worst.directory.outcomes
            if "forget" in items:
                found[cell.model.seed] = items["forget"]
        return found

    def rows(self) -> Iterable[dict[str, Any]]:
        """Every adversary of every model, in the columns of COLUMNS."""
        for cell in self.cells:
            for adversary in cell.adversaries:
                items = adversary.directory.outcomes.get("forget")
                certain = performance(items) if items else None
                yield {
                    "model": self.labels[cell.model.name],
                    "seed": cell.model.seed,
                    "attack": cell.attack,
                    "worst": adversary is cell.worst,
                    "keeps_retain": keeps(adversary, cell.model),
                    "run": adversary.name,
                    "forget": adversary.final("forget"),
                    "forget_low": certain and certain.low,
                    "forget_high": certain and certain.high,
                    "retain": adversary.final("retain"),
                    **{key: adversary.facts.get(key) for key in ("steps", "tokens", "flops", "seconds")},
                }


def _of(cell: Cell, kept: bool) -> Result | None:
    return cell.worst_kept if kept else cell.worst


def matrix(results: Results) -> Matrix | None:
    """None where nothing but `relearn` attacked models that are here: then the results table says it all."""
    if not results.of("attack"):
        return None
    groups: dict[tuple[str, str], list[Result]] = {}
    for run in (*results.of("relearn"), *results.of("attack")):
        groups.setdefault((run.config["model"], run.facts.get("attack", FINETUNING)), []).append(run)
    attacked = {name for (name, _), runs in groups.items() if any(r.name.startswith("attack/") for r in runs)}
    models = [run for run in results.runs if run.name in attacked]
    if not models:  # they live elsewhere
        return None
    labels = dict(zip([m.name for m in models], distinct([_label(results, m) for m in models], models), strict=True))
    cells = [
        Cell(model, attack, tuple(runs))
        for model in models
        for (name, attack), runs in groups.items()
        if name == model.name
    ]
    return Matrix(results, tuple(cells), labels)


def _label(results: Results, model: Result) -> str:
    """As in the results table, where it is in it; else the variant of the attacks on it."""
    known = next((a.label for a in results.attacked if a.model.name == model.name), None)
    attack: Sequence[Result] = [run for run in results.of("attack") if run.config["model"] == model.name]
    return known or next((run.config["variant"] for run in attack if run.config.get("variant")), model.label)
