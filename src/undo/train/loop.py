"""THE training loop: pretraining, unlearning, distillation and relearning are this loop with another objective.

A step takes one global batch. Its content depends on the seed and the step only, never on the number of devices or on
the micro-batch split. The gradients of micro-batches and devices add up to the gradient of the whole batch. Evaluation
stands at the top of the step, so that initial, periodic and final evaluation are one line.
"""

import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import wraps
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from undo.config.files import numbers
from undo.config.mistakes import ConfigError
from undo.config.schema import Execution, Training
from undo.data.stream import MixedStream
from undo.evaluate.evaluator import Measured
from undo.lm import flops
from undo.lm.tokens import Batch
from undo.runs import ranks
from undo.runs.directory import Diverged, Interrupted
from undo.runs.ranks import this_process
from undo.train import shard
from undo.train.gradient import BatchGradient, Objective, Step, plain
from undo.train.optimizer import Optimizer, optimizer_of
from undo.train.recorder import Recorder

if TYPE_CHECKING:
    from accelerate import PartialState

Evaluate = Callable[[int, bool], Measured]  # of a step, and whether on the whole validation set
Stop = Callable[[Mapping[str, float]], bool]
P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Outcome:
    """What a finished loop returns: optimiser steps, tokens trained on and evaluated on, FLOPs of the steps, and the
    last evaluation."""

    steps: int
    tokens: int
    flops: int
    evaluation_tokens: int
    evaluation: dict[str, float]
    tokens_per_second: float | None = field(default=None, compare=False)  # of all devices, evaluation left out
    evaluation_seconds: float = field(default=0.0, compare=False)  # of this process, what it waited for included


def learning_rate(cfg: Training, step: int) -> float:
    """The rate of the update from `step` to `step + 1`: linear warm-up that is never 0, then cosine to the minimum."""
    if step < cfg.warmup_steps:
        return cfg.learning_rate * (step + 1) / cfg.warmup_steps
    if cfg.min_learning_rate is None:
        return cfg.learning_rate
    progress = (step - cfg.warmup_steps) / max(1, cfg.steps - cfg.warmup_steps)
    return cfg.min_learning_rate + (cfg.learning_rate - cfg.min_learning_rate) * (1 + math.cos(math.pi * progress)) / 2


def mixed_precision(cfg: Training, device: torch.device) -> torch.autocast:
    """The context that a run computes in: bf16 products over fp32 weights, or nothing."""
    return torch.autocast(device.type, torch.bfloat16, enabled=cfg.precision == "bf16")


def stepwise(
    model: nn.Module,
    objective: Objective,
    streams: Mapping[str, MixedStream],
    cfg: Training,
    execution: Execution,
    recorder: Recorder,
    evaluate: Evaluate,
    *,
    step: Step = plain,
    rng: torch.Generator | None = None,
    stop: Stop = lambda _: False,
) -> Generator[int, None, Outcome]:
    """Train `model` in place, from the recorder's checkpoint if it has one. `stop` sees every evaluation but the first.

    It halts before each step and yields the step's number, so that several runs can take turns.
    Only weights that require a gradient are trained. `rng` is whatever objective and step draw from; its state is part
    of the checkpoint. Raises Diverged at the first loss or gradient that is not finite, Interrupted once the run has
    been asked to stop and a checkpoint is written, ConfigError for a batch that cannot be split over the devices.
    """
    devices = this_process()
    assert devices.device is not None
    if cfg.batch_rows < devices.num_processes:
        raise ConfigError(
            f"training.batch_rows={cfg.batch_rows} is less than the {devices.num_processes} devices of the run"
        )
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    if not weights:
        raise ConfigError("no weight is trainable")
    optimizer = optimizer_of(model, weights, cfg)
    autocast = mixed_precision(cfg, devices.device)
    done = _resume(recorder, model, weights, optimizer, rng)
    pace = _Pace()
    batch: Batch | None = None  # of the coming step, where it is drawn already
    with recorder.saves_before_it_stops():
        while True:
            yield done.step
            if cfg.evaluates(done.step) and done.evaluated != done.step:
                began = time.monotonic()
                reached = _evaluate(evaluate, cfg, done, autocast, stop)
                pace.evaluating += time.monotonic() - began
                recorder.record(done.step, done.evaluation)
                if reached:
                    break
            if done.step == cfg.steps:
                break
            stopping = ranks.any_of(recorder.stop_requested)  # a signal may have reached one rank only
            if stopping or (done.step > 0 and done.step % execution.checkpoint_every == 0):
                recorder.save_checkpoint(_state(model, weights, optimizer, rng), asdict(done))
                if stopping:
                    ranks.wait_for_all()  # the first rank to leave makes torchrun end the others
                    raise Interrupted

            began = time.perf_counter()
            batch = batch or _draw(streams, done.step, devices)
            gradient = BatchGradient(
                objective, batch, weights, done.step / cfg.steps, execution.micro_rows, devices, autocast
            )
            tokens = cfg.batch_rows * sum(tokens.input_ids.shape[1] for tokens in batch.values())
            with flops.counted() as count:
                terms, gradients = step(gradient)
            for weight, total in zip(weights, gradients, strict=True):
                weight.grad = total
            norm = shard.clip(weights, cfg.clip_norm)
            batch = _draw(streams, done.step + 1, devices) if done.step + 1 < cfg.steps else None  # as a GPU computes
            *values, norm = torch.stack([*terms.values(), norm]).tolist()  # the step's only synchronisation
            if not math.isfinite(sum(values) + norm):
                raise Diverged(done.step)
            rate = learning_rate(cfg, done.step)
            optimizer.step(rate)
            gradients = total = None  # as large as the model, and the next step makes its own
            done.step += 1
            done.tokens += tokens
            mine = len(range(devices.process_index, cfg.batch_rows, devices.num_processes))
            done.flops += count.total * cfg.batch_rows // mine
            pace.took(time.perf_counter() - began, tokens)
            by_name = {f"loss/{name}": value for name, value in zip(terms, values, strict=True)}
            recorder.record(done.step, {"loss": sum(values), **by_name, "grad_norm": norm, "learning_rate": rate})
    counted = done.step, done.tokens, done.flops, done.evaluation_tokens, done.evaluation
    return Outcome(*counted, pace.tokens_per_second, pace.evaluating)


