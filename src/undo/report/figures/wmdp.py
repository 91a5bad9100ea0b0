"""Figure 8: relearning what was unlearned in a pretrained model (Section 6). Figure 11 is Figure 7 of such models."""

from collections.abc import Iterable
from math import isfinite
from statistics import fmean
from typing import TYPE_CHECKING

from undo.report.figures.missing import Missing
from undo.results.arms import Undo
from undo.results.results import Attacked, Curve, Results

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

    Bold: the adversary that gets furthest by the last step. Dashed: the model before anything was unlearned.
    """
    from undo.report.figures.style import INK, describe, panels

    groups: dict[str, list[Attacked]] = {}
    for attacked in results.attacked:
        groups.setdefault(attacked.label, []).append(attacked)
    pairs = _with_their_teachers(groups, results)
    if not pairs:
        return Missing(
            "an attacked model and UNDO of it", "relearn", lambda arm: isinstance(arm, Undo), "relearn/undo_*"
        )
    figure, axes = panels(len(pairs))
    figure.set_size_inches(0.8 + 3.2 * len(pairs), 3.2)
    for axis, (teacher, student) in zip(axes, pairs, strict=True):
        look = results.look(student[0].arm)
        for members, color in ((teacher, look.color), (student, look.student_color)):
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
                    label=f"{describe(members[0], results)}; bold: {key[0]}, rate {key[1]:g}" if bold else None,
                )
        if "forget" in results.start:
            axis.axhline(results.start["forget"], color=INK, linewidth=0.8, linestyle="--", label="before unlearning")
        axis.set_title(look.title, fontsize=9)
        axis.set_xlabel("relearning steps", fontsize=8)
    axes[0].set_ylabel(f"forget {results.attacked[0].unit}", fontsize=8)
    found = {label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(found.values(), found.keys(), fontsize=7, loc="outside lower center", ncols=2, frameon=False)
    return figure


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
