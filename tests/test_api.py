"""The Python interface: the documented example, and each function against what it stands for."""

import inspect
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

import undo
from tests.conftest import ROOT, SHAPE, lively
from undo.config.mistakes import ConfigError
from undo.corrupt import starts_at_zero
from undo.data.rows import PackedDocuments
from undo.data.stream import MixedStream
from undo.evaluate.evaluator import Measured
from undo.lm import disk
from undo.lm import place as placing
from undo.train.loop import train
from undo.train.recorder import InMemory

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs/python.md").read_text(), re.DOTALL)
WAY = {"length": 16, "batch_rows": 4, "title": ""}


def texts(seed: int, count: int = 24) -> list[list[int]]:
    rng = torch.Generator().manual_seed(seed)
    return [torch.randint(4, SHAPE.vocab_size, (9,), generator=rng).tolist() for _ in range(count)]


FORGET, RETAIN = texts(0), texts(1)


@pytest.fixture
def llama() -> LlamaForCausalLM:
    """Another family: no softcap, norms that multiply by w, an untied head."""
    config = LlamaConfig(
        vocab_size=448,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        attention_bias=True,
    )
    torch.manual_seed(0)
    return lively(LlamaForCausalLM(config).eval())


def run(program: str, cwd) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_documented_example_says_what_figure_4_says(tmp_path):
    said = run(BLOCKS[0], tmp_path)
    curves = [eval(text) for text in re.findall(r"under attack: (\{.*\})", said)]  # a dict that it printed
    start = [eval(text) for text in re.findall(r"(\{'retain'.*\})", said)]
    unlearned, robust = curves
    assert unlearned.keys() == robust.keys() == {0, 5, 10}
    assert all(robust[step] > unlearned[step] + 0.1 for step in (5, 10)), said
    assert all(found["forget"] > found["retain"] + 2 for found in start)  # forgotten in both before the attack
    assert abs(start[0]["retain"] - start[1]["retain"]) < 0.5
    assert sum(bool(line.strip()) and not line.startswith("#") for line in BLOCKS[0].splitlines()) <= 32


def test_the_other_examples_run(tmp_path):
    for block in BLOCKS[1:]:
        assert "grad_fn" in run(block, tmp_path)


def test_importing_is_free_and_all_names_are_there(tmp_path):
    said = run(
        "import sys, undo\n"
        "assert not {'torch', 'transformers', 'numpy', 'pydantic'} & set(sys.modules)\n"
        "assert set(undo.__all__) <= set(dir(undo))\n"
        "print(all(callable(getattr(undo, name)) for name in undo.__all__ if name != 'losses'))\n"
        "import undo.unlearn.maxent\n"
        "from undo.unlearn import GradDiff\n"
        "print(undo.unlearn.maxent.MaxEnt is undo.MaxEnt, callable(undo.unlearn))\n",
        tmp_path,
    )
    assert said.split() == ["True"] * 3
    assert list(inspect.signature(undo.unlearn).parameters)[:3] == ["model", "tokenizer", "method"]
    with pytest.raises(AttributeError, match="it has: unlearn, "):
        _ = undo.unlaern


@pytest.mark.parametrize(
    "method", [undo.MaxEnt(), undo.RMU(layer=1, trained_layers=[0, 1], c=2.0), undo.NPO(), undo.SAM()]
)
def test_unlearning_leaves_the_model_as_it_was(model, method):
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    attention = model.config._attn_implementation
    made = undo.unlearn(model, method=method, forget=FORGET, retain=RETAIN, steps=3, learning_rate=1e-2, **WAY)
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    assert any(not torch.equal(weight, before[name]) for name, weight in made.named_parameters())
    assert made.config._attn_implementation == model.config._attn_implementation == attention
    assert all(weight.requires_grad for weight in made.parameters())


