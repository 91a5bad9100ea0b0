"""From a model and an objective to a finished training run and its facts."""

import fcntl
import json
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from undo.config.files import as_json, digest, numbers, open_lock, write_atomically
from undo.config.mistakes import ConfigError
from undo.config.schema import Role, RunName, as_raw
from undo.evaluate.evaluator import Measured
from undo.runs import precision, ranks
from undo.runs.directory import RunDirectory
from undo.runs.run import Run
from undo.train.parents import computed_in, open_stores, saved_dtype
from undo.train.stage import TrainingStage

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from undo.data.rows import Rows
    from undo.train.gradient import Objective, Step
    from undo.train.loop import Stop


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
) -> Generator[int, None, dict[str, Any]]:
    """Train `model` on the config's streams, step by step -> the facts for run.json: steps, tokens, FLOPs, evaluation,
    seeds.

    `starts_as` names the run whose unchanged model this is. All runs that start from it share its evaluation.
    """
    import torch

    from undo.data.rows import few
    from undo.data.stream import MixedStream
    from undo.lm.disk import shape
    from undo.train import shard
    from undo.train.gradient import plain
    from undo.train.loop import mixed_precision, stepwise

    data, stores = run.sibling(cfg.data), open_stores(cfg, run)
    largest = max(store.largest for store in stores.values())
    if largest >= model.config.vocab_size:
        raise ConfigError(
            f"{data.folder} holds token {largest}, the model has a vocabulary of {model.config.vocab_size}\n"
            f"prepare the data with the model's tokenizer"
        )
    training, length = computed_in(cfg.training), max(store.length for store in stores.values())
    if said := precision.note(cfg.training.precision, training.precision):
        print(said, flush=True)
    rows: Mapping[Role, Rows] = stores
    if cfg.documents is not None:
        rows = {role: few(store, cfg.documents, cfg.seed_for("order")) for role, store in stores.items()}
    streams = {
        name: MixedStream(rows, mixture, training.batch_rows, cfg.seed_for("order") + index)
        for index, (name, mixture) in enumerate(cfg.streams().items())
    }
    if cfg.execution.shard == "full":  # now: noise, verification and the choice of weights want them whole
        shard.divide(model)
    evaluator = cfg.evaluation.load(run.sibling(cfg.validated_on), model.device)

    last = Measured({}, 0)

    def measured(full: bool) -> Measured:
        nonlocal last
        last = evaluator(model, full)
        return last

    def evaluate(step: int, full: bool) -> Measured:
        if step == 0 and starts_as is not None:
            return shared_evaluation(run.sibling(starts_as), cfg, lambda: measured(full))
        return measured(full)

    outcome = yield from stepwise(
        model,
        objective,
        streams,
        training,
        cfg.execution,
        run,
        evaluate,
        step=step or plain,
        rng=rng,
        stop=stop or (lambda _: False),
    )
    evaluation = outcome.evaluation
    if cfg.leaves_model and rounded(model, saved_dtype(cfg, run)):  # what is kept is what is measured
        with torch.no_grad(), mixed_precision(training, model.device):
            evaluation = ranks.of_the_leader(measured(True)).values
    if run.leads:
        write_atomically(evaluation_file(run, cfg), as_json(evaluation))  # for those who start as this model
        write_atomically(run.outcomes_file, as_json({role: items._asdict() for role, items in last.outcomes.items()}))
    size = shape(model)
    return {
        "steps": outcome.steps,
        "tokens": outcome.tokens,
        "tokens_per_second": outcome.tokens_per_second,
        "evaluation_seconds": round(outcome.evaluation_seconds, 3),
        "flops": outcome.flops,
        "evaluation_flops": size.forward_flops(length) * outcome.evaluation_tokens,
        "parameters": size.parameters,
        "precision": training.precision,
        "evaluation": evaluation,
        "seeds": {concern: cfg.seed_for(concern) for concern in ("init", "order", "noise", "objective")},
    }


def rounded(model: "PreTrainedModel", dtype: "torch.dtype") -> bool:
    """Round the weights to what `dtype` can hold -> whether it is another one. Raises ConfigError for an overflow."""
    import torch

    from undo.train import shard

    if dtype == model.dtype:
        return False
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.to(dtype))
            if not shard.whole(weight).isfinite().all():
                name = str(dtype).removeprefix("torch.")
                raise ConfigError(f"save_dtype={name}: a weight is too large for it; take bfloat16 or float32")
    return True


def shared_evaluation(of: RunDirectory, cfg: TrainingStage, measure: Callable[[], Measured]) -> Measured:
    """The evaluation of a run's model as `cfg` wants it: read from the run's folder, or made and left there.

    A process that comes while it is being made waits for it. An evaluation that was read counts no tokens. Only the
    leader looks, waits and writes; all ranks measure.
    """
    if not ranks.leads():
        made: Measured | None = ranks.of_the_leader(None)
        return measure() if made is None else made
    file = evaluation_file(of, cfg)
    with open_lock(file.with_suffix(".lock")) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = _left_there(file)
        ranks.of_the_leader(found)
        if found is not None:
            return found
        measured = measure()
        write_atomically(file, as_json(measured.values))
    return measured


def _left_there(file: Path) -> Measured | None:
    """An evaluation that was written; None for none, and for a damaged file, since it can be made again."""
    try:
        values = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    return Measured(numbers(values), 0) if isinstance(values, dict) and values else None


def evaluation_file(of: RunDirectory, cfg: TrainingStage) -> Path:
    """The file for one way to evaluate the run's model: the evaluation, its data, the precision, CPU or GPU."""
    import torch

    how = [
        as_raw(cfg.evaluation),
        of.sibling(cfg.validated_on).identity(),
        computed_in(cfg.training).precision,
        torch.cuda.is_available(),
    ]
    folder = of.folder / "evaluations"
    if folder.is_symlink():
        raise ConfigError(f"{folder}: is a symbolic link, and is not followed; delete it")
    folder.mkdir(exist_ok=True)
    return folder / f"{digest(how)}.json"
