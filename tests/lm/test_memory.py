"""What makes a large model fit: recomputed activations, optimiser states in 8 bits, and the estimate before loading."""

import importlib.util
from types import SimpleNamespace

import fits
import pytest
import torch
from transformers import PreTrainedModel

from tests.conftest import SHAPE, batch, lively, metrics, training
from tests.lm.test_architectures import build
from tests.train.test_loop import go, same
from undo.config.mistakes import ConfigError
from undo.config.schema import Execution, as_raw, validate
from undo.lm import disk, memory
from undo.lm import place as placing
from undo.lm import read as models
from undo.losses import activation_mse, cross_entropy
from undo.prepare_models import known
from undo.prepare_models.reduced_gemma2 import ReducedGemma2
from undo.runs.directory import Interrupted
from undo.runs.run import Run
from undo.train.parents import require_memory
from undo.unlearn import SAM

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
    placing.place(checkpointed, CPU, checkpointed=True)

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
    model = placing.place(build("gpt-neox"), CPU, checkpointed=True)
    tokens = batch(length=40)
    one, two = (models.hidden_states(model, tokens) for _ in range(2))
    assert torch.equal(one, two)


def test_a_teacher_is_not_checkpointed():
    model = placing.freeze(placing.place(build("llama"), CPU, checkpointed=True))
    assert not any(module.training for module in model.modules())


def test_a_checkpointed_run_is_the_same_run(tmp_path, data):
    plain, _ = go(tmp_path / "a", data)
    placed = placing.place(lively(SHAPE.build(0)), CPU)
    other, _ = go(tmp_path / "b", data, placed)
    checkpointed, _ = go(tmp_path / "c", data, placing.place(lively(SHAPE.build(0)), CPU, checkpointed=True))
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
    from undo.evaluate import TokenCrossEntropy
    from undo.train.stage import TrainingStage

    raw = {"name": "x", "data": "prepare/data", "evaluation": TokenCrossEntropy()}
    config = TrainingStage.model_construct(**raw, training=training(optimizer="adamw_8bit"))
    config.check()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="uv sync --extra 8bit"):
        config.check()


def test_tokens_per_second_leave_the_first_step_out(tmp_path, data, monkeypatch):
    """By a clock of ours: 10 s for the first step, 2 s for each other; evaluation takes an hour."""
    from undo.train import loop as train

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

    monkeypatch.setattr(train, "time", SimpleNamespace(perf_counter=clock, monotonic=lambda: now[0]))
    _, outcome = go(tmp_path, data, evaluate=evaluate)
    assert outcome.tokens_per_second == pytest.approx(4 * 32 / 2)
    assert outcome.evaluation_seconds == 3 * 3600


# --- the estimate --------------------------------------------------------------------------------------------------


def test_the_estimate_is_near_the_peak_of_a_run():
    """Above what tensors really hold, by 1.6 times at most; what an allocator adds differs from machine to machine.

    SAM's step holds a copy of the weights besides; with all its offsets and the first gradient it would be three.
    """
    shape, cfg, execution, sam = fits.SMALL, training(batch_rows=4), Execution(micro_rows=2), SAM(ascent="total")
    measured, said = [], []
    for method, held in ((None, 0), (sam, sam.held_per_weight)):
        estimate = memory.needed(shape, cfg, execution, 256, held=held, device="cpu")
        measured.append(fits.peak_of_two_steps(shape, cfg, execution, 256, CPU, method=method))
        said.append(estimate.total - estimate.process)
    for real, estimated in zip(measured, said, strict=True):
        assert real <= estimated < real * 1.6, (measured, said)
    copy, more = said[1] - said[0], measured[1] - measured[0]
    assert copy == 4 * shape.parameters
    assert copy <= more < 1.1 * copy, (more, copy)


def test_what_is_modelled_is_enough_for_losses_and_steps():
    """The check that a card is given, here: the losses alone, and steps with a teacher and without. Near, too."""
    found = list(fits.peaks())
    assert len(found) == 8 + 4
    for peak in found:
        assert peak.enough, peak
        assert peak.modelled < 1.8 * peak.measured, peak
    assert all(peak.modelled < 1.1 * peak.measured for peak in found[:8])


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("name", ["gemma2", "gemma3", "llama", "qwen3"])
def test_activations_are_bounded(name, mixed):
    """What autograd really keeps of a block, bf16 copies of weights aside: less than said, by 5 times at most.

    The bound covers four norms a block and attention without a kernel; Llama on a CPU has neither, and narrow heads.
    """
    model, tokens = build(name).float(), batch(rows=2, length=256)
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    shape, kept = disk.shape(model), {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes(), tensor  # held, so that no address is given out twice
        return tensor

    def saved(layer):
        kept.clear()
        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
            torch.autocast("cpu", torch.bfloat16, enabled=mixed),
        ):
            models.hidden_states(model, tokens, layer)
        return sum(size for size, _ in kept.values())

    copies = 2 * sum(w.numel() for w in models.blocks(model)[0].parameters() if w.ndim == 2) if mixed else 0
    a_block = (saved(2) - saved(0)) / 2 - copies
    said = memory._activations(shape, 256, mixed, "cpu") * 512
    assert a_block < said < 5 * a_block


