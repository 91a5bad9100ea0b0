"""Figure 5: robustness against compute over alpha."""

from statistics import median
from typing import TYPE_CHECKING

from undo.figures.relearning import alpha_of
from undo.results import Attacked, Results

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def robustness_against_compute(results: Results) -> "Figure | str":
    """x: S_student / S_oracle, S = training steps; y: robustness. Points are medians over seeds, bars their range."""
    from undo.figures.style import INK, color_of, panels

    groups: dict[str, list[tuple[Attacked, float, float]]] = {}
    for attacked in results.attacked:
        robustness, oracle = results.robustness(attacked), results.oracle_of(attacked)
        if "teacher" in attacked.model.config and robustness is not None and oracle is not None:
            compute = attacked.model.facts["steps"] / oracle.model.facts["steps"]
            groups.setdefault(attacked.label, []).append((attacked, compute, robustness))
    if not groups:
        return "no student with an attacked teacher and oracle; make them with run_undo.py and run_relearn.py"
    figure, (axis,) = panels(1)
    figure.set_size_inches(3.6, 2.9)
    points = []
    for label, members in groups.items():
        xs, ys = [m[1] for m in members], [m[2] for m in members]
        x, y, alpha = median(xs), median(ys), alpha_of(members[0][0])
        axis.errorbar(
            x,
            y,
            xerr=[[x - min(xs)], [max(xs) - x]],
            yerr=[[y - min(ys)], [max(ys) - y]],
            fmt="s" if alpha is None else "o",
            color=color_of(label, alpha),
            markersize=6,
            capsize=2,
        )
        text = "distilled" if alpha is None else f"α = {alpha:g}"
        axis.annotate(text, (x, y), fontsize=7, xytext=(5, -9), textcoords="offset points")
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
    seeds = len({m[0].model.seed for members in groups.values() for m in members})
    axis.set_title(
        f"{seeds} seed{'s' * (seeds > 1)}, after {max(results.attacked[0].worst_case)} relearning steps", fontsize=8
    )
    axis.margins(0.14)
    return figure
