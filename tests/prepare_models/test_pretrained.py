"""The base stage: which folder or hub id is a model that can be used, and what runs on it cost."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.conftest import ROOT, SHAPE, run_script
from tests.lm.test_architectures import build
from undo.config.mistakes import ConfigError
from undo.config.schema import validate
from undo.experiments.costs import Costs
from undo.lm.disk import load, save
from undo.prepare_models.known import MODELS
from undo.prepare_models.pretrained import Base, fetch
from undo.runs.run import Run
from undo.settings import whole as run_all
from undo.settings.stages import STAGES


def base(model: object, folder: Path, setting: str = "made") -> Run:
    config = validate(Base, {"name": "model", "model": str(model)}, "base.yaml")
    run = Run(folder, setting, "base/model")
    run.claim(config)
    run.open(config)
    config.check()
    fetch(config, run)
    return run


def test_a_local_model_is_linked_and_loads(tmp_path, data):
    model = SHAPE.build(0)
    save(model, data.folder / "tokenizer", tmp_path / "mine")
    run = base(tmp_path / "mine", tmp_path / "runs")
    assert run.facts["architecture"] == "Gemma2ForCausalLM"
    for ours, theirs in zip(load(run.model).parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_causal_model_may_have_another_name(tmp_path, data):
    save(build("gpt2"), data.folder / "tokenizer", tmp_path / "mine")
    run = base(tmp_path / "mine", tmp_path / "runs")
    assert run.facts["architecture"] == "GPT2LMHeadModel"
    assert run.facts["vocab_size"] == load(run.model).config.vocab_size


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "holds no config.json"),
        ({"config.json": "{"}, "is not JSON"),
        ({"config.json": "[]"}, "is not the config of a transformers model"),
        (
            {"config.json": '{"architectures": ["BertForMaskedLM"]}'},
            "is a BertForMaskedLM, which is not a",
        ),
        ({"config.json": "{}"}, "not a causal language model"),
        ({"config.json": '{"architectures": ["Gemma3ForConditionalGeneration"]}'}, "has no vocab_size"),
        ({"config.json": '{"architectures": ["LlamaForCausalLM"], "vocab_size": 8}'}, "holds no model.safetensors"),
    ],
)
def test_what_is_no_model_is_refused(tmp_path, files, words):
    (tmp_path / "mine").mkdir()
    for name, content in files.items():
        (tmp_path / "mine" / name).write_text(content)
    with pytest.raises(ConfigError, match=words):
        base(tmp_path / "mine", tmp_path / "runs")


def test_model_is_said_once_for_the_weights_and_the_tokenizer(tmp_path):
    only = ("--stage", "prepare", "--only", "base/model", "--runs", str(tmp_path))
    listed = run_script("run_wmdp.py", "wmdp_bio", "model=./mine", *only)
    assert listed.returncode == 2
    assert "model: mine holds no config.json" in listed.stderr
    refused = run_script("run_wmdp.py", "wmdp_small", "model=./mine", "--dry-run")
    assert "wmdp_small pretrains its own" in refused.stderr


def test_costs_are_those_of_the_model(tmp_path, data):
    """Of the folder that `model=` names, of the one that was linked, of the hub's where it is known, or of none."""
    folder, runs = ROOT / "configs/wmdp_bio", tmp_path / "runs"
    save(SHAPE.build(0), data.folder / "tokenizer", tmp_path / "mine")

    def flops(model: str, *stages: str) -> float | None:
        overrides = [f"base.model={model}", f"prepare.tokenizer={model}"]
        args = SimpleNamespace(overrides=overrides, extra=(), only=None, runs=runs)
        planned, _ = run_all.planned_in(folder, args, stages)
        cost = Costs(planned, folder, STAGES, model).of(next(run for run in planned if run.name.startswith("undo/")))
        return None if cost is None else cost.flops

    tokens = 2664 * 110 * 1024
    before = flops(str(tmp_path / "mine"), "base", "unlearn", "undo")
    assert before == 4 * SHAPE.forward_flops(1024) * tokens
    assert (
        flops("google/gemma-2-2b", "base", "unlearn", "undo") == 4 * MODELS["gemma-2-2b"].forward_flops(1024) * tokens
    )
    for stages in (("base", "unlearn", "undo"), ("undo",)):
        assert flops("owner/unknown", *stages) is None
        assert flops("google/gemma-3-270m", *stages) == 4 * MODELS["gemma-3-270m"].forward_flops(1024) * tokens
    base(tmp_path / "mine", runs, "wmdp_bio")
    assert flops(str(tmp_path / "mine"), "undo") == before


def test_a_cost_that_nobody_knows_is_no_number(tmp_path):
    args = ("--dry-run", "--stage", "undo", "--only", "*undo_rmu-seed_0", "--runs", str(tmp_path))
    listed = run_script("run_wmdp.py", "wmdp_bio", "model=owner/unknown", *args)
    assert listed.returncode == 0, listed.stderr
    assert re.search(r"undo/undo_rmu-seed_0 .* to do +- +- +-", listed.stdout)
    assert "without 1 run of a model whose size is not known" in listed.stdout
