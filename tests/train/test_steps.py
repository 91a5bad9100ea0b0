"""Steps with a second gradient: by hand on two parameters, exact over micro-batches, weights back to the last bit."""

import gc

import pytest
import torch
from accelerate import PartialState
from torch import nn

from tests.unlearn.test_methods import METHODS, gradients, moved, roles, setting
from undo.train.gradient import BatchGradient
from undo.train.shift import shifted
from undo.unlearn import SAM, UAM, GradDiff, Smoothing
from undo.unlearn.method import Method


class Quadratic:
    """forget = (3 w1^2 + 4 w2^2) / 2 and retain = |w - center|^2 / 2: gradients (3 w1, 4 w2) and w - center."""

    def __init__(self, w, center=(0.0, 0.0), progress=0.0):
        self.weights, self.progress = [nn.Parameter(torch.tensor(w, dtype=torch.float64))], progress
        self.center, self.asked = torch.tensor(center, dtype=torch.float64), []

    def __call__(self, names=None):
        (w,) = self.weights
        scale = torch.tensor([3.0, 4.0], dtype=torch.float64)
        terms = {"forget": (scale * w**2).sum() / 2, "retain": ((w - self.center) ** 2).sum() / 2}
        wanted = [value for name, value in terms.items() if names is None or name in names]
        grads = [torch.autograd.grad(sum(wanted), w)[0] if wanted else None]
        self.asked.append((w.tolist(), names))
        return {name: value.detach() for name, value in terms.items()}, grads


def step(method, quadratic) -> list[float]:
    before = quadratic.weights[0].clone()
    _, (gradient,) = method.step(quadratic, torch.Generator())
    assert torch.equal(quadratic.weights[0], before)
    return pytest.approx(gradient.tolist())


# At w = (1, 1) the forget gradient is (3, 4), its direction (0.6, 0.8); with rho = 0.5 the second point is (1.3, 1.4).


def test_sam_on_the_forget_term_by_hand():
    assert step(SAM(base=GradDiff(), rho=0.5, ascent="forget"), Quadratic([1.0, 1.0])) == [3.9 + 1, 5.6 + 1]


def test_sam_on_the_total_by_hand():
    """At (1, 1) the total gradient is (4, 5), of norm sqrt(41)."""
    w1, w2 = 1 + 0.5 * 4 / 41**0.5, 1 + 0.5 * 5 / 41**0.5
    assert step(SAM(base=GradDiff(), rho=0.5, ascent="total"), Quadratic([1.0, 1.0])) == [4 * w1, 5 * w2]


@pytest.mark.parametrize(
    ("gamma", "expected"), [(0.0, [1.3, 1.4]), (1.0, [1.3 - 1.14, 1.4 - 1.52]), (0.5, [1.3 - 0.57, 1.4 - 0.76])]
)
def test_uam_by_hand(gamma, expected):
    """The retain gradient at (1.3, 1.4) is (1.3, 1.4) itself; along (0.6, 0.8) it is 1.9."""
    assert step(UAM(rho=0.5, gamma=gamma), Quadratic([1.0, 1.0])) == expected


def test_uam_with_gamma_1_leaves_the_forget_loss_to_first_order():
    quadratic = Quadratic([1.0, 1.0])
    _, (gradient,) = UAM(rho=0.5, gamma=1.0).step(quadratic, torch.Generator())
    assert float(gradient @ torch.tensor([3.0, 4.0], dtype=torch.float64)) == pytest.approx(0)


@pytest.mark.parametrize(("when", "expected"), [("conflict", [-1.7, -1.6]), ("always", [-1.7 + 1.38, -1.6 + 1.84])])
def test_uam_projects_where_the_step_would_undo_forgetting(when, expected):
    """Towards (3, 3) the step raises the forget loss: no conflict. Along (0.6, 0.8) the gradient is -2.3."""
    assert step(UAM(rho=0.5, gamma=1.0, when=when), Quadratic([1.0, 1.0], center=(3.0, 3.0))) == expected
    both = [step(UAM(rho=0.5, when=w), Quadratic([1.0, 1.0])) for w in ("conflict", "always")]
    assert both[0] == both[1].expected


def test_uam_s_rho_goes_to_zero_with_the_cosine():
    for progress, rho in ((0.0, 0.5), (0.5, 0.25), (1.0, 0.0)):
        quadratic = Quadratic([1.0, 1.0], progress=progress)
        UAM(rho=0.5, schedule="cosine").step(quadratic, torch.Generator())
        assert quadratic.asked[1][0] == pytest.approx([1 + 0.6 * rho, 1 + 0.8 * rho])


def test_smoothing_is_the_mean_over_its_draws():
    """On a quadratic the gradient is linear, so the mean over draws is the gradient at the mean draw."""
    rng, sigma = torch.Generator().manual_seed(0), 0.1
    draws = torch.stack([torch.randn(2, generator=rng) for _ in range(4)]).double().mean(0)
    quadratic = Quadratic([1.0, 1.0])
    _, (gradient,) = Smoothing(base=GradDiff(), sigma=sigma, samples=4).step(
        quadratic, torch.Generator().manual_seed(0)
    )
    w = 1 + sigma * draws
    assert gradient.tolist() == pytest.approx([3 * float(w[0]) + 1, 4 * float(w[1]) + 1], rel=1e-6)
    assert quadratic.weights[0].tolist() == [1.0, 1.0]


