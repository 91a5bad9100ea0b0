"""Steps with a second gradient: by hand on two parameters, exact over micro-batches, weights back to the last bit."""

import gc

import numpy as np
import pytest
import torch
from torch import nn

from tests.conftest import DEVICE
from tests.unlearn.test_methods import METHODS, gradients, log_probabilities, moved, roles, setting
from undo.lm.tokens import collate
from undo.runs.ranks import this_process
from undo.train.gradient import BatchGradient
from undo.train.shift import shifted
from undo.unlearn import NPO, SAM, UAM, GradDiff, Smoothing
from undo.unlearn.method import Method

pytestmark = pytest.mark.device


class Quadratic:
    """forget = (3 w1^2 + 4 w2^2) / 2 and retain = |w - center|^2 / 2: gradients (3 w1, 4 w2) and w - center."""

    def __init__(self, w, center=(0.0, 0.0), progress=0.0):
        self.weights, self.progress = [nn.Parameter(torch.tensor(w, dtype=torch.float64))], progress
        self.center, self.asked = torch.tensor(center, dtype=torch.float64), []

    def __call__(self, names=None, *, without=()):
        (w,) = self.weights
        scale = torch.tensor([3.0, 4.0], dtype=torch.float64)
        terms = {"forget": (scale * w**2).sum() / 2, "retain": ((w - self.center) ** 2).sum() / 2}
        wanted = {n: value for n, value in terms.items() if (names is None or n in names) and n not in without}
        grads = [torch.autograd.grad(sum(wanted.values()), w)[0] if wanted else None]
        self.asked.append((w.tolist(), [*wanted]))
        return {name: value.detach() for name, value in wanted.items()}, grads


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


@pytest.mark.cpu  # counts plain tensors
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

        def __call__(self, names=None, *, without=()):
            found.append(4 * (alive() - before) / len(weights))
            return dict.fromkeys(("forget", "retain"), torch.ones(())), [torch.ones(size) for _ in weights]

    method.step(Asked(), torch.Generator())
    assert found == held
    assert max(held) <= method.held_per_weight


every_method = pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)


def batch_gradient(model, objective, micro_rows):
    weights = [w for w in model.parameters() if w.requires_grad]
    off = torch.autocast(DEVICE.type, enabled=False)
    return BatchGradient(objective, roles(rows=4), weights, 0.25, micro_rows, this_process(), off)


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


# --- the steps of SAM and of smoothing as published, written out ------------------------------------------------------


def batch_mean(model, tokens) -> torch.Tensor:
    """Mean of -log p over all labels of the batch, through full logits."""
    log_p, labels = log_probabilities(model, tokens)
    return -log_p.gather(1, labels[:, None]).mean()


def published(method, model, reference, data) -> list[torch.Tensor]:
    """Fan et al. (2025), the code's NPO+SAM and NPO+RS: one sigmoid of the mean NLL of the whole batch."""
    base, weights = method.base, [*model.parameters()]
    with torch.no_grad():
        before = batch_mean(reference, data["forget"])

    def forget_gradient(offsets):
        with torch.no_grad():
            for weight, offset in zip(weights, offsets, strict=True):
                weight += offset
        risen = batch_mean(model, data["forget"]) - before
        found = torch.autograd.grad(-2 / base.beta * torch.log(torch.sigmoid(base.beta * risen)), weights)
        with torch.no_grad():
            for weight, offset in zip(weights, offsets, strict=True):
                weight -= offset
        return found

    if method.name == "sam":
        at_w = forget_gradient([torch.zeros_like(w) for w in weights])
        norm = torch.sqrt(sum(g.square().sum() for g in at_w))
        forget = forget_gradient([method.rho * g / norm for g in at_w])
    else:
        rng = torch.Generator().manual_seed(1)
        draws = [
            forget_gradient([method.sigma * torch.randn(w.shape, generator=rng).to(w) for w in weights])
            for _ in range(method.samples)
        ]
        forget = [sum(parts) / method.samples for parts in zip(*draws, strict=True)]
    retain = torch.autograd.grad(base.retain_weight * batch_mean(model, data["retain"]), weights)
    return [f + r for f, r in zip(forget, retain, strict=True)]


