"""What a stage is, and what the configs of all stages that train have in common."""

import importlib.util
import zlib
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, Literal

from pydantic import Field

from undo.config.mistakes import ConfigError
from undo.config.schema import Mixture, RunName, Seed, StageConfig, Training
from undo.evaluate import Evaluation
from undo.lm.shape import Shape
from undo.runs.company import Turns
from undo.runs.directory import RunDirectory
from undo.runs.run import Run

SaveDtype = Literal["auto", "float32", "bfloat16", "float16"]
Concern = Literal["init", "order", "noise", "objective"]
TRAINING: Final = (  # what takes long to import of what training needs
    "transformers:AutoTokenizer",
    "transformers:AutoModelForCausalLM",
    "undo.train.loop",
    "undo.lm.place",
    "undo.evaluate.accuracy",
    "undo.losses",
)


@dataclass(frozen=True)
class Stage:
    """A kind of run: its name, its config class, and the function that executes one run: step by step if it trains."""

    name: str
    schema: type[StageConfig]
    execute: Callable[[Any, Run], Turns | None]  # None: it is done
    module: str  # where a worker finds this stage, as STAGE
    caption: str  # of its hyper-parameters: what they are, and where the paper has them
    example: str = "demo training.steps=50 sweep.seed=[0,1,2] --only '*seed_0' --dry-run"  # arguments, for --help
    shape: Callable[[Any, RunDirectory], Shape | None] = lambda config, run: None  # of its model; None: its parent's
    row_tokens: Callable[[Any], int | None] = lambda config: None  # of its data; None: as its parents have them
    vocabulary: Callable[[Any, RunDirectory], int | None] = lambda config, run: None  # of its data, if it makes them
    computes: bool = True  # False: its runs take no share of the devices
    imports: tuple[str, ...] = TRAINING  # what its processes need, if the launcher is to import it once for all


@cache
def check_evaluation(evaluation: Evaluation) -> None:
    """Once for the hundreds of runs that have the same. Raises ConfigError."""
    try:
        evaluation.check()
    except ConfigError as error:
        raise ConfigError(f"evaluation.{error}") from None


class TrainingStage(StageConfig):
    """Config of a stage that trains a model on mixtures of the prepared roles."""

    seed: Seed = 0
    seeds: dict[Concern, Seed] = Field(default={})  # single seeds; all others follow from `seed` and the stage
    data: RunName  # the prepare run
    evaluation_data: RunName | None = None  # the prepare run whose validation data are used; None: the same
    training: Training
    evaluation: Evaluation
    save_dtype: SaveDtype = "float32"  # of the model that is left; auto: as the pretrained model came

    @property
    def validated_on(self) -> RunName:
        return self.evaluation_data or self.data

    def seed_for(self, concern: Concern) -> int:
        """A seed that differs by stage, concern and `seed`; all runs of a stage with one `seed` share it."""
        import numpy as np

        stage = zlib.crc32(type(self).__name__.encode())
        derived = np.random.SeedSequence([self.seed, stage, zlib.crc32(concern.encode())]).generate_state(1)[0]
        return self.seeds.get(concern, int(derived))

    def streams(self) -> Mapping[str, Mixture]:
        """The batch's entries, and the mixture of roles behind each."""
        raise TypeError(f"{type(self).__name__} does not say which data it reads")

    def trains(self, parameter: str) -> bool:
        """Whether the weight of this name is trained."""
        return True

    @property
    def documents(self) -> int | None:
        """Of each role that the run trains on; None: all there are."""
        return None

    @property
    def leaves_model(self) -> bool:
        """Whether the run keeps its model."""
        return True

    @property
    def held_per_weight(self) -> int:
        """Bytes per trained weight that a step holds beside one gradient; see Method."""
        return 0

    @property
    def common_teacher(self) -> Hashable:
        """Runs that are equal in this read one teacher's outputs on the same batches. None: it has no teacher."""
        return None

    def flops_per_token(self, model: Shape, length: int) -> int:
        """FLOPs per token of a training step, for estimates: 3 forward passes, and those of any other model."""
        return 3 * model.forward_flops(length)

    def check(self) -> None:
        check_evaluation(self.evaluation)  # pyright: ignore[reportArgumentType]  # only pydantic knows that it has a hash
        if self.training.batch_rows < self.execution.devices:
            raise ConfigError(
                f"{self.name}: execution.devices={self.execution.devices} is more than the "
                f"{self.training.batch_rows} rows of a batch: take fewer devices, or more training.batch_rows"
            )
        if self.execution.shard == "full":
            self.check_shard()
        if self.training.optimizer == "adamw_8bit" and importlib.util.find_spec("bitsandbytes") is None:
            raise ConfigError(
                f"{self.name}: training.optimizer=adamw_8bit needs the library bitsandbytes, which is not installed\n"
                f"get it with: uv sync --extra 8bit"
            )

    def check_shard(self) -> None:
        """Raises ConfigError for settings that are not known to be exact with divided weights."""
        devices, rows = self.execution.devices, self.training.batch_rows
        reason = None
        if rows % devices:  # each micro-batch is a collective call, so all ranks must have as many
            reason = f"training.batch_rows={rows} must be a multiple of execution.devices={devices}"
        elif self.training.optimizer != "adamw":
            reason = f"training.optimizer={self.training.optimizer} cannot be divided; take adamw"
        elif self.execution.compile:
            reason = "execution.compile=true does not go with it; leave the key out"
        if reason is not None:
            raise ConfigError(f"{self.name}: execution.shard=full: {reason}")

    def compiles(self, device: str) -> bool:
        """Whether to compile. It took 27 s on a CPU for 1.4 times the demo's speed: too long for a short run."""
        chosen = self.execution.compile
        if self.execution.shard == "full":
            return False
        return device == "cuda" and self.training.steps >= 1000 if chosen is None else chosen

    def tokens(self, length: int) -> int:
        """Tokens of all steps, padding of packed rows included."""
        return self.training.steps * self.training.batch_rows * len(self.streams()) * length
