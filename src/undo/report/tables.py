"""The paper's tables of results (Appendix B.1, Tables 10 and 13, Figure 7 as a table), with ours beside them."""

from collections.abc import Mapping, Sequence

from undo.report.paper import (
    CHOSEN,
    COMPUTE_AT_ALPHA_08,
    MMLU_AFTER_NOISE,
    POINTS,
    PRETRAINED,
    SHARE_AT_ALPHA_06,
    UNLEARNING,
    Sweep,
)
from undo.results.arms import Reference, Undo
from undo.results.attacked import Result
from undo.results.frontier import beats
from undo.results.results import Results
from undo.results.seeds import median
from undo.results.selection import RANKS
from undo.results.text import markdown


def unlearning_sweep(results: Results) -> str | None:
    """Initial and final performance of every unlearning run, with the paper's numbers where it prints the same run.

    Runs whose models are distilled are bold; at another size than the paper's, its own choice stands beside those.
    """
    runs, paper, same = results.of("unlearn"), results.shown.paper or "", results.shown.like_for_like
    if not runs or paper in PRETRAINED:  # its table is `points`
        return None
    main, rows = main_sweeps(results), []
    for run in sorted(runs, key=lambda r: (r.label, r.seed, r.config["training"]["learning_rate"])):
        method, rate = run.config["method"]["name"], run.config["training"]["learning_rate"]
        chosen = run.name in results.taught
        printed = UNLEARNING.get(paper, {}).get(method, {}) if run.label in main.get(method, ()) else {}
        where = rate if same else CHOSEN.get(paper, {}).get(method) if chosen else None
        theirs = next((sweep for r, sweep in printed.items() if where is not None and abs(r / where - 1) < 1e-6), None)
        ours = _measured(run)
        cells = [run.label, f"{rate:g}", str(run.seed), *_arrows(ours)]
        if paper in UNLEARNING:
            cells += _arrows(theirs) if theirs else ["-", "-"]
        if same and paper in UNLEARNING:
            cells += _differences(ours, theirs) if theirs else ["-", "-"]
        rows.append([f"**{cell}**" if chosen and cell != "-" else cell for cell in cells])
    header = ["variant", "rate", "seed", "retain", "forget"]
    if paper not in UNLEARNING:
        return markdown(header, rows)
    header += ["paper: retain", "paper: forget"]
    if same:
        return markdown([*header, "difference, retain", "difference, forget"], rows)
    return markdown(header, rows) + "\nThe paper's are those of the run it chose, at its own size: not like for like.\n"


def points(results: Results) -> str | None:
    """Table 10: the points of each method on WMDP, what they retain and forget, medians over seeds; and the paper's.

    A label with one alpha and learning rate is a point, ranked by what it retains; one with several is a search.
    """
    if results.shown.paper not in PRETRAINED:
        return None
    theirs, groups = POINTS.get(results.shown.paper or "", {}), dict[str, list[Result]]()
    for run in results.of("unlearn"):
        groups.setdefault(run.label, []).append(run)
    rows = []
    for ranked in _by_method(groups):
        for rank, runs in ranked:
            method, rate, alpha = runs[0].config["method"], runs[0].config["training"]["learning_rate"], _alpha(runs[0])
            printed = theirs.get(method["name"], {}).get(rank)
            ours = f"{rate:g}" if alpha is None else f"α = {alpha:g}, {rate:g}"
            performance = [f"{median(r.facts['evaluation'][role] for r in runs):.3f}" for role in ("retain", "forget")]
            paper = f"α = {printed[0]:g}, {printed[1]:g}" if printed else "-"
            rows.append((method["name"], rank, ours, paper, *performance))
    start = [f"{results.start[role]:.3f}" for role in ("retain", "forget")] if results.start else []
    header = ("method", "rank by retain", "alpha, rate", "paper", "retain", "forget")
    return markdown(header, [*([("before", "", "", "", *start)] if start else []), *rows]) if rows else None


def _by_method(groups: Mapping[str, Sequence[Result]]) -> list[list[tuple[str, Sequence[Result]]]]:
    """For each method its points with their ranks, best retained first, then the runs of its search one by one."""
    points: dict[str, list[Sequence[Result]]] = {}
    searched: dict[str, list[tuple[str, Sequence[Result]]]] = {}
    for runs in groups.values():
        method = runs[0].config["method"]["name"]
        if len({(_alpha(run), run.config["training"]["learning_rate"]) for run in runs}) == 1:
            points.setdefault(method, []).append(runs)
        else:
            searched.setdefault(method, []).extend(("searched", [run]) for run in runs)

    def retained(runs: Sequence[Result]) -> float:
        sign = -1 if runs[0].higher_is_better else 1
        return sign * median(run.facts["evaluation"]["retain"] for run in runs)

    ranked: list[list[tuple[str, Sequence[Result]]]] = [
        list(zip(RANKS, sorted(members, key=retained), strict=False)) for members in points.values()
    ]
    return [*ranked, *searched.values()]


def _alpha(run: Result) -> float | None:
    """The weight of the retain loss; None for a method that has none."""
    method = run.config["method"]
    return (method.get("base") or method).get("alpha")


def main_sweeps(results: Results) -> dict[str, set[str]]:
    """Method -> the labels of its main sweep: those whose models something is distilled from; else all it has."""
    every: dict[str, set[str]] = {}
    taught: dict[str, set[str]] = {}
    for run in results.of("unlearn"):
        method = run.config["method"]["name"]
        every.setdefault(method, set()).add(run.label)
        if run.name in results.taught:
            taught.setdefault(method, set()).add(run.label)
    return every | taught


