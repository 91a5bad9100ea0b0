"""Every optimiser: its update by its formula, and that a resumed run has the bits of one that was not disturbed."""

from typing import get_args

import pytest
import torch

from tests.conftest import SHAPE, batch, lively, training
from tests.train.test_loop import go, same
from undo.config.schema import Training
from undo.losses import cross_entropy
from undo.runs.directory import Interrupted
from undo.runs.run import Run
from undo.train.optimizer import optimizer_of

NAMES = get_args(Training.model_fields["optimizer"].annotation)


def stepped(name: str, steps: int = 1, rates=(1e-2, 5e-3), **more):
    """Weights before, gradients of each step, weights after."""
    model = lively(SHAPE.build(0))
    weights = list(model.parameters())
    optimizer = optimizer_of(model, weights, training(optimizer=name, **more))
    before, gradients = [w.detach().clone() for w in weights], []
    for step in range(steps):
        cross_entropy(model, batch(seed=step)).backward()
        gradients.append([w.grad.clone() for w in weights])
        optimizer.step(rates[step])
        assert all(weight.grad is None for weight in weights)
    return model, before, gradients


def test_sgd_with_momentum_by_its_formula():
    model, before, (first, second) = stepped("sgd", steps=2, betas=[0.8, 0.95], weight_decay=0.1)
    for weight, old, a, b in zip(model.parameters(), before, first, second, strict=True):
        velocity = a + 0.1 * old
        once = old - 1e-2 * velocity
        velocity = 0.8 * velocity + b + 0.1 * once
        torch.testing.assert_close(weight, once - 5e-3 * velocity)


def test_muon_moves_matrices_by_nearly_orthogonal_updates_and_the_rest_as_adamw_does():
    model, before, _ = stepped("muon", weight_decay=0.0)
    adam, _, _ = stepped("adamw", weight_decay=0.0)
    theirs, inner = dict(adam.named_parameters()), 0
    for (name, weight), old in zip(model.named_parameters(), before, strict=True):
        if "layers" not in name or weight.ndim != 2:
            assert torch.equal(weight, theirs[name]), name
            continue
        inner += 1
        moved = (weight - old) / 1e-2 / (0.2 * max(weight.shape) ** 0.5)  # as large as AdamW's
        values = torch.linalg.svdvals(moved.double())
        assert values.max() < 1.3, name  # its iteration in bf16 ends with singular values in 0.7 to 1.2, not all at 1
        assert values[: len(values) // 2].min() > 0.5, name
    assert inner == 14


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_has_the_bits_of_an_undisturbed_one(name, tmp_path, data, monkeypatch):
    if name == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    cfg = training(optimizer=name)

    def objective(model):
        def terms(tokens):
            if len(seen) == 2:
                monkeypatch.setattr(Run, "_stop_requested", True)
            seen.append(1)
            return {"ce": cross_entropy(model, tokens["train"])}

        return terms

    seen = [1] * 99
    undisturbed, _ = go(tmp_path / "a", data, cfg=cfg, objective=objective)
    seen = []
    with pytest.raises(Interrupted):
        go(tmp_path / "b", data, cfg=cfg, objective=objective)
    monkeypatch.setattr(Run, "_stop_requested", False)
    seen = [1] * 99
    resumed, _ = go(tmp_path / "b", data, cfg=cfg, objective=objective)
    assert same(undisturbed, resumed)