def test_it_is_the_same_loop_on_the_same_batches(model):
    """Bit by bit what train.loop does when it is called by hand."""
    made = undo.finetune(model, FORGET, steps=4, learning_rate=1e-2, seed=3, **WAY)
    by_hand = placing.place(disk.fresh(model.config, 0), torch.device("cpu"))
    by_hand.load_state_dict(model.state_dict())
    rows = PackedDocuments([torch.tensor(text).numpy() for text in FORGET], 16, SHAPE.vocab_size)
    from tests.conftest import execution, training

    cfg = training(steps=4, batch_rows=4, learning_rate=1e-2, evaluate_every=4)
    train(
        by_hand,
        lambda batch: {"ce": undo.losses.cross_entropy(by_hand, batch["train"])},
        {"train": MixedStream({"forget": rows}, {"forget": 1.0}, 4, 3)},
        cfg,
        execution(),
        InMemory(4),
        lambda step, full: Measured({}, 0),
    )
    for (name, mine), theirs in zip(made.named_parameters(), by_hand.parameters(), strict=True):
        assert torch.equal(mine, theirs), name


def test_every_function_on_another_family(llama):
    unlearned = undo.unlearn(
        llama, method=undo.GradDiff(), forget=FORGET, retain=RETAIN, steps=2, learning_rate=1e-2, **WAY
    )
    noised = undo.corrupt(unlearned, alpha=0.5)
    for (name, weight), noise in zip(unlearned.named_parameters(), noised.parameters(), strict=True):
        assert torch.equal(weight, noise) == ("norm" in name)  # Llama's norms multiply by w: they are kept
    robust = undo.distill(noised, unlearned, RETAIN, steps=3, learning_rate=1e-2, **WAY)
    attack = undo.relearn(robust, FORGET, rates=[1e-3, 1e-2], steps=4, evaluate_every=2, **WAY)
    assert attack.curves.keys() == {1e-3, 1e-2}
    assert attack.worst_case == {step: min(curve[step] for curve in attack.curves.values()) for step in (0, 2, 4)}
    found = undo.evaluate(robust, forget=FORGET, length=16)
    assert found["forget"] == pytest.approx(attack.worst_case[0], rel=1e-6)
    assert len(attack.plot().axes[0].get_lines()) == 3


def test_distillation_stops_within_the_threshold(model):
    teacher = undo.finetune(model, RETAIN, steps=30, learning_rate=1e-2, **WAY)
    options = {"steps": 200, "learning_rate": 1e-2, "retain": RETAIN, "check_every": 10, **WAY}
    student = undo.distill(model, teacher, RETAIN, within=0.2, **options)
    nats = [undo.evaluate(m, retain=RETAIN, length=16)["retain"] for m in (teacher, student, model)]
    assert nats[1] <= 1.2 * nats[0] < nats[2]
    with pytest.raises(ValueError, match="give some retain texts"):
        undo.distill(model, teacher, RETAIN, steps=1, learning_rate=1e-2, within=0.2, **WAY)


def test_an_attack_that_diverges_is_an_outcome(model):
    def broken(of) -> float:
        return 1.0

    attack = undo.relearn(
        model, FORGET, rates=[1e30], steps=6, measure=broken, higher_is_better=True, evaluate_every=1, **WAY
    )
    assert 0 < len(attack.curves[1e30]) < 6
    assert attack.last == 1.0


@pytest.mark.parametrize(("factor", "said"), [(float("nan"), "holds NaN or infinity"), (1e30, "before any update")])
def test_a_broken_model_is_no_outcome_of_an_attack(model, factor, said):
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(factor)
        model.model.layers[0].mlp.up_proj.weight.mul_(1e30)
    with pytest.raises(ConfigError, match=said):
        undo.relearn(model, FORGET, rates=[1e-3], steps=2, **WAY)


def test_strings_need_a_tokenizer_and_there_must_be_some(model):
    with pytest.raises(TypeError, match="give the model's tokenizer"):
        undo.evaluate(model, forget=["a text"])
    with pytest.raises(ValueError, match="no text"):
        undo.finetune(model, [], steps=1, learning_rate=1e-2)
    with pytest.raises(ValueError, match="does not fit the model's vocabulary of 448"):
        undo.evaluate(model, forget=[[448, 1]])


