"""The sweep language: one YAML file, its variants and sweep, and key=value overrides become plain runs.

One YAML is one experiment. Its special keys are `variants` (named sets of overrides), `sweep` (dotted key -> values,
crossed) and `name` (a template such as "{variant}-lr_{training.learning_rate:g}-seed_{seed}"). A variant may have a
`sweep` of its own, whose keys replace the common ones. `adversaries` are named sets as well, crossed with the variants;
a run's key `adversary` holds the name of its set. `let` holds values that are swept and filled in like keys but are no
keys of a run, such as the alpha of the model that an adversary attacks. `points` holds such values too: those chosen
from an earlier experiment's results. Precedence, low to high: the YAML's own keys, the variant, the adversary, the
sweep, the command line, and there an override of one variant (`variants.<name>.<key>=...`).
"""

import itertools
import re
from collections.abc import Iterable, Mapping
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from undo.config.mistakes import ConfigError
from undo.config.schema import Raw


def read_yaml(path: Path) -> Raw:
    """The file as plain values. Raises ConfigError if it is missing, unreadable, empty or not a mapping."""
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        content = OmegaConf.load(path)
        values = OmegaConf.to_container(content, resolve=True)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error})") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not a text file in UTF-8") from None
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise ConfigError(
            f"{path}:{where} not valid YAML: {_first_line(getattr(error, 'problem', None) or error)}"
        ) from None
    if not isinstance(values, dict) or not values:
        raise ConfigError(f"{path}: is empty or not a mapping; it needs keys such as those in configs/demo/")
    return {str(key): value for key, value in values.items()}


def parse_overrides(overrides: Iterable[str]) -> dict[str, Any]:
    """["training.steps=5", ...] -> {"training.steps": 5, ...}, values read as YAML."""
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    parsed = {}
    for text in overrides:
        key, equals, _ = text.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_][\w.\-]*", key):
            raise ConfigError(f"{text!r} is not key=value; example: training.steps=50")
        try:
            value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text[len(key) + 1 :]}"]), resolve=True)
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            raise ConfigError(f"{text!r}: the value is not valid YAML: {_first_line(error)}") from None
        assert isinstance(value, dict)
        parsed[key] = value["value"]
    return parsed


def expand(raw: Raw, overrides: Mapping[str, Any], source: str) -> list[Raw]:
    """All runs of an experiment as plain values: variants x sweep, with the overrides on top and names filled in.

    An override `variants.<name>.<key>` changes that variant alone, and beats one for all of them.
    """
    raw, pinned, asked, single = dict(raw), {}, {}, {}
    for key, value in overrides.items():
        block, _, rest = key.partition(".")
        if block == "sweep" and rest:
            asked[rest] = value
        elif block == "variants" and "." in rest:
            single[key] = value
        elif block in ("sweep", "variants", "adversaries"):
            raise ConfigError(f"{key!r} cannot be set; set sweep.<key>=[...] or variants.<name>.<key>=...")
        else:
            pinned[key] = value
    sweep = raw.pop("sweep", None) or {}
    variants, adversaries = raw.pop("variants", None), raw.pop("adversaries", None)
    if "variant" in pinned:  # a variant of the user's own, instead of the file's
        variants = None
    if not all(isinstance(block, dict | None) for block in (variants, adversaries, sweep)):
        raise ConfigError(f"{source}: `variants`, `adversaries` and `sweep` must be mappings")
    variants = variants or {pinned.get("variant", raw.get("variant", "")): {}}
    own = _by_variant(single, [str(name) for name in variants], source)
    named = [
        [{key: name, **(changes or {})} for name, changes in sets.items()]
        for key, sets in (("variant", variants), ("adversary", adversaries))
        if sets
    ]
    runs: dict[str, Raw] = {}
    for chosen in itertools.product(*named):
        base, points = raw, dict(sweep)
        fixed = {**pinned, **own.get(str(chosen[0]["variant"]), {})}
        for changes in chosen:
            base = _merge(base, {key: value for key, value in changes.items() if key != "sweep"})
            points |= changes.get("sweep") or {}
        points = {key: values for key, values in {**points, **asked}.items() if key not in fixed}
        for key, values in points.items():
            if not isinstance(values, list) or not values:
                raise ConfigError(f"{source}: sweep.{key} must be a list with at least one value, got {values!r}")
        for point in itertools.product(*points.values()):
            swept = dict(zip(points, point, strict=True))
            also = {key: swept[key] for key in asked if key in swept}  # after a block that was pinned as a whole
            run = base
            for key, value in [*swept.items(), *fixed.items(), *also.items()]:
                run = _merge(run, _nest(key, value))
            run["variant"] = _fill_in(run["variant"], _namespace(run), source)
            run = _fill_in(run, _namespace(run), source)
            for key in ("let", "points"):
                run.pop(key, None)
            name = str(run.get("name"))
            if name in runs and isinstance(run["name"], str):
                raise ConfigError(
                    f"{source}: two runs are named {name!r}; put every swept key into `name`,\n"
                    f"or give variant=<your own name> to leave out the variants"
                )
            runs[name] = run
    return list(runs.values())