def test_without_a_forget_gradient_nothing_is_shifted():
    quadratic = Quadratic([0.0, 0.0], center=(1.0, 1.0))
    assert step(SAM(base=GradDiff(), rho=0.5), quadratic) == [-1.0, -1.0]


def test_weights_come_back_to_the_last_bit_even_after_an_error():
    weights = [nn.Parameter(torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 1e-3)]
    before = weights[0].clone()
    with shifted(weights, [torch.full((1000,), 1e4)]):
        assert not torch.equal(weights[0], before)
    assert torch.equal(weights[0], before)
    with pytest.raises(KeyError), shifted(weights, [torch.ones(1000)]):
        raise KeyError
    assert torch.equal(weights[0], before)


@pytest.mark.parametrize(
    ("method", "held"),
    [
        (SAM(base=GradDiff(), ascent="total"), [0, 4]),
        (SAM(base=GradDiff(), ascent="forget"), [0, 4, 4]),
        (Smoothing(base=GradDiff(), samples=3), [4, 8, 8, 4]),
        (UAM(gamma=1.0), [0, 8]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_a_step_holds_while_it_asks_for_a_gradient(method, held):
    """In bytes a weight, of all tensors that are alive: the offsets are gone, and so is what is not needed again."""
    size, found = 12_345, []
    weights = [nn.Parameter(torch.ones(size)) for _ in range(4)]

    def alive() -> int:
        return sum(x.numel() == size for x in gc.get_objects() if type(x) is torch.Tensor)

    gc.collect()
    before = alive()

    class Asked:
        progress = 0.0

        def __init__(self):
            self.weights = weights

        def __call__(self, names=None):
            found.append(4 * (alive() - before) / len(weights))
            return dict.fromkeys(("forget", "retain"), torch.ones(())), [torch.ones(size) for _ in weights]

    method.step(Asked(), torch.Generator())
    assert found == held
    assert max(held) <= method.held_per_weight


every_method = pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)


def batch_gradient(model, objective, micro_rows):
    weights = [w for w in model.parameters() if w.requires_grad]
    off = torch.autocast("cpu", enabled=False)
    return BatchGradient(objective, roles(rows=4), weights, 0.25, micro_rows, PartialState(cpu=True), off)


@every_method
@pytest.mark.parametrize("micro_rows", [1, 2])
def test_a_step_is_exact_over_micro_batches(method, micro_rows):
    results = []
    for rows in (None, micro_rows):
        model, _, objective = setting(method, dtype=torch.float64)
        before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        terms, grads = method.step(batch_gradient(model, objective, rows), torch.Generator().manual_seed(1))
        assert all(torch.equal(before[name], weight) for name, weight in model.named_parameters())
        assert all(weight.grad is None for weight in model.parameters())
        results.append((terms, grads))
    (terms, grads), (split_terms, split_grads) = results
    assert terms.keys() == split_terms.keys()
    for name in terms:
        torch.testing.assert_close(split_terms[name], terms[name], rtol=1e-6, atol=1e-6)
    for whole, split in zip(grads, split_grads, strict=True):
        assert (whole is None) == (split is None)
        if whole is not None:
            torch.testing.assert_close(split, whole, rtol=1e-6, atol=1e-6)


@every_method
def test_the_terms_sum_to_the_loss(method):
    """A step says all terms; where it moves no weights, it is the gradient of their sum, each counted once."""
    model, _, objective = setting(method, dtype=torch.float64)
    moved(model, method)
    terms, grads = method.step(batch_gradient(model, objective, 2), torch.Generator().manual_seed(1))
    whole = objective(roles(rows=4))
    assert terms.keys() == whole.keys()
    if type(method).step is Method.step:
        for name in whole:
            torch.testing.assert_close(terms[name], whole[name].detach(), rtol=1e-6, atol=1e-6)
        weights = [w for w in model.parameters() if w.requires_grad]
        for mine, expected in zip(grads, torch.autograd.grad(sum(whole.values()), weights), strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-6, atol=1e-6)


@every_method
def test_the_same_generator_makes_the_same_step(method):
    steps = []
    for noise in (0, 1):
        torch.manual_seed(noise)
        model, _, objective = setting(method)
        steps.append(method.step(batch_gradient(model, objective, None), torch.Generator().manual_seed(1))[1])
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(*steps, strict=True))


def test_a_radius_of_zero_is_the_base_s_own_step():
    for ascent in ("forget", "total"):
        method = SAM(rho=0.0, ascent=ascent)
        model, _, objective = setting(method)
        _, sharp = method.step(batch_gradient(model, objective, 2), torch.Generator())
        plain = gradients(model, objective(roles(rows=4)))
        for (name, _), mine in zip(model.named_parameters(), sharp, strict=True):
            torch.testing.assert_close(mine, plain[name], rtol=1e-4, atol=1e-6)
