"""Every fused loss against its formula written out in full logits, in float64, and its gradient."""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import SHAPE, batch, lively
from undo import losses as equations
from undo.lm.read import hidden_states
from undo.lm.tokens import IGNORE, Tokens, collate
from undo.losses import linear as losses
from undo.losses import logits as tiles
from undo.losses import targets
from undo.losses.linear import Head, linear_loss
from undo.losses.logits import Grid
from undo.losses.targets import CrossEntropy, ForwardKL, LoweredKL, UniformKL

WIDTH = 5


def capped(hidden: torch.Tensor, head: Head) -> torch.Tensor:
    logits = hidden @ head.weight.T
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def naive(kind: str, hidden: torch.Tensor, head: Head, labels: torch.Tensor, teacher: tuple[torch.Tensor, Head]):
    """The textbook formulas, term by term."""
    p = capped(hidden, head).softmax(-1)
    if kind == "ce":
        return -torch.stack([p[i, y].log() for i, y in enumerate(labels.tolist())]).sum() if len(labels) else p.sum()
    if kind == "uniform":
        v = p.shape[-1]
        return ((1 / v) * ((1 / v) / p).log()).sum()
    q = capped(*teacher).softmax(-1)
    return (q * (q / p).log()).sum()


@contextlib.contextmanager
def as_on_a_gpu(fused: Callable[..., Any] = lambda function, *arguments: function(*arguments)) -> Iterator[None]:
    """The forms that a GPU takes, on a CPU, and `fused` in place of the compiler."""
    with contextlib.ExitStack() as stack:
        for module in (tiles, targets):
            stack.enter_context(patch.object(module, "in_one_kernel", lambda _: True))
            stack.enter_context(patch.object(module, "fused", fused))
        yield


def target(kind: str, labels: torch.Tensor, teacher: tuple[torch.Tensor, Head]):
    return {"ce": CrossEntropy(labels), "uniform": UniformKL(), "kl": ForwardKL(*teacher)}[kind]


