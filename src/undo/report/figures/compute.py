"""Figure 5: robustness against compute over alpha, and the relearning curves behind it."""

import math
from typing import TYPE_CHECKING

from undo.report.figures.missing import Missing
from undo.report.figures.relearning import LINES, ORACLE, UNLEARNED, curves
from undo.results.arms import Distilled, Undo
from undo.results.attacked import Attacked
from undo.results.results import Results
from undo.results.seeds import median

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def robustness_against_compute(results: Results) -> "Figure | Missing":
    """Left: robustness against compute, medians over seeds with their range. Right: relearning curves of some alphas.

    Compute is S_student / S_oracle, S = training tokens. Curves are those of the first seed.
    """
    from undo.report.figures.style import legend, panels, shade

    groups = _groups(results)
    if not groups:
        return Missing(
            "an attacked UNDO model with its teacher and oracle",
            "relearn",
            lambda arm: isinstance(arm, Undo),
            "relearn/undo_*",
        )
    figure, (scaling, relearning) = panels(2, sharey=False)
    figure.set_size_inches(6.8, 2.8)
    _scaling(scaling, results, groups)
    first = min(a.model.seed for members in groups.values() for a in members)
    undo = sorted(
        (
            (alpha, a)
            for alpha, members in groups.items()
            for a in members
            if a.model.seed == first and alpha is not None
        ),
        key=lambda pair: pair[0],
    )
    wanted = results.shown.figure_5
    shown = [(alpha, a) for alpha, a in undo if wanted is None or alpha in wanted.alphas] or undo
    some = undo[0][1] if undo else groups[None][0]
    teacher, oracle = results.teacher_of(some), results.oracle_of(some)
    if teacher is not None:
        curves(relearning, teacher, UNLEARNED)
    for alpha, attacked in shown:
        curves(relearning, attacked, (shade(alpha), f"α = {alpha:g}"))
    if oracle is not None:
        curves(relearning, oracle, ORACLE)
    relearning.set_xlabel("relearning steps", fontsize=8)
    relearning.set_ylabel(f"forget {results.attacked[0].unit}", fontsize=8)
    relearning.set_title(f"relearning\nseed {first}", fontsize=8)
    legend(figure, [scaling, relearning], LINES["worst case"])
    return figure


def _groups(results: Results) -> dict[float | None, list[Attacked]]:
    """Alpha -> the UNDO models that differ in alpha alone; None -> the random student of the same teachers."""
    names, teachers = {run.name for run in results.series}, {run.config["teacher"] for run in results.series}
    groups: dict[float | None, list[Attacked]] = {}
    for a in results.attacked:
        if isinstance(a.arm, Undo) and a.model.name in names:
            alpha = a.arm.alpha
        elif isinstance(a.arm, Distilled) and (not teachers or a.model.config["teacher"] in teachers):
            alpha = None
        else:
            continue
        robustness = results.robustness(a)
        if robustness is not None and math.isfinite(robustness) and results.compute(a) is not None:
            groups.setdefault(alpha, []).append(a)
    return groups


def _scaling(axis: "Axes", results: Results, groups: dict[float | None, list[Attacked]]) -> None:
    from undo.report.figures.style import COLORS, INK, over_seeds, shade

    points = []
    for alpha, members in sorted(groups.items(), key=lambda group: (group[0] is None, group[0])):
        xs, ys = [results.compute(a) or 0 for a in members], [results.robustness(a) or 0 for a in members]
        x, y = median(xs), median(ys)
        axis.errorbar(
            x,
            y,
            xerr=[[x - min(xs)], [max(xs) - x]],
            yerr=[[y - min(ys)], [max(ys) - y]],
            fmt="s" if alpha is None else "o",
            color=COLORS["student"] if alpha is None else shade(alpha),
            markersize=6,
            elinewidth=0.8,
            label="unlearn and distill" if alpha is None else f"α = {alpha:g}",
        )
        if alpha is not None:
            points.append((alpha, x, y))
    points.sort()
    axis.plot([p[1] for p in points], [p[2] for p in points], color=INK, linewidth=0.8, alpha=0.5, zorder=0)
    axis.axhline(1, color=INK, linewidth=0.8, linestyle=":", label="data filtering: robustness 1")
    axis.set_xlabel("compute: training tokens / those of data filtering", fontsize=8)
    axis.set_ylabel("robustness to relearning", fontsize=8)
    last = max(next(iter(groups.values()))[0].worst_case)
    axis.set_title(f"after {last} relearning steps\n{over_seeds(groups.values(), 'median and range')}", fontsize=8)
    axis.margins(0.1)
