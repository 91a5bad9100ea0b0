"""Causal LMs of many architectures, tiny and random: read here they are what the library says they are."""

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import (
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    PhiConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from tests.conftest import batch, lively
from undo.config.mistakes import ConfigError
from undo.corrupt import Noise
from undo.lm import disk
from undo.lm import place as placing
from undo.lm import read as models
from undo.lm.tokens import Tokens, collate
from undo.losses import cross_entropy, forward_kl, uniform_kl
from undo.unlearn import RMU

CPU = torch.device("cpu")
SIZES = {
    "vocab_size": 448,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
SLIDING = ["sliding_attention", "sliding_attention", "full_attention"]
CONFIGS = {
    "gemma2": Gemma2Config(**SIZES, head_dim=8, sliding_window=20),
    "gemma3": Gemma3TextConfig(
        **SIZES,
        head_dim=8,
        sliding_window=12,
        layer_types=SLIDING,
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": 1e4},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
        },
    ),
    "llama": LlamaConfig(**SIZES),
    "llama-tied": LlamaConfig(**SIZES, tie_word_embeddings=True, attention_bias=True, attention_dropout=0.5),
    "qwen2": Qwen2Config(**SIZES),
    "qwen2-sliding": Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=9, layer_types=SLIDING[::-1]),
    "qwen3": Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True),
    "mistral": MistralConfig(**SIZES, sliding_window=10),
    "phi": PhiConfig(**SIZES, partial_rotary_factor=0.5),
    "gpt-neox": GPTNeoXConfig(**{k: v for k, v in SIZES.items() if k != "num_key_value_heads"}, hidden_dropout=0.5),
    "gpt2": GPT2Config(vocab_size=448, n_embd=32, n_layer=3, n_head=4, n_positions=512, bos_token_id=1, eos_token_id=2),
}


def build(name: str) -> PreTrainedModel:
    """Placed and so verified, in double precision, and not near any special point."""
    return placing.place(lively(disk.fresh(CONFIGS[name], 0)).double(), CPU)


@pytest.fixture(params=CONFIGS)
def network(request) -> PreTrainedModel:
    return build(request.param)


def packed() -> tuple[Tokens, list[np.ndarray]]:
    """Two rows of 150 with documents shorter and longer than any window and than a block of queries."""
    rng = np.random.default_rng(0)
    rows = [[rng.integers(4, 448, n) for n in sizes] for sizes in ((5, 60, 80), (140, 7))]
    return collate(rows, 150), [document for row in rows for document in row]


def alone(model: PreTrainedModel, documents: list[np.ndarray], **options):
    """The library's own word on each document, by its plainest attention."""
    placed = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        return [model(input_ids=torch.from_numpy(d)[None], use_cache=False, **options) for d in documents]
    finally:
        model.set_attn_implementation(placed)


def unpacked(values: torch.Tensor, tokens: Tokens, documents: list[np.ndarray]) -> list[torch.Tensor]:
    starts = [0, 5, 65, 150, 290]
    return [values.flatten(0, 1)[start : start + len(d)] for start, d in zip(starts, documents, strict=True)]


def logits(model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    weight, softcap, bias = models.head(model)
    found = functional.linear(hidden, weight, bias)
    return found if softcap is None else softcap * torch.tanh(found / softcap)


def test_packed_documents_are_documents_alone(network):
    tokens, documents = packed()
    found = unpacked(logits(network, models.hidden_states(network, tokens)), tokens, documents)
    for mine, theirs in zip(found, alone(network, documents), strict=True):
        close(mine, theirs.logits[0])


def close(mine: torch.Tensor, theirs: torch.Tensor) -> None:
    """Equal but for rounding in fp32: the library's norms, rotary angles and softmaxes are fp32 whatever the weights
    are, so an element's error goes by the largest ones that its sum is made of, not by itself."""
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5 * float(theirs.detach().abs().max()))


def test_layer_outputs_are_those_of_the_library(network):
    tokens, documents = packed()
    expected = alone(network, documents, output_hidden_states=True)
    outputs, mlps = models.recorded(network, tokens)
    assert len(outputs) == len(mlps) == 3
    for layer in (0, 1):
        mine = models.hidden_states(network, tokens, layer)
        torch.testing.assert_close(outputs[layer], mine, rtol=1e-12, atol=1e-12)
        for part, theirs in zip(unpacked(mine, tokens, documents), expected, strict=True):
            close(part, theirs.hidden_states[layer + 1][0])
    last = models.final_norm(network)(models.hidden_states(network, tokens, 2))
    for part, theirs in zip(unpacked(last, tokens, documents), expected, strict=True):
        close(part, theirs.hidden_states[3][0])
    assert len(models.blocks(network)) == 3  # as it was
    assert not any(module._forward_hooks for module in models.blocks(network).modules() if "mlp" in str(type(module)))