def _draw(streams: Mapping[str, MixedStream], step: int, devices: "PartialState") -> Batch:
    """This process's rows of a step's batch."""
    return {name: s.batch(step, devices.process_index, devices.num_processes) for name, s in streams.items()}


def at_once(stepwise: Callable[P, Generator[object, None, T]]) -> Callable[P, T]:
    """The same function, in one call to its end."""

    @wraps(stepwise)
    def whole(*args: P.args, **options: P.kwargs) -> T:
        turns = stepwise(*args, **options)
        while True:
            try:
                next(turns)
            except StopIteration as end:
                return end.value

    return whole


train = at_once(stepwise)


@dataclass
class _Pace:
    """How fast this process trains. The first step compiles and warms up, so it counts only if there is no other."""

    steps: int = 0
    seconds: float = 0.0
    tokens: int = 0
    evaluating: float = 0.0  # seconds

    def took(self, seconds: float, tokens: int) -> None:
        if self.steps == 1:
            self.seconds, self.tokens = 0.0, 0
        self.steps, self.seconds, self.tokens = self.steps + 1, self.seconds + seconds, self.tokens + tokens

    @property
    def tokens_per_second(self) -> float | None:
        return self.tokens / self.seconds if self.steps else None


def _evaluate(evaluate: Evaluate, cfg: Training, done: "_Progress", autocast: torch.autocast, stop: Stop) -> bool:
    """Write the evaluation of this step into `done`; return whether to stop.

    A run never stops before its first step, and never on the word of a subset: the whole set is evaluated first.
    """
    full = cfg.evaluates_fully(done.step)
    with torch.no_grad(), autocast:
        while True:
            # Each rank measures its copy of the model; a GPU's last bits must not make one stop and another go on.
            measured = ranks.of_the_leader(evaluate(done.step, full))
            done.evaluation, done.evaluated = measured.values, done.step
            done.evaluation_tokens += measured.tokens
            reached = done.step > 0 and stop(done.evaluation)
            if full or not reached:
                return reached
            full = True


# --- the loop's state, as tensors and a few numbers ----------------------------------------------------------------


@dataclass
class _Progress:
    step: int = 0
    evaluated: int = -1  # the step of the last evaluation
    evaluation: dict[str, float] = field(default_factory=dict)
    tokens: int = 0
    flops: int = 0
    evaluation_tokens: int = 0


def _state(
    model: nn.Module,
    weights: Sequence[nn.Parameter],
    optimizer: Optimizer,
    rng: torch.Generator | None,
) -> dict[str, Tensor]:
    state = {f"model.{name}": shard.whole(weight.detach()) for name, weight in model.named_parameters()}
    for index, weight in enumerate(weights):
        for key, value in optimizer.state_of(weight).items():
            if not isinstance(value, Tensor):
                value = torch.tensor(value)  # a count of steps
            elif key.startswith("qmap"):
                value = value.clone()  # what 8 bits stand for: one tensor of all weights, and a file holds none twice
            state[f"optimizer.{index}.{key}"] = shard.whole(value)
    return state if rng is None else state | {"rng": rng.get_state()}


def _resume(
    recorder: Recorder,
    model: nn.Module,
    weights: Sequence[nn.Parameter],
    optimizer: Optimizer,
    rng: torch.Generator | None,
) -> _Progress:
    saved = recorder.load_checkpoint()
    if saved is None:
        return _Progress()
    tensors, progress = saved
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(shard.like(tensors[f"model.{name}"], weight))
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".")
            weight = weights[int(index)]
            if value.dtype == torch.int64:
                optimizer.state_of(weight)[name] = value.item()
            else:
                same = value.shape == weight.shape  # a count of steps is not divided
                optimizer.state_of(weight)[name] = shard.like(value, weight) if same else value.to(weight.device)
    if rng is not None:
        rng.set_state(tensors["rng"])
    return _Progress(**{**progress, "evaluation": numbers(progress["evaluation"])})