@pytest.mark.parametrize("side", ["left", "right"])
def test_tokens_of_a_padded_batch_have_the_library_s_own_loss(llama, side):
    llama = llama.double()
    llama.set_attn_implementation("sdpa")
    rng = torch.Generator().manual_seed(0)
    ids, mask = torch.randint(4, 448, (3, 11), generator=rng), torch.ones(3, 11, dtype=torch.int64)
    for row, length in enumerate((11, 7, 4)):
        mask[row, slice(length, None) if side == "right" else slice(0, 11 - length)] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, 2:4] = -100  # a prompt, say
    tokens = undo.Tokens.of(ids, mask, labels)
    assert (tokens.total, tokens.documents) == (8 + 6 + 3, 3)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = llama(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    expected = functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].masked_fill(mask[:, :-1] == 0, -100).flatten()
    )
    placed = placing.place(llama, torch.device("cpu"))
    # the library's rotary angles and norms are fp32 whatever the weights are
    assert float(undo.losses.cross_entropy(placed, tokens)) == pytest.approx(float(expected), rel=1e-6)


def test_tokens_of_refuses_what_it_cannot_mean():
    ids = torch.ones(2, 5, dtype=torch.int64)
    with pytest.raises(ValueError, match="a hole"):
        undo.Tokens.of(ids, torch.tensor([[1, 1, 0, 1, 1], [1, 1, 1, 1, 1]]))
    with pytest.raises(ValueError, match=r"\[rows, length\]"):
        undo.Tokens.of(ids[0])
    with pytest.raises(ValueError, match="the shape of input_ids"):
        undo.Tokens.of(ids, ids[:, :3])


@pytest.mark.parametrize("name", ["cross_entropy", "uniform_kl"])
@pytest.mark.parametrize("batch", [torch.ones(1, 3, dtype=torch.int64), {"input_ids": 1}])
def test_what_is_no_tokens_is_refused_with_the_way_out(model, name, batch):
    with pytest.raises(TypeError, match=r"make one with Tokens.of\(input_ids, attention_mask\)"):
        getattr(undo.losses, name)(model, batch)


# --- noise without a second model ------------------------------------------------------------------------------------


def test_noise_alone_is_noise_beside_a_fresh_model(model, llama):
    for network in (model, llama):
        fresh, alone, beside = (
            disk.fresh(network.config, 5),
            disk.fresh(network.config, 0),
            disk.fresh(network.config, 0),
        )
        for made in (alone, beside):
            made.load_state_dict(network.state_dict())
        undo.Noise(alpha=0.5).apply(alone, rng=torch.Generator().manual_seed(1))
        undo.Noise(alpha=0.5).apply(beside, fresh, torch.Generator().manual_seed(1))
        for (name, mine), theirs in zip(alone.named_parameters(), beside.parameters(), strict=True):
            assert torch.equal(mine, theirs), name
    with pytest.raises(ValueError, match="give it as `fresh`"):
        undo.Noise(alpha=0.5, distribution="init").apply(model)
    assert not torch.equal(undo.corrupt(model, 0.5, distribution="init").lm_head.weight, model.lm_head.weight)


def test_where_vectors_start_is_seen_without_a_second_model():
    from tests.lm.test_architectures import CONFIGS

    for family, config in CONFIGS.items():
        fresh = disk.fresh(config, 0)
        random = lively(disk.fresh(config, 1))
        for name, weight in fresh.named_parameters():
            if weight.ndim < 2:
                assert starts_at_zero(name, random) == (not bool(weight.any())), (family, name)


def test_a_recorder_in_memory_keeps_what_the_loop_says(capsys):
    recorder = InMemory(2, "a title")
    with recorder.saves_before_it_stops():
        recorder.record(1, {"loss": 2.0})
    assert json.dumps(recorder.records) == '[{"step": 1, "loss": 2.0}]'
    assert recorder.load_checkpoint() is None
    assert capsys.readouterr().err == ""  # no bar where nobody looks
