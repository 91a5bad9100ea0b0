"""Labels of attacked models: the rows of the table, text for people. No two models of a seed have the same."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from undo.results.arms import method_of

if TYPE_CHECKING:
    from undo.results.attacked import Result

APART: Final[tuple[Callable[["Result"], str], ...]] = (  # what tells models of one label apart, first choice first
    lambda model: model.label,
    lambda model: method_of(model.arm) or "",
    lambda model: model.name,
)


def distinct(labels: Sequence[str], models: Sequence["Result"]) -> list[str]:
    """The labels, with more in brackets where several models of one seed share them."""
    labels = list(labels)
    for apart in APART:
        times = Counter(zip(labels, (model.seed for model in models), strict=True))
        shared = {label for (label, _), number in times.items() if number > 1}
        for i, model in enumerate(models):
            if labels[i] in shared and apart(model) not in ("", labels[i]):
                labels[i] = f"{labels[i]} ({apart(model)})"
    return labels
