"""Figure 3: the trade-off of each unlearning method over learning rates."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from undo.report.figures.missing import Missing
from undo.report.tables import main_sweeps
from undo.results.arms import Unlearned
from undo.results.attacked import Result
from undo.results.results import Results

if TYPE_CHECKING:
    from matplotlib.figure import Figure


SHOWN: Final = ("graddiff", "maxent", "rmu")  # the paper's, and whatever later stages start from


def unlearning_tradeoff(results: Results) -> "Figure | Missing":
    """One panel a method: retain and forget performance over unlearning steps, one line a learning rate.

    The title lists the learning rates, drawn from light to dark. The thick line is the run whose model later stages
    start from. With several seeds, the first one is drawn.
    """
    from undo.report.figures.style import COLORS, legend, of_one_seed, panels

    main = main_sweeps(results)
    runs = [r for r in results.of("unlearn") if _is_shown(r, results) and r.label in main[r.config["method"]["name"]]]
    if not runs:
        return Missing("an unlearned model", "unlearn", lambda arm: isinstance(arm, Unlearned), "unlearn/*")
    first = min(run.seed for run in runs)
    methods: dict[str, list[Result]] = {}
    for run in runs:
        if run.seed == first:
            methods.setdefault(run.config["method"]["name"], []).append(run)
    figure, axes = panels(len(methods))
    for axis, members in zip(axes, methods.values(), strict=True):
        members = sorted(members, key=lambda run: run.config["training"]["learning_rate"])
        for rank, run in enumerate(members):
            thick = run.name in results.taught
            for role, style in (("retain", "-"), ("forget", "--")):
                curve = run.curve(role)
                axis.plot(
                    list(curve),
                    list(curve.values()),
                    style,
                    color=COLORS[role],
                    linewidth=2.6 if thick else 1.2,
                    alpha=0.3 + 0.7 * rank / (len(members) - 1) if len(members) > 1 else 1,
                )
        axis.set_title(f"{results.look(members[0].arm).title}\n{_rates(members)}", fontsize=8)
        axis.set_xlabel("unlearning steps", fontsize=8)
    axes[0].set_ylabel(runs[0].unit, fontsize=8)
    for role, style in (("retain", "-"), ("forget", "--")):
        axes[0].plot([], [], style, color=COLORS[role], label=role)
    if any(run.name in results.taught for members in methods.values() for run in members):
        axes[0].plot([], [], "-", color="black", linewidth=2.6, label="the teacher of later stages")
    legend(figure, axes[:1], of_one_seed(runs))
    return figure


def _rates(members: Sequence[Result]) -> str:
    """What the shades are: one line under a panel's title."""
    rates = [f"{run.config['training']['learning_rate']:g}" for run in members]
    if len(rates) == 1:
        return f"learning rate {rates[0]}"
    listed = ", ".join(rates) if len(rates) < 5 else f"{rates[0]} to {rates[-1]} ({len(rates)})"
    return f"rates, light to dark: {listed}"


def _is_shown(run: Result, results: Results) -> bool:
    return run.config["method"]["name"] in SHOWN or run.name in results.taught
