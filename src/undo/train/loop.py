"""THE training loop: pretraining, unlearning, distillation and relearning are this loop with another objective.

A step takes one global batch. Its order and content depend on the seed and the step only, never on the number of
devices or on the micro-batch split; micro-batch gradients and the gradients of all devices add up to the gradient of
the whole batch. Evaluation stands at the top of the step, so initial, periodic and final evaluation are one line.
"""

import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from undo import ranks, shard
from undo.config import ConfigError, Training
from undo.evaluate.evaluator import Measured
from undo.ranks import this_process
from undo.run import Diverged, Interrupted, Run
from undo.tokens import Batch, MixedStream

if TYPE_CHECKING:
    from accelerate import PartialState

Objective = Callable[[Batch], dict[str, Tensor]]  # named, already weighted terms; the loss is their sum
Terms = dict[str, Tensor]  # their values, of a whole batch
Gradients = Sequence[Tensor | None]  # one for each trained weight, None where the terms do not depend on it
Evaluate = Callable[[int, bool], Measured]  # of a step, and whether on the whole validation set
Stop = Callable[[Mapping[str, float]], bool]


@dataclass(frozen=True)
class Outcome:
    """What a finished loop says: optimiser steps, tokens trained on and evaluated on, and the last evaluation."""

    steps: int
    tokens: int
    evaluation_tokens: int
    evaluation: dict[str, float]
    tokens_per_second: float | None = field(default=None, compare=False)  # of all devices, evaluation left out


class Gradient(Protocol):
    """The gradient of the sum of the named terms (None: all) on the step's whole batch, at the weights as they are.

    Exact over micro-batches and devices; may be asked any number of times in a step. `progress` is how much of the
    training is done, from 0 to 1; `weights` are those that are trained.
    """

    @property
    def weights(self) -> Sequence[nn.Parameter]: ...

    @property
    def progress(self) -> float: ...

    def __call__(self, names: Collection[str] | None = None) -> tuple[Terms, Gradients]: ...


Step = Callable[[Gradient], tuple[Terms, Gradients]]  # what the optimiser takes as the gradient, and what is recorded


def plain(gradient: Gradient) -> tuple[Terms, Gradients]:
    """The gradient of the loss."""
    return gradient()


def learning_rate(cfg: Training, step: int) -> float:
    """The rate of the update from `step` to `step + 1`: linear warm-up that is never 0, then cosine to the minimum."""
    if step < cfg.warmup_steps:
        return cfg.learning_rate * (step + 1) / cfg.warmup_steps
    if cfg.min_learning_rate is None:
        return cfg.learning_rate
    progress = (step - cfg.warmup_steps) / max(1, cfg.steps - cfg.warmup_steps)
    return cfg.min_learning_rate + (cfg.learning_rate - cfg.min_learning_rate) * (1 + math.cos(math.pi * progress)) / 2


def train(
    model: nn.Module,
    objective: Objective,
    streams: Mapping[str, MixedStream],
    cfg: Training,
    run: Run,
    evaluate: Evaluate,
    *,
    step: Step = plain,
    rng: torch.Generator | None = None,
    stop: Stop = lambda _: False,
) -> Outcome:
    """Train `model` in place, from the run's checkpoint if it has one. `stop` sees every evaluation but the first.

    Only weights that require a gradient are trained. `rng` is whatever objective and step draw from; its state is part
    of the checkpoint. Raises Diverged at the first loss or gradient that is not finite, Interrupted once the run has
    been asked to stop and a checkpoint is written, ConfigError for a batch that cannot be split over the devices.
    """
    devices, execution = this_process(), run.configured.execution
    assert devices.device is not None
    if cfg.batch_rows < devices.num_processes:
        raise ConfigError(
            f"training.batch_rows={cfg.batch_rows} is less than the {devices.num_processes} devices of the run"
        )
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    if not weights:
        raise ConfigError("no weight is trainable")
    optimizer = _optimizer(weights, cfg)
    autocast = torch.autocast(devices.device.type, torch.bfloat16, enabled=cfg.precision == "bf16")
    done = _resume(run, model, weights, optimizer, rng)
    pace = _Pace()
    with run.saves_before_it_stops():
        while True:
            if cfg.evaluates(done.step) and done.evaluated != done.step:
                reached = _evaluate(evaluate, cfg, done, autocast, stop)
                run.record(done.step, done.evaluation)
                if reached:
                    break
            if done.step == cfg.steps:
                break
            stopping = ranks.any_of(run.stop_requested)  # a signal may have reached one rank only, or not all by now
            if stopping or (done.step > 0 and done.step % execution.checkpoint_every == 0):
                run.save_checkpoint(_state(model, weights, optimizer, rng), asdict(done))
                if stopping:
                    ranks.wait_for_all()  # the first rank to leave makes torchrun end the others
                    raise Interrupted

            began = time.perf_counter()
            batch = {name: stream.batch(done.step) for name, stream in streams.items()}
            gradient = BatchGradient(
                objective, batch, weights, done.step / cfg.steps, execution.micro_rows, devices, autocast
            )
            terms, gradients = step(gradient)
            for weight, total in zip(weights, gradients, strict=True):
                weight.grad = total
            norm = shard.clip(weights, cfg.clip_norm)
            *values, norm = torch.stack([*terms.values(), norm]).tolist()  # the step's only synchronisation
            if not math.isfinite(sum(values) + norm):
                raise Diverged(done.step)
            rate = learning_rate(cfg, done.step)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
            gradients = total = None  # as large as the model, and the next step makes its own
            done.step += 1
            tokens = sum(tokens.input_ids.numel() for tokens in batch.values())
            done.tokens += tokens
            pace.took(time.perf_counter() - began, tokens)
            by_name = {f"loss/{name}": value for name, value in zip(terms, values, strict=True)}
            run.record(done.step, {"loss": sum(values), **by_name, "grad_norm": norm, "learning_rate": rate})
    return Outcome(done.step, done.tokens, done.evaluation_tokens, done.evaluation, pace.tokens_per_second)


