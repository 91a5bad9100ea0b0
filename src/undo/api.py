"""The pipeline as functions on Hugging Face models in memory: `import undo` in a notebook.

No YAML and no folder of runs. The loop, the losses and the methods are those of the command line. Every function that
trains or perturbs returns a new model in fp32, on the machine's device, and leaves the one it was given as it was.
Texts are strings, for which a tokenizer is needed, or documents as token ids.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from transformers import PreTrainedModel

from undo.attacks.relearn import BROKEN
from undo.config.mistakes import ConfigError
from undo.config.schema import Execution, Role, Training
from undo.corrupt import Noise
from undo.data.ends import family_ends
from undo.data.rows import PackedDocuments
from undo.data.stream import MixedStream
from undo.evaluate.evaluator import Measured
from undo.lm import place as placing
from undo.lm.disk import require_finite
from undo.lm.read import head
from undo.lm.tokens import Tokens, collate, token_ids
from undo.losses import cross_entropy, forward_kl
from undo.results.attacked import worst_case
from undo.results.results import Results
from undo.runs.directory import Diverged
from undo.runs.ranks import this_process
from undo.settings import publish
from undo.train.gradient import Objective, Step, plain
from undo.train.loop import train
from undo.train.parents import computed_in
from undo.train.recorder import InMemory
from undo.unlearn import health
from undo.unlearn.method import Method

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from transformers import PreTrainedTokenizerBase

Texts = Sequence[str] | Sequence[Sequence[int]]


def unlearn(
    model: PreTrainedModel,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    *,
    method: Method,
    forget: Texts,
    retain: Texts,
    steps: int,
    learning_rate: float,
    **options: Any,
) -> PreTrainedModel:
    """A copy of `model` in which `method` has suppressed what is in `forget`. Section 4.

    method: one of undo.GradDiff, MaxEnt, RMU, ... with its hyper-parameters, or a Method of your own. options: see
    `finetune`; a step takes `batch_rows` rows of each role. Raises ConfigError if the method trains nothing, or one of
    its terms has no gradient; Diverged with the step if the loss is not finite.
    """
    copy, rng = _copy(model), torch.Generator().manual_seed(options.get("seed", 0))
    reference = placing.freeze(_copy(model)) if method.needs_reference else None
    texts: dict[Role, Texts] = {"retain": retain, "forget": forget}
    with _placed(copy), _placed(reference):
        recorder = InMemory(steps, options.pop("title", "unlearn"))
        objective, step = health.begin(method, copy, reference, rng, recorder.record)
        _train(copy, objective, texts, tokenizer, steps, learning_rate, recorder, step=step, rng=rng, **options)
    return copy.requires_grad_(True)


def corrupt(model: PreTrainedModel, alpha: float, beta: float = 0.1, *, seed: int = 0, **noise: Any) -> PreTrainedModel:
    """A copy of `model`, shrunk and perturbed: (1 - alpha) theta + alpha beta N. Section 5, Appendix C.

    noise: the other keys of undo.Noise, such as norms="paper".
    """
    copy = _copy(model).cpu()  # the generator's numbers are those of a CPU
    fresh = None
    if noise.get("distribution") == "init":
        from undo.lm.disk import fresh as initialised

        fresh = initialised(copy.config, seed)
    Noise(alpha=alpha, beta=beta, **noise).apply(copy, fresh, torch.Generator().manual_seed(seed))
    return cast(PreTrainedModel, copy.to(model.device))  # pyright: ignore[reportArgumentType]


def distill(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    texts: Texts,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    *,
    steps: int,
    learning_rate: float,
    retain: Texts | None = None,
    within: float | None = None,
    check_every: int = 50,
    **options: Any,
) -> PreTrainedModel:
    """A copy of `student`, trained on the teacher's outputs over unlabelled `texts` by KL(teacher || student).

    within: stop at the first check, after every `check_every` steps, at which the cross entropy on `retain` is within
    this share of the teacher's (the paper: 0.05); None: train for all steps. options: see `finetune`. With a tokenizer,
    models that are padded to different widths have one vocabulary. Raises ValueError for `within` without `retain`,
    ConfigError for models of different vocabularies.
    """
    if within is not None and retain is None:
        raise ValueError("within compares student and teacher on `retain`: give some retain texts")
    copy, frozen = _copy(student), placing.freeze(_copy(teacher))
    least = min(len(head(model).weight) for model in (student, teacher))
    vocabulary = least if tokenizer is not None and len(tokenizer) <= least else None
    with _placed(copy), _placed(frozen):
        target = None if within is None else _nats(frozen, _rows(retain or (), tokenizer, copy, options))
        recorder = InMemory(steps, options.pop("title", "distill"))
        _train(
            copy,
            lambda batch: {"kl": forward_kl(copy, frozen, batch["retain"], vocabulary)},
            {"retain": texts},
            tokenizer,
            steps,
            learning_rate,
            recorder,
            measure={} if retain is None or within is None else {"retain": retain},
            evaluate_every=check_every,
            stop=lambda found: target is not None and within is not None and found["retain"] <= target * (1 + within),
            **options,
        )
    return copy


def finetune(
    model: PreTrainedModel,
    texts: Texts,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    *,
    steps: int,
    learning_rate: float,
    **options: Any,
) -> PreTrainedModel:
    """A copy of `model`, trained on texts by cross entropy: pretraining in the small, or one attack without its curve.

    options: length (256 tokens of a row, into which documents are packed), batch_rows (8 rows of a step), seed (0, of
    the order of the data), title (of the progress bar; "" shows none), and all other keys of the block `training` of a
    config, such as warmup_steps, min_learning_rate, weight_decay, clip_norm, precision.
    """
    copy = _copy(model)
    with _placed(copy):
        recorder = InMemory(steps, options.pop("title", "finetune"))
        _train(copy, _likelihood(copy), {"forget": texts}, tokenizer, steps, learning_rate, recorder, **options)
    return copy


@dataclass(frozen=True)
class Relearned:
    """What relearning attacks brought back: for each learning rate a curve, step -> performance on the forget texts."""

    curves: dict[float, dict[int, float]]
    higher_is_better: bool  # whether larger numbers mean that more came back
    unit: str

    @property
    def worst_case(self) -> dict[int, float]:
        """At each step the best performance over all rates; one that diverged counts up to its end."""
        return worst_case(list(self.curves.values()), self.higher_is_better)

    @property
    def last(self) -> float:
        """The worst case at the end of the attack; NaN where every rate diverged at once."""
        return self.worst_case[max(self.worst_case)] if self.worst_case else math.nan

    def plot(self) -> "Figure":
        """Thin for each rate, bold for the worst case, as in Figure 4."""
        from undo.report.figures.style import COLORS, panels

        figure, (axis,) = panels(1)
        for rate, curve in self.curves.items():
            axis.plot(list(curve), list(curve.values()), linewidth=0.8, label=f"rate {rate:g}")
        worst = self.worst_case
        axis.plot(list(worst), list(worst.values()), linewidth=2.2, color=COLORS["unlearned"], label="worst case")
        axis.set_xlabel("relearning steps", fontsize=8)
        axis.set_ylabel(f"forget {self.unit}", fontsize=8)
        axis.legend(fontsize=7, frameon=False)
        return figure


def relearn(
    model: PreTrainedModel,
    texts: Texts,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    *,
    rates: Sequence[float],
    steps: int,
    measured_on: Texts | None = None,
    measure: Callable[[PreTrainedModel], float] | None = None,
    higher_is_better: bool = False,
    unit: str = "cross entropy (nats)",
    evaluate_every: int = 10,
    **options: Any,
) -> Relearned:
    """Attack a model by finetuning copies of it on the forget texts, one for each learning rate. Section 2, Table 4.

    measured_on: held-out forget texts whose cross entropy makes the curve; None: the texts themselves. measure: instead
    of it, a function of the model that is being attacked; then `higher_is_better` and `unit` say what it returns.
    options: see `finetune`. A rate at which the loss is not finite ends early: it is an outcome, not an error. Raises
    ConfigError if it is not finite before any update, which is no rate's doing.
    """
    curves: dict[float, dict[int, float]] = {}
    options = {"warmup_steps": 1, **options}
    title = options.pop("title", "relearn")
    for rate in rates:
        copy = _copy(model)
        recorder = InMemory(steps, title and f"{title}, rate {rate:g}")
        with _placed(copy):
            try:
                _train(
                    copy,
                    _likelihood(copy),
                    {"forget": texts},
                    tokenizer,
                    steps,
                    rate,
                    recorder,
                    measure=measure or {"forget": texts if measured_on is None else measured_on},
                    evaluate_every=evaluate_every,
                    **options,
                )
            except Diverged as diverged:
                if diverged.step == 0:
                    raise ConfigError(BROKEN.format("the model")) from None
        curves[rate] = {int(line["step"]): line["forget"] for line in recorder.records if "forget" in line}
    return Relearned(curves, higher_is_better, unit)


def evaluate(
    model: PreTrainedModel, tokenizer: "PreTrainedTokenizerBase | None" = None, *, length: int = 256, **texts: Texts
) -> dict[str, float]:
    """Cross entropy in nats per token on named sets of texts: evaluate(model, tokenizer, retain=..., forget=...)."""
    copy = placing.freeze(_copy(model))
    with _placed(copy):
        return {name: _nats(copy, _rows(some, tokenizer, copy, {"length": length})) for name, some in texts.items()}


def read_results(runs: str | Path, setting: str) -> Results:
    """All finished runs of a setting, as the table and the figures see them: `read_results("runs", "demo").table()`."""
    return publish.read(Path(runs), setting)


# --- underneath ------------------------------------------------------------------------------------------------------


def _copy(model: PreTrainedModel) -> PreTrainedModel:
    """fp32 master weights, without dropout: a gradient here is a function of the batch.

    Raises ConfigError for NaN or infinity among them.
    """
    require_finite("the model", model)
    return deepcopy(model).float().eval().requires_grad_(True)


@contextmanager
def _placed(model: PreTrainedModel | None) -> Iterator[None]:
    """The model on this process's device, with the attention that keeps packed documents apart, and back again."""
    if model is None:
        yield
        return
    device, attention = this_process().device, cast(str, model.config._attn_implementation)
    assert device is not None
    placing.place(model, device)
    try:
        yield
    finally:
        model.set_attn_implementation(attention)


