"""The masks of packed rows: one for all that read the same rows in the same way, and none for longer than that."""

from contextlib import nullcontext

import pytest
import torch
from accelerate import PartialState

from tests.conftest import SHAPE, batch, lively
from undo.lm import attention
from undo.lm.place import freeze
from undo.lm.read import hidden_states
from undo.losses import forward_kl
from undo.train.gradient import BatchGradient

WINDOW = 5  # tokens, in rows of 12: sliding layers need a mask of their own
NARROW = SHAPE.model_copy(update={"sliding_window": WINDOW, "head_dim": 16})


@pytest.fixture
def made(monkeypatch) -> list:
    """The window of each mask that was made."""
    windows, make = [], attention._made

    def watched(positions, kind, window, dtype):
        windows.append(window)
        return make(positions, kind, window, dtype)

    monkeypatch.setattr(attention, "_made", watched)
    return windows


def distilled(kind: str, micro_rows: int, autocast: bool = False):
    """One step's gradient of a student of a teacher -> its terms and gradients."""
    student, teacher = lively(NARROW.build(0)), freeze(lively(NARROW.build(0), 2))
    for model in (student, teacher):
        model.set_attn_implementation(kind)
    objective = lambda parts: {"kl": forward_kl(student, teacher, parts["train"])}  # noqa: E731
    context = torch.autocast("cpu", torch.bfloat16, enabled=autocast)
    tokens = {"train": batch(rows=4)}
    return BatchGradient(objective, tokens, [*student.parameters()], 0.0, micro_rows, PartialState(cpu=True), context)()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", ["blocked", "eager"])
def test_teacher_and_student_share_a_mask(kind, autocast, made, monkeypatch):
    """One of each kind for a micro-batch; and the same bits as from two."""
    terms, gradients = distilled(kind, 2, autocast)
    assert made == [None, WINDOW] * 2
    assert attention._shared == []
    made.clear()
    monkeypatch.setattr(attention, "shared", nullcontext)
    alone, theirs = distilled(kind, 2, autocast)
    assert made == [None, WINDOW] * 4
    assert torch.equal(terms["kl"], alone["kl"])
    assert all(torch.equal(a, b) for a, b in zip(gradients, theirs, strict=True))


def test_two_models_share_a_mask_of_flex_attention(made, monkeypatch):
    """In its unfused form, which has no backward pass on a CPU."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr("transformers.integrations.flex_attention.torch.compile", lambda function, **_: function)
    tokens, models = batch(rows=4), [freeze(lively(NARROW.build(0), seed)) for seed in (1, 2)]
    for model in models:
        model.set_attn_implementation("flex_attention")
    alone = [hidden_states(model, tokens) for model in models]
    assert made == [None, WINDOW] * 2
    with attention.shared():
        assert all(torch.equal(hidden_states(*pair), a) for *pair, a in zip(models, [tokens] * 2, alone, strict=True))
    assert made == [None, WINDOW] * 3


def test_what_is_read_in_another_way_has_a_mask_of_its_own(made):
    """Another window, another precision, other rows, or the same rows later on."""
    model, tokens = lively(NARROW.build(0)), batch(rows=4)
    other = lively(NARROW.model_copy(update={"sliding_window": WINDOW + 2}).build(0))
    alone = {of: hidden_states(of, tokens) for of in (model, other)}
    made.clear()
    with attention.shared():
        for of in (model, other, model, other):
            assert torch.equal(hidden_states(of, tokens), alone[of])
        assert made == [None, WINDOW, WINDOW + 2]
        hidden_states(model, tokens.labelled(tokens.labels > 9))
        assert len(made) == 3
        with torch.autocast("cpu", torch.bfloat16):
            hidden_states(model, tokens)
        assert len(made) == 5
        assert not torch.equal(hidden_states(model, batch(rows=4, seed=1)), alone[model])
        assert len(made) == 7
    for _ in range(2):
        hidden_states(model, tokens)
    assert len(made) == 11


def test_a_failure_leaves_no_masks_behind(model):
    with pytest.raises(TypeError), attention.shared():
        hidden_states(model, (hidden_states(model, batch()),))
    assert attention._shared == []


def test_torch_s_mask_maker_is_compiled_once_and_asked_in_one_way(monkeypatch):
    """A graph is made for each mode that it is called in: teachers run without gradients, students with them."""
    compiled, modes, of = [], [], attention._create_block_mask

    def compile_(function):
        compiled.append(function)

        def asked(*args):
            modes.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
            return function(*args)

        return asked

    monkeypatch.setattr(torch, "compile", compile_)
    monkeypatch.setattr(attention, "_create_block_mask", lambda _: of(True))  # as on CUDA
    of.cache_clear()
    document = torch.tensor([[1, 1, 1, 2, 2]])
    for gradient in (False, True):
        with torch.set_grad_enabled(gradient), torch.autocast("cpu", torch.bfloat16, enabled=gradient):
            attention._block_mask(document, None)
    of.cache_clear()
    assert len(compiled) == 1
    assert modes == [(False, False)] * 2
