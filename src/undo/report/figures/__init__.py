"""One function for each figure of the paper, one for the matrix of attacks: results -> a figure, or what it lacks."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Final

from undo.report.figures.attacks import attack_matrix
from undo.report.figures.compute import robustness_against_compute
from undo.report.figures.distillation import distillation_trends
from undo.report.figures.matching import oracle_matching
from undo.report.figures.missing import Missing
from undo.report.figures.noise import noise_grid
from undo.report.figures.relearning import average_relearning_curves, relearning_curves
from undo.report.figures.tradeoff import retain_against_forget
from undo.report.figures.unlearning import unlearning_tradeoff
from undo.report.figures.wmdp import relearning_of_wmdp

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from undo.results.results import Results

FIGURES: Final[dict[str, Callable[["Results"], "Figure | Missing"]]] = {
    "fig2": oracle_matching,
    "fig3": unlearning_tradeoff,
    "fig4": relearning_curves,
    "fig5": robustness_against_compute,
    "fig6": noise_grid,
    "fig7": retain_against_forget,
    "fig8": relearning_of_wmdp,
    "fig9": distillation_trends,
    "fig10": average_relearning_curves,
    "fig11": retain_against_forget,
    "attacks": attack_matrix,
}
OF_A_PRETRAINED_MODEL: Final = ("fig8", "fig11")  # all others are of models that were trained here


def figures_of(results: "Results") -> list[str]:
    """Those that the setting's figures.yaml names; else those that the paper draws of such an experiment.

    With them the matrix of attacks, where there were some.
    """
    fetched = bool(results.of("base"))
    paper = [name for name in FIGURES if name != "attacks" and (name in OF_A_PRETRAINED_MODEL) == fetched]
    wanted = paper if results.shown.figures is None else results.shown.figures
    return [name for name in FIGURES if name in wanted or (name == "attacks" and results.of("attack"))]


def draw(names: Iterable[str], results: "Results", folder: Path) -> tuple[list[Path], dict[str, Missing]]:
    """Write the named figures as PDF and PNG -> the PNGs, and what each of the others lacks."""
    drawn, missing = list[Path](), dict[str, Missing]()
    for name in names:
        figure = FIGURES[name](results)
        if isinstance(figure, Missing):
            missing[name] = figure
            continue
        folder.mkdir(parents=True, exist_ok=True)
        for suffix in ("pdf", "png"):
            path = folder / f"{name}.{suffix}"
            path.unlink(missing_ok=True)  # a symbolic link would be followed
            # no creation date: the same results give the same bytes
            figure.savefig(path, metadata={"CreationDate": None} if suffix == "pdf" else None)
        drawn.append(folder / f"{name}.png")
    return drawn, missing
