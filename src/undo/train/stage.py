"""What the stages that train have in common: the rest of their config, and the way from a model to a finished run."""

import fcntl
import importlib.util
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from undo import ranks
from undo.config import ROLES, ConfigError, Mixture, Role, RunName, StageConfig, Training, as_raw
from undo.evaluate import Evaluation
from undo.evaluate.evaluator import Measured
from undo.run import Run, RunDirectory, digest, write_atomically
from undo.shape import Shape
from undo.tokens import MixedStream, TokenStore

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from undo.train import Objective, Step, Stop

Concern = Literal["init", "order", "noise", "objective"]


@dataclass(frozen=True)
class Stage:
    """A kind of run: its name, its config class, the function that executes one run, and the command that hosts it."""

    name: str
    schema: type[StageConfig]
    execute: Callable[[Any, Run], None]
    command: tuple[str, ...]  # after the interpreter: the script, or -m and a module


class TrainingStage(StageConfig):
    """Config of a stage that trains a model on mixtures of the prepared roles."""

    seed: int = 0
    seeds: dict[Concern, int] = Field(default={})  # single seeds; all others follow from `seed` and the stage
    data: RunName  # the prepare run
    evaluation_data: RunName | None = None  # the prepare run whose validation data are used; None: the same
    training: Training
    evaluation: Evaluation

    @property
    def validated_on(self) -> RunName:
        return self.evaluation_data or self.data

    def seed_for(self, concern: Concern) -> int:
        """Independent for each stage, concern and seed; the same for all runs of a stage that share the seed."""
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
    def held_per_weight(self) -> int:
        """Bytes that a step holds for each trained weight beside one gradient; see Method."""
        return 0

    def flops_per_token(self, model: Shape, length: int) -> int:
        """Of one training step: forward and backward cost 3 forward passes; more where a second model runs along."""
        return 3 * model.forward_flops(length)

    def check(self) -> None:
        try:
            self.evaluation.check()
        except ConfigError as error:
            raise ConfigError(f"evaluation.{error}") from None
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
        """Raises ConfigError for what is not known to be exact with divided weights."""
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
        """Compiling took 27 s on a CPU, for 1.4 times the demo's speed: it does not pay in a short run."""
        chosen = self.execution.compile
        if self.execution.shard == "full":
            return False
        return device == "cuda" and self.training.steps >= 1000 if chosen is None else chosen

    def tokens(self, length: int) -> int:
        """Tokens of all steps, padding of packed rows included."""
        return self.training.steps * self.training.batch_rows * len(self.streams()) * length


def fit(
    cfg: TrainingStage,
    run: Run,
    model: "PreTrainedModel",
    objective: "Objective",
    *,
    starts_as: RunName | None = None,
    step: "Step | None" = None,
    rng: "torch.Generator | None" = None,
    stop: "Stop | None" = None,
) -> dict[str, Any]:
    """Train `model` on the config's streams -> the facts for run.json: steps, tokens, FLOPs, evaluation, seeds.

    `starts_as` names the run whose very model this is: its evaluation is made once for all runs that start from it.
    """
    from undo import shard
    from undo.models import shape
    from undo.train import plain, train

    data, stores = run.sibling(cfg.data), open_stores(cfg, run)
    largest = max(store.vocab_size for store in stores.values())
    if largest > model.config.vocab_size:
        raise ConfigError(
            f"{data.folder} has a vocabulary of {largest}, the model only {model.config.vocab_size}\n"
            f"prepare the data with the model's tokenizer"
        )
    training, length = cfg.training, max(store.length for store in stores.values())
    streams = {
        name: MixedStream(stores, mixture, training.batch_rows, training.steps, cfg.seed_for("order") + index)
        for index, (name, mixture) in enumerate(cfg.streams().items())
    }
    if cfg.execution.shard == "full":  # now: noise, verification and the choice of weights want them whole
        shard.divide(model)
    evaluator = cfg.evaluation.load(run.sibling(cfg.validated_on), model.device)

    def evaluate(step: int, full: bool) -> Measured:
        if step == 0 and starts_as is not None:
            return shared_evaluation(run.sibling(starts_as), cfg, lambda: evaluator(model, full))
        return evaluator(model, full)

    outcome = train(
        model,
        objective,
        streams,
        training,
        run,
        evaluate,
        step=step or plain,
        rng=rng,
        stop=stop or (lambda _: False),
    )
    if run.leads:  # for those who start as this model
        write_atomically(evaluation_file(run, cfg), json.dumps(outcome.evaluation))
    size = shape(model)
    return {
        "steps": outcome.steps,
        "tokens": outcome.tokens,
        "tokens_per_second": outcome.tokens_per_second,
        "flops": cfg.flops_per_token(size, length) * outcome.tokens,
        "evaluation_flops": size.forward_flops(length) * outcome.evaluation_tokens,
        "parameters": size.parameters,
        "evaluation": outcome.evaluation,
        "seeds": {concern: cfg.seed_for(concern) for concern in ("init", "order", "noise", "objective")},
    }


