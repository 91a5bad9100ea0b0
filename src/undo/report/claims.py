"""The paper's claims as checks on the runs at hand: what was measured, on how many seeds, and whether it holds.

A claim is measured seed by seed. It holds if it holds on every seed, fails if it holds on none, and is mixed otherwise.
If too little was run to tell, the verdict is "undecided"; if nothing was, "not run". Nothing here is tuned to pass: the
comparisons are the paper's.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import mean
from typing import Final, Literal

from undo.report.paper import MMLU_LOST, PRETRAINED
from undo.results.arms import Distilled, Matched, Oracle, Undo, Unlearned
from undo.results.attacked import Attacked, Result
from undo.results.frontier import pareto_front
from undo.results.results import Results

Verdict = Literal["holds", "mixed", "fails", "undecided", "not run"]


@dataclass(frozen=True)
class Observation:
    """A claim on one seed, or on the median over all of them."""

    seed: int | None
    holds: bool | None  # None: what there is decides nothing
    measured: str


@dataclass(frozen=True)
class Claim:
    """A sentence of the paper. `observe` yields one observation for each seed whose runs speak to it."""

    section: str
    sentence: str
    observe: Callable[[Results], Iterable[Observation]]


@dataclass(frozen=True)
class Checked:
    claim: Claim
    observations: tuple[Observation, ...]

    @property
    def verdict(self) -> Verdict:
        if not self.observations:
            return "not run"
        if not self._told:
            return "undecided"
        return "holds" if all(self._told) else "mixed" if any(self._told) else "fails"

    @property
    def seeds(self) -> str:
        return f"{sum(self._told)} of {len(self._told)}" if self._told else "-"

    @property
    def _told(self) -> list[bool]:
        return [o.holds for o in self.observations if o.holds is not None]

    @property
    def measured(self) -> str:
        return "; ".join(o.measured if o.seed is None else f"seed {o.seed}: {o.measured}" for o in self.observations)


def check(results: Results) -> list[Checked]:
    return [Checked(claim, tuple(sorted(claim.observe(results), key=lambda o: o.seed or 0))) for claim in CLAIMS]


HEADER: Final = ("section", "claim", "measured", "holds on", "verdict")


def as_rows(checked: Sequence[Checked]) -> list[tuple[str, ...]]:
    """One row a claim, in the columns of HEADER."""
    return [(c.claim.section, c.claim.sentence, c.measured or "-", c.seeds, c.verdict) for c in checked]


# --- the measurements ----------------------------------------------------------------------------------------------


def _more(a: Attacked, b: Attacked) -> bool:
    """Whether the attack brings back more of the forgotten in `a` than in `b`: the mean over all evaluated steps.

    No where there are none, since all adversaries of one diverged at once.
    """
    steps = sorted(a.worst_case.keys() & b.worst_case.keys() - {0})
    if not steps:
        return False
    first, second = (mean(x.worst_case[step] for step in steps) for x in (a, b))
    return first > second if a.higher_is_better else first < second


def _end(attacked: Attacked) -> str:
    return f"{attacked.label} {attacked.last:.3f}"


def matching_leaves_capabilities(results: Results) -> Iterable[Observation]:
    """Oracle-matched students beside the oracle, seed by seed."""
    for matched in results.attacked:
        if matched.arm != Matched("reference"):
            continue
        seed = matched.model.seed
        random = next((a for a in results.attacked if a.arm == Matched("random") and a.model.seed == seed), None)
        oracle = next((a for a in results.attacked_as(Oracle) if a.model.seed == seed), None)
        if random is not None and oracle is not None:
            holds = _more(matched, random) and _more(matched, oracle)
            yield Observation(seed, holds, ", ".join(map(_end, (matched, random, oracle))))


def distilling_beats_unlearning(results: Results) -> Iterable[Observation]:
    """Each attacked student of Unlearn-and-Distill beside its teacher."""
    for student in results.attacked_as(Distilled):
        teacher = results.teacher_of(student)
        if teacher is not None:
            yield Observation(student.model.seed, _more(teacher, student), f"{_end(teacher)}, {_end(student)}")


def _over_alpha(results: Results) -> dict[int, list[tuple[float, Attacked]]]:
    """Seed -> attacked UNDO models that differ in alpha only, by alpha."""
    groups: dict[int, list[tuple[float, Attacked]]] = {}
    names = {run.name for run in results.series}
    for a in results.attacked_as(Undo):
        if a.model.name in names and isinstance(a.arm, Undo):
            groups.setdefault(a.model.seed, []).append((a.arm.alpha, a))
    ordered = {seed: sorted(group, key=lambda pair: pair[0]) for seed, group in groups.items()}
    return {seed: group for seed, group in ordered.items() if len(group) > 1}


def robustness_rises_with_alpha(results: Results) -> Iterable[Observation]:
    """Of UNDO models that differ in alpha alone."""
    for seed, group in _over_alpha(results).items():
        values = [results.robustness(a) for _, a in group]
        known = [value for value in values if value is not None]
        if len(known) == len(values):
            pairs = zip(group, known, strict=True)
            text = ", ".join(f"α={alpha:g} {value:.2f}" for (alpha, _), value in pairs)
            yield Observation(seed, _rises(known), text)


def compute_rises_with_alpha(results: Results) -> Iterable[Observation]:
    """Training steps of the same models."""
    for seed, group in _over_alpha(results).items():
        steps = [a.model.facts["steps"] for _, a in group]
        text = ", ".join(f"α={alpha:g} {count}" for (alpha, _), count in zip(group, steps, strict=True))
        yield Observation(seed, _rises(steps), text + " steps")


def _rises(values: list[float] | list[int]) -> bool:
    """From end to end, and never down by more than a tenth of the whole rise on the way."""
    rise = values[-1] - values[0]
    return rise > 0 and all(b >= a - rise / 10 for a, b in pairwise(values))


def alpha_drives_cost_more_than_beta(results: Results) -> Iterable[Observation]:
    """Steps of distillation over a grid of alphas and betas, at the retain threshold of the series over alpha."""
    for seed in sorted({run.seed for run in results.of("undo")}):
        arms = [
            (run.arm, run.facts["steps"])
            for run in results.of("undo")
            if run.seed == seed and isinstance(run.arm, Undo) and run.arm.within == results.within
        ]
        cost = {(arm.alpha, arm.beta): steps for arm, steps in arms}
        several = {alpha: {b for a, b in cost if a == alpha} for alpha, _ in cost}
        several = {alpha: tried for alpha, tried in several.items() if len(tried) > 1}
        alphas, betas = several.keys(), set.intersection(*several.values()) if several else set()
        if len(alphas) > 1 and len(betas) > 1:
            over_alpha = [mean(cost[alpha, beta] for beta in betas) for alpha in alphas]
            over_beta = [mean(cost[alpha, beta] for alpha in alphas) for beta in betas]
            spans = [max(values) - min(values) for values in (over_alpha, over_beta)]
            text = f"mean steps differ by {spans[0]:.0f} over alpha, {spans[1]:.0f} over beta"
            yield Observation(seed, spans[0] > spans[1], text)


def students_reach_the_teacher(results: Results) -> Iterable[Observation]:
    """Retain performance of each student of Unlearn-and-Distill, as a share of its teacher's."""
    for run in results.of("distill"):
        teacher = results.named(run.config["teacher"])
        if teacher is None or not isinstance(run.arm, Distilled):
            continue
        values = [r.facts["evaluation"]["retain"] for r in (run, teacher)]
        ratio = values[0] / values[1] if run.higher_is_better else values[1] / values[0]
        yield Observation(run.seed, ratio >= 0.95, f"{run.label} {values[0]:.3f} of {values[1]:.3f}")


