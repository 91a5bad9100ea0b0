"""Properties of every unlearning method in the union, so that a new one is covered on arrival; then each equation."""

import math
from typing import get_args

import pytest
import torch
from conftest import SHAPE, batch, lively

from undo.methods import GradDiff, MaxEnt, UnlearningMethod
from undo.methods.method import Method
from undo.methods.rmu import RMU
from undo.models import freeze, hidden_states
from undo.tokens import IGNORE, Tokens, collate

NEEDED = {"rmu": {"layer": 1, "trained_layers": (0, 1), "c": 2.0, "alpha": 3.0}}  # keys without a default
KINDS: list[type[Method]] = list(get_args(get_args(UnlearningMethod)[0]))
METHODS = [kind(**NEEDED.get(kind.model_fields["name"].default, {})) for kind in KINDS]
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)


def setting(method: Method, seed: int = 3):
    model, reference = lively(SHAPE.build(0)), freeze(lively(SHAPE.build(0)))
    for name, weight in model.named_parameters():
        weight.requires_grad_(method.trains(name))
    return model, reference, method.objective(model, reference, torch.Generator().manual_seed(seed))


def roles(**changes) -> dict[str, Tokens]:
    return {"retain": batch(seed=1, **changes), "forget": batch(seed=2, **changes)}


def gradients(model, terms) -> dict[str, torch.Tensor]:
    sum(terms.values()).backward()
    grads = {name: w.grad.clone() for name, w in model.named_parameters() if w.grad is not None}
    model.zero_grad()
    return grads


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], tolerance: float = 1e-6):
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-4, atol=tolerance)


@every_method
def test_padding_changes_nothing(method):
    _model, _, objective = setting(method)
    short, long = objective(roles()), objective({k: pad(t, 5) for k, t in roles().items()})
    assert_same(short, long)


def pad(tokens: Tokens, extra: int) -> Tokens:
    rows = len(tokens.input_ids)
    return Tokens(
        torch.cat([tokens.input_ids, torch.zeros(rows, extra, dtype=torch.long)], 1),
        torch.cat([tokens.positions, torch.arange(extra).expand(rows, extra)], 1),
        torch.cat([tokens.labels, torch.full((rows, extra), IGNORE)], 1),
        tokens.total,
    )


@every_method
def test_packing_changes_nothing(method):
    """The same documents, one a row or all in one row."""
    import numpy as np

    rng = np.random.default_rng(0)
    documents = {role: [rng.integers(4, 448, size=n) for n in (5, 3, 7)] for role in ("retain", "forget")}
    _model, _, objective = setting(method)
    alone = objective({role: collate([[d] for d in docs]) for role, docs in documents.items()})
    packed = objective({role: collate([docs]) for role, docs in documents.items()})
    assert_same(alone, packed)


@every_method
def test_gradient_reaches_the_declared_parameters_and_no_other(method):
    model, _, objective = setting(method)
    grads = gradients(model, objective(roles()))
    assert grads.keys() == {name for name, _ in model.named_parameters() if method.trains(name)}
    assert grads
    assert all(grad.any() for grad in grads.values())


@every_method
def test_the_reference_is_untouched(method):
    model, reference, objective = setting(method)
    before = {k: v.clone() for k, v in reference.state_dict().items()}
    gradients(model, objective(roles()))
    assert all(torch.equal(before[k], v) for k, v in reference.state_dict().items())
    assert all(w.grad is None for w in reference.parameters())


@every_method
def test_same_generator_same_result_whatever_else_is_drawn(method):
    torch.manual_seed(0)
    one = setting(method)[2](roles())
    torch.manual_seed(1)
    two = setting(method)[2](roles())
    assert all(torch.equal(one[k], two[k]) for k in one)


