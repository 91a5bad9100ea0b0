"""Which of several (retain, forget) performances no other one beats."""

from collections.abc import Mapping


def pareto_front(points: Mapping[str, tuple[float, float]], higher_is_better: bool) -> list[str]:
    """Which (retain, forget) performances no other one beats: better on retain and worse on forget, or equal in one."""
    return [
        label
        for label, mine in points.items()
        if not any(beats(other, mine, higher_is_better) for other in points.values())
    ]


def beats(one: tuple[float, float], other: tuple[float, float], higher_is_better: bool) -> bool:
    """Whether `one`, (retain, forget), is better than `other` in one of the two and not worse in any."""
    sign = 1 if higher_is_better else -1
    return one != other and sign * one[0] >= sign * other[0] and sign * one[1] <= sign * other[1]