def _likelihood(model: PreTrainedModel) -> Objective:
    return lambda batch: {"ce": cross_entropy(model, batch["forget"])}


def _rows(
    texts: Texts, tokenizer: "PreTrainedTokenizerBase | None", model: PreTrainedModel, options: Mapping[str, Any]
) -> PackedDocuments:
    """Documents as the prepare stage encloses and packs them. Raises TypeError for strings without a tokenizer."""
    ends = None if tokenizer is None else family_ends(tokenizer)
    documents = []
    for text in texts:
        if not isinstance(text, str):
            documents.append(np.asarray(text, dtype=np.uint32))
        elif tokenizer is None or ends is None:
            raise TypeError("these texts are strings: give the model's tokenizer, too")
        else:
            documents.append(ends.enclose(token_ids([text], tokenizer)[0]))
    return PackedDocuments(documents, options.get("length", 256), model.config.vocab_size)


@torch.no_grad()
def _nats(model: PreTrainedModel, rows: PackedDocuments, at_once: int = 16) -> float:
    """Mean cross entropy over all tokens of the rows; NaN where no token is predicted."""
    total, labels = 0.0, 0
    for start in range(0, len(rows), at_once):
        some: Tokens = collate((rows[i] for i in range(start, min(start + at_once, len(rows)))), rows.length)
        total += float(cross_entropy(model, some.to(model.device))) * some.total
        labels += some.total
    return total / labels if labels else math.nan