def test_weights_gradients_and_states_are_counted():
    cfg, execution = training(batch_rows=8), Execution(micro_rows=1)
    shape = ReducedGemma2(size="0.3B")
    n, tied = shape.parameters, shape.vocab_size * shape.hidden_size
    full = memory.needed(shape, cfg, execution, 128, frozen=[shape])
    assert (full.weights, full.frozen, full.optimizer) == (4 * n, 4 * n, 8 * n)
    assert full.gradients == 4 * (n + 2 * tied)
    few = memory.needed(shape, cfg, execution, 128, trained=1000)
    assert (few.weights, few.frozen, few.gradients, few.optimizer) == (4 * n, 0, 4000, 8000)
    small = memory.needed(shape, training(batch_rows=8, optimizer="adamw_8bit"), execution, 128)
    assert small.optimizer == pytest.approx(2 * n, rel=0.02)
    again = memory.needed(shape, cfg, Execution(micro_rows=4), 128)
    recomputed = memory.needed(shape, cfg, Execution(micro_rows=4, gradient_checkpointing=True), 128)
    assert recomputed.activations < again.activations / 3
    assert again.activations == pytest.approx(4 * full.activations, rel=0.1)


def test_what_a_step_holds_is_counted():
    """Of the weights that are trained: RMU below a step with a second gradient has few of them."""
    shape, cfg = known.MODELS["gemma-2-2b"], training(batch_rows=8, precision="bf16")
    plain = memory.needed(shape, cfg, Execution(), 1024)
    sam = memory.needed(shape, cfg, Execution(), 1024, held=SAM(ascent="forget").held_per_weight)
    assert sam.total - plain.total == sam.step == 8 * shape.parameters
    assert memory.needed(shape, cfg, Execution(), 1024, trained=1000, held=8).step == 8000
    assert all(option.memory.step == sam.step for option in memory.options(shape, cfg, Execution(), 1024, held=8))


def test_a_run_of_sam_is_asked_for_what_its_step_holds(data, monkeypatch):
    from undo.unlearn.stage import Unlearn

    asked = []
    monkeypatch.setattr(memory, "require", lambda *_, **more: asked.append(more["held"]))
    for method in ({"name": "maxent"}, {"name": "sam"}, {"name": "uam"}, {"name": "smoothing"}):
        raw = {"name": "x", "data": "prepare/data", "reference": "pretrain/x", "method": method}
        raw |= {"training": as_raw(training()), "evaluation": {"name": "cross_entropy"}}
        require_memory(validate(Unlearn, raw, "here"), Run(data.runs, "tiny", "unlearn/x"), SHAPE)
    assert asked == [0, 8, 8, 8]


def test_known_models_have_their_known_sizes():
    sizes = {name: shape.parameters for name, shape in known.MODELS.items()}
    assert sizes == {"gemma-3-270m": 268_098_176, "gemma-3-1b": 999_885_952, "gemma-2-2b": 2_614_341_888}


def test_what_is_too_large_is_refused_with_the_keys_that_help():
    shape, cfg = known.MODELS["gemma-2-2b"], training(batch_rows=8, precision="bf16")
    assert memory.require(140e9, shape, cfg, Execution(), 1024).total < 140e9
    with pytest.raises(ConfigError) as refusal:
        memory.require(45e9, shape, cfg, Execution(), 1024)
    lines = str(refusal.value).splitlines()
    assert len(lines) == 2
    assert "optimizer 20.9" in lines[0]
    keys = "execution.micro_rows=1 training.optimizer=adamw_8bit"
    assert f"has 45.0 GB of memory; it would fit with: {keys}" in lines[1]
    with pytest.raises(ConfigError, match=r"it would fit with: execution\.micro_rows=\d "):
        memory.require(75e9, shape, cfg, Execution(), 1024)  # 8 bits change results, so they come last
    with pytest.raises(ConfigError, match="no key makes it fit"):
        memory.require(20e9, shape, cfg, Execution(), 1024)


def test_the_advice_fits():
    shape, cfg = known.MODELS["gemma-3-1b"], training(batch_rows=8)
    found = list(memory.options(shape, cfg, Execution(), 512))
    assert found[0].keys == ""
    assert len({option.keys for option in found}) == len(found) == 2 * 2 * 4
    assert found[-1].memory.total == min(option.memory.total for option in found)


def test_a_run_that_does_not_fit_fails_before_its_weights_are_loaded(data, monkeypatch):
    from undo.prepare_models.pretrain import Pretrain, pretrain

    run = Run(data.runs, "tiny", "pretrain/too-large")
    raw = {
        "name": "too-large",
        "data": "prepare/data",
        "model": as_raw(SHAPE),
        "mixture": {"retain": 1.0},
        "training": as_raw(training()),
        "evaluation": {"name": "cross_entropy"},
    }
    config = validate(Pretrain, raw, "here")
    run.claim(config)
    run.open(config)
    monkeypatch.setattr(memory, "available", lambda *_: (5e8, "cpu"))
    monkeypatch.setattr(ReducedGemma2, "build", lambda *_: pytest.fail("it was built"))
    with pytest.raises(ConfigError, match=r"this run needs 0\.5 GB"):
        list(pretrain(config, run))


def test_this_machine_has_memory():
    found, device = memory.available()
    assert device == "cpu"
    assert 1e8 < found < 1e14


def test_the_table_names_every_model_and_card():
    text = fits.table()
    assert all(name in text for name in known.MODELS)
    assert "141 GB" in text
    assert "modelled, not measured" in text
