"""Colours and sizes of all figures: legible at column width, and without telling red from green."""

from typing import Final

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure  # without pyplot: files only, no display, no global state

INK: Final = "#222222"
COLORS: Final = {  # Okabe and Ito
    "reference": "#999999",
    "oracle": "#000000",
    "unlearned": "#D55E00",
    "distilled": "#0072B2",
    "unlearned_graddiff": "#E69F00",
    "unlearned_rmu": "#CC79A7",
    "distilled_graddiff": "#56B4E9",
    "distilled_rmu": "#009E73",
    "maxent": "#D55E00",
    "rmu": "#CC79A7",
    "undo_maxent": "#0072B2",
    "undo_rmu": "#009E73",
    "retain": "#0072B2",
    "forget": "#D55E00",
}
BASELINES: Final = ("sam", "smoothing", "repnoise", "undial", "npo", "simnpo", "uam")  # each a mark of its own
MARKS: Final = "Pv<>XDp"
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


def color_of(label: str, alpha: float | None = None) -> str:
    """A model's own colour; UNDO's runs from light to dark with alpha; the other baselines grey, with their marks."""
    if label.partition("_")[0] in BASELINES:
        return "#777777"
    if alpha is None or label in COLORS:
        return COLORS.get(label) or COLORS.get(label.partition("_")[0], INK)
    return shade(alpha)


def shade(share: float) -> str:
    """0 to 1 -> light to dark."""
    red, green, blue, _ = matplotlib.colormaps["viridis"](0.85 - 0.8 * share)
    return to_hex((red, green, blue))
