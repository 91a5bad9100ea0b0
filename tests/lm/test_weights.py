"""A model folder whose weights are not whole, not its config's or not finite is refused, not filled up."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.lm.test_architectures import CONFIGS
from undo.config.mistakes import ConfigError
from undo.config.schema import validate
from undo.lm import disk
from undo.lm.weights import weight_files
from undo.prepare_models.pretrained import Base, fetch
from undo.runs.run import Run

CHANGES = {  # of the weights of a llama -> what is said of them
    "a layer": (lambda w: without(w, "layers.1."), "9 missing (model.layers.1.input_layernorm.weight, "),
    "a tensor": (lambda w: without(w, "model.norm"), "1 missing (model.norm.weight)"),
    "an untied head": (lambda w: without(w, "lm_head"), "1 missing (lm_head.weight)"),
    "renamed": (lambda w: {k.replace("mlp", "ffn"): v for k, v in w.items()}, "9 not in the model (model.layers.0.ffn"),
    "one too many": (lambda w: w | {"model.layers.3.x": torch.ones(2)}, "1 not in the model (model.layers.3.x)\n"),
    "module.": (lambda w: prefixed(w, "module."), "as DistributedDataParallel names them; save the model inside"),
    "peft": (lambda w: prefixed(w, "base_model.model."), "as peft names them; merge the adapter first"),
    "compiled": (lambda w: prefixed(w, "_orig_mod."), "as torch.compile names them"),
    "vocabulary": (
        lambda w: w | {"model.embed_tokens.weight": torch.ones(440, 32)},
        "1 of another shape (model.embed_tokens.weight: [440, 32], not [448, 32])",
    ),
    "NaN": (lambda w: w | {"lm_head.weight": torch.full((448, 32), torch.nan)}, "lm_head.weight holds NaN or inf"),
    "inf": (lambda w: w | {"model.norm.weight": torch.tensor([torch.inf] * 32)}, "model.norm.weight holds NaN or inf"),
}


def without(weights: dict, part: str) -> dict:
    return {key: value for key, value in weights.items() if part not in key}


def prefixed(weights: dict, prefix: str) -> dict:
    return {prefix + key: value for key, value in weights.items()}


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llama"
    disk.fresh(CONFIGS["llama"], 0).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(llama, tmp_path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "mine"))


def base(folder: Path) -> tuple[Base, Run]:
    config = validate(Base, {"name": "model", "model": str(folder)}, "base.yaml")
    run = Run(folder.parent / "runs", "made", "base/model")
    run.claim(config)
    run.open(config)
    return config, run


@pytest.mark.parametrize("change", CHANGES)
def test_weights_that_are_not_those_of_the_config_are_refused(folder, change):
    """Before, the library filled up what was missing with random numbers: a perfect `the capability is gone`."""
    make, said = CHANGES[change]
    save_file(make(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})
    config, run = base(folder)
    config.check()  # the files are whole
    for refused in (lambda: disk.load(folder), lambda: fetch(config, run)):
        with pytest.raises(ConfigError) as error:
            refused()
        assert said in str(error.value)
        assert len(str(error.value).splitlines()) <= 2
    assert not run.done
    assert not run.model.exists()


def test_a_tied_head_that_is_another_is_refused(tmp_path):
    """One version of the library takes the head, another the embedding."""
    disk.fresh(CONFIGS["llama-tied"], 0).save_pretrained(tmp_path)
    weights, file = load_file(tmp_path / "model.safetensors"), tmp_path / "model.safetensors"
    save_file(weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}, file, {"format": "pt"})
    disk.load(tmp_path)  # written twice, and one still
    save_file(weights | {"lm_head.weight": torch.ones(448, 32)}, file, {"format": "pt"})
    with pytest.raises(ConfigError, match="set tie_word_embeddings to false"):
        disk.load(tmp_path)


def test_what_tied_heads_and_old_checkpoints_leave_out_or_have_besides_is_no_mistake(tmp_path):
    disk.fresh(CONFIGS["llama-tied"], 0).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in weights
    for more in ({}, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}):
        save_file(weights | more, tmp_path / "model.safetensors", {"format": "pt"})
        model = disk.load(tmp_path)
        assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda whole: whole[: len(whole) // 2], "is empty, cut or no safetensors file"),
        (lambda whole: b"", "is empty, cut or no safetensors file"),
        (lambda whole: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "git lfs pull"),
    ],
    ids=["cut", "empty", "pointer"],
)
def test_damaged_files_are_refused_before_anything_starts(folder, damage, said):
    file = folder / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ConfigError, match=said):
        base(folder)[0].check()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth"])
def test_pickles_alone_are_refused_before_anything_starts(folder, name):
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(ConfigError, match=rf"holds its weights as pickles \({name}\)"):
        base(folder)[0].check()


def test_shards(folder):
    model = disk.load(folder)
    model.bfloat16().save_pretrained(folder, max_shard_size="40KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    files = weight_files(folder)
    assert len(files) > 2
    loaded = disk.load(folder)
    assert all(torch.equal(a.float(), b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    assert {w.dtype for w in loaded.parameters()} == {torch.float32}
    files[1].unlink()
    with pytest.raises(ConfigError, match=f"holds no {files[1].name}"):
        base(folder)[0].check()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "../mine/model-00001-of-00002.safetensors"}}))
    with pytest.raises(ConfigError, match="outside its folder"):
        weight_files(folder)
