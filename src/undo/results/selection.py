"""Three points across the frontier of a search over unlearning runs, by rule (Appendix D.2.3; Table 10 is the paper's).

The paper sweeps alpha and the learning rate and "chose three points across the frontier"; the one that retains best is
the teacher of UNDO. Here the choice is a rule. Take the runs of a method that forget at least half as much as the one
that forgets most, and of these the Pareto front. Choose the run that retains best, the one that retains worst, and the
one nearest the middle between them. A front of fewer than three runs is filled up with the runs that retain best.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from undo.config.mistakes import ConfigError
from undo.config.schema import Raw

RANKS: Final = ("best", "medium", "worst")  # by what they retain


class Point(NamedTuple):
    """A run of the search: its hyper-parameters, and its performance after unlearning."""

    run: str
    alpha: float
    learning_rate: float
    retain: float
    forget: float


def across_the_frontier(points: Sequence[Point], start: float, higher_is_better: bool) -> dict[str, Point]:
    """Rank -> point, of those that did not diverge. `start`: forget performance before unlearning.

    Raises ConfigError for fewer than three points.
    """
    from undo.results.frontier import pareto_front

    points = [point for point in points if math.isfinite(point.retain) and math.isfinite(point.forget)]
    if len(points) < len(RANKS):
        raise ConfigError(
            f"three points are to be chosen from a search of {len(points)} that did not diverge; sweep more values"
        )
    sign = 1 if higher_is_better else -1
    forgotten = {point: sign * (start - point.forget) for point in points}
    most = max(forgotten.values())
    if most <= 0:
        raise ConfigError("no run of the search forgets anything; try higher learning rates or a smaller alpha")
    enough = [point for point in points if forgotten[point] >= most / 2]
    front = pareto_front({p.run: (p.retain, p.forget) for p in enough}, (higher_is_better, higher_is_better))
    by_retain = sorted(points, key=lambda p: (p.run in front, p in enough, sign * p.retain), reverse=True)
    kept = max(len(front), len(RANKS))
    best, *middle, worst = sorted(by_retain[:kept], key=lambda p: sign * p.retain, reverse=True)
    between = (best.retain + worst.retain) / 2
    return dict(zip(RANKS, (best, min(middle, key=lambda p: abs(p.retain - between)), worst), strict=True))


def as_raw(chosen: Mapping[str, Mapping[str, Point]]) -> Raw:
    """Method -> rank -> values, as they stand in a YAML under `points`."""
    return {method: {rank: dict(p._asdict()) for rank, p in ranks.items()} for method, ranks in chosen.items()}
