"""What a report is about: its models and its data, as configs and records name them."""

from collections.abc import Iterable

from undo.config.schema import ROLES
from undo.config.units import si
from undo.results.attacked import Result
from undo.results.results import Results
from undo.results.text import markdown


def subject(results: Results) -> str:
    """Two tables: the models that everything starts from, and the text of each role."""
    models = [*results.of("base"), *_first_of_each_size(results.of("pretrain"))]
    parts = [markdown(("model", "what it is"), ((run.name, _model(run)) for run in models))] if models else []
    data = [(run.name, *(_role(run, role) for role in ROLES)) for run in results.of("prepare")]
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


def _role(run: Result, role: str) -> str:
    """What a prepare run read for a role, as it recorded it; - where it made none of it."""
    read = [label for key, label in run.facts.get("sources", {}).items() if key.partition(".")[0] == role]
    world = run.config.get("world")
    if not read and world and role != "auxiliary":
        return f"generated: {world.get('name', 'problems')}"
    asked = ", questions made from it" if (run.config.get("data", {}).get(role) or {}).get("questions") else ""
    return ("; ".join(read) or "-") + asked
