"""The paper's tables of results (Appendix B.1, Tables 10 and 13, Figure 7 as a table), with ours beside them."""

from statistics import median

from undo.report.paper import (
    CHOSEN,
    COMPUTE_AT_ALPHA_08,
    MMLU_AFTER_NOISE,
    POINTS,
    SHARE_AT_ALPHA_06,
    UNLEARNING,
    Sweep,
)
from undo.results.frontier import beats
from undo.results.results import Result, Results
from undo.results.selection import RANKS
from undo.results.text import markdown


def unlearning_sweep(results: Results) -> str | None:
    """Initial and final performance of every unlearning run; where the paper prints the same run, its numbers beside.

    Bold: the runs whose models are distilled; for settings of another size the paper's own choice stands beside those.
    """
    runs = results.of("unlearn")
    if not runs or results.is_wmdp:  # its table is `points`
        return None
    paper_setting = results.setting.partition("_")[0]
    same = paper_setting == results.setting
    taught = {run.config["teacher"] for stage in ("distill", "undo") for run in results.of(stage)}
    rows = []
    for run in sorted(runs, key=lambda r: (r.config["variant"], r.seed, r.config["training"]["learning_rate"])):
        method, rate = run.config["method"]["name"], run.config["training"]["learning_rate"]
        variant, chosen = run.config["variant"], run.name in taught
        printed = UNLEARNING.get(paper_setting, {}).get(method, {}) if variant == method else {}
        where = rate if same else CHOSEN.get(paper_setting, {}).get(method) if chosen else None
        theirs = next((sweep for r, sweep in printed.items() if where is not None and abs(r / where - 1) < 1e-6), None)
        ours = _measured(run)
        cells = [variant, f"{rate:g}", str(run.seed), *_arrows(ours)]
        if paper_setting in UNLEARNING:
            cells += _arrows(theirs) if theirs else ["-", "-"]
        if same and paper_setting in UNLEARNING:
            cells += _differences(ours, theirs) if theirs else ["-", "-"]
        rows.append([f"**{cell}**" if chosen and cell != "-" else cell for cell in cells])
    header = ["variant", "rate", "seed", "retain", "forget"]
    if paper_setting not in UNLEARNING:
        return markdown(header, rows)
    header += ["paper: retain", "paper: forget"]
    if same:
        return markdown([*header, "difference, retain", "difference, forget"], rows)
    return markdown(header, rows) + "\nThe paper's are those of the run it chose, at its own size: not like for like.\n"


def points(results: Results) -> str | None:
    """Table 10: the points of each method on WMDP, what they retain and forget, medians over seeds; and the paper's."""
    if not results.is_wmdp:
        return None
    theirs = POINTS.get(results.setting.partition("_")[2], {})
    groups: dict[tuple[str, str], list[Result]] = {}
    for run in results.of("unlearn"):
        method, _, rank = run.config["variant"].rpartition("_")
        if rank in RANKS:
            groups.setdefault((method, rank), []).append(run)
        elif run.name.startswith("unlearn/search-"):
            groups[run.config["variant"], run.name] = [run]
    rows = []
    for (method, rank), runs in groups.items():
        config = runs[0].config
        values = config["method"].get("base") or config["method"]
        printed = theirs.get(method, {}).get(rank)
        ours = f"α = {values['alpha']:g}, {config['training']['learning_rate']:g}"
        performance = [f"{median(r.facts['evaluation'][role] for r in runs):.3f}" for role in ("retain", "forget")]
        paper = f"α = {printed[0]:g}, {printed[1]:g}" if printed else "-"
        rows.append((method, rank if rank in RANKS else "searched", ours, paper, *performance))
    start = [f"{results.start[role]:.3f}" for role in ("retain", "forget")] if results.start else []
    header = ("method", "rank by retain", "alpha, rate", "paper", "retain", "forget")
    return markdown(header, [*([("before", "", "", "", *start)] if start else []), *rows]) if rows else None


def beaten(results: Results) -> str:
    """Each UNDO of Figures 7 and 11 at each strength of attack, and who beats it: medians over seeds."""
    higher, rows = bool(results.attacked) and results.attacked[0].model.higher_is_better, []
    for step in results.attack_steps if results.compared else ():
        points = results.medians(step)
        for label, mine in points.items():
            if label.startswith("undo_"):
                better = [
                    f"{other} ({retain:.3f}, {forget:.3f})"
                    for other, (retain, forget) in points.items()
                    if not other.startswith("undo_") and beats((retain, forget), mine, higher)
                ]
                rows.append((str(step), label, f"{mine[0]:.3f}", f"{mine[1]:.3f}", ", ".join(better) or "nobody"))
    return markdown(
        ("relearning steps", "UNDO", "retain", "forget", "beaten on both by (retain, forget)"), rows
    ) * bool(rows)


def choices(results: Results) -> str | None:
    """Multiple choice: accuracy with its 95 % interval beside chance, and the letter that a model says most often."""
    rows = []
    for run in [*results.of("pretrain"), *results.of("unlearn"), *results.of("undo")]:
        found = run.facts["evaluation"]
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
        rows.append((run.config["variant"], str(run.seed), *cells))
    header = ("model", "seed", "retain", "chance", "says", "forget", "chance", "says")
    return markdown(header, rows) if rows else None


def after_noise(results: Results) -> str | None:
    """Table 13: alpha against the retain performance after distillation, beta 0; MaxEnt's student of the first seed."""
    runs = [run for run in results.of("undo") if run.config["variant"].startswith("undo_maxent")]
    if not results.is_wmdp or not runs:
        return None
    first = min(run.seed for run in runs)
    found = {run.config["noise"]["alpha"]: run.facts["evaluation"]["retain"] for run in runs if run.seed == first}
    found[0.0] = results.start["retain"]
    paper = {alpha: f"{MMLU_AFTER_NOISE[alpha]:.2f}" if alpha in MMLU_AFTER_NOISE else "-" for alpha in found}
    rows = [("before" if alpha == 0 else f"{alpha:g}", paper[alpha], f"{found[alpha]:.3f}") for alpha in sorted(found)]
    return markdown(("alpha", "paper: MMLU of Gemma-2-2B", f"ours: retain {runs[0].unit}"), rows)


def compute(results: Results) -> str | None:
    """What UNDO takes, in the two quantities of which the paper prints numbers; medians over seeds."""
    printed = SHARE_AT_ALPHA_06.get(results.setting.partition("_")[0])
    reference = next((run for run in results.of("pretrain") if run.config["variant"] == "reference"), None)
    shares = [] if reference is None else [r.facts["tokens"] / reference.facts["tokens"] for r in _undo(results, 0.6)]
    ratios = [r for a in results.attacked if a.model in _undo(results, 0.8) if (r := results.compute(a)) is not None]
    low, high = COMPUTE_AT_ALPHA_08
    rows = []
    if printed is not None and shares:
        ours = median(shares)
        share = "trained on at α = 0.6, as a share of the pretraining corpus"
        rows.append((share, f"about {printed:.0%}", f"{ours:.0%}", f"{ours - printed:+.0%}"))
    if printed is not None and ratios:
        ours = median(ratios)
        off = ours - min(max(ours, low), high)
        steps = "steps at α = 0.8, as a share of those of data filtering"
        rows.append((steps, f"{low:.0%} to {high:.0%}", f"{ours:.0%}", f"{off:+.0%}" if off else "within"))
    return markdown(("", "paper", "ours", "difference"), rows) if rows else None


def _undo(results: Results, alpha: float) -> list[Result]:
    return [run for run in results.of("undo") if run.config["variant"] == f"undo_{alpha}"]


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
