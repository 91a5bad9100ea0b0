"""Figure 4: relearning curves; thin for each adversary, bold for the worst case."""

from typing import TYPE_CHECKING

from undo.figures.unlearning import NAMES as METHODS
from undo.results import Attacked, Results

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def relearning_curves(results: Results) -> "Figure | str":
    """One panel for distilled and one for each alpha, each with its unlearned teacher and the oracle beside it.

    With several seeds, the first one is drawn.
    """
    from undo.figures.style import color_of, panels

    if not results.attacked:
        return "no relearn run is done; make them with run_relearn.py"
    first = min(a.model.seed for a in results.attacked)
    models = {a.model.name: a for a in results.attacked if a.model.seed == first}
    students = [a for a in models.values() if "teacher" in a.model.config]
    if not students:
        return (
            "no distilled or UNDO model has been attacked; make them with run_distill.py, run_undo.py, run_relearn.py"
        )
    students.sort(key=lambda a: (alpha_of(a) is None, alpha_of(a) or 0))  # by alpha, distilled last
    oracle = next((a for a in models.values() if a.label == "oracle"), None)
    figure, axes = panels(len(students))
    for axis, student in zip(axes, students, strict=True):
        unlearned = models.get(student.model.config["teacher"])
        for attacked in (unlearned, student, oracle):
            if attacked is None:
                continue
            color = color_of(attacked.label, alpha_of(attacked))
            for adversary in attacked.adversaries:
                curve = adversary.curve("forget")
                axis.plot(list(curve), list(curve.values()), color=color, linewidth=0.6, alpha=0.4)
            worst = attacked.worst_case
            axis.plot(list(worst), list(worst.values()), color=color, linewidth=2.2, label=describe(attacked))
        axis.set_title(describe(student), fontsize=9)
        axis.set_xlabel("relearning steps", fontsize=8)
    legend = {label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(legend.values(), legend.keys(), fontsize=8, loc="outside lower center", ncols=6, frameon=False)
    axes[0].set_ylabel(f"forget {students[0].model.unit}", fontsize=8)
    return figure


def alpha_of(attacked: Attacked) -> float | None:
    noise = attacked.model.config.get("noise")
    return None if noise is None else noise["alpha"]


def describe(attacked: Attacked) -> str:
    """The name of a model in a legend."""
    alpha = alpha_of(attacked)
    if alpha is not None:
        noise, within = attacked.model.config["noise"], attacked.model.config["retain_threshold"]
        beta = "" if noise["beta"] == 0.1 else f", β = {noise['beta']:g}"
        return f"UNDO, α = {alpha:g}{beta}" + ("" if within in (0.05, None) else f", within {within:.0%}")
    if attacked.label == "oracle":
        return "oracle (data filtering)"
    kind, _, method = attacked.label.partition("_")
    names = {"unlearned": "unlearn only", "distilled": "unlearn and distill"}
    return attacked.label if kind not in names else names[kind] + (f", {METHODS.get(method, method)}" if method else "")
