"""Figure 7: retain against forget performance, before the attack and under it."""

from statistics import median
from typing import TYPE_CHECKING

from undo.report.figures.missing import Missing
from undo.report.figures.relearning import alpha_of, describe
from undo.results.results import Attacked, Results

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def retain_against_forget(results: Results) -> "Figure | Missing":
    """Three panels: no attack, a moderate one (40 of the paper's 500 steps, or that share of fewer), the whole attack.

    x: retain performance before the attack; y: worst-case forget performance. Points are medians over seeds, bars their
    range, the line is the Pareto front; reference and oracle are shown, and take no part in it. UNDO is shown as in
    Section 6: alpha = 0.6, beta = 0.1, over its retain thresholds.
    """
    from undo.report.figures.style import INK, color_of, panels
    from undo.results.frontier import pareto_front

    if not results.compared:
        return Missing("an attacked model that something was unlearned in", "relearn/unlearned*")
    shown = ("reference", "oracle")
    groups = {label: [a for a in results.attacked if a.label == label] for label in shown} | results.compared
    groups = {label: members for label, members in groups.items() if members}
    chosen = results.attack_steps
    figure, axes = panels(len(chosen), sharey=False)
    for axis, step in zip(axes, chosen, strict=True):
        for label, members in groups.items():
            xs = [a.model.facts["evaluation"]["retain"] for a in members]
            ys = [a.worst_case[step] for a in members]
            x, y = median(xs), median(ys)
            color = color_of(label, alpha_of(members[0]))
            axis.errorbar(
                x,
                y,
                xerr=[[x - min(xs)], [max(xs) - x]],
                yerr=[[y - min(ys)], [max(ys) - y]],
                fmt=_marker(members[0]),
                color=color,
                capsize=2,
                elinewidth=0.7,
                label=describe(members[0]) if axis is axes[0] else None,
            )
        points = results.medians(step)
        front = sorted(points[label] for label in pareto_front(points, results.attacked[0].model.higher_is_better))
        axis.plot([p[0] for p in front], [p[1] for p in front], color=INK, linewidth=0.8, linestyle="--", zorder=0)
        axis.set_title("before the attack" if step == 0 else f"after {step} steps", fontsize=9)
        axis.set_xlabel(f"retain {results.attacked[0].model.unit}", fontsize=8)
    axes[0].set_ylabel(f"forget {results.attacked[0].model.unit}", fontsize=8)
    figure.legend(fontsize=8, loc="outside lower center", ncols=4, frameon=False)
    return figure


def _marker(attacked: Attacked) -> str:
    """A star for models that nothing was unlearned in, a triangle for other thresholds, its own for a baseline."""
    from undo.report.figures.style import BASELINES, MARKS

    kind = attacked.label.partition("_")[0]
    if kind in BASELINES:
        return MARKS[BASELINES.index(kind)]
    if kind in ("reference", "oracle"):
        return "*"
    return "^" if "_within_" in attacked.label else "o"
