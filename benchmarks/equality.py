"""Before anything is timed: are the fast paths of this device equal to the formulas? Ends in a line of JSON.

    uv run benchmarks/equality.py [--small] [--compile] [--only methods --only loop] [--out FILE.jsonl]

losses     cross entropy, KL, MaxEnt, UNDIAL's KL and losses of documents, with gradients; and choices, the arg-max of
           the head: against full logits in float64
model      a model as it is placed here (its attention, sliding windows, gradient checkpointing, bf16, with --compile a
           compiled body) against the plain model with eager attention in fp32 on the CPU: loss and every gradient
methods    one step of each unlearning method in micro-batches against the whole batch in float64 on the CPU
loop       a training that is interrupted and resumed against the same one left alone (on a CPU to the last bit), and
           against the same one on the CPU
Each prints its line as it ends, and one that fails does not stop the others.
"""

import argparse
import contextlib
import json
import math
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Final, cast, get_args
from unittest.mock import patch

import baseline
import measure
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

import undo.train.loop
from undo import losses as equations
from undo.config.schema import StageConfig, Training
from undo.data.rows import PackedDocuments
from undo.data.stream import MixedStream
from undo.evaluate.evaluator import Measured
from undo.lm import place as placing
from undo.lm.read import Head
from undo.lm.tokens import MARK, Batch, Tokens, collate
from undo.losses.linear import linear_loss, linear_losses, most_likely
from undo.losses.targets import CrossEntropy, ForwardKL, LoweredKL, UniformKL
from undo.prepare_models.reduced_gemma2 import ReducedGemma2
from undo.runs.directory import Interrupted
from undo.runs.ranks import this_process
from undo.runs.run import Run
from undo.train.gradient import BatchGradient, Objective
from undo.train.loop import train
from undo.unlearn import NPO, RMU, SAM, UAM, MaxEnt, RepNoise, Smoothing, UnlearningMethod
from undo.unlearn.method import Method

SOFTCAP: Final = 30.0
STRENGTH: Final = 5.0  # UNDIAL's
CPU: Final = torch.device("cpu")
FP32, BF16 = 1e-5, 2e-2  # bounds of what is relative to float64, by the precision of the products


@dataclass(frozen=True)
class Asked:
    """Where, how large, and whether a compiled body is asked of, too."""

    device: torch.device
    small: bool = False
    compiled: bool = False
    vocabulary: int = 32_000
    tokens: int = 300


Errors = Iterator[tuple[str, float, float]]  # what, its relative error, and the bound on that


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--small", action="store_true", help="seconds on one core")
    parser.add_argument("--compile", action="store_true", help="also the compiled body of a model")
    parser.add_argument("--only", action="append", choices=CHECKS, help="may be given several times")
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file as well")
    parser.add_argument("--vocabulary", type=int)
    parser.add_argument("--tokens", type=int)
    args = parser.parse_args()
    device = this_process().device
    assert device is not None
    asked = Asked(
        device,
        args.small,
        args.compile,
        args.vocabulary or (500 if args.small else Asked.vocabulary),
        args.tokens or (40 if args.small else Asked.tokens),
    )
    torch._dynamo.config.recompile_limit = 64  # many kinds in one process
    bad = []
    for name in args.only or CHECKS:
        line = check(name, asked)
        text = json.dumps(line | measure.environment())
        print(text, flush=True)
        if args.out:
            with open(args.out, "a") as file:
                file.write(text + "\n")
        bad += [f"{name}: {what}" for what in (*line["too_large"], *([line["failed"]] if "failed" in line else []))]
    print(json.dumps({"name": "equality", "equal": not bad, "not_equal": bad}), flush=True)
    if bad:
        raise SystemExit(f"not equal: {'; '.join(bad)}")


def check(name: str, asked: Asked) -> dict[str, Any]:
    """The line of one of CHECKS: relative errors by what they are of, and those that are too large."""
    began, errors, bounds, line = time.perf_counter(), dict[str, float](), dict[str, float](), dict[str, Any]()
    try:
        for what, error, bound in CHECKS[name](asked):
            errors[what], bounds[what] = error, bound
            print(f"{name}/{what}: {error:.1e}", file=sys.stderr, flush=True)  # a check may take minutes on a card
    except Exception as reason:  # the next check may say more
        traceback.print_exc()
        line["failed"] = f"{type(reason).__name__}: {reason}"[:500]
    return {
        "name": f"equality/{name}",
        "relative_errors": {what: float(f"{error:.1e}") for what, error in errors.items()},
        "too_large": [what for what, error in errors.items() if not error <= bounds[what]],
        "seconds": round(time.perf_counter() - began, 1),
        **line,
    }