def _train(
    model: PreTrainedModel,
    objective: Objective,
    texts: Mapping[Role, Texts],
    tokenizer: "PreTrainedTokenizerBase | None",
    steps: int,
    learning_rate: float,
    recorder: InMemory,
    *,
    measure: Mapping[Role, Texts] | Callable[[PreTrainedModel], float] | None = None,
    evaluate_every: int | None = None,
    stop: Callable[[Mapping[str, float]], bool] = lambda _: False,
    step: Step = plain,
    rng: torch.Generator | None = None,
    length: int = 256,
    batch_rows: int = 8,
    seed: int = 0,
    micro_rows: int | None = None,
    **training: Any,
) -> None:
    """The loop on texts in memory. measure: texts by role, or a function of the model, measured as `forget`."""
    sizes = {"length": length}
    every: dict[Role, PackedDocuments] = {role: _rows(some, tokenizer, model, sizes) for role, some in texts.items()}
    cfg = computed_in(
        Training.model_validate(
            {
                "steps": steps,
                "batch_rows": batch_rows,
                "learning_rate": learning_rate,
                "evaluate_every": evaluate_every or steps,
                **training,
            },
            strict=False,
        )
    )
    streams = {
        role: MixedStream({role: rows}, {role: 1.0}, batch_rows, seed + index)
        for index, (role, rows) in enumerate(every.items())
    }
    validation = (
        {}
        if measure is None or callable(measure)
        else {r: _rows(t, tokenizer, model, sizes) for r, t in measure.items()}
    )

    def evaluated(_step: int, _full: bool) -> Measured:
        if callable(measure):
            return Measured({"forget": measure(model)}, 0)
        return Measured({role: _nats(model, rows) for role, rows in validation.items()}, 0)

    train(
        model,
        objective,
        streams,
        cfg,
        Execution(micro_rows=micro_rows),
        recorder,
        evaluated,
        stop=stop,
        step=step,
        rng=rng,
    )