def maxent_is_near_uniform(results: Results) -> Iterable[Observation]:
    """Of the models that others are distilled from; not where the forget loss is weighed down against the other."""
    for run in results.of("unlearn"):
        plain = run.arm == Unlearned("maxent") and not run.config["method"].get("convex")
        if plain and run.name in results.taught and not run.higher_is_better:
            uniform = math.log(_vocabulary(results, run))
            value = run.facts["evaluation"]["forget"]
            yield Observation(run.seed, value > 0.95 * uniform, f"{value:.2f} of ln V = {uniform:.2f}")


def _vocabulary(results: Results, run: Result) -> int:
    reference = results.named(run.config["reference"])
    if reference is None:
        return 256_000
    model = reference.config["model"]
    return reference.facts["vocab_size"] if isinstance(model, str) else model["vocab_size"]  # a base model's is a name


def undo_is_on_the_front(strength: Literal["moderate", "whole"]) -> Callable[[Results], Iterable[Observation]]:
    """Median over seeds of retain performance before, and of worst-case forget performance after, that much attack."""

    def observe(results: Results) -> Iterable[Observation]:
        steps = results.attack_steps
        if len(steps) < 3:
            return
        step = steps[1 if strength == "moderate" else 2]
        medians = results.medians(step)
        ours = [label for label, members in results.compared.items() if isinstance(members[0].arm, Undo)]
        if not ours:
            return
        if len(medians) < 3:  # of two points that differ, both are mostly on it
            yield Observation(None, None, f"too few points: {', '.join(medians)}")
            return
        if len(ours) == len(medians):
            return
        front = pareto_front(medians, results.directions)
        on_it = [label for label in ours if label in front]
        yield Observation(
            None, bool(on_it), f"after {step} steps, medians over seeds; on the front: {', '.join(front)}"
        )

    return observe


