"""The loop: exact accumulation, the schedule, evaluation and stopping, divergence, and resuming bit by bit."""

import math
import re
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.conftest import DEVICE, SHAPE, execution, lively, metrics, training
from undo.data.store import TokenStore
from undo.data.stream import MixedStream
from undo.evaluate.evaluator import Measured
from undo.losses import cross_entropy, uniform_kl
from undo.prepare_models.pretrain import Pretrain
from undo.runs.directory import Diverged, Interrupted
from undo.runs.run import Run
from undo.train.loop import learning_rate, train
from undo.unlearn import GradDiff, Smoothing

pytestmark = pytest.mark.device


def make(folder: Path, cfg=None, **run_execution) -> tuple[Run, Pretrain]:
    config = Pretrain.model_validate(
        {
            "name": "x",
            "data": "prepare/data",
            "model": SHAPE.model_dump(),
            "mixture": {"retain": 0.5, "forget": 0.5},
            "training": (cfg or training()).model_dump(),
            "evaluation": {"name": "accuracy"},
            "execution": execution(**run_execution).model_dump(),
        },
        strict=False,
    )
    run = Run(folder, "tiny", "pretrain/x")
    run.claim(config)
    run.open(config)
    return run, config


def stream(data, rows=4, seed=0) -> MixedStream:
    stores = {role: TokenStore(data.folder / "train" / role) for role in ("retain", "forget")}
    return MixedStream(stores, {"retain": 0.5, "forget": 0.5}, rows, seed)


def go(
    folder,
    data,
    model=None,
    cfg=None,
    evaluate=lambda step, full: Measured({"retain": 0.0, "forget": 0.0}, 10),
    objective=None,
    **more,
):
    """One small training -> the model and the outcome."""
    options = {key: more.pop(key) for key in ("rng", "stop", "step") if key in more}
    rows = more.pop("rows", 4)
    run, config = make(folder, cfg, **more)
    model = (model or lively(SHAPE.build(0))).to(DEVICE)
    terms = objective(model) if objective else lambda batch: {"ce": cross_entropy(model, batch["train"])}
    outcome = train(
        model, terms, {"train": stream(data, rows)}, config.training, config.execution, run, evaluate, **options
    )
    return model, outcome


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_a_step_begins_without_the_last_one_s_gradient(tmp_path, data):
    """It is as large as the model."""
    last: list[weakref.ref] = []

    def step(gradient):
        assert not [tensor for tensor in last if tensor() is not None]
        terms, gradients = gradient()
        last[:] = [weakref.ref(tensor) for tensor in gradients]
        return terms, gradients

    go(tmp_path, data, step=step)
    assert last


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_accumulation_over_micro_batches_is_exact(tmp_path, data, rows):
    whole, _ = go(tmp_path / "a", data, lively(SHAPE.build(0)).double())
    parts, _ = go(tmp_path / "b", data, lively(SHAPE.build(0)).double(), micro_rows=rows)
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-6)  # Adam's first steps magnify rounding; a wrong mean is 1e-3
    one, two = (metrics(tmp_path / x / "tiny/pretrain/x") for x in "ab")
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=1e-6)


class Watched:
    """A stream that says which batches it was asked for."""

    def __init__(self, rows: MixedStream, events: list):
        self.rows, self.events = rows, events

    def batch(self, step, rank, ranks):
        self.events.append(("drawn", step))
        return self.rows.batch(step, rank, ranks)


def watched(folder, data, monkeypatch, **more) -> tuple[list, nn.Module]:
    """One small training -> which batch was drawn when, and when the loop waited for its numbers; and the model."""
    events, model, synchronises = [], lively(SHAPE.build(0)), torch.Tensor.tolist
    run, config = make(folder, training(evaluate_every=2), checkpoint_every=2)

    def tolist(tensor):
        if tensor.is_floating_point():
            events.append("waited")
        return synchronises(tensor)

    def objective(batch):
        events.append("computed")
        return {"ce": cross_entropy(model, batch["train"])}

    def evaluate(step, full):
        events.append("evaluated")
        return Measured({"retain": step / 6, "forget": 0.0}, 10)

    streams = {"train": Watched(stream(data), events)}
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "tolist", tolist)
        train(model, objective, streams, config.training, config.execution, run, evaluate, **more)
    return events, model


def steps_of(events: list) -> list[int]:
    return [event[1] for event in events if isinstance(event, tuple)]


def test_the_next_batch_is_drawn_before_a_step_is_waited_for(tmp_path, data, monkeypatch):
    """While a GPU computes. Each once, none after the last; and bit by bit what a loop that draws in time does."""
    events, trained = watched(tmp_path, data, monkeypatch)
    step = ["computed", ("drawn", 1), "waited", "computed", ("drawn", 2), "waited", "evaluated"]
    assert events[: len(step) + 2] == ["evaluated", ("drawn", 0), *step]
    assert events[-3:] == ["computed", "waited", "evaluated"]
    assert steps_of(events) == [0, 1, 2, 3, 4, 5]

    model, batches, losses = lively(SHAPE.build(0)), stream(data), []
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, betas=training().betas, weight_decay=0.0, fused=True)
    for number in range(6):
        loss = cross_entropy(model, batches.batch(number))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), training().clip_norm or math.inf)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert same(model, trained)
    assert [line["loss"] for line in metrics(tmp_path / "tiny/pretrain/x") if "loss" in line] == losses


