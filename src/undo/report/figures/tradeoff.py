"""Figure 7: retain against forget performance, before the attack and under it."""

from collections.abc import Mapping, Sequence
from math import inf, isfinite, nan
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from undo.report.figures.missing import Missing
from undo.results.arms import Oracle, Reference, Undo, Unlearned
from undo.results.attacked import Attacked
from undo.results.results import Results
from undo.results.seeds import median

if TYPE_CHECKING:
    from matplotlib.figure import Figure

THRESHOLDS: Final = ("o", "^", "s", "v", "D")  # marks of UNDO models, that of `Results.within` first
FILLINGS: Final = (  # of points of one colour and mark: what is filled, and with what if not with their colour
    ("full", None),
    ("left", None),
    ("full", "white"),
    ("bottom", None),
    ("right", None),
    ("top", None),
)


def retain_against_forget(results: Results) -> "Figure | Missing":
    """Three panels: no attack, a moderate one (40 of the paper's 500 steps, or that share of fewer), the whole attack.

    x: retain performance before the attack; y: worst-case forget performance. Points are medians over seeds, bars their
    range, the line is the Pareto front; reference and oracle are shown, and take no part in it. UNDO is shown as the
    setting's figures.yaml says: in Section 6 at alpha = 0.6, beta = 0.1, over its retain thresholds. All panels have
    one axis; what lies far above those under attack (a cross entropy before it) stands at its upper edge.
    """
    from undo.report.figures.style import INK, describe, legend, over_seeds, panels
    from undo.results.frontier import pareto_front

    if not results.compared or not results.attack_steps:
        return Missing(
            "an attacked model that something was unlearned in",
            "relearn",
            lambda arm: isinstance(arm, Unlearned),
            "relearn/unlearned*",
        )
    groups = _beside(results) | results.compared
    chosen, looks = results.attack_steps, _looks(groups, results)
    every = {
        step: {label: _spread([a.worst_case.get(step, nan) for a in groups[label]]) for label in groups}
        for step in chosen
    }
    edge = _edge({step: [y.middle for y in ys.values()] for step, ys in every.items()})
    figure, axes = panels(len(chosen))
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height * 1.25)
    for axis, step in zip(axes, chosen, strict=True):
        for label, members in groups.items():
            x, y = _spread([a.before("retain") or 0.0 for a in members]), every[step][label]
            axis.errorbar(
                x.middle,
                min(y.middle, edge),
                xerr=_bars(x),
                yerr=_bars(y) if y.high <= edge else None,
                elinewidth=0.6,
                label=describe(members[0], results),
                clip_on=False,
                **looks[label],
            )
        points = results.medians(step)
        front = sorted(points[label] for label in pareto_front(points, results.directions))
        xs, ys = [p[0] for p in front], [min(p[1], edge) for p in front]
        axis.plot(xs, ys, color=INK, linewidth=0.8, linestyle="--", zorder=0, label="Pareto front")
        axis.set_title("before the attack" if step == 0 else f"after {step} steps", fontsize=9)
        axis.set_xlabel(f"retain {next(iter(groups.values()))[0].before_unit}", fontsize=8)
    axes[0].set_ylabel(f"forget {results.attacked[0].unit}", fontsize=8)
    beyond = any(y.middle > edge for ys in every.values() for y in ys.values())
    if beyond:
        axes[0].set_ylim(top=edge)
    note = over_seeds(groups.values(), "median and range")
    legend(figure, axes, note + ("; at the upper edge: beyond it" if beyond else ""))
    return figure


class _Spread(NamedTuple):
    """A number over seeds."""

    low: float
    middle: float
    high: float


def _spread(values: Sequence[float]) -> _Spread:
    """NaN where a seed is not finite: such a point is not drawn."""
    middle = median(values)
    return _Spread(min(values), middle, max(values)) if isfinite(middle) else _Spread(nan, nan, nan)


def _bars(values: _Spread) -> list[list[float]] | None:
    """As matplotlib wants them; None where there is no range to show."""
    low, middle, high = values
    return [[middle - low], [high - middle]] if low < high else None


def _beside(results: Results) -> dict[str, list[Attacked]]:
    """References and oracles whose retain performance is known in the unit of the others', by label."""
    unit = next(iter(results.compared.values()))[0].before_unit
    groups: dict[str, list[Attacked]] = {}
    for kind in (Reference, Oracle):
        for attacked in results.attacked_as(kind):
            if attacked.before("retain") is not None and attacked.before_unit == unit:
                groups.setdefault(attacked.label, []).append(attacked)
    return groups


def _edge(heights: Mapping[int, Sequence[float]]) -> float:
    """Where the axis ends: the panels under attack keep a quarter of it."""
    under_attack = [y for step, ys in heights.items() if step > 0 for y in ys if isfinite(y)]
    every = [y for ys in heights.values() for y in ys if isfinite(y)]
    if not every:
        return inf
    low, high = min(every), max(under_attack, default=max(every))
    edge = low + 4 * (high - low)
    return edge if max(every) > edge else inf


def _looks(groups: Mapping[str, Sequence[Attacked]], results: Results) -> dict[str, dict[str, Any]]:
    """Colour, mark, filling and size of each group's points: no two alike, and nothing of it from a label."""
    from undo.report.figures.style import color_of

    sign = -1 if results.directions[0] else 1
    alike: dict[tuple[str, str], list[str]] = {}
    for label, members in groups.items():
        alike.setdefault((color_of(members[0], results), _marker(members[0], results)), []).append(label)
    looks: dict[str, dict[str, Any]] = {}
    for (color, mark), labels in alike.items():
        best_first = sorted(labels, key=lambda label: sign * median(a.before("retain") or 0.0 for a in groups[label]))
        for i, label in enumerate(best_first):
            style, inside = FILLINGS[i % len(FILLINGS)]
            filled = {"fillstyle": style, "markerfacecolor": inside or color, "markerfacecoloralt": "white"}
            looks[label] = {"color": color, "fmt": mark, "markersize": 6 + 2.5 * (i // len(FILLINGS)), **filled}
    return looks


def _marker(attacked: Attacked, results: Results) -> str:
    """A star for models that nothing was unlearned in, a method's own mark, UNDO's by its retain threshold."""
    match attacked.arm:
        case Reference() | Oracle():
            return "*"
        case Unlearned():
            return results.look(attacked.arm).mark
        case Undo(within=within):
            arms = (members[0].arm for members in results.compared.values())
            others = {arm.within for arm in arms if isinstance(arm, Undo)} - {results.within}
            ordered = [results.within, *sorted(others, key=lambda share: share or 0.0)]
            return THRESHOLDS[ordered.index(within) % len(THRESHOLDS)]
    return "o"
