"""LoRA adapter folders: merged exactly, or refused with the way out."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from tests.foreign import qwen
from tests.prepare_models.test_pretrained import base
from undo.config.mistakes import ConfigError
from undo.lm import disk
from undo.lm.vocabulary import tokenizer_files
from undo.prepare_models import adapter
from undo.prepare_models.pretrained import Base, known_shape


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A model, and a LoRA adapter of it whose matrices are not zero."""
    folder = tmp_path_factory.mktemp("adapter")
    model = qwen(folder / "model")
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    for name, weight in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.2, generator=torch.Generator().manual_seed(len(name)))
    adapted.save_pretrained(folder / "lora")
    facts = json.loads((folder / "lora/adapter_config.json").read_text())
    facts["base_model_name_or_path"] = str(folder / "model")
    (folder / "lora/adapter_config.json").write_text(json.dumps(facts))
    return folder


@pytest.fixture
def folder(made, tmp_path) -> Path:
    return Path(shutil.copytree(made / "lora", tmp_path / "lora"))


def test_an_adapter_is_merged_into_its_model(made, folder, tmp_path):
    run = base(folder, tmp_path / "runs")
    before, after = (dict(disk.load(f).named_parameters()) for f in (made / "model", run.model))
    lora = load_file(folder / "adapter_model.safetensors")
    for name, weight in after.items():
        down, up = (lora.get(f"base_model.model.{name.removesuffix('.weight')}.lora_{m}.weight") for m in "AB")
        expected = before[name] if down is None else before[name] + 2 * up @ down  # alpha / r = 2
        torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-5)
    assert sum("lora_A" in name for name in lora) == 4
    assert run.facts["dtype"] == "bfloat16"  # what it came in
    for file in tokenizer_files(made / "model"):
        assert (run.model / file.name).read_bytes() == file.read_bytes()
    assert known_shape(str(folder)) == known_shape(str(made / "model"))


def test_its_model_may_be_given(made, folder, tmp_path):
    facts = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(facts | {"base_model_name_or_path": "Qwen/Qwen2-0.5B"}))
    with pytest.raises(ConfigError, match=r"of Qwen/Qwen2-0.5B, which is no folder here\n.*base_model="):
        base(folder, tmp_path / "runs")
    Base(name="model", model=str(folder), base_model=str(made / "model")).check()
    assert known_shape(str(folder), "owner/unknown") is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda f: (f / "adapter_config.json").write_text("{}"), "is not the config of an adapter"),
        (lambda f: (f / "adapter_config.json").write_text('{"peft_type": "IA3"}'), "of the kind IA3"),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b""), "is empty, cut"),
        (lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"), r"pickles \(adapter_model.bin\)"),
        (lambda f: rewrite(f, lambda w: dict(list(w.items())[1:])), "is not what adapter_config.json says"),
        (lambda f: rewrite(f, lambda w: w | {"base_model.model.other": torch.ones(2)}), "says of .*: base_model.model"),
        (lambda f: rewrite(f, lambda w: {k: v[:1] for k, v in w.items()}), "does not fit"),
        (lambda f: rewrite(f, lambda w: {k: v * torch.nan for k, v in w.items()}), "holds NaN or infinity"),
        (lambda f: shutil.copy(f.parent / "whole", f / "model.safetensors"), "holds a model and an adapter"),
    ],
)
def test_what_does_not_fit_is_refused(folder, tmp_path, change, said):
    save_file({"x": torch.ones(1)}, tmp_path / "whole")
    change(folder)
    with pytest.raises(ConfigError, match=said):
        base(folder, tmp_path / "runs")


def rewrite(folder: Path, change) -> None:
    file = folder / "adapter_model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})


def test_without_peft_it_says_how_to_get_it(folder, monkeypatch):
    monkeypatch.setattr(adapter.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="get it with: uv sync --extra lora"):
        Base(name="model", model=str(folder)).check()