def _optimizer(weights: Sequence[nn.Parameter], cfg: Training) -> torch.optim.Optimizer:
    if cfg.optimizer == "adamw":
        kinds = [[w for w in weights if isinstance(w, DTensor) == divided] for divided in (False, True)]
        groups = [{"params": kind} for kind in kinds if kind]  # a fused update takes one kind at a time
        return torch.optim.AdamW(groups, cfg.learning_rate, cfg.betas, weight_decay=cfg.weight_decay, fused=True)
    from bitsandbytes.optim.adamw import AdamW8bit  # a stage's `check` has asked whether it is there

    return AdamW8bit(weights, cfg.learning_rate, cfg.betas, weight_decay=cfg.weight_decay)


@dataclass
class _Pace:
    """How fast this process trains. Its first step compiles and warms up, so it counts only if it is the only one."""

    steps: int = 0
    seconds: float = 0.0
    tokens: int = 0

    def took(self, seconds: float, tokens: int) -> None:
        if self.steps == 1:
            self.seconds, self.tokens = 0.0, 0
        self.steps, self.seconds, self.tokens = self.steps + 1, self.seconds + seconds, self.tokens + tokens

    @property
    def tokens_per_second(self) -> float | None:
        return self.tokens / self.seconds if self.steps else None


def _evaluate(evaluate: Evaluate, cfg: Training, done: "_Progress", autocast: torch.autocast, stop: Stop) -> bool:
    """Write the evaluation of this step down in `done`; return whether to stop.

    Never on a student that has learned nothing yet, and never on what a subset says: then the whole set is asked.
    """
    full = cfg.evaluates_fully(done.step)
    with torch.no_grad(), autocast:
        while True:
            # Each rank measures its copy of the model; a GPU's last bits must not make one stop and another go on.
            done.evaluation, tokens = ranks.of_the_leader(evaluate(done.step, full))
            done.evaluated, done.evaluation_tokens = done.step, done.evaluation_tokens + tokens
            reached = done.step > 0 and stop(done.evaluation)
            if full or not reached:
                return reached
            full = True


@dataclass(frozen=True)
class BatchGradient:
    """Gradient, by backward passes over the micro-batches of this process's part of the batch."""

    objective: Objective
    batch: Batch
    weights: Sequence[nn.Parameter]
    progress: float
    micro_rows: int | None
    devices: "PartialState"
    autocast: torch.autocast

    def __call__(self, names: Collection[str] | None = None) -> tuple[Terms, Gradients]:
        terms: Terms = {}
        mine = [t.rows(self.devices.process_index, step=self.devices.num_processes) for t in self.batch.values()]
        for parts in zip(*(tokens.micro_batches(self.micro_rows) for tokens in mine), strict=True):
            with self.autocast:
                part = self.objective({n: t.to(self.devices.device) for n, t in zip(self.batch, parts, strict=True)})
            wanted = [value for name, value in part.items() if names is None or name in names]
            if wanted:
                torch.stack(wanted).sum().backward()
            for name, value in part.items():
                terms[name] = terms.get(name, 0) + value.detach()
        gradients: Gradients = [weight.grad for weight in self.weights]
        for weight in self.weights:
            weight.grad = None
        own = (
            g for g in gradients if g is not None and not isinstance(g, DTensor)
        )  # what is divided is summed already
        _add_up_over_devices([*terms.values(), *own], self.devices)
        return terms, gradients


def _add_up_over_devices(parts: Iterable[Tensor], devices: "PartialState") -> None:
    if devices.num_processes > 1:
        for part in parts:
            torch.distributed.all_reduce(part)


# --- the loop's state, as tensors and a few numbers ----------------------------------------------------------------


@dataclass
class _Progress:
    step: int = 0
    evaluated: int = -1  # the step of the last evaluation
    evaluation: dict[str, float] = field(default_factory=dict)
    tokens: int = 0
    evaluation_tokens: int = 0


def _state(
    model: nn.Module,
    weights: Sequence[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    rng: torch.Generator | None,
) -> dict[str, Tensor]:
    state = {f"model.{name}": shard.whole(weight.detach()) for name, weight in model.named_parameters()}
    for index, weight in enumerate(weights):
        for key, value in optimizer.state.get(weight, {}).items():
            if not isinstance(value, Tensor):
                value = torch.tensor(value)  # a count of steps
            elif key.startswith("qmap"):
                value = value.clone()  # what 8 bits stand for: one tensor of all weights, and a file holds none twice
            state[f"optimizer.{index}.{key}"] = shard.whole(value)
    return state if rng is None else state | {"rng": rng.get_state()}


def _resume(
    run: Run,
    model: nn.Module,
    weights: Sequence[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    rng: torch.Generator | None,
) -> _Progress:
    saved = run.load_checkpoint()
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
                optimizer.state[weight][name] = value.item()
            else:
                same = value.shape == weight.shape  # a count of steps is not divided
                optimizer.state[weight][name] = shard.like(value, weight) if same else value.to(weight.device)
    if rng is not None:
        rng.set_state(tensors["rng"])
    return _Progress(**progress)