def test_a_batch_that_was_drawn_for_nothing_is_drawn_again(tmp_path, data, monkeypatch):
    """Ahead of an evaluation that ends the run, and of a request to stop, after which the run is resumed."""
    _, undisturbed = watched(tmp_path / "a", data, monkeypatch)
    reached, _ = watched(tmp_path / "b", data, monkeypatch, stop=lambda found: found["retain"] >= 0.6)
    assert steps_of(reached) == [0, 1, 2, 3, 4]

    def step(gradient):
        monkeypatch.setattr(Run, "_stop_requested", gradient.progress == 0.5)
        return gradient()

    with pytest.raises(Interrupted):
        watched(tmp_path / "c", data, monkeypatch, step=step)
    monkeypatch.setattr(Run, "_stop_requested", False)
    rest, resumed = watched(tmp_path / "c", data, monkeypatch)
    assert steps_of(rest) == [4, 5]
    assert same(resumed, undisturbed)
    one, two = (tmp_path / x / "tiny/pretrain/x/metrics.jsonl" for x in "ac")
    assert one.read_bytes() == two.read_bytes()


def test_schedule():
    cfg = training(steps=100, learning_rate=1.0, min_learning_rate=0.1, warmup_steps=4)
    rates = [learning_rate(cfg, step) for step in range(100)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert min(rates) > 0
    assert rates[52] == pytest.approx(0.55)
    assert rates[99] == pytest.approx(0.1, abs=1e-3)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert {learning_rate(training(warmup_steps=1), step) for step in range(6)} == {1e-2}  # Table 4: one warm-up step


def test_evaluations_stand_at_the_top_of_the_step(tmp_path, data):
    _, outcome = go(tmp_path, data, cfg=training(steps=7, evaluate_every=3, evaluate_at=(1,)))
    lines = metrics(tmp_path / "tiny/pretrain/x")
    assert [line["step"] for line in lines if "retain" in line] == [0, 1, 3, 6, 7]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6, 7]
    assert outcome.steps == 7
    assert outcome.evaluation_tokens == 50
    assert outcome.tokens == 7 * 4 * 32


def test_stops_at_the_first_evaluation_that_satisfies_but_never_untrained(tmp_path, data):
    _, outcome = go(tmp_path, data, stop=lambda _: True)
    assert outcome.steps == 3  # not 0


def test_a_subset_never_stops_a_run(tmp_path, data):
    """Promising on the subset at steps 2 and 4; the whole set agrees at step 4 only. The last answer is recorded."""
    asked = []

    def evaluate(step, full):
        asked.append((step, full))
        return Measured({"retain": float(not full or step == 4), "forget": 0.0}, 100 if full else 1)

    cfg = training(steps=8, evaluate_every=2, evaluate_fully_at=(6,))
    _, outcome = go(tmp_path, data, cfg=cfg, evaluate=evaluate, stop=lambda e: e["retain"] == 1)
    assert asked == [(0, True), (2, False), (2, True), (4, False), (4, True)]
    assert outcome.steps == 4
    assert outcome.evaluation_tokens == 302
    lines = metrics(tmp_path / "tiny/pretrain/x")
    assert [line["retain"] for line in lines if "retain" in line] == [0.0, 0.0, 1.0]


def test_whole_set_first_last_and_at_chosen_steps(tmp_path, data):
    asked = {}

    def evaluate(step, full):
        asked[step] = full
        return Measured({"retain": 0.0, "forget": 0.0}, 1)

    go(tmp_path, data, cfg=training(steps=8, evaluate_every=2, evaluate_fully_at=(5,)), evaluate=evaluate)
    assert asked == {0: True, 2: False, 4: False, 5: True, 6: False, 8: True}


def test_the_loss_falls(tmp_path, data):
    go(tmp_path, data, SHAPE.build(0), cfg=training(steps=40))
    losses = [line["loss"] for line in metrics(tmp_path / "tiny/pretrain/x") if "loss" in line]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_terms_sum_to_the_loss_and_are_recorded_by_name(tmp_path, data):
    def two_terms(model):
        return lambda batch: {
            "a": cross_entropy(model, batch["train"]),
            "b": -0.5 * cross_entropy(model, batch["train"]),
        }

    go(tmp_path, data, objective=two_terms)
    for line in metrics(tmp_path / "tiny/pretrain/x"):
        if "loss" in line:
            assert line["loss"] == pytest.approx(line["loss/a"] + line["loss/b"])
            assert line["loss/b"] == pytest.approx(-line["loss/a"] / 2)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_divergence_is_raised_at_its_step_before_the_update(tmp_path, data, poison):
    model = lively(SHAPE.build(0))
    calls = []

    def objective(_):
        def terms(batch):
            calls.append({name: w.detach().clone() for name, w in model.named_parameters()})
            return {"ce": cross_entropy(model, batch["train"]) * (poison if len(calls) == 4 else 1.0)}

        return terms

    with pytest.raises(Diverged, match="step 3"):
        go(tmp_path, data, model, objective=objective)
    assert all(torch.equal(calls[3][name], w) for name, w in model.named_parameters())