def test_losses_and_gradients_are_those_of_plain_logits(network):
    tokens, documents = packed()
    cross_entropy(network, tokens).backward()
    mine = {name: weight.grad.clone() for name, weight in network.named_parameters() if weight.grad is not None}
    network.zero_grad()
    total = sum(
        functional.cross_entropy(out.logits[0, :-1], torch.from_numpy(d)[1:], reduction="sum")
        for out, d in zip(alone(network, documents), documents, strict=True)
    )
    (total / tokens.total).backward()
    theirs = {name: weight.grad for name, weight in network.named_parameters() if weight.grad is not None}
    assert mine.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(mine[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("name", ["phi", "gemma3"])
def test_divergences_with_a_biased_or_plain_head(name):
    """Phi's head has a bias, which is learned too."""
    student, teacher, tokens = build(name), placing.freeze(lively(build(name), seed=5)), batch(length=40)
    p, q = (logits(m, tokens.at_labels(models.hidden_states(m, tokens))).log_softmax(-1) for m in (student, teacher))
    for loss, formula in (
        (forward_kl(student, teacher, tokens), (q.exp() * (q - p)).sum(1)),
        (uniform_kl(student, tokens), -p.mean(1) - np.log(448)),
    ):
        torch.testing.assert_close(loss, formula.sum() / tokens.total, rtol=1e-8, atol=1e-8)
        bias = student.get_output_embeddings().bias
        if bias is not None:
            (mine,) = torch.autograd.grad(loss, bias)
            (theirs,) = torch.autograd.grad(formula.sum() / tokens.total, bias, retain_graph=True)
            torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ["gemma3", "mistral"])
def test_windows_matter(name):
    """Else the tests above would prove nothing about them."""
    tokens, _ = packed()
    narrow = build(name)
    found = models.hidden_states(narrow, tokens)
    narrow.config.sliding_window = 4000
    assert (models.hidden_states(narrow, tokens) - found).abs().max() > 0.1


def test_flex_attention_with_windows(monkeypatch):
    """The attention of a GPU, in its unfused form."""
    from torch.nn.attention import flex_attention

    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr("transformers.integrations.flex_attention.torch.compile", lambda function, **_: function)
    tokens, _ = packed()
    for name in ("gemma3", "mistral", "llama"):
        network = build(name).float()
        with torch.no_grad():
            expected = models.hidden_states(network, tokens)
            network.set_attn_implementation("flex_attention")
            torch.testing.assert_close(models.hidden_states(network, tokens), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (CohereConfig(**SIZES, logit_scale=0.25), "logit_scale"),
        (GraniteConfig(**SIZES, logits_scaling=4.0), "logits_scaling"),
    ],
    ids=["cohere", "granite"],
)
def test_scaled_logits_are_refused(config, reason):
    with pytest.raises(ConfigError, match=reason):
        placing.place(lively(disk.fresh(config, 0)), CPU)


def test_an_architecture_that_is_read_wrongly_is_refused(monkeypatch):
    """A body that looks across documents: the mask it is given is lost on the way."""
    network = lively(disk.fresh(CONFIGS["llama"], 0))
    forward, causal = type(network.base_model).forward, torch.full((1, 1, 15, 15), -1e9).triu(1)

    def sees_all(self, **inputs):
        return forward(self, **inputs | {"attention_mask": causal} if inputs["input_ids"].shape[1] == 15 else inputs)

    monkeypatch.setattr(type(network.base_model), "forward", sees_all)
    network.set_attn_implementation("eager")
    with pytest.raises(ConfigError, match="LlamaForCausalLM cannot be used here: its logits"):
        placing.verify(network)
    assert network.config._attn_implementation == "eager"


