"""The model as the project uses it: documents apart, seeded, saved for everyone, and of the paper's sizes."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.conftest import SHAPE, batch, lively
from undo.config.mistakes import ConfigError
from undo.lm import disk
from undo.lm import place as placing
from undo.lm import read as models
from undo.lm.read import hidden_states
from undo.lm.tokens import collate
from undo.losses import cross_entropy
from undo.prepare_models.reduced_gemma2 import SIZES, ReducedGemma2


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


def test_rows_may_be_longer_than_the_sliding_window(model):
    narrow = lively(SHAPE.model_copy(update={"sliding_window": 8}).build(0))
    one, two = torch.arange(5, 25), torch.arange(30, 42)
    packed = models.hidden_states(narrow, collate([[one.numpy(), two.numpy()]]))[0]
    for found, ids in ((packed[:20], one), (packed[20:], two)):
        torch.testing.assert_close(found, narrow.model(ids[None]).last_hidden_state[0], rtol=1e-5, atol=1e-5)
    assert (models.hidden_states(model, collate([[one.numpy()]]))[0] - packed[:20]).abs().max() > 1e-2  # it matters


def test_a_layer_that_does_not_exist_is_refused(model):
    with pytest.raises(ConfigError, match="blocks 0 to 1"):
        models.hidden_states(model, collate([[torch.arange(4).numpy()]]), layer=2)


def test_save_and_load(tmp_path, data, model):
    disk.save(model, data.folder / "tokenizer", tmp_path / "model")
    for loaded in (disk.load(tmp_path / "model"), AutoModelForCausalLM.from_pretrained(tmp_path / "model")):
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    for shape in (disk.shape(model), disk.read_shape(tmp_path / "model")):
        assert (shape.layers, shape.heads, shape.head_dim, shape.parameters) == (2, 2, 8, SHAPE.parameters)
        assert [shape.forward_flops(n) for n in (64, 8192)] == [SHAPE.forward_flops(n) for n in (64, 8192)]


def test_weights_load_in_fp32_whatever_they_were_saved_in(tmp_path, data):
    disk.save(lively(SHAPE.build(0)).bfloat16(), data.folder / "tokenizer", tmp_path / "model")
    assert {w.dtype for w in disk.load(tmp_path / "model").parameters()} == {torch.float32}


def test_only_safetensors_are_loaded(tmp_path, data, model):
    disk.save(model, data.folder / "tokenizer", tmp_path / "model")
    torch.save(model.state_dict(), tmp_path / "model" / "pytorch_model.bin")
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="only safetensors"):
        disk.load(tmp_path / "model")


def test_flex_attention_equals_eager(monkeypatch):
    """The attention of a GPU, in its unfused form: softcap, packed documents, padding, grouped heads."""
    from torch.nn.attention import flex_attention

    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr("transformers.integrations.flex_attention.torch.compile", lambda function, **_: function)
    shape = SHAPE.model_copy(update={"head_dim": 16, "attention_softcap": 2.0})  # so low that it matters
    model, tokens = lively(shape.build(seed=0)), batch(rows=3, length=150)
    with torch.no_grad():
        expected = hidden_states(model, tokens)
        model.set_attn_implementation("flex_attention")
        got = hidden_states(model, tokens)
        model.config.attn_logit_softcapping = None
        for layer in model.model.layers:
            layer.self_attn.attn_logit_softcapping = None
        uncapped = hidden_states(model, tokens)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert (uncapped - expected).abs().max() > 0.01


@pytest.mark.parametrize("softcap", [2.0, None])
@pytest.mark.parametrize("length", [40, 128, 300])
def test_blocked_attention_equals_eager_with_gradients(length, softcap):
    """Several blocks, documents across their borders and within them, padding, grouped heads."""
    shape = SHAPE.model_copy(update={"heads": 4, "kv_heads": 2, "attention_softcap": softcap})
    eager, blocked = (lively(shape.build(seed=0)).double() for _ in range(2))
    placing.place(blocked, torch.device("cpu"))
    rng = np.random.default_rng(0)
    sizes = [(length // 5, length // 2), (length - 3,), tuple([length // 10] * 9)]
    tokens = collate([[rng.integers(4, 400, n) for n in row] for row in sizes], length)
    a, b = hidden_states(eager, tokens), hidden_states(blocked, tokens)
    torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)  # eager takes its softmax in fp32, always
    for model in (eager, blocked):
        cross_entropy(model, tokens).backward()
    for (name, w), v in zip(eager.named_parameters(), blocked.parameters(), strict=True):
        torch.testing.assert_close(v.grad, w.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_blocked_attention_leaves_the_library_s_own_calls_alone():
    """generate() with its cache, and a plain call with padding, are what they were."""
    plain, placed = (lively(SHAPE.build(seed=0)) for _ in range(2))
    placing.place(placed, torch.device("cpu"))
    ids, mask = torch.tensor([[5, 6, 7, 8], [0, 0, 9, 10]]), torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    for call in (
        lambda m: m(ids, attention_mask=mask).logits,
        lambda m: m.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=0),
    ):
        assert torch.equal(call(plain), call(placed))


@pytest.mark.parametrize(
    ("size", "parameters"),
    [("0.1B", 112_904_000), ("0.3B", 328_772_352), ("0.6B", 601_957_376), ("0.9B", 933_346_560)],
)
def test_named_sizes(size, parameters):
    """The first two as counted by the authors' code; all from the sums of their matrices."""
    assert ReducedGemma2(size=size).parameters == parameters
    assert ReducedGemma2(size=size, vocab_size=1000).parameters == parameters - 255_000 * SIZES[size]["hidden_size"]


def test_a_key_beside_the_size_wins_and_another_size_is_refused():
    assert ReducedGemma2(size="0.1B", layers=2).layers == 2
    with pytest.raises(ValueError, match=r"0\.1B"):
        ReducedGemma2(size="7B", hidden_size=8, intermediate_size=8)