def variant_of(key: str, variants: Iterable[str]) -> str | None:
    """The one of `variants` that an override's key `variants.<name>.<key>` names; None if it names none."""
    return next((n for n in sorted(variants, key=len, reverse=True) if n and key.startswith(f"variants.{n}.")), None)


def _by_variant(overrides: Mapping[str, Any], variants: list[str], source: str) -> dict[str, Raw]:
    """Variant -> its overrides, without `variants.<name>.` before their keys. Raises ConfigError for other names."""
    found: dict[str, Raw] = {}
    for key, value in overrides.items():
        name = variant_of(key, variants)
        if name is None:
            there = ", ".join(filter(None, variants)) or "none"
            raise ConfigError(f"{source}: {key!r} does not name one of its variants: {there}")
        rest = key.removeprefix(f"variants.{name}.")
        if rest.partition(".")[0] in ("sweep", "points", "variants", "adversaries"):
            raise ConfigError(f"{key!r} cannot be set for one variant; give variants.{name}.<key> a single value")
        found.setdefault(name, {})[rest] = value
    return found


def _merge(base: Raw, changes: Raw) -> Raw:
    """Deep merge. A block that changes its `name` starts afresh: MaxEnt's values must not leak into RMU."""
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict) and value.get("name", old.get("name")) == old.get("name"):
            merged[key] = _merge(old, value)
        else:
            merged[key] = value
    return merged


def _nest(dotted: str, value: Any) -> Raw:
    for part in reversed(dotted.split(".")):
        value = {part: value}
    return value


def _namespace(values: Any) -> Any:
    if isinstance(values, dict):
        return SimpleNamespace(**{str(key): _namespace(value) for key, value in values.items()})
    return values


def _fill_in(values: Any, names: SimpleNamespace, source: str) -> Any:
    """Replace {seed}, {training.learning_rate:g} and the like in every string; a bare {points.<...>} stays a number."""
    if isinstance(values, dict):
        return {key: _fill_in(value, names, source) for key, value in values.items()}
    if isinstance(values, list):
        return [_fill_in(value, names, source) for value in values]
    if isinstance(values, str) and "{" in values:
        try:
            if re.fullmatch(r"\{points\.[\w.]+\}", values):
                return attrgetter(values[1:-1])(names)
            return values.format(**vars(names))
        except (KeyError, AttributeError, ValueError, IndexError) as error:
            raise ConfigError(
                f"{source}: cannot fill in {values!r}: no such key or format: {error}\n"
                f"a brace that stands for itself, as in a file's name, is written twice: {{{{ or }}}}"
            ) from None
    return values


def _first_line(error: object) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
