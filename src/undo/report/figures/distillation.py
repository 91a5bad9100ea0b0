"""Figure 9: what students learn of their unlearned teachers."""

from typing import TYPE_CHECKING

from undo.report.figures.missing import Missing
from undo.results.arms import Distilled
from undo.results.results import Results

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def distillation_trends(results: Results) -> "Figure | Missing":
    """A panel for each Unlearn-and-Distill run: retain and forget performance over its steps, the teacher's dashed.

    With several seeds, the first one is drawn.
    """
    from undo.report.figures.style import COLORS, legend, of_one_seed, panels

    runs = [run for run in results.of("distill") if isinstance(run.arm, Distilled)]
    if not runs:
        return Missing("a distilled student", "distill", lambda arm: isinstance(arm, Distilled), "distill/distilled*")
    first = min(run.seed for run in runs)
    said = of_one_seed(runs)
    runs = sorted((run for run in runs if run.seed == first), key=lambda run: run.config["teacher"])
    figure, axes = panels(len(runs))
    for axis, run in zip(axes, runs, strict=True):
        teacher = results.named(run.config["teacher"])
        for role in ("retain", "forget"):
            curve = run.curve(role)
            axis.plot(list(curve), list(curve.values()), color=COLORS[role], linewidth=1.8, label=role)
            if teacher is not None:
                level = teacher.facts["evaluation"][role]
                axis.axhline(level, color=COLORS[role], linewidth=1, linestyle="--", label=f"{role}, teacher")
        axis.set_title(results.look(run.arm).title or "unlearned", fontsize=9)
        axis.set_xlabel("distillation steps", fontsize=8)
    axes[0].set_ylabel(runs[0].unit, fontsize=8)
    legend(figure, axes, said)
    return figure
