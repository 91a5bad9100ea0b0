"""Which of several (retain, forget) performances no other one beats."""

import math
from collections.abc import Mapping

Directions = tuple[bool, bool]  # whether more is better: of retain and of forget performance


def pareto_front(points: Mapping[str, tuple[float, float]], more_is_better: Directions) -> list[str]:
    """Which (retain, forget) performances no other one beats: better on retain and worse on forget, or equal in one.

    One that is not finite is on no front.
    """
    return [
        label
        for label, mine in points.items()
        if all(map(math.isfinite, mine)) and not any(beats(other, mine, more_is_better) for other in points.values())
    ]


def beats(one: tuple[float, float], other: tuple[float, float], more_is_better: Directions) -> bool:
    """Whether `one`, (retain, forget), is better than `other` in one of the two and not worse in any.

    More forget performance is worse for whoever wants the model to have forgotten.
    """
    retain, forget = (1 if up else -1 for up in more_is_better)
    return one != other and retain * one[0] >= retain * other[0] and forget * one[1] <= forget * other[1]
