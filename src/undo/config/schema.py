"""Config blocks: frozen, typed, and strict about unknown keys; every stage's config is made of them."""

import json
import re
from collections.abc import Iterable
from typing import Annotated, Any, Final, Literal, Self, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from undo.config.mistakes import ConfigError, in_words

Role = Literal["retain", "forget", "auxiliary"]
ROLES: Final[tuple[Role, ...]] = get_args(Role)
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]  # what generators of torch and numpy take
Raw = dict[str, Any]  # a config before validation: plain YAML values


class Frozen(BaseModel):
    """Base of every config block: immutable, strict about types, and closed to unknown keys."""

    # built at first use: most commands use few of the blocks
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True, defer_build=True)


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
    optimizer: Literal["adamw", "adamw_8bit", "sgd", "muon"] = "adamw"  # 8bit: a quarter of its state, which rounds
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16: autocast over fp32 weights, where the machine has it
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
    """How a run is executed. These keys change speed, not results, so they are not part of a run's identity."""

    micro_rows: Count | None = None  # rows in one forward and backward; None: the whole batch
    checkpoint_every: Count = 100  # steps
    devices: Count = 1  # that one run uses, whole GPUs or `threads` cores each: the batch's rows are divided among them
    shard: Literal["none", "full"] = "none"  # full: the blocks' weights, gradients and optimiser states divided, too
    runs_per_gpu: Count = 1
    runs_per_process: Count = 1  # runs of the same models that share a process, one after the other: saves start-up
    students: Count = 1  # of one teacher, side by side in a process: its hidden states are computed once for all
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
        if self.devices > 1 and self.students > 1:
            raise ValueError(f"students must be 1, not {self.students}, where devices is {self.devices}")
        if self.shard != "none" and self.devices == 1:
            raise ValueError(f"shard: {self.shard} divides weights over devices: set devices above 1, or shard: none")
        return self


class StageConfig(Frozen):
    """The keys that every run has, whatever its stage."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.+-]*$")]
    variant: str = ""  # the row of the results table that the run belongs to
    execution: Execution = Execution()

    def check(self) -> None:
        """Raises ConfigError for mistakes outside the config, such as missing files, before anything starts."""

    def notes(self) -> Iterable[str]:
        """What to know before the run starts, of a config that passes `check`: a line each."""
        return ()

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
