"""Colours and sizes of all figures: legible at column width, and without relying on red against green."""

from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from textwrap import fill
from typing import Final

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure  # without pyplot: files only, no display, no global state

from undo.corrupt import Noise
from undo.results.arms import Distilled, Oracle, Reference, Undo, Unlearned, method_of
from undo.results.attacked import Attacked, Result
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


def legend(figure: Figure, axes: Iterable[Axes], note: str) -> None:
    """One for all panels, each name once, below them; `note` says what lines and points are, and of which seeds.

    The figure grows by what it takes.
    """
    found = {label: mark for axis in axes for mark, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    width, height = figure.get_size_inches()
    names, note = list(found), fill(note, int(width / 0.05))
    columns = next((n for n in range(len(names), 1, -1) if _width(names, n) < width), 1)
    rows = -(-len(names) // columns)
    figure.set_size_inches(width, height + 0.16 * (rows - 1 + len(note.splitlines())))
    figure.legend(
        found.values(),
        names,
        title=note,
        title_fontsize=7,
        fontsize=8,
        loc="outside lower center",
        ncols=columns,
        frameon=False,
    )


def _width(names: Sequence[str], columns: int) -> float:
    """About how wide a legend is, in inches: a mark with its margins, and the longest name of each column."""
    rows, longer = divmod(len(names), columns)  # the first columns have one more
    ends = [0, *accumulate(rows + (i < longer) for i in range(columns))]
    return sum(0.55 + 0.063 * max(map(len, names[start:end])) for start, end in pairwise(ends))


def of_one_seed(runs: Iterable[Attacked | Result]) -> str:
    """For a figure that draws the first seed only."""
    seeds = {(run.model if isinstance(run, Attacked) else run).seed for run in runs}
    return f"seed {min(seeds)}" + (f", the first of {len(seeds)}" if len(seeds) > 1 else "")


def over_seeds(groups: Iterable[Sequence[Attacked]], summary: str, what: str = "point") -> str:
    """How many seeds stand behind each point or curve, and as what."""
    counts = {len({a.model.seed for a in members}) for members in groups}
    numbers = " to ".join(str(count) for count in sorted({min(counts), max(counts)}))
    return f"1 seed a {what}" if max(counts) == 1 else f"{numbers} seeds a {what}: {summary}"


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
            name = f"UNDO of {title}" if of_several_methods(results) else "UNDO"
            noise = f"{name}, α = {alpha:g}" + ("" if beta == Noise.model_fields["beta"].default else f", β = {beta:g}")
            return noise + ("" if within in (results.within, None) else f", within {100 * within:g} %")
        case Reference():
            return "reference"
        case Oracle():
            return "oracle (data filtering)"
        case Distilled():
            return f"unlearn and distill, {title}"
        case Unlearned():
            several = sum(a.arm == attacked.arm and a.model.seed == attacked.model.seed for a in results.attacked) > 1
            return f"{title}: {plain(attacked.label)}" if several else title
    return plain(attacked.label)


def plain(text: str) -> str:
    """Text of anybody's making: no formula in dollars, and no leading underscore, which hides it from a legend."""
    return (" " + text if text.startswith("_") else text).replace("$", r"\$")


def shade(share: float) -> str:
    """0 to 1 -> light to dark."""
    red, green, blue, _ = matplotlib.colormaps["viridis"](0.85 - 0.8 * share)
    return to_hex((red, green, blue))
