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
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from string import Formatter
from typing import Any

from undo.config.files import digest
from undo.config.mistakes import ConfigError
from undo.config.schema import Raw


def read_yaml(path: Path) -> Raw:
    """The file as plain values. Raises ConfigError if it is missing, unreadable, empty or not a mapping."""
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        values = _plain(OmegaConf.load(path), str(path))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error})") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not a text file in UTF-8") from None
    except RecursionError:
        raise ConfigError(f"{path}: is nested too deeply for a config") from None
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise ConfigError(
            f"{path}:{where} not valid YAML: {_first_line(getattr(error, 'problem', None) or error)}"
        ) from None
    if not isinstance(values, dict) or not values:
        raise ConfigError(f"{path}: is empty or not a mapping; it needs keys such as those in configs/demo/")
    return values


def parse_overrides(overrides: Iterable[str]) -> dict[str, Any]:
    """["training.steps=5", ...] -> {"training.steps": 5, ...}, values read as YAML, but paths as they are typed.

    A path may begin with * or [, which mean something else in YAML.
    """
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    parsed = {}
    for text in overrides:
        key, equals, typed = text.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_][\w.\-]*", key):
            raise ConfigError(f"{text!r} is not key=value; example: training.steps=50")
        if key.endswith("path") and typed not in ("", "null") and typed[0] not in "'\"":
            parsed[key] = typed
            continue
        try:
            value = _plain(OmegaConf.from_dotlist([f"value={typed}"]), key)
        except RecursionError:
            raise ConfigError(f"{key}: the value is nested too deeply") from None
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            raise ConfigError(f"{text[:80]!r}: the value is not valid YAML: {_first_line(error)}") from None
        assert isinstance(value, dict)
        parsed[key] = value["value"]
    return parsed


def _plain(content: Any, where: str) -> Any:
    """OmegaConf's values as JSON has them. A ${key} is filled in; a ${resolver:...} is refused, for it would read the
    environment, and with it tokens, into names and records."""
    from omegaconf import OmegaConf

    def checked(value: Any) -> Any:
        if isinstance(value, dict):
            return {key if isinstance(key, str) else json.dumps(key): checked(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [checked(inner) for inner in value]
        if isinstance(value, bytes):
            raise ConfigError(f"{where}: a value is binary; write text")
        if isinstance(value, str) and (found := re.search(r"\$\{\s*[\w.]+\s*:[^}]*\}?", value)):
            raise ConfigError(f"{where}: {found[0]}: look-ups are not taken; write the value, or ${{another.key}}")
        return value

    checked(OmegaConf.to_container(content, resolve=False))
    return checked(OmegaConf.to_container(content, resolve=True))


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
    for block, content in (("variants", variants), ("adversaries", adversaries), ("sweep", sweep)):
        if not isinstance(content, dict | None):
            raise ConfigError(f"{source}: `{block}` must be a mapping, got {content!r}")
        for name, changes in (content or {}).items() if block != "sweep" else ():
            if not isinstance(changes, dict | None) or not isinstance((changes or {}).get("sweep"), dict | None):
                raise ConfigError(f"{source}: {block}.{name}, and a sweep in it, must be a mapping, got {changes!r}")
    variants = variants or {pinned.get("variant", raw.get("variant", "")): {}}
    own = _by_variant(single, [str(name) for name in variants], source)
    named = [
        [{key: name, **(changes or {})} for name, changes in sets.items()]
        for key, sets in (("variant", variants), ("adversary", adversaries))
        if sets
    ]
    runs, before = dict[str, Raw](), dict[str, Raw]()  # before: without the overrides
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
            given = _set(base, swept)
            run = _filled(_set(given, {**fixed, **also}), source)
            name = str(run.get("name"))
            if name in runs and isinstance(run["name"], str):
                raise ConfigError(
                    f"{source}: two runs are named {name!r}; put every swept key into `name`,\n"
                    f"or give variant=<your own name> to leave out the variants"
                )
            runs[name], before[name] = run, given
    if pinned:
        _check_names(runs, before, pinned, source)
    return list(runs.values())


def _set(run: Raw, values: Mapping[str, Any]) -> Raw:
    for key, value in values.items():
        run = _merge(run, _nest(key, value))
    return run


def _filled(run: Raw, source: str) -> Raw:
    """The run with its templates filled in, and without the values that only they use."""
    run = {**run, **{key: _fill_in(run[key], run, source) for key in ("variant", "adversary") if key in run}}
    run = _fill_in(run, run, source)
    return {key: value for key, value in run.items() if key not in ("let", "points")}


def _check_names(runs: Mapping[str, Raw], before: Mapping[str, Raw], pinned: Mapping[str, Any], source: str) -> None:
    """Raises ConfigError if overrides make two variants the same run: then their names no longer hold."""

    def what(run: Raw) -> Raw:
        return {key: value for key, value in run.items() if key not in ("name", "variant", "adversary")}

    def differed(name: str) -> Raw:
        try:
            return what(_filled(before[name], source))
        except ConfigError:  # a template of a key that an override gives
            return what(before[name])

    seen: dict[str, str] = {}
    for name, run in runs.items():
        twin = seen.setdefault(digest(what(run)), name)
        if twin == name or differed(name) == differed(twin):
            continue
        changed = " ".join(f"{key}={value}" for key, value in pinned.items())
        raise ConfigError(
            f"{source}: with {changed}, {twin} and {name} are the same run under two names\n"
            f"name your own with variant=<name> {changed}, or change one alone with variants.<name>.<key>=<value>"
        )


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


FIELD = re.compile(r"[A-Za-z_][\w.-]*")
FORMAT = re.compile(r"[<>=^]?[+ -]?#?0?\d{0,2}[,_]?(\.\d{1,2})?[A-Za-z%]?")


def _fill_in(values: Any, run: Raw, source: str) -> Any:
    """Replace {seed}, {training.learning_rate:g} and the like in every string; a bare {points.<...>} stays a number.

    A brace that is meant is written twice.
    """
    if isinstance(values, dict):
        return {key: _fill_in(value, run, source) for key, value in values.items()}
    if isinstance(values, list):
        return [_fill_in(value, run, source) for value in values]
    if isinstance(values, str) and ("{" in values or "}" in values):
        try:
            if re.fullmatch(r"\{points\.[\w.]+\}", values):
                return _value(values[1:-1], run)
            return "".join(_formatted(*part, run) for part in Formatter().parse(values))
        except (LookupError, TypeError, ValueError) as error:
            raise ConfigError(
                f"{source}: cannot fill in {values!r}: no such key or format: {error}\n"
                f"a brace that stands for itself, as in a file's name, is written twice: {{{{ or }}}}"
            ) from None
    return values


def _formatted(text: str, field: str | None, form: str | None, conversion: str | None, run: Raw) -> str:
    """One part of a template. Formats are short: a field is never padded to more than 99 characters."""
    if field is None:
        return text
    if conversion or not FIELD.fullmatch(field) or not FORMAT.fullmatch(form or ""):
        raise ValueError(f"{field}{':' * bool(form)}{form or ''}")
    return text + format(_value(field, run), form or "")


def _value(dotted: str, run: Raw) -> Any:
    value: Any = run
    for key in dotted.split("."):
        if not isinstance(value, dict) or key not in value:
            raise KeyError(dotted)
        value = value[key]
    return value


def _first_line(error: object) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
