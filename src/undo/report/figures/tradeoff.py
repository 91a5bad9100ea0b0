"""Figure 7: retain against forget performance, before the attack and under it."""

from math import nan
from typing import TYPE_CHECKING

from undo.report.figures.missing import Missing
from undo.results.arms import Oracle, Reference, Undo, Unlearned
from undo.results.results import Attacked, Results
from undo.results.seeds import median

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def retain_against_forget(results: Results) -> "Figure | Missing":
    """Three panels: no attack, a moderate one (40 of the paper's 500 steps, or that share of fewer), the whole attack.

    x: retain performance before the attack; y: worst-case forget performance. Points are medians over seeds, bars their
    range, the line is the Pareto front; reference and oracle are shown, and take no part in it. UNDO is shown as the
    setting's figures.yaml says: in Section 6 at alpha = 0.6, beta = 0.1, over its retain thresholds.
    """
    from undo.report.figures.style import INK, color_of, describe, panels
    from undo.results.frontier import pareto_front

    if not results.compared or not results.attack_steps:
        return Missing(
            "an attacked model that something was unlearned in",
            "relearn",
            lambda arm: isinstance(arm, Unlearned),
            "relearn/unlearned*",
        )
    groups: dict[str, list[Attacked]] = {}
    for kind in (Reference, Oracle):
        for attacked in results.attacked_as(kind):
            if attacked.model.final("retain") is not None:
                groups.setdefault(attacked.label, []).append(attacked)
    groups |= results.compared
    chosen = results.attack_steps
    figure, axes = panels(len(chosen), sharey=False)
    for axis, step in zip(axes, chosen, strict=True):
        for members in groups.values():
            xs = [a.model.facts["evaluation"]["retain"] for a in members]
            ys = [a.worst_case.get(step, nan) for a in members]
            x, y = median(xs), median(ys)
            color = color_of(members[0], results)
            axis.errorbar(
                x,
                y,
                xerr=[[x - min(xs)], [max(xs) - x]],
                yerr=[[y - min(ys)], [max(ys) - y]],
                fmt=_marker(members[0], results),
                color=color,
                capsize=2,
                elinewidth=0.7,
                label=describe(members[0], results) if axis is axes[0] else None,
            )
        points = results.medians(step)
        front = sorted(points[label] for label in pareto_front(points, results.directions))
        axis.plot([p[0] for p in front], [p[1] for p in front], color=INK, linewidth=0.8, linestyle="--", zorder=0)
        axis.set_title("before the attack" if step == 0 else f"after {step} steps", fontsize=9)
        axis.set_xlabel(f"retain {next(iter(groups.values()))[0].model.unit}", fontsize=8)
    axes[0].set_ylabel(f"forget {results.attacked[0].unit}", fontsize=8)
    figure.legend(fontsize=8, loc="outside lower center", ncols=4, frameon=False)
    return figure


def _marker(attacked: Attacked, results: Results) -> str:
    """A star for models that nothing was unlearned in, a method's own mark, a triangle for UNDO at other thresholds."""
    match attacked.arm:
        case Reference() | Oracle():
            return "*"
        case Unlearned():
            return results.look(attacked.arm).mark
        case Undo(within=within) if within != results.within:
            return "^"
    return "o"