@pytest.mark.parametrize("micro_rows", [None, 1, 3])
@pytest.mark.parametrize("lengths", ["equal", "unequal"])
@pytest.mark.parametrize(("kind", "preset"), [(SAM, "official"), (Smoothing, "faithful")])
def test_a_preset_s_whole_step_is_the_published_one(kind, preset, lengths, micro_rows):
    """From a model that has moved away from its start, so that the sigmoid's slope is not that of the start."""
    method = kind.model_validate({"preset": preset})
    model, reference, objective = setting(method, dtype=torch.float64)
    moved(model, method)
    rng = np.random.default_rng(0)
    sizes = [24, 24, 24, 24] if lengths == "equal" else [24, 5, 12, 2]
    data = {role: collate([[rng.integers(4, 448, size=n)] for n in sizes]).to(DEVICE) for role in ("retain", "forget")}
    off = torch.autocast(DEVICE.type, enabled=False)
    gradient = BatchGradient(objective, data, [*model.parameters()], 0.5, micro_rows, this_process(), off)
    terms, step = method.step(gradient, torch.Generator().manual_seed(1))
    assert terms.keys() == {"forget", "retain"}
    expected = published(method, model, reference, data)
    apart = sum(float((a - b).square().sum()) for a, b in zip(step, expected, strict=True))
    assert apart**0.5 < 1e-5 * sum(float(b.square().sum()) for b in expected) ** 0.5


def test_npo_of_the_batch_mean_is_one_sigmoid_over_all_micro_batches():
    method = NPO(nll="batch_mean", beta=3.0, retain_weight=0.5)  # far into the bend
    model, reference, objective = setting(method, dtype=torch.float64)
    moved(model, method)
    data = roles(rows=4)
    with torch.no_grad():
        before = batch_mean(reference, data["forget"])
    loss = -2 / 3 * torch.log(torch.sigmoid(3 * (batch_mean(model, data["forget"]) - before)))
    expected = torch.autograd.grad(loss + 0.5 * batch_mean(model, data["retain"]), [*model.parameters()])
    for micro_rows in (None, 1, 3):
        terms, grads = method.step(batch_gradient(model, objective, micro_rows), torch.Generator())
        torch.testing.assert_close(terms["forget"], loss.detach(), rtol=1e-6, atol=0)
        for mine, hand in zip(grads, expected, strict=True):
            torch.testing.assert_close(mine, hand, rtol=1e-5, atol=1e-7)


@every_method
def test_a_gradient_runs_only_the_terms_it_is_asked_for(method):
    """Each term reads one role: asked for one, the other role's tokens are never read."""
    _, _, objective = setting(method)
    forget = roles(rows=4)["forget"]

    class Forbidden(dict):
        def __getitem__(self, role):
            assert role == "forget", "the retain role was read"
            return forget

    terms = objective(Forbidden())
    of_forget = [name for name in terms if name not in ("retain", "preserve")]
    assert all(terms[name].requires_grad for name in of_forget)
    assert set(method.forget_terms) <= {*of_forget}


def test_a_radius_of_zero_is_the_base_s_own_step():
    for ascent in ("forget", "total"):
        method = SAM(rho=0.0, ascent=ascent)
        model, _, objective = setting(method)
        _, sharp = method.step(batch_gradient(model, objective, 2), torch.Generator())
        plain = gradients(model, objective(roles(rows=4)))
        for (name, _), mine in zip(model.named_parameters(), sharp, strict=True):
            torch.testing.assert_close(mine, plain[name], rtol=1e-4, atol=1e-6)
