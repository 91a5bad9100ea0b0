"""What makes a large model fit: recomputed activations, optimiser states in 8 bits, and the estimate before loading."""

import importlib.util
from types import SimpleNamespace

import pytest
import torch
from conftest import SHAPE, batch, lively, metrics, training
from test_architectures import build
from test_train import go, same
from transformers import PreTrainedModel

from undo import models
from undo.config import ConfigError
from undo.losses import activation_mse, cross_entropy
from undo.prepare_models import ReducedGemma2
from undo.run import Interrupted, Run

CPU = torch.device("cpu")
# wide enough that most matrices have their state in 8 bits: those of 4,096 weights and more
WIDE = ReducedGemma2(vocab_size=448, hidden_size=64, intermediate_size=128, layers=2, heads=2, kv_heads=1, head_dim=16)


def gradients(model: PreTrainedModel, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "llama-tied", "phi", "gpt-neox"])
def test_checkpointing_changes_no_bit(name):
    """Losses on the head, on a block's output, and on all blocks and MLPs; models with dropout in their configs too."""
    tokens, plain, checkpointed = batch(length=40), build(name), build(name)
    models.place(checkpointed, CPU, checkpointed=True)

    def through_hooks(model):
        outputs, mlps = models.recorded(model, tokens)
        return sum(t.square().mean() for t in (*outputs, *mlps))

    saved = {}
    for loss in (
        lambda m: cross_entropy(m, tokens),
        lambda m: activation_mse(models.hidden_states(m, tokens, 1), torch.ones(32), tokens),
        through_hooks,
    ):
        found = []
        for model in (plain, checkpointed):
            sizes: list[int] = []
            with torch.autograd.graph.saved_tensors_hooks(lambda t, to=sizes: to.append(t.numel()) or t, lambda t: t):
                value = loss(model)
            saved[model is checkpointed] = sum(sizes)
            found.append((value.detach(), gradients(model, value)))
        (a, one), (b, two) = found
        assert torch.equal(a, b)
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)
        assert saved[True] < saved[False] / 2


def test_checkpointing_draws_no_dropout():
    """The library checkpoints only what is in training mode; a gradient here is a function of the batch."""
    model = models.place(build("gpt-neox"), CPU, checkpointed=True)
    tokens = batch(length=40)
    one, two = (models.hidden_states(model, tokens) for _ in range(2))
    assert torch.equal(one, two)


def test_a_teacher_is_not_checkpointed():
    model = models.freeze(models.place(build("llama"), CPU, checkpointed=True))
    assert not any(module.training for module in model.modules())


def test_a_checkpointed_run_is_the_same_run(tmp_path, data):
    plain, _ = go(tmp_path / "a", data)
    placed = models.place(lively(SHAPE.build(0)), CPU)
    other, _ = go(tmp_path / "b", data, placed)
    checkpointed, _ = go(tmp_path / "c", data, models.place(lively(SHAPE.build(0)), CPU, checkpointed=True))
    assert same(other, checkpointed)
    for a, b in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


def test_eight_bits_train_as_well(tmp_path, data):
    losses = {}
    for optimizer in ("adamw", "adamw_8bit"):
        go(tmp_path / optimizer, data, WIDE.build(0), cfg=training(steps=40, optimizer=optimizer))
        losses[optimizer] = [
            line["loss"] for line in metrics(tmp_path / optimizer / "tiny/pretrain/x") if "loss" in line
        ]
    assert losses["adamw"] != losses["adamw_8bit"]  # it is another optimiser
    assert losses["adamw_8bit"][0] == losses["adamw"][0]
    for a, b in zip(losses["adamw"], losses["adamw_8bit"], strict=True):
        assert b == pytest.approx(a, rel=0.03)
    assert losses["adamw_8bit"][-1] < 0.8 * losses["adamw_8bit"][0]


@pytest.mark.parametrize("stop_at", [1, 3])
def test_eight_bits_are_resumed_bit_by_bit(tmp_path, data, monkeypatch, stop_at):
    def stopping(steps):
        def objective(model):
            def terms(part):
                steps.append(1)
                if len(steps) == stop_at:
                    monkeypatch.setattr(Run, "_stop_requested", True)
                return {"ce": cross_entropy(model, part["train"])}

            return terms

        return objective

    cfg = training(optimizer="adamw_8bit", weight_decay=0.1)
    undisturbed, _ = go(tmp_path / "a", data, WIDE.build(0), cfg=cfg)
    with pytest.raises(Interrupted):
        go(tmp_path / "b", data, WIDE.build(0), cfg=cfg, objective=stopping([]))
    monkeypatch.setattr(Run, "_stop_requested", False)
    from safetensors.torch import load_file

    state = load_file(tmp_path / "b/tiny/pretrain/x/checkpoint/state.safetensors")
    assert {value.dtype for key, value in state.items() if key.endswith("state1")} == {torch.uint8, torch.float32}
    resumed, _ = go(tmp_path / "b", data, WIDE.build(7), cfg=cfg)
    assert same(undisturbed, resumed)
    one, two = (tmp_path / x / "tiny/pretrain/x/metrics.jsonl" for x in "ab")
    assert one.read_bytes() == two.read_bytes()


def test_a_missing_optimiser_is_said_before_anything_starts(data, monkeypatch):
    from undo.stage import TrainingStage

    raw = {"name": "x", "data": "prepare/data", "evaluation": {"kind": "cross_entropy"}}
    config = TrainingStage.model_construct(**raw, training=training(optimizer="adamw_8bit"))
    config.check()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="uv sync --extra 8bit"):
        config.check()


def test_tokens_per_second_leave_the_first_step_out(tmp_path, data, monkeypatch):
    """By a clock of ours: 10 s for the first step, 2 s for each other; evaluation takes an hour."""
    from undo import train

    now = [0.0]
    durations = iter([10.0, *[2.0] * 5])
    began = []

    def clock():
        began.append(now[0])
        if len(began) % 2 == 0:
            now[0] += next(durations)
        return now[0]

    def evaluate(step, full):
        now[0] += 3600
        return train.Measured({"retain": 0.0, "forget": 0.0}, 1)

    monkeypatch.setattr(train, "time", SimpleNamespace(perf_counter=clock))
    _, outcome = go(tmp_path, data, evaluate=evaluate)
    assert outcome.tokens_per_second == pytest.approx(4 * 32 / 2)
