"""Configs: frozen typed blocks, and the way from one YAML file (with its sweep) and key=value overrides to runs.

One YAML is one experiment. Its special keys are `variants` (named sets of overrides), `sweep` (dotted key -> values,
crossed) and `name` (a template such as "{variant}-lr_{training.learning_rate:g}-seed_{seed}"). A variant may have a
`sweep` of its own, whose keys replace the common ones. `adversaries` are named sets as well, crossed with the variants;
the name of a run's is its key `adversary`. `let` holds values that are no keys of a run, but are swept and filled in
like them: the alpha of the model that an adversary attacks. `points` holds such values too: the ones that were chosen
from an earlier experiment's results. Precedence, low to high: the YAML's own keys, the variant, the adversary, the
sweep, the command line; there, what names a variant (`variants.<name>.<key>=...`). Nothing here imports torch.
"""

import itertools
import json
import re
from collections.abc import Iterable, Mapping
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Final, Literal, Self, TypeVar, get_args

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from undo.mistakes import in_words

Role = Literal["retain", "forget", "auxiliary"]
ROLES: Final[tuple[Role, ...]] = get_args(Role)
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(gt=0)]
Raw = dict[str, Any]  # a config before validation: plain YAML values


class ConfigError(Exception):
    """A mistake of the user's: what is wrong and how to mend it, in at most three lines and without a traceback."""


class Frozen(BaseModel):
    """Base of every config block: immutable, strict about types, and without room for unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True)


def _is_run_name(name: str) -> str:
    if not re.fullmatch(r"[a-z]+/[A-Za-z0-9][\w.+-]*", name):
        raise ValueError("a run is named <stage>/<name>, for example pretrain/reference-seed_0")
    return name


RunName = Annotated[str, AfterValidator(_is_run_name)]  # a field of this type makes the run it names a parent


def _sums_to_one(shares: dict[Role, float]) -> dict[Role, float]:
    if abs(sum(shares.values()) - 1) > 1e-6:
        raise ValueError(f"the shares must add up to 1, not {sum(shares.values()):g}")
    return shares


Mixture = Annotated[dict[Role, Share], AfterValidator(_sums_to_one)]  # shares of rows by role


class Training(Frozen):
    """One training loop's settings. A step is one optimiser update on the *global* batch."""

    steps: Count
    batch_rows: Count  # rows of the global batch: all micro-batches on all devices together
    learning_rate: Positive
    min_learning_rate: NonNegative | None = None  # the cosine ends here; None: constant rate
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    weight_decay: NonNegative = 0.0
    betas: tuple[Share, Share] = (0.9, 0.999)
    clip_norm: Positive | None = 1.0
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"  # 8bit: its state takes a quarter of the memory, and rounds
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16: autocast; the weights stay fp32
    evaluate_every: Count
    evaluate_at: tuple[int, ...] = ()  # further steps
    evaluate_fully_at: tuple[int, ...] = ()  # on the whole set, not on evaluation.subset; so are the first and the last

    @model_validator(mode="after")
    def _rates_in_order(self) -> Self:
        if self.min_learning_rate is not None and self.min_learning_rate > self.learning_rate:
            raise ValueError(f"min_learning_rate {self.min_learning_rate:g} is above the learning rate")
        return self

    def evaluates(self, step: int) -> bool:
        return step % self.evaluate_every == 0 or step in self.evaluate_at or self.evaluates_fully(step)

    def evaluates_fully(self, step: int) -> bool:
        return step in (0, self.steps) or step in self.evaluate_fully_at


class Execution(Frozen):
    """How a run is executed. These keys change speed, not results, and are no part of a run's identity."""

    micro_rows: Count | None = None  # rows in one forward and backward; None: the whole batch
    checkpoint_every: Count = 100  # steps
    devices: Count = 1  # that one run uses, whole GPUs or `threads` cores each: the batch's rows are divided among them
    shard: Literal["none", "full"] = "none"  # full: the blocks' weights, gradients and optimiser states divided, too
    runs_per_gpu: Count = 1
    runs_per_process: Count = 1  # runs of the same models that share a process, one after the other: saves start-up
    compile: bool | None = None  # the model's body by torch.compile; None: on CUDA, in runs of 1000 steps and more
    gradient_checkpointing: bool = False  # each block's forward pass twice, for the memory of its activations
    threads: Count = 1  # of one run on CPU; cores / threads runs go side by side
    tracking: Literal["off", "offline", "online"] = "off"  # Weights & Biases

    @model_validator(mode="after")
    def _several_devices_are_whole(self) -> Self:
        if self.devices > 1 and self.runs_per_gpu > 1:
            raise ValueError(
                f"runs_per_gpu must be 1, not {self.runs_per_gpu}, where devices is {self.devices}: a run on several "
                f"devices has each to itself"
            )
        if self.shard != "none" and self.devices == 1:
            raise ValueError(f"shard: {self.shard} divides weights over devices: set devices above 1, or shard: none")
        return self