def beaten(results: Results) -> str:
    """Each UNDO model of Figures 7 and 11 at each strength of attack, and which models beat it: medians over seeds."""
    undo = {label for label, members in results.compared.items() if isinstance(members[0].arm, Undo)}
    rows = []
    for step in results.attack_steps if undo else ():
        points = results.medians(step)
        for label in (label for label in points if label in undo):
            mine = points[label]
            better = [
                f"{other} ({retain:.3f}, {forget:.3f})"
                for other, (retain, forget) in points.items()
                if other not in undo and beats((retain, forget), mine, results.directions)
            ]
            rows.append((str(step), label, f"{mine[0]:.3f}", f"{mine[1]:.3f}", ", ".join(better) or "nobody"))
    return markdown(
        ("relearning steps", "UNDO", "retain", "forget", "beaten on both by (retain, forget)"), rows
    ) * bool(rows)


def choices(results: Results) -> str | None:
    """Multiple choice: accuracy with its 95 % interval beside chance, and the letter that a model says most often."""
    rows = []
    for run in [*results.of("pretrain"), *results.of("unlearn"), *results.of("undo")]:
        found = run.facts.get("evaluation", {})
        prefix = "accuracy/" if "accuracy/retain/chance" in found else ""
        if f"{prefix}retain/chance" not in found:
            continue
        cells = []
        for role in ("retain", "forget"):
            about = f"{prefix}{role}/"
            of = {key.removeprefix(about): value for key, value in found.items() if key.startswith(about)}
            letter = max((key for key in of if key.startswith("says_")), key=lambda key: of[key])
            interval = f"{found[prefix + role]:.3f} ({of['low']:.3f} to {of['high']:.3f})"
            cells += [interval, f"{of['chance']:.3f}", f"{letter.removeprefix('says_')}: {of[letter]:.0%}"]
        rows.append((run.label, str(run.seed), *cells))
    header = ("model", "seed", "retain", "chance", "says", "forget", "chance", "says")
    return markdown(header, rows) if rows else None


def after_noise(results: Results) -> str | None:
    """Table 13: alpha against the retain performance after distillation; the students over alpha of the first seed."""
    if results.shown.paper not in PRETRAINED or not results.series:
        return None
    first = min(run.seed for run in results.series)
    found = {
        run.arm.alpha: run.facts["evaluation"]["retain"]
        for run in results.series
        if run.seed == first and isinstance(run.arm, Undo)
    }
    if "retain" in results.start:
        found[0.0] = results.start["retain"]
    paper = {alpha: f"{MMLU_AFTER_NOISE[alpha]:.2f}" if alpha in MMLU_AFTER_NOISE else "-" for alpha in found}
    rows = [("before" if alpha == 0 else f"{alpha:g}", paper[alpha], f"{found[alpha]:.3f}") for alpha in sorted(found)]
    return markdown(("alpha", "paper: MMLU of Gemma-2-2B", f"ours: retain {results.series[0].unit}"), rows)


def compute(results: Results) -> str | None:
    """What UNDO takes, in the two quantities of which the paper prints numbers; medians over seeds."""
    printed = SHARE_AT_ALPHA_06.get(results.shown.paper or "")
    if printed is None:
        return None
    reference = next((run for run in results.of("pretrain") if isinstance(run.arm, Reference)), None)
    shares = [] if reference is None else [r.facts["tokens"] / reference.facts["tokens"] for r in _at(results, 0.6)]
    strongest = {run.name for run in _at(results, 0.8)}
    attacked = (a for a in results.attacked if a.model.name in strongest)
    ratios = [ratio for a in attacked if (ratio := results.compute(a)) is not None]
    low, high = COMPUTE_AT_ALPHA_08
    rows = []
    if shares:
        ours = median(shares)
        share = "trained on at α = 0.6, as a share of the pretraining corpus"
        rows.append((share, f"about {printed:.0%}", f"{ours:.0%}", f"{ours - printed:+.0%}"))
    if ratios:
        ours = median(ratios)
        off = ours - min(max(ours, low), high)
        tokens = "tokens at α = 0.8, as a share of those of data filtering (the paper: steps)"
        rows.append((tokens, f"{low:.0%} to {high:.0%}", f"{ours:.0%}", f"{off:+.0%}" if off else "within"))
    return markdown(("", "paper", "ours", "difference"), rows) if rows else None


def _at(results: Results, alpha: float) -> list[Result]:
    return [run for run in results.series if isinstance(run.arm, Undo) and run.arm.alpha == alpha]


def _measured(run: Result) -> Sweep:
    first, last = run.evaluations[0], run.facts["evaluation"]
    return Sweep(first["retain"], last["retain"], first["forget"], last["forget"])


def _arrows(sweep: Sweep) -> list[str]:
    return [
        f"{sweep.initial_retain:.3f} → {sweep.final_retain:.3f}",
        f"{sweep.initial_forget:.3f} → {sweep.final_forget:.3f}",
    ]


def _differences(ours: Sweep, theirs: Sweep) -> list[str]:
    return [
        f"{ours.final_retain - theirs.final_retain:+.3f}",
        f"{ours.final_forget - theirs.final_forget:+.3f}",
    ]
