"""The model as the project uses it: documents apart, seeded, saved for everyone, and of the paper's sizes."""

import pytest
import torch
from conftest import SHAPE, batch, lively
from transformers import AutoModelForCausalLM

from undo import models
from undo.config import ConfigError
from undo.models import FLEX, hidden_states
from undo.prepare_models import ReducedGemma2
from undo.tokens import collate


@pytest.mark.parametrize(
    ("hidden", "intermediate", "parameters"), [(320, 1280, 112_904_000), (768, 3072, 328_772_352)], ids=["0.1B", "0.3B"]
)
def test_sizes_of_table_1(hidden, intermediate, parameters):
    """Against the authors' counts, and against transformers' own model, built without memory."""
    shape = ReducedGemma2(hidden_size=hidden, intermediate_size=intermediate)
    assert shape.parameters == parameters
    with torch.device("meta"):
        assert sum(w.numel() for w in shape.build(0).parameters()) == parameters


def test_flops_are_the_counted_ones():
    """performance.md section 4: 284 MF forward at 2,048 for the 0.1B, 665 MF at 256 for the 0.3B."""
    assert ReducedGemma2(hidden_size=320, intermediate_size=1280).forward_flops(2048) == pytest.approx(284e6, rel=0.01)
    assert ReducedGemma2(hidden_size=768, intermediate_size=3072).forward_flops(256) == pytest.approx(665e6, rel=0.01)


def test_initialisation_depends_on_its_seed_alone():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one = SHAPE.build(5).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    two, other = SHAPE.build(5).state_dict(), SHAPE.build(6).state_dict()
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert any(not torch.equal(one[k], other[k]) for k in one)


def test_packed_documents_do_not_see_each_other(model):
    one, two = torch.tensor([5, 6, 7, 8]), torch.tensor([9, 10, 11])
    packed = models.hidden_states(model, collate([[one.numpy(), two.numpy()]], length=9))[0]
    torch.testing.assert_close(packed[:4], model.model(one[None]).last_hidden_state[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(packed[4:7], model.model(two[None]).last_hidden_state[0], rtol=1e-5, atol=1e-5)


def test_rows_longer_than_the_sliding_window_are_refused():
    narrow = SHAPE.model_copy(update={"sliding_window": 8}).build(0)
    with pytest.raises(ConfigError, match="sliding window of 8"):
        models.hidden_states(narrow, collate([[torch.arange(9).numpy()]]))


def test_a_layer_that_does_not_exist_is_refused(model):
    with pytest.raises(ConfigError, match="blocks 0 to 1"):
        models.hidden_states(model, collate([[torch.arange(4).numpy()]]), layer=2)


def test_save_and_load(tmp_path, data, model):
    models.save(model, data.folder / "tokenizer", tmp_path / "model")
    for loaded in (models.load(tmp_path / "model"), AutoModelForCausalLM.from_pretrained(tmp_path / "model")):
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    facts = models.load(tmp_path / "model").config.to_dict()
    assert ReducedGemma2.from_transformers(facts) == SHAPE


def test_weights_load_in_fp32_whatever_they_were_saved_in(tmp_path, data):
    models.save(lively(SHAPE.build(0)).bfloat16(), data.folder / "tokenizer", tmp_path / "model")
    assert {w.dtype for w in models.load(tmp_path / "model").parameters()} == {torch.float32}


def test_only_safetensors_are_loaded(tmp_path, data, model):
    models.save(model, data.folder / "tokenizer", tmp_path / "model")
    torch.save(model.state_dict(), tmp_path / "model" / "pytorch_model.bin")
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="only safetensors"):
        models.load(tmp_path / "model")


def test_flex_attention_equals_eager(monkeypatch):
    """The attention of a GPU, in its unfused form: softcap, packed documents, padding, grouped heads."""
    from torch.nn.attention import flex_attention

    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr("transformers.integrations.flex_attention.torch.compile", lambda function, **_: function)
    shape = SHAPE.model_copy(update={"head_dim": 16, "attention_softcap": 2.0})  # so low that it matters
    model, tokens = lively(shape.build(seed=0)), batch(rows=3, length=150)
    with torch.no_grad():
        expected = hidden_states(model, tokens)
        model.set_attn_implementation(FLEX)
        got = hidden_states(model, tokens)
        model.config.attn_logit_softcapping = None
        for layer in model.model.layers:
            layer.self_attn.attn_logit_softcapping = None
        uncapped = hidden_states(model, tokens)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert (uncapped - expected).abs().max() > 0.01