def shared_evaluation(of: RunDirectory, cfg: TrainingStage, measure: Callable[[], Measured]) -> Measured:
    """The evaluation of a run's model as `cfg` wants it: read from the run's folder, or made and left there.

    Whoever comes while it is being made waits for it. What was read cost no tokens. The leader looks, waits and writes;
    measuring is everybody's.
    """
    if not ranks.leads():
        made: Measured | None = ranks.of_the_leader(None)
        return measure() if made is None else made
    file = evaluation_file(of, cfg)
    with open(file.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = Measured(json.loads(file.read_text()), 0) if file.exists() else None
        ranks.of_the_leader(found)
        if found is not None:
            return found
        measured = measure()
        write_atomically(file, json.dumps(measured.values))
    return measured


def evaluation_file(of: RunDirectory, cfg: TrainingStage) -> Path:
    """One for each way to evaluate the run's model: the evaluation, its data, the precision, CPU or GPU."""
    import torch

    how = [
        as_raw(cfg.evaluation),
        of.sibling(cfg.validated_on).identity(),
        cfg.training.precision,
        torch.cuda.is_available(),
    ]
    folder = of.folder / "evaluations"
    folder.mkdir(exist_ok=True)
    return folder / f"{digest(how)}.json"


def require_memory(cfg: TrainingStage, run: Run, model: Shape | RunName, frozen: Sequence[RunName] = ()) -> None:
    """Raises ConfigError, before any weight is loaded, if training `model` beside the frozen ones cannot fit.

    A run's model is known by its folder's config.json.
    """
    from undo import memory
    from undo.models import shape, skeleton

    trained = None
    if isinstance(model, str):
        empty = skeleton(run.sibling(model).model)
        trained = sum(weight.numel() for name, weight in empty.named_parameters() if cfg.trains(name))
        model = shape(empty)
    available, device = memory.available(cfg.execution.runs_per_gpu, cfg.execution.devices)
    memory.require(
        available,
        model,
        cfg.training,
        cfg.execution,
        max(store.length for store in open_stores(cfg, run).values()),
        frozen=[shape_of_parent(run, name) for name in frozen],
        trained=trained,
        held=cfg.held_per_weight,
        streams=len(cfg.streams()),
        device=device,
    )


def open_stores(cfg: TrainingStage, run: Run) -> dict[Role, TokenStore]:
    """Of all roles that the run trains on."""
    used = {role for mixture in cfg.streams().values() for role, share in mixture.items() if share > 0}
    return {role: open_store(run.sibling(cfg.data), role) for role in ROLES if role in used}


def open_store(data: RunDirectory, role: Role) -> TokenStore:
    """Raises ConfigError if the prepare run has no text for the role."""
    folder = data.folder / "train" / role
    if not folder.exists():
        present = ", ".join(sorted(path.name for path in folder.parent.glob("*")))
        raise ConfigError(f"{data.folder} holds no {role} data; its roles: {present}")
    return TokenStore(folder)


def keep(model: "PreTrainedModel", cfg: TrainingStage, run: Run) -> None:
    """Save the model beside the tokenizer that its data was made with."""
    from undo import shard
    from undo.models import save

    weights = None
    if cfg.execution.shard == "full":
        weights = {name: shard.whole(weight) for name, weight in model.state_dict().items()}
    if run.leads:
        save(model, run.sibling(cfg.data).folder / "tokenizer", run.model, weights)


def load_parent(run: Run, name: str) -> "PreTrainedModel":
    """The model of another run, on this run's device, in fp32."""
    from undo.models import load

    return place(load(run.sibling(name).model), run)


def shape_of_parent(run: Run, name: str) -> Shape:
    """The shape of another run's model, without loading its weights."""
    from undo.models import read_shape

    return read_shape(run.sibling(name).model)


def fresh_like(run: Run, name: str, seed: int) -> "PreTrainedModel":
    """A random initialisation of another run's architecture, on this run's device."""
    from undo.models import fresh, read_config

    return place(fresh(read_config(run.sibling(name).model), seed), run)


def place(model: "PreTrainedModel", run: Run) -> "PreTrainedModel":
    """The same model, on this process's device, compiled if the run's config says so."""
    from undo import models
    from undo.ranks import this_process

    device, cfg = this_process().device, run.configured
    assert device is not None
    assert isinstance(cfg, TrainingStage)
    return models.place(model, device, cfg.compiles(device.type), cfg.execution.gradient_checkpointing)


def generator(seed: int) -> "torch.Generator":
    import torch

    return torch.Generator().manual_seed(seed)