def test_frozen_weights_stay(tmp_path, data):
    model = lively(SHAPE.build(0))
    before = [w.detach().clone() for w in model.parameters()]
    for name, weight in model.named_parameters():
        weight.requires_grad_("down_proj" in name)
    go(tmp_path, data, model)
    moved = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert moved == ["down_proj" in name for name, _ in model.named_parameters()]


@pytest.mark.parametrize("stop_at", [1, 2, 3, 5])
def test_interrupted_and_resumed_is_bit_equal_to_undisturbed(tmp_path, data, monkeypatch, stop_at):
    """The objective draws from the generator at each step, so its state must come back too."""

    def objective(model):
        def terms(batch):
            if len(seen) == stop_at - 1:  # asked to stop in the middle of a step, once
                monkeypatch.setattr(Run, "_stop_requested", True)
            seen.append(1)
            scale = 1 + torch.rand((), generator=rng)
            return {"ce": scale * cross_entropy(model, batch["train"])}

        return terms

    seen, rng = [1] * 99, torch.Generator().manual_seed(4)
    undisturbed, whole = go(tmp_path / "a", data, objective=objective, rng=rng)
    seen, rng = [], torch.Generator().manual_seed(4)
    with pytest.raises(Interrupted):
        go(tmp_path / "b", data, objective=objective, rng=rng)
    assert len(seen) == stop_at
    monkeypatch.setattr(Run, "_stop_requested", False)
    with open(tmp_path / "b/tiny/pretrain/x/metrics.jsonl", "a") as file:
        file.write('{"step": 99, "torn')  # what a crash after the checkpoint leaves behind
    seen, rng = [1] * 99, torch.Generator().manual_seed(12345)
    resumed, outcome = go(tmp_path / "b", data, objective=objective, rng=rng)
    assert outcome.steps == 6
    assert outcome.flops == whole.flops > 0
    assert same(undisturbed, resumed)
    one, two = (tmp_path / x / "tiny/pretrain/x/metrics.jsonl" for x in "ab")
    assert one.read_bytes() == two.read_bytes()


def test_an_evaluation_that_is_not_finite_is_null_on_disk_and_nan_when_read(tmp_path, data, monkeypatch):
    """In the records, in a checkpoint, and in run.json."""

    def evaluate(step, full):
        monkeypatch.setattr(Run, "_stop_requested", step == 3)
        return Measured({"retain": math.nan, "forget": math.inf}, 10)

    with pytest.raises(Interrupted):
        go(tmp_path, data, evaluate=evaluate)
    monkeypatch.setattr(Run, "_stop_requested", False)
    _, outcome = go(tmp_path, data, evaluate=evaluate)
    run, _ = make(tmp_path)
    run.finish(evaluation=outcome.evaluation)
    for name in ("metrics.jsonl", "run.json"):
        assert '"retain": null' in (text := (run.folder / name).read_text())
        assert not re.search("NaN|Infinity", text)
    assert all(math.isnan(value) for value in run.facts["evaluation"].values())
    assert [*run.evaluations()] == [0, 3, 6]
    assert all(math.isnan(found["retain"]) and math.isnan(found["forget"]) for found in run.evaluations().values())


def two_terms(model):
    """Something to forget and something to retain, of one stream."""
    return lambda batch: {
        "forget": -0.1 * uniform_kl(model, batch["train"]),
        "retain": cross_entropy(model, batch["train"]),
    }


def test_a_step_that_draws_is_resumed_bit_by_bit(tmp_path, data, monkeypatch):
    method = Smoothing(base=GradDiff(), sigma=0.01, samples=2)

    def run_it(folder, seed, stop_at=None):
        rng, taken = torch.Generator().manual_seed(seed), []

        def step(gradient):
            taken.append(1)
            if len(taken) == stop_at:
                monkeypatch.setattr(Run, "_stop_requested", True)
            return method.step(gradient, rng)

        return go(folder, data, objective=two_terms, rng=rng, step=step)

    undisturbed, _ = run_it(tmp_path / "a", 4)
    with pytest.raises(Interrupted):
        run_it(tmp_path / "b", 4, stop_at=3)
    monkeypatch.setattr(Run, "_stop_requested", False)
    resumed, _ = run_it(tmp_path / "b", 12345)
    assert same(undisturbed, resumed)
    one, two = (tmp_path / x / "tiny/pretrain/x/metrics.jsonl" for x in "ab")
    assert one.read_bytes() == two.read_bytes()


def test_checkpoint_interval_changes_nothing(tmp_path, data):
    one, _ = go(tmp_path / "a", data, checkpoint_every=1)
    two, _ = go(tmp_path / "b", data, checkpoint_every=100)
    assert same(one, two)
