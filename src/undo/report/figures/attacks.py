"""The matrix of attacks: what each elicits from each model."""

from math import isfinite
from typing import TYPE_CHECKING

from undo.report.figures.missing import Missing
from undo.results.matrix import KEPT, matrix
from undo.results.results import Results

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def attack_matrix(results: Results) -> "Figure | Missing":
    """A heat map, a row an attack and a column a model: forget performance, and small below it retain.

    Numbers are those of the worst adversary, medians over seeds.
    """
    from matplotlib.figure import Figure

    from undo.report.figures.style import INK, plain

    found = matrix(results)
    if found is None:
        return Missing("an attack", "attack", lambda arm: arm is not None, "attack/*")
    grid = [[found.elicited(model, attack) for model in found.models] for attack in found.attacks]
    values = [[float("nan") if pair is None else pair[0] for pair in row] for row in grid]
    size = 2.6 + 0.85 * len(found.models), 1.3 + 0.34 * len(found.attacks)
    figure = Figure(figsize=size, dpi=200, layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(values, cmap="cividis" if found.higher_is_better else "cividis_r", aspect="auto")
    known = [value for row in values for value in row if isfinite(value)]
    middle = (min(known) + max(known)) / 2 if known else 0.0
    for i, (attack, row) in enumerate(zip(found.attacks, grid, strict=True)):
        for j, (model, pair) in enumerate(zip(found.models, row, strict=True)):
            if pair is None:
                axis.text(j, i, "diverged" if found.at(model, attack) else "not run", ha="center", va="center", size=6)
                continue
            light = (pair[0] > middle) == found.higher_is_better
            color, lost = INK if light else "white", found.costs_retain(model, attack)
            axis.text(j, i - 0.14, f"{pair[0]:.2f}", ha="center", va="center", size=8, color=color)
            retain = f"({pair[1]:.2f})" if lost else f"{pair[1]:.2f}"
            axis.text(j, i + 0.27, retain, ha="center", va="center", size=5.5, color=color)
    axis.set_xticks(range(len(found.models)), map(plain, found.models), size=8, rotation=30, ha="left")
    axis.set_yticks(range(len(found.attacks)), map(plain, found.attacks), size=8)
    axis.xaxis.tick_top()
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    seeds = len({cell.model.seed for cell in found.cells})
    note = f"large: forget {found.unit}, worst adversary; small: retain, in brackets below {KEPT:.0%} of the model's; "
    axis.set_xlabel(note + ("1 seed" if seeds == 1 else f"medians over {seeds} seeds"), size=6.5)
    figure.colorbar(image, ax=axis, shrink=0.6, label=f"forget {found.unit}").ax.tick_params(labelsize=7)
    return figure