def _pretrained(results: Results) -> bool:
    """Whether the models start from one that somebody else trained, or stand for such (Section 6)."""
    return bool(results.of("base")) or results.shown.paper in PRETRAINED


def undo_outlasts_its_teacher(results: Results) -> Iterable[Observation]:
    """Worst case over adversaries at the end of the attack, on a pretrained model."""
    for student in results.attacked_as(Undo) if _pretrained(results) else ():
        teacher = results.teacher_of(student)
        if teacher is None or student.label not in results.compared:
            continue
        less = student.last < teacher.last if student.higher_is_better else student.last > teacher.last
        text = f"{teacher.label} {teacher.last:.3f}, {student.label} {student.last:.3f}"
        yield Observation(student.model.seed, less, text)


def undo_costs_retain_performance(results: Results) -> Iterable[Observation]:
    """Against the model before anything was unlearned: mean over methods and seeds."""
    runs = [run for run in results.of("undo") if isinstance(run.arm, Undo) and results.is_shown(run.arm)]
    if not _pretrained(results) or not runs or "retain" not in results.start:
        return
    sign = 1 if runs[0].higher_is_better else -1
    lost = mean(sign * (results.start["retain"] - r.facts["evaluation"]["retain"]) for r in runs)
    same = runs[0].higher_is_better and results.shown.paper in PRETRAINED
    printed = f" (the paper: {MMLU_LOST:.4f} of MMLU)" if same else ""
    yield Observation(None, lost > 0, f"{lost:.4f} on average{printed}")


def retained_after_noise_falls_with_alpha(results: Results) -> Iterable[Observation]:
    """Table 13: students of one teacher over alpha, after the same steps."""
    by_seed: dict[int, dict[float, Result]] = {}
    for run in results.series if _pretrained(results) else ():
        if isinstance(run.arm, Undo):
            by_seed.setdefault(run.seed, {})[run.arm.alpha] = run
    for seed, runs in by_seed.items():
        if len(runs) > 1:
            values = [(alpha, runs[alpha].facts["evaluation"]["retain"]) for alpha in sorted(runs)]
            sign = 1 if runs[values[0][0]].higher_is_better else -1
            falls = all(sign * a > sign * b for (_, a), (_, b) in pairwise(values))
            yield Observation(seed, falls, ", ".join(f"α={alpha:g} {value:.3f}" for alpha, value in values))


CLAIMS: Final[tuple[Claim, ...]] = (
    Claim(
        "3, Fig. 2",
        "A reference model taught to behave as the oracle relearns faster than the oracle and than a random student.",
        matching_leaves_capabilities,
    ),
    Claim(
        "4, Fig. 4",
        "Distilling an unlearned model into a random student makes it relearn more slowly.",
        distilling_beats_unlearning,
    ),
    Claim(
        "4, App. C",
        "A distilled student reaches 95 % of its teacher's retain performance.",
        students_reach_the_teacher,
    ),
    Claim(
        "B.1", "MaxEnt leaves a cross entropy near ln V on the forget text (over 95 % of it).", maxent_is_near_uniform
    ),
    Claim("5, Fig. 5", "Robustness rises with alpha.", robustness_rises_with_alpha),
    Claim("5, Fig. 5", "The compute that distillation needs rises with alpha.", compute_rises_with_alpha),
    Claim("5, Fig. 6", "Alpha changes that compute more than beta does.", alpha_drives_cost_more_than_beta),
    Claim(
        "6, Fig. 7",
        "After a moderate attack (40 of the paper's 500 steps), UNDO is on the Pareto front of retain and forget.",
        undo_is_on_the_front("moderate"),
    ),
    Claim("6, Fig. 7", "After the whole attack, too.", undo_is_on_the_front("whole")),
    Claim(
        "6, Fig. 8", "On a pretrained model, UNDO makes what it starts from relearn less.", undo_outlasts_its_teacher
    ),
    Claim("6", "On a pretrained model, UNDO costs some retain performance.", undo_costs_retain_performance),
    Claim(
        "D.2.7, Tab. 13",
        "On a pretrained model, what is retained falls with alpha.",
        retained_after_noise_falls_with_alpha,
    ),
)
