"""What is wrong with a config, in words that name the key and the fix."""

import difflib
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError


def in_words(error: ValidationError, schema: type[BaseModel], raw: dict[str, Any]) -> str:
    """The first mistake in words, and how many more there are."""
    first, *others = error.errors(include_url=False)
    path = _keys_only(first["loc"], raw)
    key = ".".join(path)
    if first["type"] == "extra_forbidden":
        text = f"unknown key {key!r}" + _meant(path, schema, raw)
    elif first["type"] == "missing":
        text = f"key {key!r} is missing"
    else:
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "union_tag_invalid":
            tags = first.get("ctx", {})
            message = f"there is no {tags.get('tag')}; there are {tags.get('expected_tags', '')}".replace("'", "")
        text = (
            f"{key}: " * bool(key)
            + message[0].lower()
            + message[1:]
            + ("" if isinstance(first["input"], dict) else f" (got {first['input']!r})")
        )
    return text + (f" (and {len(others)} more)" if others else "")


def _keys_only(location: tuple[str | int, ...], raw: Any) -> list[str]:
    """The path in the user's values. Pydantic also names the union member that it tried, which is not a key."""
    path = []
    for position, part in enumerate(location):
        member = raw.get("name") if isinstance(raw, dict) else None
        if isinstance(raw, dict) and part in raw:
            raw = raw[part]
        elif isinstance(raw, list) and isinstance(part, int):
            raw = None  # no block of ours is a list
        elif position + 1 < len(location) or part == member:
            continue
        path.append(str(part))
    return path


def _meant(path: list[str], schema: type[BaseModel], raw: dict[str, Any]) -> str:
    """A suggestion for an unknown key, from the keys of its own block or else of the whole config."""
    *above, leaf = path
    block = _block(above, schema, raw)
    if above and block is not None:
        prefix, keys = ".".join(above), list(block.model_fields)
        if like := difflib.get_close_matches(leaf, keys, n=1):
            return f"; did you mean {f'{prefix}.{like[0]}'!r}?"
        read = " (YAML reads on and yes as true, off and no as false)" if leaf in ("true", "false") else ""
        return f"{read}; keys of {prefix}: {', '.join(keys)}"
    known = [*_keys(schema), "sweep", "variants", "adversaries", "let", "points"]
    like = difflib.get_close_matches(".".join(path), known, n=1, cutoff=0.5) or difflib.get_close_matches(
        leaf, [k.split(".")[-1] for k in known], n=1
    )
    return f"; did you mean {like[0]!r}?" if like else ""


def _block(path: list[str], schema: type[BaseModel], raw: Any) -> type[BaseModel] | None:
    """The schema of the block at `path`. If several are possible there, its `name` decides."""
    annotation: Any = schema
    for key in path:
        mapped = [get_args(option)[1] for option in _options(annotation) if get_origin(option) is dict]
        block = None if mapped else _named(annotation, raw)
        if not mapped and (block is None or key not in block.model_fields):
            return None
        annotation = mapped[0] if block is None else block.model_fields[key].annotation
        raw = raw.get(key) if isinstance(raw, dict) else None
    return _named(annotation, raw)


def _named(annotation: Any, raw: Any) -> type[BaseModel] | None:
    blocks = [option for option in _options(annotation) if isinstance(option, type) and issubclass(option, BaseModel)]
    name = raw.get("name") if isinstance(raw, dict) else None
    for block in blocks:
        if "name" in block.model_fields and block.model_fields["name"].default == name:
            return block
    return next(iter(blocks), None)


def _options(annotation: Any) -> list[Any]:
    """The members of a union, also of an annotated one, or the annotation itself."""
    if get_origin(annotation) is Annotated:
        return _options(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [option for member in get_args(annotation) for option in _options(member)]
    return [annotation]


def _keys(schema: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in schema.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += _keys(field.annotation, f"{prefix}{name}.")
    return keys


class ConfigError(Exception):
    """A user's mistake: what is wrong and how to fix it, in at most three lines and without a traceback."""
