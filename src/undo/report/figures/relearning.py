"""Figures 4 and 10: relearning curves of each method, with and without distillation."""

from typing import TYPE_CHECKING, Final, Literal

from undo.report.figures.missing import Missing
from undo.results.arms import Distilled, Oracle, method_of
from undo.results.attacked import Attacked
from undo.results.results import Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Summary = Literal["worst case", "average"]


def relearning_curves(results: Results) -> "Figure | Missing":
    """Figure 4: thin for each adversary, bold for the worst case."""
    return _panels(results, "worst case")


def average_relearning_curves(results: Results) -> "Figure | Missing":
    """Figure 10: the same curves, bold for their average."""
    return _panels(results, "average")


def _panels(results: Results, bold: Summary) -> "Figure | Missing":
    """One panel for each distilled student, with its unlearned teacher and the oracle.

    With several seeds, the first one is drawn. An axis of cross entropy ends above what is under attack,
    and the oracle.
    """
    from undo.report.figures.style import legend, of_one_seed, panels

    students = results.attacked_as(Distilled)
    if not students:
        return Missing(
            "a distilled student that has been attacked",
            "relearn",
            lambda arm: isinstance(arm, Distilled),
            "relearn/distilled*",
        )
    first = min(a.model.seed for a in students)
    said = of_one_seed(students)
    students = sorted((a for a in students if a.model.seed == first), key=lambda a: method_of(a.arm) or "")
    figure, axes = panels(len(students))
    for axis, student in zip(axes, students, strict=True):
        teacher, oracle = results.teacher_of(student), results.oracle_of(student)
        if teacher is not None:
            curves(axis, teacher, UNLEARNED, bold)
        curves(axis, student, STUDENT, bold)
        if oracle is not None:
            curves(axis, oracle, ORACLE, bold)
        axis.set_title(results.look(student.arm).title or "unlearned", fontsize=9)
        axis.set_xlabel("relearning steps", fontsize=8)
    axes[0].set_ylabel(f"forget {students[0].unit}", fontsize=8)
    note = f"{LINES[bold]}; {said}"
    drawn = [a for s in students for a in (results.teacher_of(s), s, results.oracle_of(s)) if a is not None]
    shown = [v for a in drawn for step, v in a.worst_case.items() if step > 0 or isinstance(a.arm, Oracle)]
    if shown and not students[0].higher_is_better:  # unlearned models start anywhere: what follows matters
        low, high = min(shown), max(shown)
        axes[0].set_ylim(low - 0.05 * (high - low), high + 0.1 * (high - low))
        note += "; the axis ends above what is under attack, and the oracle"
    legend(figure, axes, note)
    return figure


UNLEARNED: Final = ("#D55E00", "unlearn")  # colour and name
STUDENT: Final = ("#0072B2", "unlearn and distill")
ORACLE: Final = ("#000000", "data filtering (oracle)")
LINES: Final[dict[Summary, str]] = {
    "worst case": "thin: each adversary; bold: the worst case over a model's adversaries",
    "average": "thin: each adversary; bold: the average over a model's adversaries",
}


def curves(axis: "Axes", attacked: Attacked, look: tuple[str, str], bold: Summary = "worst case") -> None:
    """All adversaries of a model, thin, and their worst case or average, bold. `look`: colour and name."""
    color, name = look
    for adversary in attacked.adversaries:
        curve = adversary.curve("forget")
        axis.plot(list(curve), list(curve.values()), color=color, linewidth=0.6, alpha=0.4)
    summary = attacked.worst_case if bold == "worst case" else attacked.average
    axis.plot(list(summary), list(summary.values()), color=color, linewidth=2.2, label=name)