@every_method
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_micro_batches_add_up_to_the_whole_batch(method, rows):
    model, _, objective = setting(method)
    whole = gradients(model, objective(roles()))
    parts = zip(*(tokens.micro_batches(rows) for tokens in roles().values()), strict=True)
    for retain, forget in parts:
        sum(objective({"retain": retain, "forget": forget}).values()).backward()
    summed = {name: w.grad for name, w in model.named_parameters() if w.grad is not None}
    assert_same(whole, summed)


@every_method
def test_descent_on_the_objective_lowers_it(method):
    model, _, objective = setting(method)
    first = sum(objective(roles()).values())
    grads = gradients(model, objective(roles()))
    norm = math.sqrt(sum(float(g.square().sum()) for g in grads.values()))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name in grads:
                weight -= 1e-3 * grads[name] / norm
    assert sum(objective(roles()).values()) < first


# --- each equation, written out ------------------------------------------------------------------------------------


def log_probabilities(model, tokens):
    """float64 [labels, vocabulary], and the labels."""
    mask = tokens.labels != IGNORE
    logits = hidden_states(model, tokens)[mask].double() @ model.lm_head.weight.double().T
    return (30 * torch.tanh(logits / 30)).log_softmax(-1), tokens.labels[mask]


def test_graddiff_is_minus_forget_plus_alpha_retain():
    method = GradDiff(alpha=15.0)
    model, _, objective = setting(method)
    data = roles()
    losses = {}
    for role, tokens in data.items():
        log_p, labels = log_probabilities(model, tokens)
        losses[role] = -log_p.gather(1, labels[:, None]).mean()
    terms = objective(data)
    torch.testing.assert_close(terms["forget"].double(), -losses["forget"], rtol=1e-5, atol=0)
    torch.testing.assert_close(terms["retain"].double(), 15 * losses["retain"], rtol=1e-5, atol=0)


def test_maxent_is_uniform_kl_on_forget_plus_cross_entropy_on_retain():
    model, _, objective = setting(MaxEnt())
    data = roles()
    log_p, _ = log_probabilities(model, data["forget"])
    uniform = -log_p.mean(-1).mean() - math.log(SHAPE.vocab_size)
    log_p, labels = log_probabilities(model, data["retain"])
    terms = objective(data)
    torch.testing.assert_close(terms["uniform"].double(), uniform, rtol=1e-5, atol=0)
    torch.testing.assert_close(terms["retain"].double(), -log_p.gather(1, labels[:, None]).mean(), rtol=1e-5, atol=0)


def test_rmu_pushes_to_c_u_and_holds_to_the_reference():
    method = RMU(layer=0, trained_layers=(0,), c=2.0, alpha=3.0)
    model, reference, objective = setting(method, seed=11)
    with torch.no_grad():  # the model has moved away from its reference
        model.model.layers[0].mlp.down_proj.weight += 0.1
    data = roles()
    u = torch.randn(SHAPE.hidden_size, generator=torch.Generator().manual_seed(11))
    u /= u.norm()
    mask = {role: tokens.labels != IGNORE for role, tokens in data.items()}

    def first_block(of, role):
        tokens = data[role]
        output = of.model(tokens.input_ids, position_ids=tokens.positions, output_hidden_states=True, use_cache=False)
        return output.hidden_states[1][mask[role]]

    h = {role: first_block(model, role) for role in data}
    kept = first_block(reference, "retain")
    terms = objective(data)
    torch.testing.assert_close(terms["misdirect"], ((h["forget"] - 2.0 * u) ** 2).mean(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(terms["preserve"], 3.0 * ((h["retain"] - kept) ** 2).mean(), rtol=1e-4, atol=1e-6)


def test_rmu_never_runs_the_head_or_the_blocks_above():
    method = RMU(layer=0, trained_layers=(0,))
    model, reference, objective = setting(method)
    for part in (model.lm_head, model.model.layers[1], reference.lm_head, reference.model.layers[1]):
        part.register_forward_hook(lambda *_: pytest.fail("a part that RMU does not need was run"))
    objective(roles())
