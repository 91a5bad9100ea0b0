"""Figure 8: relearning what was unlearned in a pretrained model (Section 6). Figure 11 is Figure 7 of such models."""

from collections.abc import Iterable
from math import isfinite
from statistics import fmean
from typing import TYPE_CHECKING

from undo.report.figures.missing import Missing
from undo.results.arms import Undo
from undo.results.attacked import Attacked, Curve
from undo.results.results import Results

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def adversaries(members: Iterable[Attacked]) -> dict[tuple[str, float], Curve]:
    """(Adversary, learning rate) -> its forget curve, averaged over the seeds of a model, where all are finite."""
    found: dict[tuple[str, float], list[Curve]] = {}
    for attacked in members:
        for run in attacked.adversaries:
            key = run.config.get("adversary", ""), run.config["training"]["learning_rate"]
            finite = {step: value for step, value in run.curve("forget").items() if isfinite(value)}
            found.setdefault(key, []).append(finite)
    averaged = {
        key: {step: fmean(c[step] for c in curves) for step in sorted(set.intersection(*map(set, curves)))}
        for key, curves in found.items()
    }
    return {key: curve for key, curve in averaged.items() if curve}


def relearning_of_wmdp(results: Results) -> "Figure | Missing":
    """Figure 8: a panel a method; its best-retaining point and UNDO of it under every adversary, averaged over seeds.

    Without such a pair: a panel for each attacked model. Bold: the adversary that gets furthest by the last step.
    Dashed: the model before anything was unlearned.
    """
    from undo.report.figures.style import INK, color_of, describe, legend, over_seeds, panels, plain

    groups: dict[str, list[Attacked]] = {}
    for attacked in results.attacked:
        groups.setdefault(attacked.label, []).append(attacked)
    if not groups:
        return Missing("an attacked model", "relearn", lambda arm: arm is not None, "relearn/*")
    pairs = _with_their_teachers(groups, results)
    shown = pairs or [(members,) for members in groups.values()]
    figure, axes = panels(len(shown))
    width, height = figure.get_size_inches()
    figure.set_size_inches(width * 1.3, height * 1.2)
    for axis, models in zip(axes, shown, strict=True):
        look = results.look(models[-1][0].arm)
        for members in models:
            student = pairs and isinstance(members[0].arm, Undo)
            color = look.student_color if student else look.color if pairs else color_of(members[0], results)
            who = f"{describe(members[0], results)}: " if pairs else ""  # a panel's title is the one model's name
            curves, best = adversaries(members), max if members[0].higher_is_better else min
            strongest = best(curves, key=lambda key, curves=curves: curves[key][max(curves[key])], default=None)
            for key, curve in curves.items():
                bold = key == strongest
                axis.plot(
                    list(curve),
                    list(curve.values()),
                    color=color,
                    linewidth=2.2 if bold else 0.6,
                    alpha=1 if bold else 0.45,
                    marker="o" if bold else None,
                    markersize=3,
                    label=f"{who}{_named(key)}" if bold else None,
                )
        if "forget" in results.start:
            axis.axhline(results.start["forget"], color=INK, linewidth=0.8, linestyle="--", label="before unlearning")
        axis.set_title(look.title if pairs else plain(models[0][0].label), fontsize=9)
        axis.set_xlabel("relearning steps", fontsize=8)
    axes[0].set_ylabel(f"forget {results.attacked[0].unit}", fontsize=8)
    drawn = [members for models in shown for members in models]
    note = "thin: each adversary; bold, and named: the strongest at the last step"
    legend(figure, axes, f"{note}; {over_seeds(drawn, 'mean', 'curve')}")
    return figure


def _named(adversary: tuple[str, float]) -> str:
    from undo.report.figures.style import plain

    name, rate = adversary
    return f"{plain(name)}, rate {rate:g}".removeprefix(", ")


def _with_their_teachers(
    groups: dict[str, list[Attacked]], results: Results
) -> list[tuple[list[Attacked], list[Attacked]]]:
    """Teachers and students over seeds, of all UNDO models that stand in Figure 11 and whose teachers were attacked."""
    found = []
    for students in groups.values():
        teacher, arm = results.teacher_of(students[0]), students[0].arm
        if teacher is not None and isinstance(arm, Undo) and results.is_shown(arm):
            found.append((groups[teacher.label], students))
    return found