def test_shapes_are_counted(tmp_path):
    for name, config in CONFIGS.items():
        network = disk.fresh(config, 0)
        shape = disk.shape(network)
        assert shape.parameters == sum(w.numel() for w in network.parameters()), name
        assert shape.vocab_size == 448
        config.save_pretrained(tmp_path / name)
        assert disk.read_shape(tmp_path / name) == shape
        below = shape.first(2)
        assert 0 < below.forward_flops(64) < shape.forward_flops(64) - 2 * shape.head_parameters
    tied, apart = (disk.shape(disk.fresh(CONFIGS[name], 0)) for name in ("qwen3", "llama"))
    assert tied.embedding_parameters == 0
    assert apart.embedding_parameters == apart.head_parameters == 448 * 32


def test_a_window_saves_arithmetic():
    shape = disk.shape(disk.fresh(CONFIGS["mistral"], 0))
    assert shape.forward_flops(10) - shape.forward_flops(5) == 2 * 3 * 5 * 32  # up to the window of 10: as without one
    pairs = sum(min(query + 1, 10) for query in range(1000)) / 1000  # keys that a query sees
    assert shape.forward_flops(1000) - 2 * (shape.body_parameters + shape.head_parameters) == pytest.approx(
        4 * 3 * pairs * 32, rel=0.02
    )


def test_a_fresh_model_has_its_architecture_and_seed(network):
    one, two, other = (disk.fresh(network.config, seed).state_dict() for seed in (3, 3, 4))
    assert one.keys() == network.state_dict().keys()
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert any(not torch.equal(one[k], other[k]) for k in one)
    assert {w.dtype for w in one.values() if w.is_floating_point()} == {torch.float32}


@pytest.mark.parametrize(("name", "kept"), [("llama", True), ("qwen3", True), ("gemma2", False), ("gemma3", False)])
def test_noise_leaves_norms_that_multiply_by_themselves(name, kept):
    """Llama's norms multiply by w, and shrinking w would break it; Gemma's multiply by 1 + w."""
    network = lively(disk.fresh(CONFIGS[name], 0))
    before = {k: w.detach().clone() for k, w in network.named_parameters()}
    Noise(alpha=0.5, beta=0.0).apply(network, disk.fresh(CONFIGS[name], 1), torch.Generator().manual_seed(0))
    for key, weight in network.named_parameters():
        shrunk = before[key] if kept and "norm" in key else before[key] / 2
        torch.testing.assert_close(weight.detach(), shrunk, msg=key)


def test_a_method_on_blocks_reads_any_architecture():
    network, tokens = build("qwen3").float(), batch(length=30)
    reference = placing.freeze(build("qwen3").float())
    method = RMU(layer=1, trained_layers=(0, 1))
    terms = method.objective(network, reference, torch.Generator().manual_seed(0))(
        {"retain": tokens, "forget": batch(length=30, seed=1)}
    )
    sum(terms.values()).backward()
    assert network.model.layers[1].mlp.down_proj.weight.grad.norm() > 0
    assert network.model.layers[2].mlp.down_proj.weight.grad is None


@pytest.mark.parametrize("wider", ["student", "teacher"])
def test_logits_beyond_a_shared_vocabulary_are_left_out(wider):
    """Both sides are normalised over the common columns; the student's others get no gradient."""
    padded = {"vocab_size": 470} if wider == "student" else {"vocab_size": 430}
    values = {k: v for k, v in SIZES.items() if k != "vocab_size"} | padded
    student = placing.place(lively(disk.fresh(PhiConfig(**values), 0)).double(), CPU)
    teacher, tokens = placing.freeze(build("phi")), batch(length=40, vocab_size=430)
    width = min(448, padded["vocab_size"])
    p, q = (logits(m, tokens.at_labels(models.hidden_states(m, tokens)))[:, :width] for m in (student, teacher))
    p, q = p.log_softmax(-1), q.log_softmax(-1)
    loss = forward_kl(student, teacher, tokens, width)
    torch.testing.assert_close(loss, (q.exp() * (q - p)).sum() / tokens.total, rtol=1e-8, atol=1e-8)
    (mine,) = torch.autograd.grad(loss, student.lm_head.bias)
    assert (mine[width:] == 0).all()
    assert (mine[:width] != 0).any()


def test_a_teacher_of_another_vocabulary_is_refused():
    small = placing.place(disk.fresh(LlamaConfig(**SIZES | {"vocab_size": 300}), 0), CPU)
    with pytest.raises(ConfigError, match="vocabulary of 448, the student one of 300"):
        forward_kl(small, build("llama").float(), batch(vocab_size=300))
