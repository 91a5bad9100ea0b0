"""Models of other people's making: each loads, trains a step, and is saved as it came."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PhiConfig, Qwen2Config, Qwen3Config

from tests.conftest import training
from tests.foreign import GENERATION, TEXT, qwen
from undo.attacks.relearn import Relearn, relearn
from undo.config.mistakes import ConfigError
from undo.config.schema import as_raw, validate
from undo.distill.unlearn_and_distill import Distill, start
from undo.lm import disk
from undo.lm.vocabulary import same_tokens, shared_width, tokenizer_files
from undo.prepare_data.prepare import Prepare, prepare
from undo.prepare_models.pretrained import Base, fetch
from undo.runs.run import Run
from undo.train.fit import rounded


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A Qwen-like folder, the base run of it, and data prepared with its tokenizer."""
    folder = tmp_path_factory.mktemp("foreign")
    qwen(folder / "qwen")
    for role in ("retain", "forget"):
        rows = [{"text": f"{role} {i} {TEXT}"} for i in range(20)]
        (folder / f"{role}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    raw = {"name": "data", "data": {role: {"path": str(folder / f"{role}.jsonl")} for role in ("retain", "forget")}}
    raw |= {"tokenizer": str(folder / "qwen"), "length": 64, "shortest": 5, "validation_share": 0.3}
    execute(folder, "prepare/data", validate(Prepare, raw, "test"), prepare)
    execute(folder, "base/model", validate(Base, {"name": "model", "model": str(folder / "qwen")}, "test"), fetch)
    return folder


def execute(folder, name, config, stage) -> Run:
    run = Run(folder, "made", name)
    run.claim(config)
    run.open(config)
    list(stage(config, run) or ())
    return run


def attacked(folder, name="x", model="base/model", **changes) -> Run:
    raw = {"name": name, "data": "prepare/data", "model": model, "mixture": {"forget": 1.0}, "save_model": True}
    raw |= {"training": as_raw(training(steps=1)), "evaluation": {"name": "cross_entropy"}, **changes}
    return execute(folder, f"relearn/{name}", validate(Relearn, raw, "test"), relearn)


def tensors(folder) -> dict[str, torch.Tensor]:
    """All weights in its files."""
    return {name: weight for file in folder.glob("*.safetensors") for name, weight in load_file(file).items()}


def test_what_lies_beside_the_weights_is_kept_byte_for_byte(world):
    run = attacked(world)
    names = [file.name for file in tokenizer_files(world / "qwen")]
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= set(names)
    for copy in (run.model, run.sibling("prepare/data").folder / "tokenizer"):
        for name in names:
            assert (copy / name).read_bytes() == (world / "qwen" / name).read_bytes()
    assert json.loads((run.model / "generation_config.json").read_text()) == GENERATION
    model, tokenizer = (kind.from_pretrained(run.model) for kind in (AutoModelForCausalLM, AutoTokenizer))
    assert model.config.vocab_size == len(tokenizer) + 20
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False).startswith("<|im_start|>")
    moved = [
        not torch.equal(a, b) for a, b in zip(model.parameters(), disk.load(world / "qwen").parameters(), strict=True)
    ]
    assert all(moved)


@pytest.mark.parametrize(
    ("save_dtype", "kept"), [("float32", torch.float32), ("auto", torch.bfloat16), ("float16", torch.float16)]
)
def test_a_model_is_saved_in_the_dtype_that_is_asked_for(world, save_dtype, kept):
    run = attacked(world, save_dtype, save_dtype=save_dtype)
    assert {weight.dtype for weight in tensors(run.model).values()} == {kept}
    assert disk.read_config(run.model).dtype == kept
    again = attacked(world, f"{save_dtype}-again", model=run.name, save_dtype="auto")
    assert (
        tensors(again.model)["lm_head.weight"].dtype == torch.bfloat16
    )  # as the pretrained model came, not as the run before was saved
    assert run.facts["evaluation"] == {k: again.evaluations()[0][k] for k in run.facts["evaluation"]}


