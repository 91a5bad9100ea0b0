"""One page about a setting's runs: models, claims, figures, the unlearning sweep, and the cost."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from undo.config.units import si
from undo.report.attacks import attacks
from undo.report.claims import HEADER, Checked, as_rows
from undo.report.subject import subject
from undo.report.tables import after_noise, beaten, choices, compute, points, unlearning_sweep
from undo.results.attacked import Result
from undo.results.results import Results
from undo.results.seeds import median
from undo.results.text import as_text, escaped, markdown


def report(results: Results, checked: Sequence[Checked], figures: Iterable[Path], missing: Iterable[str]) -> str:
    """Markdown, to lie beside the folder that holds `figures`."""
    rows, attack = results.table(), ", ".join(c for c in results.columns if c.startswith("forget_"))
    parts = [f"# {escaped(results.setting)}\n\n{origin(results.runs)}\n"]
    if about := subject(results):
        parts += ["## Model and data\n", about]
    parts += ["## Models\n"]
    parts.append(markdown(results.columns, as_text(rows)))
    if len({row["seed"] for row in rows}) > 1:
        parts.append(over_seeds(rows, results.columns))
    parts.append(
        f"retain, forget: performance before the attack. {attack}: worst case over the adversaries\nafter so many "
        "relearning steps, and at the end. robustness: (P - P_unlearned) / (P_oracle - P_unlearned), P = forget_last."
        "\nsteps and flops are those of the run that made the model.\n"
    )
    parts += [escaped(line) + "\n" for line in without_robustness(results)]
    parts += ["## The paper's claims on these runs\n", markdown(HEADER, as_rows(checked))]
    if found := beaten(results):
        parts += ["## Who beats UNDO (Figures 7 and 11)\n", found]
    if matrix := attacks(results):
        parts += ["## Attacks of every kind\n", matrix]
    parts.append("## Figures\n")
    parts += [f"![{path.stem}]({path.parent.name}/{path.name})\n" for path in figures]
    parts += [f"- {escaped(line)}\n" for line in missing]
    if sweep := unlearning_sweep(results):
        parts += ["## Unlearning, before and after (Appendix B.1)\n", sweep]
    if chosen := points(results):
        parts += ["## The points (Table 10)\n", chosen]
    if asked := choices(results):
        parts += ["## Multiple choice, by the lm-evaluation-harness (D.2.1)\n", asked]
    if noised := after_noise(results):
        parts += ["## Noise, and what is retained after it (Table 13)\n", noised]
    if beside := compute(results):
        parts += ["## What UNDO takes (abstract, Appendix D.2.7)\n", beside]
    parts += ["## Cost\n", costs(results)]
    return "\n".join(parts)


def origin(runs: Sequence[Result]) -> str:
    """When, where and with what the runs were made."""
    facts = [run.facts for run in runs]
    dates = sorted({str(f["finished"])[:10] for f in facts})
    versions = Counter(f"{name} {version}" for f in facts for name, version in f["versions"].items())
    revisions = sorted({_short(f["git_revision"]) for f in facts})
    devices = sorted({f"{f['device']}, {f['threads']} thread{'s' * (f['threads'] > 1)} a run" for f in facts})
    return (
        f"{len(runs)} runs, finished {' to '.join(dict.fromkeys((dates[0], dates[-1])))}, on {'; '.join(devices)}.\n"
        f"{', '.join(versions)}. Code: {', '.join(revisions)}."
    )


def without_robustness(results: Results) -> list[str]:
    """One line for each reason why a robustness is not there, with the models that lack it."""
    reasons: dict[str, list[str]] = {}
    for attacked in results.attacked:
        if (reason := results.why_no_robustness(attacked)) is not None:
            reasons.setdefault(reason, []).append(attacked.label)
    return [f"No robustness: {', '.join(dict.fromkeys(labels))}: {reason}." for reason, labels in reasons.items()]


def over_seeds(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> str:
    """Median and range over seeds, a row a model."""
    columns = [column for column in columns if column not in ("model", "seed", "flops")]
    models = list(dict.fromkeys(row["model"] for row in rows))

    def cell(model: str, column: str) -> str:
        values = [row[column] for row in rows if row["model"] == model and row[column] is not None]
        if not values:
            return "-"
        if lost := sum(map(math.isnan, values)):
            return f"diverged on {lost} of {len(values)} seed{'s' * (len(values) > 1)}"
        digits = 0 if column == "steps" else 3
        if len(values) == 1:
            return f"{values[0]:.{digits}f} (one seed)"
        return f"{median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"

    table = markdown(("model", *columns), ((model, *(cell(model, column) for column in columns)) for model in models))
    return "Median over seeds, and range:\n\n" + table


def costs(results: Results) -> str:
    """By stage: runs, their processes' time, tokens trained on, FLOPs of training and of evaluation, peak memory."""
    rows = []
    for stage in results.stages:
        facts = [run.facts for run in results.of(stage)]
        if facts:
            rows.append((stage, *_cost_cells(facts)))
    facts = [run.facts for run in results.runs]
    ends = [datetime.fromisoformat(f["finished"]) for f in facts]
    starts = [end - timedelta(seconds=f["seconds"]) for end, f in zip(ends, facts, strict=True)]
    rows.append(("all", *_cost_cells(facts)))
    header = ("stage", "runs", "process minutes", "tokens", "training FLOPs", "evaluation FLOPs", "peak memory, GiB")
    minutes = (max(ends) - min(starts)).total_seconds() / 60
    return (
        markdown(header, rows) + f"\nFrom the start of the first run to the end of the last: {minutes:.1f} minutes.\n"
    )


def _cost_cells(facts: Sequence[dict[str, Any]]) -> list[str]:
    def total(key: str) -> str:
        numbers = [f[key] for f in facts if isinstance(f.get(key), int | float)]
        return si(sum(numbers)).strip() if numbers else "-"

    memory = max(f["peak_device_bytes"] or f["peak_rss_bytes"] for f in facts)
    seconds = sum(f["seconds"] for f in facts)
    cells = [str(len(facts)), f"{seconds / 60:.1f}", total("tokens"), total("flops"), total("evaluation_flops")]
    return [*cells, f"{memory / 2**30:.2f}"]


def _short(revision: str | None) -> str:
    """Nine digits of a revision, and the + of a changed checkout."""
    return "unknown" if revision is None else revision[:9] + "+" * revision.endswith("+")
