"""Shrink-and-perturb against the paper's formula and its limits (Section 5, Appendix C)."""

import math

import pytest
import torch
from torch import nn

from tests.conftest import DEVICE, SHAPE
from undo.corrupt import Noise

pytestmark = pytest.mark.device


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: w.detach().clone() for name, w in model.named_parameters()}


def perturbed(noise: Noise, seed: int = 0):
    model = SHAPE.build(0).to(DEVICE)
    for _name, weight in model.named_parameters():
        if weight.ndim == 1:
            nn.init.constant_(weight, 0.5)
    before = weights(model)
    noise.apply(model, SHAPE.build(77).to(DEVICE), torch.Generator().manual_seed(seed))
    return before, weights(model)


def test_alpha_zero_is_the_identity():
    before, after = perturbed(Noise(alpha=0.0, beta=1.0))
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_the_formula():
    """With the noise of alpha = beta = 1 in hand, theta' = (1 - alpha) theta + alpha beta N for any alpha and beta."""
    _, noise = perturbed(Noise(alpha=1.0, beta=1.0))
    before, after = perturbed(Noise(alpha=0.3, beta=0.5))
    for key in before:
        torch.testing.assert_close(after[key], 0.7 * before[key] + 0.3 * 0.5 * noise[key])


def test_xavier_statistics_and_zero_vectors():
    _, noise = perturbed(Noise(alpha=1.0, beta=1.0))
    for value in noise.values():
        if value.ndim == 1:
            assert not value.any()
        else:
            bound = math.sqrt(6 / sum(value.shape))
            assert value.abs().max() <= bound
            assert value.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)


def test_alpha_and_beta_one_is_a_fresh_initialisation_where_init_noise_is_chosen():
    _, after = perturbed(Noise(alpha=1.0, beta=1.0, distribution="init"))
    fresh = weights(SHAPE.build(77).to(DEVICE))
    assert all(torch.equal(after[k], fresh[k]) for k in fresh)


def test_norms_can_be_kept():
    before, after = perturbed(Noise(alpha=0.5, norms="keep"))
    vectors = [k for k in before if before[k].ndim == 1]
    assert vectors
    assert all(torch.equal(before[k], after[k]) for k in vectors)
    assert not any(torch.equal(before[k], after[k]) for k in before if before[k].ndim == 2)


def test_noise_has_its_own_generator():
    torch.manual_seed(1)
    _, one = perturbed(Noise(alpha=0.5), seed=5)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    _, two = perturbed(Noise(alpha=0.5), seed=5)
    _, three = perturbed(Noise(alpha=0.5), seed=6)
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert any(not torch.equal(one[k], three[k]) for k in one)
    assert torch.equal(torch.get_rng_state(), state)


def test_tied_embeddings_are_perturbed_once():
    model = SHAPE.build(0).to(DEVICE)
    before = model.model.embed_tokens.weight.detach().clone()
    Noise(alpha=0.5, beta=0.0).apply(model, model, torch.Generator())
    torch.testing.assert_close(model.lm_head.weight, before / 2)


def test_other_shapes_are_refused():
    conv = nn.Conv1d(2, 2, 3)
    with pytest.raises(ValueError, match=r"no noise is defined for weight of shape \(2, 2, 3\)"):
        Noise(alpha=0.5).apply(conv, conv, torch.Generator())