@settings(deadline=None, max_examples=60)
@given(
    kind=st.sampled_from(["ce", "uniform", "kl"]),
    tokens=st.integers(0, 9),
    vocabulary=st.integers(2, 40),
    softcap=st.sampled_from([None, 3.0, 30.0, 80.0]),
    teacher_softcap=st.sampled_from([None, 30.0]),
    rows=st.integers(1, 12),
    columns=st.integers(1, 50),
    scale=st.sampled_from([0.1, 1.0, 4.0]),
    gpu=st.booleans(),
)
def test_equals_the_formula_with_gradients(
    kind, tokens, vocabulary, softcap, teacher_softcap, rows, columns, scale, gpu
):
    rng = torch.Generator().manual_seed(tokens * 100 + vocabulary)

    def draw(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.float64) * scale

    hidden, weight = draw(tokens, WIDTH).requires_grad_(), draw(vocabulary, WIDTH).requires_grad_()
    teacher = draw(tokens, WIDTH + 1), Head(draw(vocabulary, WIDTH + 1), teacher_softcap)
    labels = torch.randint(vocabulary, (tokens,), generator=rng)
    expected = naive(kind, hidden, Head(weight, softcap), labels, teacher)
    expected_grads = torch.autograd.grad(expected, (hidden, weight))
    device = as_on_a_gpu() if gpu else contextlib.nullcontext()
    with patch.object(losses, "grid", lambda *_: Grid(rows, columns)), device:
        got = linear_loss(hidden, Head(weight, softcap), target(kind, labels, teacher))
        with torch.no_grad():
            evaluated = linear_loss(hidden, Head(weight, softcap), target(kind, labels, teacher))
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(evaluated, expected, rtol=1e-9, atol=1e-9)
    for mine, theirs in zip(torch.autograd.grad(got, (hidden, weight)), expected_grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("kind", ["ce", "uniform", "kl"])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradient_by_finite_differences(kind, softcap):
    torch.manual_seed(0)
    hidden = torch.randn(4, WIDTH, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, WIDTH, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(4, 3, dtype=torch.float64), Head(torch.randn(7, 3, dtype=torch.float64), 30.0)
    chosen = target(kind, torch.tensor([0, 3, 6, 3]), teacher)

    def loss() -> torch.Tensor:
        return linear_loss(hidden, Head(weight, softcap), chosen)

    for tensor, gradient in zip((hidden, weight), torch.autograd.grad(loss(), (hidden, weight)), strict=True):
        flat = tensor.detach().view(-1)  # shares the memory
        for i, value in enumerate(flat.tolist()):
            ends = []
            for step in (1e-5, -1e-5):
                flat[i] = value + step
                ends.append(loss().item())
            flat[i] = value
            assert gradient.view(-1)[i].item() == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("kind", ["ce", "uniform", "kl"])
def test_single_precision_is_close_to_double(kind):
    torch.manual_seed(1)
    hidden, weight, labels = torch.randn(64, 32) * 3, torch.randn(500, 32), torch.randint(500, (64,))
    teacher = torch.randn(64, 32) * 3, Head(torch.randn(500, 32), 30.0)
    single = linear_loss(hidden, Head(weight, 30.0), target(kind, labels, teacher))
    double_teacher = teacher[0].double(), Head(teacher[1].weight.double(), 30.0)
    double = naive(kind, hidden.double(), Head(weight.double(), 30.0), labels, double_teacher)
    torch.testing.assert_close(single.double(), double, rtol=1e-5, atol=0)


def test_single_precision_gradients_are_close_to_double():
    torch.manual_seed(2)
    hidden, weight, labels = torch.randn(64, 32) * 3, torch.randn(5000, 32), torch.randint(5000, (64,))
    teacher = torch.randn(64, 32) * 3, Head(torch.randn(5000, 32), 30.0)
    double_teacher = teacher[0].double(), Head(teacher[1].weight.double(), 30.0)
    for kind in ("ce", "uniform", "kl"):
        single = [t.clone().requires_grad_() for t in (hidden, weight)]
        double = [t.double().requires_grad_() for t in (hidden, weight)]
        linear_loss(single[0], Head(single[1], 30.0), target(kind, labels, teacher)).backward()
        naive(kind, double[0], Head(double[1], 30.0), labels, double_teacher).backward()
        for mine, exact in zip(single, double, strict=True):
            assert (mine.grad.double() - exact.grad).norm() < 1e-5 * exact.grad.norm()


def test_autocast_rounds_the_products_only():
    """bf16 has 8 bits: loss and gradients are near the fp32 ones, and all that is returned is fp32."""
    torch.manual_seed(3)
    hidden, weight = torch.randn(64, 32, requires_grad=True), torch.randn(5000, 32, requires_grad=True)
    labels, teacher = torch.randint(5000, (64,)), (torch.randn(64, 32), Head(torch.randn(5000, 32), 30.0))
    for kind in ("ce", "uniform", "kl"):
        values = []
        for enabled in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                loss = linear_loss(hidden, Head(weight, 30.0), target(kind, labels, teacher))
            values.append((loss, *torch.autograd.grad(loss, (hidden, weight))))
        for exact, rounded in zip(*values, strict=True):
            assert rounded.dtype == torch.float32
            error = (rounded - exact).norm() / exact.norm()
            assert 0 < error < 0.02


@settings(deadline=None, max_examples=30)
@given(tokens=st.integers(0, 9), vocabulary=st.integers(2, 40), rows=st.integers(1, 12), columns=st.integers(1, 50))
def test_most_likely_is_the_arg_max(tokens, vocabulary, rows, columns):
    rng = torch.Generator().manual_seed(vocabulary)
    hidden, weight = torch.randn(tokens, WIDTH, generator=rng), torch.randn(vocabulary, WIDTH, generator=rng)
    with patch.object(losses, "grid", lambda *_: Grid(rows, min(columns, vocabulary))):
        got = losses.most_likely(hidden, Head(weight, 30.0))
    assert torch.equal(got, capped(hidden, Head(weight, 30.0)).argmax(-1))


def test_gradient_is_taken_once():
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    loss = linear_loss(hidden, Head(weight, 30.0), UniformKL())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        loss.backward()


@pytest.mark.parametrize("kind", ["ce", "uniform", "kl", "lowered"])
def test_one_graph_for_the_compiler(kind, monkeypatch):
    """What a GPU runs: the functions on tiles as whole graphs, without a break, and with the same result."""
    graphs = []

    def compiled(function, *arguments):
        graphs.append(function)
        return torch.compile(function, backend="aot_eager", fullgraph=True)(*arguments)

    torch.manual_seed(4)
    hidden, weight = torch.randn(20, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    labels, teacher = torch.randint(50, (20,)), (torch.randn(20, 8), Head(torch.randn(50, 8), 30.0))
    chosen = LoweredKL(*teacher, labels, 9.0) if kind == "lowered" else target(kind, labels, teacher)
    monkeypatch.setattr(losses, "grid", lambda *_: Grid(8, 50))
    plain = linear_loss(hidden, Head(weight, 30.0), chosen)
    expected = plain, *torch.autograd.grad(plain, (hidden, weight))
    with as_on_a_gpu(compiled):
        loss = linear_loss(hidden, Head(weight, 30.0), chosen)
    torch.testing.assert_close((loss, *torch.autograd.grad(loss, (hidden, weight))), expected)
    assert len(set(graphs)) == (3 if kind == "lowered" else 2)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["ce", "uniform", "kl"])
def test_gradients_of_a_whole_model(kind, tied):
    """By every weight, against autograd through full logits; the embedding is the head's weight, or is not."""
    ours, plain, teacher = (lively(SHAPE.build(0)), lively(SHAPE.build(0)), lively(SHAPE.build(5), seed=9))
    if not tied:
        for network in (ours, plain):
            network.lm_head.weight = torch.nn.Parameter(network.lm_head.weight.detach().flip(0).clone())
    tokens = collate([[np.arange(4, 16)], [np.arange(30, 42)]])  # a document a row: the library's masks will do
    if kind == "ce":
        loss = equations.cross_entropy(ours, tokens)
    else:
        loss = equations.uniform_kl(ours, tokens) if kind == "uniform" else equations.forward_kl(ours, teacher, tokens)
    loss.backward()
    log_p = plain(tokens.input_ids).logits[:, :-1].log_softmax(-1)
    if kind == "ce":
        expected = -log_p.gather(2, tokens.labels[:, :-1, None])
    elif kind == "uniform":
        expected = -log_p.mean(-1) - math.log(SHAPE.vocab_size)
    else:
        with torch.no_grad():
            log_q = teacher(tokens.input_ids).logits[:, :-1].log_softmax(-1)
        expected = (log_q.exp() * (log_q - log_p)).sum(-1)
    expected.mean().backward()
    torch.testing.assert_close(loss, expected.mean(), rtol=1e-5, atol=1e-6)
    names = [name for name, _ in ours.named_parameters()]
    assert ("lm_head.weight" in names) is not tied
    for name, a, b in zip(names, ours.parameters(), plain.parameters(), strict=True):
        assert (a.grad - b.grad).norm() <= 1e-5 * b.grad.norm() + 1e-9, name


def test_batch_without_labels_costs_nothing_and_is_zero(model):
    empty = collate([[np.array([5])], [np.array([6]), np.array([7])]], 12)
    assert empty.total == 0
    teacher = SHAPE.build(seed=5)
    for loss in (
        equations.cross_entropy(model, empty),
        equations.uniform_kl(model, empty),
        equations.forward_kl(model, teacher, empty),
        equations.undial_kl(model, teacher, empty, 5.0),
        equations.activation_mse(hidden_states(model, empty, 0), torch.ones(SHAPE.hidden_size), empty),
    ):
        loss.backward()
        assert loss == 0
    assert all(torch.isfinite(w.grad).all() and not w.grad.any() for w in model.parameters() if w.grad is not None)


def test_means_over_labels_of_a_whole_model(model):
    """The three losses of a model, against its own logits as Hugging Face computes them, one document at a time."""
    teacher = lively(SHAPE.build(seed=5), seed=9)
    tokens = batch(rows=3)
    log_p, log_q, picked = [], [], []
    for row in range(3):
        starts = [t for t in range(12) if tokens.positions[row, t] == 0] + [12]
        for a, b in itertools.pairwise(starts):
            ids, mask = tokens.input_ids[row : row + 1, a:b], tokens.labels[row, a:b] != IGNORE
            log_p.append(model(ids).logits[0].double().log_softmax(-1)[mask])
            log_q.append(teacher(ids).logits[0].double().log_softmax(-1)[mask])
            picked.append(tokens.labels[row, a:b][mask])
    log_p, log_q, picked = torch.cat(log_p), torch.cat(log_q), torch.cat(picked)
    assert len(picked) == tokens.total
    expected_ce = -log_p.gather(1, picked[:, None]).mean()
    expected_kl = (log_q.exp() * (log_q - log_p)).sum(-1).mean()
    expected_uniform = (-log_p.mean(-1) - math.log(SHAPE.vocab_size)).mean()
    torch.testing.assert_close(equations.cross_entropy(model, tokens).double(), expected_ce, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(equations.forward_kl(model, teacher, tokens).double(), expected_kl, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(equations.uniform_kl(model, tokens).double(), expected_uniform, rtol=1e-5, atol=1e-6)


def test_activation_mse_by_hand():
    """A document of two positions, the last one without a label, and padding of one; width 2.

    Errors (1, 3) and (2, 0) -> ((1 + 9) / 2 + (4 + 0) / 2) / 2 = 3.5.
    """
    hidden = torch.tensor([[[1.0, 3.0], [2.0, 0.0], [99.0, 99.0]]])
    for tokens in (
        collate([[np.array([5, 7])]], 3),
        Tokens.of(torch.tensor([[5, 7, 0]]), torch.tensor([[1, 1, 0]])),
    ):
        assert equations.activation_mse(hidden, torch.zeros_like(hidden), tokens).item() == 3.5
        assert equations.activation_mse(hidden, torch.zeros(2), tokens).item() == 3.5
    prompt = Tokens.of(torch.tensor([[5, 6, 7]]), labels=torch.tensor([[IGNORE, IGNORE, 7]]))
    assert equations.activation_mse(hidden, torch.zeros(2), prompt).item() == pytest.approx((5 + 2 + 99**2) / 3)


def test_layer_output_is_the_blocks_own(model):
    tokens = batch()
    seen = []
    hook = model.model.layers[0].register_forward_hook(lambda _m, _i, out: seen.append(out))
    hidden_states(model, tokens)
    hook.remove()
    torch.testing.assert_close(hidden_states(model, tokens, layer=0), seen[0], rtol=0, atol=0)


@pytest.mark.parametrize("device", [contextlib.nullcontext, as_on_a_gpu])
def test_undial_s_target_over_several_tiles_and_with_a_sure_teacher(device):
    """Vocabulary of three tiles; a teacher whose label has nearly all of the mass, lowered by 15."""
    rng = torch.Generator().manual_seed(0)
    hidden, q_hidden = (torch.randn(40, 8, generator=rng, dtype=torch.float64) for _ in range(2))
    weight, q_weight = (torch.randn(5000, 8, generator=rng, dtype=torch.float64) for _ in range(2))
    q_weight[:40] = 40 * q_hidden  # token i is nearly certain of word i
    labels = torch.arange(40)
    labels[20:] = torch.randint(5000, (20,), generator=rng)
    capped = [30 * torch.tanh(h @ w.T / 30) for h, w in ((hidden, weight), (q_hidden, q_weight))]
    lowered = capped[1].clone()
    lowered[torch.arange(40), labels] -= 15.0
    log_q = lowered.log_softmax(-1)
    expected = (log_q.exp() * (log_q - capped[0].log_softmax(-1))).sum()
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        teacher = Head(q_weight.to(dtype), 30.0)
        target = LoweredKL(q_hidden.to(dtype), teacher, labels, 15.0)
        with device():
            loss = linear_loss(hidden.to(dtype), Head(weight.to(dtype), 30.0), target)
        assert float(loss) == pytest.approx(float(expected), rel=tolerance)


def test_weights_of_tokens_over_several_chunks(monkeypatch):
    """Value and gradients of a weighted sum, against autograd on the plain formula."""
    monkeypatch.setattr("undo.losses.linear.grid", lambda weight, tokens: Grid(7, 300))
    rng = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 6, generator=rng, dtype=torch.float64).requires_grad_() for n in (20, 1000))
    labels, weights = torch.randint(1000, (20,), generator=rng), torch.randn(20, generator=rng, dtype=torch.float64)
    loss = linear_loss(hidden, Head(weight, None), CrossEntropy(labels), weights)
    plain = -(weights * (hidden @ weight.T).log_softmax(-1)[torch.arange(20), labels]).sum()
    torch.testing.assert_close(loss, plain)
    for mine, theirs in zip(
        torch.autograd.grad(loss, [hidden, weight]), torch.autograd.grad(plain, [hidden, weight]), strict=True
    ):
        torch.testing.assert_close(mine, theirs)
