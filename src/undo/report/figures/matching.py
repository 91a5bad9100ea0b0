"""Figure 2: oracle matching. Behaviour can be copied exactly while the capability stays."""

from typing import TYPE_CHECKING, Final

from undo.report.figures.missing import Missing
from undo.report.figures.relearning import LINES, curves
from undo.results.arms import Matched, Oracle
from undo.results.results import Results

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOOKS: Final = {
    Matched("reference"): ("student (reference)", "#D55E00"),
    Matched("random"): ("student (random)", "#0072B2"),
    Oracle(): ("oracle teacher", "#000000"),
}


def oracle_matching(results: Results) -> "Figure | Missing":
    """Left: the distillation loss of both students. Right: relearning curves; thin each adversary, bold the worst case.

    With several seeds, the first one is drawn.
    """
    from undo.report.figures.style import legend, of_one_seed, panels

    found = [(a, LOOKS[a.arm]) for a in results.attacked if isinstance(a.arm, Matched | Oracle)]
    students = results.attacked_as(Matched)
    if not students:
        return Missing(
            "an oracle-matched student that has been attacked",
            "relearn",
            lambda arm: isinstance(arm, Matched),
            "relearn/matched_*",
        )
    first = min(a.model.seed for a in students)
    figure, (losses, relearning) = panels(2, sharey=False)
    for attacked, (name, color) in (pair for pair in found if pair[0].model.seed == first):
        if isinstance(attacked.arm, Matched):
            loss = [(r["step"], r["loss/kl"]) for r in attacked.model.directory.records() if "loss/kl" in r]
            losses.plot(*zip(*loss, strict=True), color=color, linewidth=1.2)
        curves(relearning, attacked, (color, name))
    losses.set_yscale("log")
    losses.set_ylabel("KL to the oracle (nats)", fontsize=8)
    losses.set_xlabel("distillation steps", fontsize=8)
    relearning.set_ylabel(f"forget {students[0].unit}", fontsize=8)
    relearning.set_xlabel("relearning steps", fontsize=8)
    legend(figure, [relearning], f"{LINES['worst case']}; {of_one_seed(students)}")
    return figure
