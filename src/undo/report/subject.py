"""What a report is about: its models and its data, as the setting's own configs name them."""

from collections.abc import Iterable

from undo.config.schema import ROLES, Raw
from undo.config.units import si
from undo.results.attacked import Result
from undo.results.results import Results
from undo.results.text import markdown


def subject(results: Results) -> str:
    """Two tables: the models that everything starts from, and the text of each role."""
    models = [*results.of("base"), *_first_of_each_size(results.of("pretrain"))]
    parts = [markdown(("model", "what it is"), ((run.name, _model(run)) for run in models))] if models else []
    data = [(run.name, *(_role(run.config, role) for role in ROLES)) for run in results.of("prepare")]
    return "\n".join([*parts, *([markdown(("data", *ROLES), data)] if data else [])])


def _first_of_each_size(runs: Iterable[Result]) -> list[Result]:
    """Reference, oracle and their seeds are one model, trained on other text."""
    return list({str(run.config.get("model")): run for run in reversed(list(runs))}.values())


def _model(run: Result) -> str:
    model, facts = run.config.get("model"), run.facts
    if isinstance(model, str):
        return f"{model} ({facts.get('architecture', 'a causal LM')}, vocabulary {facts.get('vocab_size', 'unknown')})"
    size = facts.get("parameters")
    return "a reduced Gemma-2, trained here" + (f", {si(size).strip()} parameters" if size else "")


def _role(config: Raw, role: str) -> str:
    """Where a role's text comes from; - where the run makes none of it."""
    source = (config.get("data") or {}).get(role)
    if source is not None:
        return _source(source)
    world = config.get("world")
    return f"generated: {world.get('name', 'problems')}" if world and role != "auxiliary" else "-"


def _source(source: Raw) -> str:
    if parts := source.get("parts"):
        return "; ".join(f"{part.get('proportion', 1):.0%} {_source(part)}" for part in parts.values())
    path = source.get("path")
    where = (path if isinstance(path, str) else ", ".join(path)) if path else str(source.get("hub"))
    subset = f" ({source['subset']})" if source.get("subset") and not path else ""
    return where + subset + (", questions made from it" if source.get("questions") else "")
