"""Figure 5: robustness against compute over alpha, and the relearning curves behind it."""

from statistics import median
from typing import TYPE_CHECKING, Final

from undo.report.figures.missing import Missing
from undo.report.figures.relearning import alpha_of, curves, legend
from undo.results.results import Attacked, Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ALPHAS: Final = {  # whose relearning curves the paper shows
    "language": (0.2, 0.4, 0.6, 0.8),
    "arithmetic": (0.55, 0.65, 0.7, 0.75),
}


def robustness_against_compute(results: Results) -> "Figure | Missing":
    """Left: robustness against compute, medians over seeds with their range. Right: relearning curves of some alphas.

    Compute is S_student / S_oracle, S = training steps. Curves are those of the first seed.
    """
    from undo.report.figures.style import color_of, panels

    groups: dict[str, list[Attacked]] = {}
    for attacked in results.attacked:
        plain = attacked.label == "distilled" or attacked.label == f"undo_{alpha_of(attacked)}"
        if plain and results.robustness(attacked) is not None and results.compute(attacked) is not None:
            groups.setdefault(attacked.label, []).append(attacked)
    if not groups:
        return Missing("an attacked UNDO model with its teacher and oracle", "relearn/*")
    figure, (scaling, relearning) = panels(2, sharey=False)
    figure.set_size_inches(6.8, 3.0)
    _scaling(scaling, results, list(groups.values()))
    first = min(a.model.seed for members in groups.values() for a in members)
    undo = [a for members in groups.values() for a in members if a.model.seed == first and alpha_of(a) is not None]
    wanted = ALPHAS.get(results.setting)
    shown = [a for a in undo if wanted is None or alpha_of(a) in wanted] or undo
    shown.sort(key=lambda a: alpha_of(a) or 0)
    some = undo or groups["distilled"]
    for attacked, look in (
        (results.teacher_of(some[0]), ("#D55E00", "unlearn")),
        *((a, (color_of(a.label, alpha_of(a)), f"α = {alpha_of(a):g}")) for a in shown),
        (results.oracle_of(some[0]), ("#000000", "data filtering (oracle)")),
    ):
        if attacked is not None:
            curves(relearning, attacked, look)
    relearning.set_xlabel("relearning steps", fontsize=8)
    relearning.set_ylabel(f"forget {results.attacked[0].model.unit}", fontsize=8)
    legend(figure, [relearning])
    return figure


def _scaling(axis: "Axes", results: Results, groups: list[list[Attacked]]) -> None:
    from undo.report.figures.style import INK, color_of

    points = []
    for members in groups:
        xs, ys = [results.compute(a) or 0 for a in members], [results.robustness(a) or 0 for a in members]
        x, y, alpha = median(xs), median(ys), alpha_of(members[0])
        axis.errorbar(
            x,
            y,
            xerr=[[x - min(xs)], [max(xs) - x]],
            yerr=[[y - min(ys)], [max(ys) - y]],
            fmt="s" if alpha is None else "o",
            color=color_of(members[0].label, alpha),
            markersize=6,
            capsize=2,
        )
        text, place, side = (
            ("unlearn and distill", (-7, -3), "right") if alpha is None else (f"α = {alpha:g}", (5, -9), "left")
        )
        axis.annotate(text, (x, y), fontsize=7, xytext=place, textcoords="offset points", ha=side)
        if alpha is not None:
            points.append((alpha, x, y))
    points.sort()
    axis.plot([p[1] for p in points], [p[2] for p in points], color=INK, linewidth=0.8, alpha=0.5, zorder=0)
    axis.axhline(1, color=INK, linewidth=0.8, linestyle=":")
    axis.annotate(
        "data filtering",
        (0.02, 1),
        xycoords=("axes fraction", "data"),
        fontsize=7,
        xytext=(0, 3),
        textcoords="offset points",
    )
    axis.set_xlabel("compute: steps / steps of data filtering", fontsize=8)
    axis.set_ylabel("robustness to relearning", fontsize=8)
    counts = {len({a.model.seed for a in members}) for members in groups}  # the points need not have as many each
    seeds = " to ".join(str(count) for count in sorted({min(counts), max(counts)}))
    last = max(groups[0][0].worst_case)
    axis.set_title(f"{seeds} seed{'s' * (max(counts) > 1)} a point, after {last} relearning steps", fontsize=8)
    axis.margins(0.14)
