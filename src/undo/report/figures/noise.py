"""Figure 6: alpha and beta, by robustness and by cost."""

from statistics import median
from typing import TYPE_CHECKING

from undo.corrupt import Noise
from undo.report.figures.missing import Missing
from undo.results.arms import Undo
from undo.results.attacked import Attacked, Result
from undo.results.results import Results

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def noise_grid(results: Results) -> "Figure | Missing":
    """A panel of worst-case relearning curves for each alpha that was tried with several betas; then the cost matrix.

    The matrix holds distillation steps until the student was within 5 % of the teacher, medians over seeds. Curves are
    those of the first seed.
    """
    from undo.report.figures.style import INK, legend, of_one_seed, panels, shade

    def point(run: Result) -> tuple[float, float]:
        return run.config["noise"]["alpha"], run.config["noise"]["beta"]

    runs = [run for run in results.of("undo") if isinstance(run.arm, Undo) and run.arm.within == results.within]
    betas = sorted({point(run)[1] for run in runs})
    alphas = sorted({a for a, _ in map(point, runs) if len({b for c, b in map(point, runs) if c == a}) > 1})
    if not alphas:
        return Missing(
            "an alpha that was tried with several betas",
            "relearn",
            lambda arm: isinstance(arm, Undo) and arm.beta != Noise.model_fields["beta"].default,
            "relearn/undo_*_beta_*",
        )
    first = min(run.seed for run in runs)
    attacked: dict[tuple[float, float], Attacked] = {
        point(a.model): a for a in results.attacked if a.model in runs and a.model.seed == first
    }
    figure, (*axes, matrix) = panels(len(alphas) + 1, columns=5, sharey=False)
    for axis, alpha in zip(axes, alphas, strict=True):
        for rank, beta in enumerate(betas):
            if (alpha, beta) in attacked:
                curve = attacked[alpha, beta].worst_case
                color = shade(rank / max(1, len(betas) - 1))
                axis.plot(list(curve), list(curve.values()), color=color, label=f"β = {beta:g}")
        axis.set_title(f"α = {alpha:g}", fontsize=9)
        axis.set_xlabel("relearning steps", fontsize=8)
    if attacked:
        every = [value for a in attacked.values() for value in a.worst_case.values()]
        for axis in axes if every else ():
            axis.set_ylim(min(every) - 0.02 * abs(max(every)), max(every) * 1.04)
        worst = f"curves: worst case over a model's adversaries, {of_one_seed(runs)}"
        legend(figure, axes, f"{worst}; distillation steps: median over seeds")
    axes[0].set_ylabel(f"forget {results.attacked[0].unit if attacked else runs[0].unit}", fontsize=8)
    cost = [[[run.facts["steps"] for run in runs if point(run) == (a, b)] for b in betas] for a in alphas]
    numbers = [[median(steps) if steps else float("nan") for steps in row] for row in cost]
    matrix.imshow(numbers, cmap="cividis", aspect="auto")
    known = [n for row in numbers for n in row if n == n]
    for i, row in enumerate(numbers):
        for j, value in enumerate(row):
            light = value == value and value > (min(known) + max(known)) / 2
            text = f"{value:g}" if value == value else "not run"
            matrix.text(j, i, text, ha="center", va="center", fontsize=8, color=INK if light else "white")
    matrix.grid(visible=False)
    matrix.set_xticks(range(len(betas)), [f"{b:g}" for b in betas])
    matrix.set_yticks(range(len(alphas)), [f"{a:g}" for a in alphas])
    matrix.set_xlabel("β", fontsize=8)
    matrix.set_ylabel("α", fontsize=8)
    matrix.set_title("distillation steps", fontsize=9)
    return figure