def _error(value: Tensor | None, exact: Tensor | None) -> float:
    assert value is not None
    assert exact is not None
    value, exact = value.detach().double().cpu(), exact.detach().double().cpu()
    return ((value - exact).norm() / exact.norm().clamp_min(1e-30)).item()


# --- losses from hidden states -------------------------------------------------------------------------------------


def losses(asked: Asked) -> Errors:
    for kind in ("kl", "ce", "maxent", "lowered_kl", "documents"):
        for precision, bound in (("fp32", FP32), ("bf16", BF16)):
            drawn = _Drawn(asked)
            found, exact = drawn.ours(kind, precision == "bf16"), drawn.written_out(kind)
            for what, mine, theirs in zip(("loss", "d_hidden", "d_weight", "evaluated"), found, exact, strict=True):
                yield f"{kind}/{precision}/{what}", _error(mine, theirs), bound


class _Drawn:
    """Hidden states, heads and labels of a student and a teacher, in rows of documents."""

    def __init__(self, asked: Asked) -> None:
        rng = torch.Generator().manual_seed(0)

        def draw(rows: int) -> Tensor:
            return torch.randn(rows, 64, generator=rng).to(asked.device)

        length = asked.tokens // 2 + 2
        ids = torch.randint(asked.vocabulary, (2, length), generator=rng).numpy()
        self.text = collate([[row[: length // 3], row[length // 3 :]] for row in ids], length).to(asked.device)
        self.labels = self.text.at_labels(self.text.labels)
        self.hidden, self.weight = draw(2 * length).view(2, length, 64), draw(asked.vocabulary)
        self.taught = draw(len(self.labels)), draw(asked.vocabulary)

    def ours(self, kind: str, bf16: bool) -> tuple[Tensor | None, ...]:
        hidden, weight = (t.clone().requires_grad_() for t in (self.hidden, self.weight))
        head, teacher = Head(weight, SOFTCAP), (self.taught[0], Head(self.taught[1], SOFTCAP))

        def loss() -> Tensor:
            if kind == "documents":
                return equations.of_documents([hidden], head, self.text, lambda nll, n: (nll[0] / n).square())
            target = {
                "kl": lambda: ForwardKL(*teacher),
                "ce": lambda: CrossEntropy(self.labels),
                "maxent": UniformKL,
                "lowered_kl": lambda: LoweredKL(*teacher, self.labels, STRENGTH),
            }[kind]()
            return linear_loss(self.text.at_labels(hidden), head, target)

        with torch.autocast(hidden.device.type, torch.bfloat16, enabled=bf16):
            value = loss()
            with torch.no_grad():
                evaluated = loss()
        value.backward()
        return value, hidden.grad, weight.grad, evaluated

    def written_out(self, kind: str) -> tuple[Tensor | None, ...]:
        """Full logits in float64."""
        hidden, weight = (t.double().requires_grad_() for t in (self.hidden, self.weight))
        p = baseline.capped(self.text.at_labels(hidden), weight).log_softmax(-1)
        picked = -p.gather(1, self.labels[:, None])[:, 0]
        if kind in ("kl", "lowered_kl"):
            logits = baseline.capped(self.taught[0].double(), self.taught[1].double())
            if kind == "lowered_kl":
                logits = logits.scatter_add(1, self.labels[:, None], torch.full_like(logits[:, :1], -STRENGTH))
            q = logits.log_softmax(-1)
            value = (q.exp() * (q - p)).sum()
        elif kind == "documents":
            of = self.text.at_labels(self.text.document)
            value = torch.stack([picked[of == document].mean() ** 2 for document in of.unique()]).sum()
        else:
            value = (picked if kind == "ce" else -p.mean(-1) - math.log(p.shape[1])).sum()
        value.backward()
        return value, hidden.grad, weight.grad, value


def choices(asked: Asked) -> Errors:
    """The error of an arg-max: how far the chosen logit is below the highest one, at most."""
    drawn = _Drawn(asked)
    hidden, head = drawn.text.at_labels(drawn.hidden), Head(drawn.weight, SOFTCAP)
    exact = hidden.double() @ drawn.weight.double().T
    for precision, bound in (("fp32", FP32), ("bf16", BF16)):
        with torch.autocast(asked.device.type, torch.bfloat16, enabled=precision == "bf16"):
            chosen = most_likely(hidden, head)
            each = linear_losses(hidden, head, CrossEntropy(drawn.labels))
        missed = exact.max(1).values - exact.gather(1, chosen[:, None])[:, 0]
        yield f"{precision}/most_likely", (missed / exact.max(1).values).max().item(), bound
        p = baseline.capped(hidden.double(), drawn.weight.double()).log_softmax(-1)
        yield f"{precision}/each_token", _error(each, -p.gather(1, drawn.labels[:, None])[:, 0]), bound


# --- a whole model -------------------------------------------------------------------------------------------------


def model(asked: Asked) -> Errors:
    """Two layers: documents across the kernel's blocks, grouped heads, a length that is no multiple of a block."""
    small = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16} if asked.small else {}
    paper = {"hidden_size": 320, "intermediate_size": 640, "layers": 2, "attention_softcap": 5.0, "vocab_size": 500}
    cuda = asked.device.type == "cuda"
    ways = [(bf16, checkpointed, False) for bf16 in (False, True) for checkpointed in (False, True)]
    ways += [(bf16, checkpointed, True) for bf16, checkpointed in ((False, False), (True, True)) if asked.compiled]
    for length, window in ((150, 64),) if asked.small else ((1000, 4096), (1000, 300)):
        shape = ReducedGemma2.model_validate(paper | small | {"sliding_window": window})
        cut = length * 2 // 3
        rows = ((cut, length - cut), (length // 10, length // 10, length // 2))
        text = collate([[torch.arange(n).numpy() % 500 for n in row] for row in rows], length)
        exact = _loss_and_gradients(shape.build(0), text)
        for bf16, checkpointed, compiled in ways:
            ours = placing.place(shape.build(0), asked.device, compiled, checkpointed)
            with torch.autocast(asked.device.type, torch.bfloat16, enabled=bf16):
                found = _loss_and_gradients(ours, text.to(asked.device))
            way = "bf16" if bf16 else "fp32"
            way += "/checkpointed" * checkpointed + "/compiled" * compiled
            kernel = 1e-3 if cuda else 3e-5  # of flex attention, and of another order of sums
            yield f"window_{window}/{way}/loss", _error(found[0], exact[0]), BF16 if bf16 else kernel
            worst = max(_error(a, b) for a, b in zip(found[1:], exact[1:], strict=True))
            yield f"window_{window}/{way}/worst_gradient", worst, 0.15 if bf16 else kernel


def _loss_and_gradients(network: PreTrainedModel, text: Tokens) -> list[Tensor | None]:
    loss = equations.cross_entropy(network, text)
    loss.backward()
    return [loss, *(weight.grad for weight in network.parameters())]


TINY: Final = ReducedGemma2(
    vocab_size=300, hidden_size=32, intermediate_size=64, layers=2, heads=2, kv_heads=1, head_dim=16, init_std=0.2
)
ON_BLOCKS: Final[dict[str, Any]] = {"layer": 1, "trained_layers": (0, 1), "c": 2.0, "alpha": 3.0}
MORE: Final = (  # forms that a method's defaults do not reach
    MaxEnt(retain="kl"),
    RMU(**ON_BLOCKS, coefficient="adaptive"),
    NPO(nll="batch_mean", beta=0.3),
    RepNoise(noise_weight=1.0, ascent_weight=0.5, paired=True),
    UAM(loss="representation", layer=1, trained_layers=(0, 1)),
    SAM(ascent="total"),
    SAM.model_validate({"preset": "official"}),
    Smoothing.model_validate({"preset": "faithful"}),
)


def every_method() -> list[Method]:
    """Each of the union with its defaults, and the forms that these leave out."""
    kinds: tuple[type[Method], ...] = get_args(get_args(UnlearningMethod)[0])
    return [kind(**(ON_BLOCKS if kind is RMU else {})) for kind in kinds] + list(MORE)


def methods(asked: Asked) -> Errors:
    for number, method in enumerate(every_method()):
        exact = _step(method, CPU, torch.float64, micro_rows=None)
        found = _step(method, asked.device, torch.float32, micro_rows=2)
        name = f"{number}_{method.name}"  # pyright: ignore[reportAttributeAccessIssue]
        for what, mine, theirs in zip(("terms", "gradient"), found, exact, strict=True):
            yield f"{name}/{what}", _error(mine, theirs), 1e-3


@dataclass(frozen=True)
class _Here:
    """Stands in for accelerate's PartialState, of which a process has one: here the CPU is asked beside the card."""

    device: torch.device
    num_processes: int = 1
    process_index: int = 0


def _step(method: Method, device: torch.device, dtype: torch.dtype, micro_rows: int | None) -> tuple[Tensor, Tensor]:
    """The terms of one step, and the gradient that the optimiser would take: each as one vector."""
    student, reference = (placing.place(cast(Any, TINY.build(0)).to(dtype), device) for _ in range(2))
    moved = torch.Generator().manual_seed(9)  # away from the reference, where some terms have no gradient
    with torch.no_grad():
        for name, weight in student.named_parameters():
            weight += (0.02 * torch.randn(weight.shape, generator=moved)).to(weight)
            weight.requires_grad_(method.trains(name))
    rng = torch.Generator().manual_seed(3)
    frozen = placing.freeze(reference) if method.needs_reference else None
    weights = [weight for weight in student.parameters() if weight.requires_grad]
    off = torch.autocast(device.type, torch.bfloat16, enabled=False)
    batch = {role: _stream(role, rows=4).batch(0) for role in ("retain", "forget")}
    objective = method.objective(student, frozen, rng)
    gradient = BatchGradient(objective, batch, weights, 0.25, micro_rows, cast(Any, _Here(device)), off)
    terms, gradients = method.step(gradient, rng)
    parts = [torch.zeros_like(w) if g is None else g for w, g in zip(weights, gradients, strict=True)]
    return torch.stack(list(terms.values())), torch.cat([part.flatten() for part in parts])


def _stream(role: str, rows: int, length: int = 40) -> MixedStream:
    """Documents of 5 to 20 tokens, half of which are marked as those of a pair are."""
    rng = np.random.default_rng(role == "forget")
    texts = [rng.integers(0, TINY.vocab_size, size) for size in rng.integers(5, 20, 40)]
    marked = [text | np.where(rng.random(len(text)) < 0.5, MARK, 0) for text in texts]
    return MixedStream({"retain": PackedDocuments(marked, length, 2 * MARK)}, {"retain": 1.0}, rows, seed=0)


# --- the loop ------------------------------------------------------------------------------------------------------


def loop(asked: Asked) -> Errors:
    alone, records = _trained(asked.device)
    resumed, _ = _trained(asked.device, stop_at=3)
    yield "resumed", _error(resumed, alone), 0.0 if asked.device == CPU else 1e-5  # a GPU may add in another order
    weights, expected = _trained(CPU)
    yield "weights_as_on_the_cpu", _error(alone, weights), 1e-3
    yield "losses_as_on_the_cpu", _error(records, expected), 1e-3


class _Stoppable(Run):
    stops = False

    @property
    def stop_requested(self) -> bool:
        return self.stops


def _trained(device: torch.device, stop_at: int | None = None) -> tuple[Tensor, Tensor]:
    """The weights after six steps, and the recorded losses. In step `stop_at` it is asked to stop, and then resumed."""
    training = Training(steps=6, batch_rows=4, learning_rate=1e-3, evaluate_every=3)
    config = StageConfig.model_validate({"name": "x", "execution": {"micro_rows": 2, "checkpoint_every": 2}})
    with tempfile.TemporaryDirectory() as folder:
        for attempt in range(2):
            run = _Stoppable(Path(folder), "benchmark", "train/x")
            run.claim(config)
            run.open(config)
            network = placing.place(TINY.build(attempt), device)  # both are the checkpoint's after a stop
            rng = torch.Generator().manual_seed(attempt)
            objective = _objective(network, rng, run, 2 * stop_at if stop_at and not attempt else None)
            here = patch.object(undo.train.loop, "this_process", lambda: _Here(device))
            with here, contextlib.suppress(Interrupted):
                train(
                    network,
                    objective,
                    {"train": _stream("retain", 4)},
                    training,
                    config.execution,
                    run,
                    lambda step, full: Measured({}, 0),
                    rng=rng,
                )
                break
        else:
            raise AssertionError("it was interrupted twice")
        values = [line["loss"] for line in run.records() if "loss" in line]
    return torch.cat([weight.detach().flatten() for weight in network.parameters()]), torch.tensor(values)


def _objective(network: PreTrainedModel, rng: torch.Generator, run: _Stoppable, last: int | None) -> Objective:
    """Cross entropy times a draw; micro-batch `last` asks for a stop."""
    calls = count(1)

    def terms(batch: Batch) -> dict[str, Tensor]:
        run.stops = next(calls) == last or run.stops
        return {"ce": (0.5 + torch.rand((), generator=rng)).item() * equations.cross_entropy(network, batch["train"])}

    return terms


CHECKS: Final[dict[str, Callable[[Asked], Errors]]] = {
    "losses": losses,
    "choices": choices,
    "methods": methods,
    "loop": loop,
    "model": model,  # the longest
}


if __name__ == "__main__":
    main()
