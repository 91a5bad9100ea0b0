"""Colours and sizes of all figures: legible at column width, and without relying on red against green."""

from typing import Final

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure  # without pyplot: files only, no display, no global state

from undo.corrupt import Noise
from undo.results.arms import Distilled, Oracle, Reference, Undo, Unlearned, method_of
from undo.results.attacked import Attacked
from undo.results.results import Results

INK: Final = "#222222"
COLORS: Final = {  # Okabe and Ito
    "retain": "#0072B2",
    "forget": "#D55E00",
    "reference": "#999999",
    "oracle": "#000000",
    "unlearned": "#D55E00",
    "student": "#0072B2",
}
PANEL: Final = (2.5, 2.1)  # inches


def panels(count: int, columns: int = 4, sharey: bool = True) -> tuple[Figure, list[Axes]]:
    """A row (or rows) of `count` panels."""
    columns = min(count, columns)
    rows = -(-count // columns)
    figure = Figure(figsize=(0.6 + PANEL[0] * columns, 0.5 + PANEL[1] * rows), dpi=200, layout="constrained")
    axes = figure.subplots(rows, columns, sharey=sharey, squeeze=False)
    flat = list(axes.flat)
    for unused in flat[count:]:
        unused.remove()
    for axis in flat[:count]:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25, linewidth=0.5)
    return figure, flat[:count]


def color_of(attacked: Attacked, results: Results) -> str:
    """Reference and oracle have colours of their own, unlearned models their method's; UNDO's runs from light to dark
    with alpha, or has its teacher's method's where there are several."""
    match attacked.arm:
        case Reference():
            return COLORS["reference"]
        case Oracle():
            return COLORS["oracle"]
        case Undo(alpha) if not of_several_methods(results):
            return shade(alpha)
        case Undo() | Distilled():
            return results.look(attacked.arm).student_color
        case Unlearned():
            return results.look(attacked.arm).color
    return COLORS["student"]


def of_several_methods(results: Results) -> bool:
    """Whether UNDO models of different unlearning methods are compared."""
    every = (members[0].arm for members in results.compared.values())
    return len({method_of(arm) for arm in every if isinstance(arm, Undo)}) > 1


def describe(attacked: Attacked, results: Results) -> str:
    """The name of a model in a legend that holds models of all kinds."""
    title = results.look(attacked.arm).title
    match attacked.arm:
        case Undo(alpha, beta, within=within):
            if of_several_methods(results):
                return f"UNDO of {title}"
            noise = f"UNDO, α = {alpha:g}" + ("" if beta == Noise.model_fields["beta"].default else f", β = {beta:g}")
            return noise + ("" if within in (results.within, None) else f", within {within:.0%}")
        case Reference():
            return "reference"
        case Oracle():
            return "oracle (data filtering)"
        case Distilled():
            return f"unlearn and distill, {title}"
        case Unlearned():
            several = sum(a.arm == attacked.arm and a.model.seed == attacked.model.seed for a in results.attacked) > 1
            return f"{title}: {attacked.label}" if several else title
    return attacked.label


def shade(share: float) -> str:
    """0 to 1 -> light to dark."""
    red, green, blue, _ = matplotlib.colormaps["viridis"](0.85 - 0.8 * share)
    return to_hex((red, green, blue))
