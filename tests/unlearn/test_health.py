"""What an unlearning run checks at its first step, and says after its last."""

import math

import pytest
import torch

from tests.conftest import DEVICE, SHAPE, lively
from tests.train.test_steps import batch_gradient
from tests.unlearn.test_methods import METHODS, moved, roles, setting
from undo.config.mistakes import ConfigError
from undo.data.store import TokenStore
from undo.losses import cross_entropy
from undo.unlearn import GradDiff, MaxEnt, health
from undo.unlearn.rmu import RMU

pytestmark = pytest.mark.device


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_every_method_passes_its_own_check(method):
    model, _, objective = setting(method)
    norms = health.gradient_norms(batch_gradient(model, objective, 2), method)
    assert {name.partition("/")[2] for name in norms} == objective(roles()).keys()
    assert all(norm > 0 or name.partition("/")[2] in method.zero_at_first for name, norm in norms.items())


def test_the_norm_of_a_term_is_that_of_its_own_gradient():
    model, _, objective = setting(GradDiff(alpha=3.0))
    norms = health.gradient_norms(batch_gradient(model, objective, 1), GradDiff())
    objective(roles(rows=4))["retain"].backward()
    expected = math.sqrt(sum(float(w.grad.square().sum()) for w in model.parameters() if w.grad is not None))
    assert norms["gradient/retain"] == pytest.approx(expected, rel=1e-4)


def test_a_term_without_a_gradient_is_refused_in_two_lines():
    method = GradDiff()
    model, _, terms = setting(method)

    def objective(batch):
        return {"forget": terms(batch)["forget"], "retain": 0 * terms(batch)["retain"]}

    with pytest.raises(ConfigError, match="the loss term 'retain' has no gradient at the first step") as error:
        health.gradient_norms(batch_gradient(model, objective, None), method)
    assert len(str(error.value).splitlines()) == 2


def test_a_filter_that_matches_nothing_is_refused():
    model = lively(SHAPE.build(0))
    with pytest.raises(ConfigError, match="trains no parameter of this model"):
        health.choose_weights(model, RMU(layer=9, trained_layers=(8, 9)))
    health.choose_weights(model, RMU(layer=1, trained_layers=(1,)))
    assert [name for name, w in model.named_parameters() if w.requires_grad] == ["model.layers.1.mlp.down_proj.weight"]


def test_what_is_said_after_the_last_step(data):
    method = MaxEnt()
    model, start = lively(SHAPE.build(0)), lively(SHAPE.build(0))
    health.choose_weights(model, method)
    assert health.of(model, start, data)["relative_weight_change"] == 0
    moved(model, method)
    found = health.of(model, start, data)
    pairs = list(zip(model.parameters(), start.parameters(), strict=True))
    change = sum(float((w - w0).detach().square().sum()) for w, w0 in pairs) / sum(
        float(w0.detach().square().sum()) for _, w0 in pairs
    )
    assert found["relative_weight_change"] == pytest.approx(math.sqrt(change), rel=1e-4)
    assert found["trained_weights"] == sum(w.numel() for w in model.parameters())
    assert found["ln_vocabulary"] == math.log(SHAPE.vocab_size)
    store = TokenStore(data.folder / "validation" / "forget")
    with torch.no_grad():
        tokens = next(store.batches(range(min(32, len(store))), 32))
        assert found["forget_cross_entropy"] == pytest.approx(float(cross_entropy(model, tokens.to(DEVICE))))
    line = health.as_line({**found, "gradient/forget": 1.5})
    assert "first gradients: forget 1.5" in line
    assert f"ln V = {math.log(SHAPE.vocab_size):.2f}" in line
