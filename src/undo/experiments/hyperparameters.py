"""The paper's tables of hyper-parameters (Tables 1 to 13), from the very configs that the runs use."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from undo.config.schema import Raw, as_raw, validate
from undo.config.sweep import expand, read_yaml
from undo.experiments.costs import Costs
from undo.experiments.plan import plan, sources
from undo.experiments.points import with_points
from undo.results.text import markdown
from undo.train.stage import Stage

HIDDEN: Final = ("name", "variant", "execution", "seeds")  # of a run, not of an experiment
MANY: Final = 11  # more values than this are counted, not listed


def hyperparameters(folder: Path, stages: Mapping[str, Stage]) -> str:
    """Two tables for each stage: the keys that all variants share, and the others. A swept key lists its values."""
    present = [stage for name, stage in stages.items() if (folder / f"{name}.yaml").exists()]
    planned = {run.name: run for s in present for run in plan(s, sources(folder, s.name), {}, Path("runs"))}
    costs = Costs(list(planned.values()), folder, stages)
    parts = [
        f"# The hyper-parameters of configs/{folder.name}\n\nMade by `uv run run_all.py {folder.name} --tables`.\n"
    ]
    for stage in present:
        columns: dict[str, list[Raw]] = {}
        amount = 0
        for variant, raws in (found for source in sources(folder, stage.name) for found in _variants(source)):
            configs = [validate(stage.schema, raw, stage.name) for raw in raws]
            columns[variant] = [_leaves(as_raw(config)) for config in configs]
            for leaves, config in zip(columns[variant], configs, strict=True):
                run = planned[f"{stage.name}/{config.name}"]
                if "model.layers" in leaves and (shape := costs.shape(run.name)):
                    leaves["parameters"] = shape.parameters
                if cost := costs.of(run):
                    leaves["tokens"] = cost.tokens
            amount += len(configs)
        keys = dict.fromkeys(key for raws in columns.values() for raw in raws for key in raw)
        rows = {key: [_values(raw.get(key) for raw in raws) for raws in columns.values()] for key in keys}
        common = {key: cells[0] for key, cells in rows.items() if len(set(cells)) == 1}
        rows = {key: cells for key, cells in rows.items() if key not in common}
        parts.append(f"## {stage.caption}\n\n`{stage.name}.yaml`, {amount} run{'s' * (amount > 1)}\n")
        parts.append(markdown(["every run", ""], ((f"`{key}`", cell) for key, cell in common.items() if cell != "-")))
        if rows:
            by_variant = zip(columns, zip(*rows.values(), strict=True), strict=True)
            parts.append(markdown(["", *(f"`{key}`" for key in rows)], ([v, *cells] for v, cells in by_variant)))
    return "\n".join(parts)


def _variants(source: Path) -> Iterable[tuple[str, list[Raw]]]:
    """The variants of a YAML, "undo_{noise.alpha}" as "undo_*", each with its runs."""
    raw = with_points(read_yaml(source), {}, Path("runs") / source.parent.name)
    for variant, changes in (raw.get("variants") or {raw.get("variant", "all"): {}}).items():
        label = "".join("*" + part.partition("}")[2] if i else part for i, part in enumerate(variant.split("{")))
        yield label, expand({**raw, "variants": {variant: changes}}, {}, str(source))


def _leaves(raw: Raw, prefix: str = "") -> Raw:
    """Dotted keys; a mixture is one value, and the name of a block stands for the block."""
    found: Raw = {}
    for key, value in raw.items():
        if not prefix and key in HIDDEN:
            continue
        if isinstance(value, dict) and key != "mixture":
            named = {key: value["name"]} if "name" in value else {}
            rest = {k: v for k, v in value.items() if k != "name"}
            found |= {f"{prefix}{k}": v for k, v in named.items()} | _leaves(rest, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def _values(values: Iterable[Any]) -> str:
    texts = list(dict.fromkeys(map(_text, values)))
    return f"{len(texts)} different" if len(texts) > MANY else ", ".join(texts)


def _text(value: Any) -> str:
    match value:
        case None:
            return "-"
        case bool() | str():
            return str(value)
        case float():
            return f"{value:g}"
        case int():
            return f"{value:,}"
        case list():
            return " ".join(map(_text, value)) or "-"
        case dict():
            return ", ".join(f"{key} {_text(part)}" for key, part in value.items() if part) or "-"
    return str(value)