class StageConfig(Frozen):
    """What every run has, whatever its stage."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.+-]*$")]
    variant: str = ""  # the row of the results table that the run belongs to
    execution: Execution = Execution()

    def check(self) -> None:
        """Raises ConfigError for what can be seen to be wrong outside the config before anything is started."""

    def parents(self) -> tuple[str, ...]:
        """The names of the runs whose results this one reads: all fields of type RunName, in order."""
        names = [
            getattr(self, key) for key, field in type(self).model_fields.items() if _is_run_name in _validators(field)
        ]
        return tuple(dict.fromkeys(name for name in names if name is not None))


Config = TypeVar("Config", bound=Frozen)


def _validators(field: Any) -> list[Any]:
    optional = getattr(field.annotation, "__args__", ())  # RunName | None keeps its metadata one level down
    metadata = [*field.metadata, *(m for arg in optional for m in getattr(arg, "__metadata__", ()))]
    return [m.func for m in metadata if isinstance(m, AfterValidator)]


# --- from YAML to runs ---------------------------------------------------------------------------------------------


def read_yaml(path: Path) -> Raw:
    """The file as plain values. Raises ConfigError if it is missing, unreadable, empty or no mapping."""
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
        raise ConfigError(f"{path}: is empty or no mapping; it needs keys such as those in configs/demo/")
    return {str(key): value for key, value in values.items()}


def parse_overrides(overrides: Iterable[str]) -> dict[str, Any]:
    """["training.steps=5", ...] -> {"training.steps": 5, ...}, values read as YAML."""
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
                    f"or give variant=<a name of your own> if the variants are to be left out"
                )
            runs[name] = run
    return list(runs.values())


def variant_of(key: str, variants: Iterable[str]) -> str | None:
    """Which of `variants` an override's key `variants.<name>.<key>` is for; None: it is for none of them."""
    return next((n for n in sorted(variants, key=len, reverse=True) if n and key.startswith(f"variants.{n}.")), None)


def _by_variant(overrides: Mapping[str, Any], variants: list[str], source: str) -> dict[str, Raw]:
    """Variant -> its overrides, without `variants.<name>.` before their keys. Raises ConfigError for other names."""
    found: dict[str, Raw] = {}
    for key, value in overrides.items():
        name = variant_of(key, variants)
        if name is None:
            there = ", ".join(filter(None, variants)) or "none"
            raise ConfigError(f"{source}: {key!r} names no variant of it; variants: {there}")
        rest = key.removeprefix(f"variants.{name}.")
        if rest.partition(".")[0] in ("sweep", "points", "variants", "adversaries"):
            raise ConfigError(f"{key!r} cannot be set for one variant; give variants.{name}.<key> a single value")
        found.setdefault(name, {})[rest] = value
    return found


def validate(schema: type[Config], raw: Raw, source: str) -> Config:
    """Raises ConfigError that names the key, the value and the fix."""
    try:
        return schema.model_validate_json(json.dumps(raw))  # JSON mode: strict, yet a list may fill a tuple
    except ValidationError as error:
        raise ConfigError(f"{source}: {in_words(error, schema, raw)}") from None


def as_raw(config: Frozen) -> Raw:
    """Plain values, as they stand in a run's config.yaml."""
    return config.model_dump(mode="json")


def differences(old: Raw, new: Raw, prefix: str = "") -> list[str]:
    """One "key: old -> new" for each leaf that differs."""
    lines = []
    for key in dict.fromkeys([*old, *new]):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key}: {a!r} -> {b!r}")
    return lines


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
            raise ConfigError(f"{source}: cannot fill in {values!r}: no such key or format: {error}") from None
    return values


def _first_line(error: object) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