@pytest.mark.parametrize(
    ("kind", "changes", "kept"),
    [
        (Qwen3Config, {"head_dim": 8, "tie_word_embeddings": True}, "model.embed_tokens.weight"),
        (PhiConfig, {"partial_rotary_factor": 0.5}, "lm_head.bias"),
        (Qwen2Config, {"tie_word_embeddings": False}, "lm_head.weight"),
        (LlamaConfig, {"vocab_size": 299}, "lm_head.weight"),  # as Gemma-3: its tokenizer has one token more
    ],
    ids=["tied", "head bias", "untied", "a token without a row"],
)
def test_every_kind_loads_trains_and_is_saved(world, kind, changes, kept, request):
    name = request.node.callspec.id.replace(" ", "_")
    qwen(world / name, kind=kind, **changes)
    config = validate(Base, {"name": name, "model": str(world / name)}, "test")
    execute(world, f"base/{name}", config, fetch)
    run = attacked(world, name, model=f"base/{name}", save_dtype="auto")
    before, after = tensors(world / name), tensors(run.model)
    assert before.keys() == after.keys()
    assert kept in after
    for weight in (kept, "model.layers.0.mlp.down_proj.weight", "model.layers.0.mlp.fc1.weight"):
        if weight in after:
            assert after[weight].dtype == before[weight].dtype
            assert not torch.equal(before[weight], after[weight])


def test_rounding_is_measured(world):
    exact, rounded = (attacked(world, f"measured-{kind}", save_dtype=kind).facts for kind in ("float32", "bfloat16"))
    assert exact["evaluation"] != rounded["evaluation"]
    assert exact["evaluation"]["forget"] == pytest.approx(rounded["evaluation"]["forget"], rel=0.02)


def test_a_weight_that_the_dtype_cannot_hold_is_refused():
    model = disk.fresh(Qwen2Config(vocab_size=8, hidden_size=8, intermediate_size=8, num_attention_heads=2), 0)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = 1e6
    assert not rounded(model, torch.float32)
    assert rounded(model, torch.bfloat16)
    with pytest.raises(ConfigError, match="save_dtype=float16: a weight is too large"):
        rounded(model, torch.float16)


def test_data_of_another_tokenizer_are_refused(world):
    qwen(world / "other", ["zebra crossing " * 9])
    assert same_tokens(world / "qwen", world / "qwen")
    assert not same_tokens(world / "qwen", world / "other")
    config = validate(Base, {"name": "other", "model": str(world / "other")}, "test")
    execute(world, "base/other", config, fetch)
    with pytest.raises(ConfigError, match="prepare/data was prepared with another tokenizer than that of base/other"):
        attacked(world, "foreign", model="base/other")


def test_a_teacher_and_a_student_of_one_vocabulary_may_be_padded_differently(world):
    qwen(world / "padded", vocab_size=340)
    execute(world, "base/padded", validate(Base, {"name": "padded", "model": str(world / "padded")}, "test"), fetch)
    assert shared_width(world / "qwen", world / "padded", (320, 340)) == 320
    assert shared_width(world / "qwen", world / "padded", (290, 340)) is None  # a token has no logit
    assert shared_width(world / "qwen", world, (320, 340)) is None  # nobody knows its tokens
    assert shared_width(world, world, (320, 320)) == 320
    raw = {"name": "padded", "data": "prepare/data", "teacher": attacked(world, "teacher").name, "student": "reference"}
    raw |= {"reference": "base/padded", "mixture": {"retain": 1.0}, "training": as_raw(training(steps=1))}
    raw |= {"evaluation": {"name": "cross_entropy"}}
    run = execute(world, "distill/padded", validate(Distill, raw, "test"), start)
    before, after = (tensors(folder)["lm_head.weight"].float() for folder in (world / "padded", run.model))
    assert after.shape == (340, 32)
    assert torch.equal(before[320:], after[320:])
    assert not torch.equal(before[:320], after[:320])


def test_added_tokens_are_no_other_vocabulary(world, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(world / "qwen")
    tokenizer.add_tokens(["<|tool|>"], special_tokens=True)
    tokenizer.save_pretrained(tmp_path)
    assert same_tokens(world / "qwen", tmp_path)
