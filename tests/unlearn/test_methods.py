"""Properties of every unlearning method in the union, so that a new one is covered on arrival; then each equation."""

import math
from typing import get_args

import pytest
import torch

from tests.conftest import DEVICE, SHAPE, batch, lively
from undo.lm.place import freeze
from undo.lm.read import hidden_states
from undo.lm.tokens import IGNORE, MARK, Tokens, collate
from undo.unlearn import SAM, UAM, GradDiff, MaxEnt, RepNoise, Smoothing, UnlearningMethod
from undo.unlearn.discrepancy import mmd
from undo.unlearn.method import Method
from undo.unlearn.npo import NPO, SimNPO
from undo.unlearn.rmu import RMU
from undo.unlearn.undial import UNDIAL

pytestmark = pytest.mark.device

NEEDED = {"rmu": {"layer": 1, "trained_layers": (0, 1), "c": 2.0, "alpha": 3.0}}  # keys without a default
KINDS: list[type[Method]] = list(get_args(get_args(UnlearningMethod)[0]))
METHODS = [
    *(kind(**NEEDED.get(kind.model_fields["name"].default, {})) for kind in KINDS),
    RMU(layer=1, trained_layers=(1,), c=2.0, alpha=3.0, direction="uniform", coefficient="adaptive"),
    UAM(loss="representation", layer=1, trained_layers=(0, 1)),
    MaxEnt(alpha=0.3, retain="kl", convex=True),
    RepNoise(base=RMU(layer=1, trained_layers=(0, 1)), noise_weight=1.0, ascent_weight=0.5),
    RepNoise(noise_weight=1.0, ascent_weight=0.5, paired=True),
    NPO(nll="batch_mean", beta=0.3, retain_weight=2.0),
    SAM.model_validate({"preset": "official"}),
    Smoothing.model_validate({"preset": "faithful"}),
]
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)


def setting(method: Method, seed: int = 3, dtype: torch.dtype = torch.float32):
    model, reference = lively(SHAPE.build(0)).to(dtype), freeze(lively(SHAPE.build(0)).to(dtype))
    for name, weight in model.named_parameters():
        weight.requires_grad_(method.trains(name))
    rng = torch.Generator().manual_seed(seed)
    return model, reference, method.objective(model, reference if method.needs_reference else None, rng)


def moved(model, method: Method) -> None:
    """A little away from the reference: there the terms of `zero_at_first` have a gradient, too."""
    rng = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if method.trains(name):
                weight += (0.02 * torch.randn(weight.shape, generator=rng)).to(weight)


def roles(**changes) -> dict[str, Tokens]:
    return {"retain": batch(seed=1, **changes), "forget": batch(seed=2, **changes)}


def gradients(model, terms) -> dict[str, torch.Tensor]:
    sum(terms.values()).backward()
    grads = {name: w.grad.clone() for name, w in model.named_parameters() if w.grad is not None}
    model.zero_grad()
    return grads


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], rtol: float = 1e-4):
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=rtol, atol=1e-6)


@every_method
def test_padding_changes_nothing(method):
    _model, _, objective = setting(method)
    short, long = objective(roles()), objective({k: pad(t, 5) for k, t in roles().items()})
    assert_same(short, long)


def pad(tokens: Tokens, extra: int) -> Tokens:
    rows = len(tokens.input_ids)
    return Tokens(
        torch.cat([tokens.input_ids, tokens.input_ids.new_zeros(rows, extra)], 1),
        torch.cat([tokens.positions, torch.arange(extra, device=DEVICE).expand(rows, extra)], 1),
        torch.cat([tokens.labels, tokens.labels.new_full((rows, extra), IGNORE)], 1),
        tokens.total,
        tokens.documents,
        torch.cat([tokens.marked, tokens.marked.new_zeros(rows, extra)], 1),
    )


@every_method
def test_packing_changes_nothing(method):
    """The same documents, one a row or all in one row."""
    import numpy as np

    rng = np.random.default_rng(0)
    marks = [np.array([0, MARK, 0, MARK, MARK, MARK, 0][:n]) for n in (5, 3, 7)]
    documents = {role: [rng.integers(4, 448, size=len(m)) | m for m in marks] for role in ("retain", "forget")}
    _model, _, objective = setting(method)
    alone = objective({role: collate([[d] for d in docs]).to(DEVICE) for role, docs in documents.items()})
    packed = objective({role: collate([docs]).to(DEVICE) for role, docs in documents.items()})
    assert_same(alone, packed)


@every_method
def test_gradient_reaches_the_declared_parameters_and_no_other(method):
    model, _, objective = setting(method)
    moved(model, method)
    grads = gradients(model, objective(roles()))
    assert grads.keys() == {name for name, _ in model.named_parameters() if method.trains(name)}
    assert grads
    assert all(grad.any() for grad in grads.values())


@every_method
@pytest.mark.parametrize("empty", [("forget",), ("retain",), ("forget", "retain")])
def test_a_batch_without_a_label_costs_nothing(method, empty):
    """Documents of one token have nothing to predict, and so have those whose labels are all masked."""
    ids = torch.randint(4, 448, (2, 6), generator=torch.Generator().manual_seed(0))
    for nothing in (
        collate([[torch.tensor([5]).numpy()], [torch.tensor([6]).numpy()] * 3], 12),
        Tokens.of(ids, labels=torch.full_like(ids, IGNORE)),
    ):
        assert nothing.total == nothing.documents == 0
        model, _, objective = setting(method)
        moved(model, method)
        terms = objective(roles(rows=2) | dict.fromkeys(empty, nothing.to(DEVICE)))
        assert all(torch.isfinite(value) for value in terms.values())
        grads = gradients(model, terms)
        assert all(torch.isfinite(grad).all() for grad in grads.values())
        if len(empty) == 2:
            assert all(value == 0 for value in terms.values())
            assert not any(grad.any() for grad in grads.values())


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
    model, _, objective = setting(method, dtype=torch.float64)
    whole = gradients(model, objective(roles()))
    parts = zip(*(tokens.micro_batches(rows) for tokens in roles().values()), strict=True)
    for retain, forget in parts:
        sum(objective({"retain": retain, "forget": forget}).values()).backward()
    summed = {name: w.grad for name, w in model.named_parameters() if w.grad is not None}
    assert_same(whole, summed, rtol=1e-6)


@every_method
def test_descent_on_the_objective_lowers_it(method):
    model, _, objective = setting(method)
    moved(model, method)
    first = sum(objective(roles()).values())
    grads = gradients(model, objective(roles()))
    norm = math.sqrt(sum(float(g.square().sum()) for g in grads.values()))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name in grads:
                weight -= 1e-3 * grads[name] / norm
    assert sum(objective(roles()).values()) < first


@every_method
def test_every_term_has_a_gradient_but_those_that_are_zero_at_first(method):
    model, _, objective = setting(method)
    for at_first in (True, False):
        if not at_first:
            moved(model, method)
        for term in objective(roles()):
            value = objective(roles())[term]
            alone = torch.autograd.grad(value, [w for w in model.parameters() if w.requires_grad], allow_unused=True)
            has_one = any(g is not None and g.any() for g in alone)
            assert has_one or (at_first and term in method.zero_at_first), term


@every_method
def test_the_forget_terms_are_terms(method):
    _, _, objective = setting(method)
    assert set(method.forget_terms) <= objective(roles()).keys()
    assert set(method.zero_at_first) <= objective(roles()).keys()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_presets_fill_in_and_what_is_given_wins(kind):
    for name, values in kind.presets.items():
        made = kind.model_validate({"preset": name}, strict=False).model_dump()
        for key, value in values.items():
            if isinstance(value, dict):  # a base
                assert value.items() <= made[key].items()
            else:
                assert made[key] == (tuple(value) if isinstance(value, list) else value)
    with pytest.raises(ValueError, match="there is no preset 'none'"):
        kind.model_validate({"preset": "none"})


def test_a_key_beside_a_preset_wins():
    made = RMU.model_validate({"preset": "undo_paper", "c": 7.0}, strict=False)
    assert (made.c, made.alpha, made.layer) == (7.0, 1200.0, 11)


@pytest.mark.parametrize(
    ("kind", "preset", "values"),
    [
        (RMU, "official", {"layer": 7, "trained_layers": (5, 6, 7), "c": 20, "alpha": 100, "direction": "uniform"}),
        (RMU, "published_zephyr", {"layer": 7, "c": 6.5, "alpha": 1200, "direction": "uniform"}),
        (RMU, "undo_paper", {"layer": 11, "trained_layers": (5, 6, 7, 8, 9, 10, 11), "c": 6.5, "alpha": 1200}),
        (RMU, "undo_paper_arithmetic", {"layer": 11, "c": 6, "alpha": 200, "direction": "normal"}),
        (UNDIAL, "faithful", {"strength": 5, "retain_weight": 0}),
        (UNDIAL, "open_unlearning", {"strength": 10}),
        (NPO, "faithful", {"beta": 0.1}),
        (SimNPO, "faithful", {"beta": 2.5, "gamma": 0, "forget_weight": 0.1375}),
        (SimNPO, "open_unlearning", {"beta": 4.5, "gamma": 0, "forget_weight": 0.125}),
        (GradDiff, "faithful", {"alpha": 1, "convex": False}),
        (GradDiff, "faithful_arithmetic", {"alpha": 15}),
        (MaxEnt, "faithful", {"alpha": 1, "retain": "cross_entropy", "convex": False}),
        (MaxEnt, "undo_paper_wmdp", {"alpha": 0.3, "retain": "kl", "convex": True}),
        (RMU, "faithful", {"layer": 11, "trained_layers": (5, 6, 7, 8, 9, 10, 11), "c": 6.5, "alpha": 1200}),
        (RMU, "undo_paper_wmdp", {"layer": 15, "trained_layers": (10, 11, 12, 13, 14, 15), "c": 80, "convex": True}),
        (RepNoise, "faithful", {"noise_weight": 1, "ascent_weight": 1}),
        (
            SAM,
            "official",
            {"rho": 0.01, "ascent": "forget", "base": NPO(nll="batch_mean", beta=0.015, retain_weight=2.25)},
        ),
        (SAM, "faithful", {"rho": 0.01, "ascent": "total", "base": MaxEnt()}),
        (
            Smoothing,
            "faithful",
            {"sigma": 1e-4, "samples": 3, "base": NPO(nll="batch_mean", beta=0.0125, retain_weight=2.0)},
        ),
        (RepNoise, "official", {"noise_weight": 0.001, "ascent_weight": 1, "paired": True}),
        (UAM, "official", {"gamma": 0}),
        (UAM, "faithful", {"gamma": 1, "when": "always"}),
        (UAM, "language_model", {"gamma": 1.05, "layer": 7, "trained_layers": (5, 6, 7), "loss": "representation"}),
    ],
)
def test_presets_have_the_published_values(kind, preset, values):
    """Typed in from algorithms.md and the papers, not from the code."""
    made = kind.model_validate({"preset": preset}, strict=False)
    assert {key: getattr(made, key) for key in values} == values


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


def test_maxent_on_wmdp_holds_to_the_start_model_and_shares_the_weight():
    method = MaxEnt(alpha=0.3, retain="kl", convex=True)
    model, reference, objective = setting(method)
    moved(model, method)
    data = roles()
    log_p, _ = log_probabilities(model, data["forget"])
    uniform = -log_p.mean(-1).mean() - math.log(SHAPE.vocab_size)
    (log_p, _), (log_q, _) = (log_probabilities(m, data["retain"]) for m in (model, reference))
    terms = objective(data)
    torch.testing.assert_close(terms["uniform"].double(), 0.7 * uniform, rtol=1e-5, atol=0)
    expected = 0.3 * (log_q.exp() * (log_q - log_p)).sum(-1).mean()
    torch.testing.assert_close(terms["retain"].double(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", [GradDiff, MaxEnt, RMU])
def test_a_convex_loss_shares_one_weight_between_forget_and_retain(kind):
    """(1 - alpha) forget + alpha retain (D.2.3), against the same terms with weights of their own."""
    needed = NEEDED.get(kind.model_fields["name"].default, {})
    plain = setting(kind(**{**needed, "alpha": 1.0}))[2](roles())
    shared = setting(kind(**{**needed, "alpha": 0.2, "convex": True}))[2](roles())
    for name, value in plain.items():
        weight = 0.8 if name in kind(**needed).forget_terms else 0.2
        torch.testing.assert_close(shared[name], weight * value)
    with pytest.raises(ValueError, match="alpha must be between 0 and 1"):
        kind(**{**needed, "alpha": 15.0, "convex": True})


PUBLISHED = (GradDiff, MaxEnt, RMU, SAM, Smoothing, RepNoise, UNDIAL, NPO, SimNPO, UAM)


@pytest.mark.parametrize("kind", PUBLISHED, ids=lambda kind: kind.__name__)
def test_every_published_method_has_a_faithful_preset(kind):
    assert kind in KINDS
    kind.model_validate({"preset": "faithful"}, strict=False)


def all_positions(tokens) -> torch.Tensor:
    """Those of documents: each with a label, and the one behind it."""
    labelled = tokens.labels != IGNORE
    return labelled | torch.cat([torch.zeros_like(labelled[:, :1]), labelled[:, :-1]], 1)


def test_rmu_pushes_to_c_u_and_holds_to_the_reference():
    method = RMU(layer=0, trained_layers=(0,), c=2.0, alpha=3.0)
    model, reference, objective = setting(method, seed=11)
    with torch.no_grad():  # the model has moved away from its reference
        model.model.layers[0].mlp.down_proj.weight += 0.1
    data = roles()
    u = torch.randn(SHAPE.hidden_size, generator=torch.Generator().manual_seed(11))
    u = (u / u.norm()).to(DEVICE)
    mask = {role: all_positions(tokens) for role, tokens in data.items()}

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


@pytest.mark.parametrize("draw", [torch.randn, torch.rand])
def test_adaptive_rmu_scales_the_push_with_the_reference_s_activation(draw):
    kind = "normal" if draw is torch.randn else "uniform"
    method = RMU(layer=0, trained_layers=(0,), c=2.0, direction=kind, coefficient="adaptive")
    model, reference, objective = setting(method, seed=11)
    moved(model, method)
    data = roles()
    u = draw(SHAPE.hidden_size, generator=torch.Generator().manual_seed(11))
    mask = all_positions(data["forget"])
    h, h0 = (hidden_states(m, data["forget"], 0)[mask].double() for m in (model, reference))
    target = 2.0 * h0.norm(dim=-1, keepdim=True) * (u / u.norm()).double().to(DEVICE)
    torch.testing.assert_close(objective(data)["misdirect"].double(), ((h - target) ** 2).mean(), rtol=1e-5, atol=0)


def test_undial_teaches_the_start_model_with_its_labels_lowered():
    method = UNDIAL(strength=5.0)
    model, reference, objective = setting(method)
    moved(model, method)
    data = roles()
    log_p, labels = log_probabilities(model, data["forget"])
    log_q, _ = log_probabilities(reference, data["forget"])
    lowered = log_q.clone()
    lowered[torch.arange(len(labels)), labels] -= 5.0
    lowered = lowered.log_softmax(-1)
    expected = (lowered.exp() * (lowered - log_p)).sum(-1).mean()
    terms = objective(data)
    assert terms.keys() == {"forget"}
    torch.testing.assert_close(terms["forget"].double(), expected, rtol=1e-5, atol=0)
    assert "retain" in setting(UNDIAL(retain_weight=0.5))[2](data)


def by_document(model, tokens) -> tuple[torch.Tensor, torch.Tensor]:
    """-log p and length of each document that has labels, in float64, one after the other."""
    log_p, labels = log_probabilities(model, tokens)
    losses = -log_p.gather(1, labels[:, None])[:, 0]
    number = (tokens.positions == 0).flatten().cumsum(0)[(tokens.labels != IGNORE).flatten()]
    sums = [losses[number == n].sum() for n in number.unique()]
    return torch.stack(sums), torch.stack([(number == n).sum().float() for n in number.unique()])


def test_npo_by_document():
    method = NPO(beta=0.3, retain_weight=2.0)
    model, reference, objective = setting(method)
    moved(model, method)
    data = roles()
    nll, _ = by_document(model, data["forget"])
    before, _ = by_document(reference, data["forget"])
    terms = objective(data)
    expected = -2 / 0.3 * torch.log(torch.sigmoid(0.3 * (nll - before))).mean()
    assert len(nll) == data["forget"].documents > 1
    torch.testing.assert_close(terms["forget"].double(), expected, rtol=1e-5, atol=0)
    log_p, labels = log_probabilities(model, data["retain"])
    torch.testing.assert_close(
        terms["retain"].double(), -2 * log_p.gather(1, labels[:, None]).mean(), rtol=1e-5, atol=0
    )


def test_simnpo_by_document():
    method = SimNPO(beta=2.5, gamma=0.5, forget_weight=0.25)
    model, _, objective = setting(method)
    nll, lengths = by_document(model, roles()["forget"])
    expected = 0.25 * -2 / 2.5 * torch.log(torch.sigmoid(2.5 * nll / lengths - 0.5)).mean()
    torch.testing.assert_close(objective(roles())["forget"].double(), expected, rtol=1e-5, atol=0)
    delta = 0.2  # open-unlearning's margin is inside: gamma is beta times it
    expected = 0.25 * -2 / 2.5 * torch.log(torch.sigmoid(2.5 * (nll / lengths - delta))).mean()
    _, _, objective = setting(SimNPO(beta=2.5, gamma=2.5 * delta, forget_weight=0.25))
    torch.testing.assert_close(objective(roles())["forget"].double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("method", [NPO(beta=0.3), SimNPO(), UNDIAL(), RepNoise(noise_weight=1.0, ascent_weight=1.0)])
def test_gradient_against_finite_differences(method):
    """Along a random direction of all weights. Weights are float64; Gemma's softmax of attention scores stays fp32."""
    model, reference, _ = setting(method)
    model, reference = model.double(), reference.double()
    moved(model, method)
    objective = method.objective(model, reference, torch.Generator().manual_seed(3))
    for term in objective(roles()):
        grads = torch.autograd.grad(objective(roles())[term], list(model.parameters()), allow_unused=True)
        rng = torch.Generator().manual_seed(5)
        along = [torch.randn(w.shape, generator=rng, dtype=torch.float64).to(DEVICE) for w in model.parameters()]
        expected = sum(float((g * d).sum()) for g, d in zip(grads, along, strict=True) if g is not None)
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                for weight, direction in zip(model.parameters(), along, strict=True):
                    weight += sign * 1e-4 * direction
                values.append(float(objective(roles())[term]))
                for weight, direction in zip(model.parameters(), along, strict=True):
                    weight -= sign * 1e-4 * direction
        if term != "noise":  # the width of MMD's kernels is a constant to its gradient: see test_mmd_by_hand
            assert (values[0] - values[1]) / 2e-4 == pytest.approx(expected, rel=2e-2)


def test_mmd_by_hand():
    """Two points against two, distances written out."""
    x, y = torch.tensor([[0.0], [1.0]]), torch.tensor([[2.0], [4.0]])
    points = [0.0, 1.0, 2.0, 4.0]
    width = sum((a - b) ** 2 for a in points for b in points) / 12 / 4

    def k(a, b):
        return sum(math.exp(-((a - b) ** 2) / (width * 2**i)) for i in range(5))

    xx, yy = k(0, 0) + k(1, 1) + 2 * k(0, 1), k(2, 2) + k(4, 4) + 2 * k(2, 4)
    xy = k(0, 2) + k(0, 4) + k(1, 2) + k(1, 4)
    assert float(mmd(x, y)) == pytest.approx((xx + yy - 2 * xy) / 4)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(mmd(leaf, y), leaf)
    for i, point in enumerate((0.0, 1.0)):  # the derivative of the sum above by x_i, the width being constant
        slopes = [
            (-1 if other >= 2 else 1)
            * sum(
                -2 * (point - other) / (width * 2**j) * math.exp(-((point - other) ** 2) / (width * 2**j))
                for j in range(5)
            )
            for other in points
        ]
        assert float(gradient[i]) == pytest.approx(2 * sum(slopes) / 4, rel=1e-4)
    same = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    assert float(mmd(same, same)) == pytest.approx(0, abs=1e-5)
    assert float(mmd(same, same + 3)) > 1


def test_repnoise_adds_noise_and_ascent_to_its_base():
    method = RepNoise(noise_weight=0.7, ascent_weight=0.3)
    model, _, objective = setting(method)
    data = roles()
    terms = objective(data)
    base = setting(MaxEnt())[2](data)
    for name, value in base.items():
        torch.testing.assert_close(terms[name], value)
    tokens = data["forget"]
    output = model.model(tokens.input_ids, position_ids=tokens.positions, output_hidden_states=True, use_cache=False)
    mask, nll = tokens.labels != IGNORE, []
    for hidden in (*(model.model.norm(h) for h in output.hidden_states[1:-1]), output.last_hidden_state):
        logits = hidden[mask].double() @ model.lm_head.weight.double().T
        log_p = (30 * torch.tanh(logits / 30)).log_softmax(-1)
        nll.append(-log_p.gather(1, tokens.labels[mask][:, None])[:, 0])
    number = (tokens.positions == 0).flatten().cumsum(0)[mask.flatten()]
    ascent = [torch.log1p(torch.stack([layer[number == n].mean() for layer in nll]).mean()) for n in number.unique()]
    torch.testing.assert_close(terms["ascent"].double(), -0.3 * torch.stack(ascent).mean(), rtol=1e-4, atol=0)
    assert float(terms["noise"].detach()) > 0
    twice = setting(RepNoise(noise_weight=1.4, ascent_weight=0.3))[2](data)["noise"]
    torch.testing.assert_close(twice, 2 * terms["noise"])


def test_repnoise_of_pairs_is_that_of_the_marked_tokens_alone():
    """Noise where a token is read that the harmless answer does not have, ascent where it is said; written out."""
    import numpy as np

    whole = np.array([7, 8, 9, 20, 30, 21, 22]), np.array([50, 51, 52])  # 7 8 9 20 stand in the harmless one, too
    forget = collate([[whole[0] | np.array([0, 0, 0, 0, MARK, MARK, MARK]), whole[1] | MARK]]).to(DEVICE)
    data = roles() | {"forget": forget}
    model, _, objective = setting(RepNoise(noise_weight=1.0, ascent_weight=1.0, paired=True), seed=8)
    terms = objective(data)
    output = model.model(forget.input_ids, position_ids=forget.positions, output_hidden_states=True, use_cache=False)
    lenses = [*(model.model.norm(h) for h in output.hidden_states[1:-1]), output.last_hidden_state]
    ascent = []
    for said in ([3, 4, 5], [7, 8]):  # positions from which 30, 21, 22 are said; 51, 52 (nothing says a first token)
        nll = []
        for hidden in lenses:
            log_p = (30 * torch.tanh(hidden[0, said].double() @ model.lm_head.weight.double().T / 30)).log_softmax(-1)
            nll.append(-log_p.gather(1, forget.input_ids[0, [at + 1 for at in said]][:, None]).mean())
        ascent.append(torch.log1p(torch.stack(nll).mean()))
    torch.testing.assert_close(terms["ascent"].double(), -torch.stack(ascent).mean(), rtol=1e-4, atol=0)

    unmarked = collate([list(whole)]).to(DEVICE)
    assert float(objective(data | {"forget": unmarked})["noise"].detach()) == 0  # nothing differs
    read = torch.zeros_like(forget.labels, dtype=torch.bool)
    read[0, [4, 5, 7, 8]] = True  # 30, 21 and 50, 51; after 22 and 52 nothing is predicted
    unpaired = setting(RepNoise(noise_weight=1.0, ascent_weight=1.0), seed=8)[2]
    torch.testing.assert_close(terms["noise"], unpaired(data | {"forget": unmarked.labelled(read)})["noise"])
    assert float((terms["noise"] - unpaired(data | {"forget": unmarked})["noise"]).abs().detach()) > 0.01


def test_repnoise_leaves_no_hook_behind():
    model, _, objective = setting(RepNoise())
    objective(roles())
    objective(roles())
    assert not any(module._forward_hooks for module in model.modules())


def test_repnoise_s_noise_term_written_out():
    """The outputs of every MLP at a document's labels against noise that its own tokens draw; means over both."""
    import zlib

    method = RepNoise(noise_weight=1.0, sample=3)
    model, _, objective = setting(method, seed=8)
    tokens, outputs = roles()["forget"], []
    hooks = [b.mlp.register_forward_hook(lambda _, __, out: outputs.append(out)) for b in model.model.layers]
    hidden_states(model, tokens)
    for hook in hooks:
        hook.remove()
    seed = int(torch.randint(2**62, (), generator=torch.Generator().manual_seed(8)))
    mask, number = tokens.labels != IGNORE, (tokens.positions == 0).flatten().cumsum(0).reshape(tokens.labels.shape)
    values = []
    for n in number[mask].unique():
        here = mask & (number == n)
        rng = torch.Generator().manual_seed((seed + zlib.crc32(tokens.input_ids[here].cpu().numpy().tobytes())) % 2**63)
        chosen = torch.randperm(int(here.sum()), generator=rng)[:3]
        for output in outputs:
            x = output[here][chosen].double()
            y = torch.randn(len(chosen), x.shape[1], generator=rng).to(x)
            points = torch.cat([x, y])
            d = ((points[:, None] - points[None]) ** 2).sum(-1)
            width = d.sum() / (len(points) ** 2 - len(points)) / 4
            k = sum(torch.exp(-d / (width * 2**i)) for i in range(5))
            m = len(x)
            values.append((k[:m, :m].mean() + k[m:, m:].mean() - 2 * k[:m, m:].mean()) / len(outputs))
    expected = torch.stack(values).sum() / tokens.documents
    torch.testing.assert_close(objective(roles())["noise"].double(), expected, rtol=1e-4, atol=0)


def test_a_weight_of_zero_leaves_its_term_out():
    assert setting(RepNoise(noise_weight=0.0))[2](roles()).keys() == {"uniform", "retain", "ascent"}
    assert setting(RepNoise(ascent_weight=0.0))[2](roles()).keys() == {"uniform", "retain", "noise"}
    assert setting(GradDiff(alpha=0.0))[2](roles()).keys() == {"forget"}
    assert setting(MaxEnt(alpha=0.0))[2](roles()).keys() == {"uniform"}
    alone = RMU(layer=1, trained_layers=(0, 1), c=2.0, alpha=0.0)  # what the authors of UNDO ran
    assert setting(alone)[2](roles()).keys() == {"misdirect"}
    assert alone.zero_at_first == MaxEnt(retain="kl", alpha=0.0).zero_at_first == ()


def test_repnoise_takes_micro_batches_without_a_token_of_its_own():
    """A row in which nothing differs, or whose documents are of one token: it counts for nothing, and fails nothing."""
    import numpy as np

    marked, plain, short = np.array([5, 6 | MARK, 7 | MARK, 8]), np.array([5, 9, 7, 8]), np.array([5])
    for paired, other in ((True, plain), (False, short)):
        model, _, objective = setting(RepNoise(noise_weight=1.0, ascent_weight=1.0, paired=paired))
        data = {"retain": batch(2, seed=1), "forget": collate([[marked], [other]]).to(DEVICE)}
        whole = gradients(model, {term: v for term, v in objective(data).items() if term in ("noise", "ascent")})
        parts = zip(*(tokens.micro_batches(1) for tokens in data.values()), strict=True)
        for retain, forget in parts:
            terms = objective({"retain": retain, "forget": forget})
            for term in ("noise", "ascent"):
                terms[term].backward(retain_graph=True)
        summed = {name: w.grad for name, w in model.named_parameters() if w.grad is not None}
        assert_same(whole, summed)


def test_uam_s_losses():
    data = roles()
    model, _, objective = setting(UAM())
    for role, value in objective(data).items():
        log_p, labels = log_probabilities(model, data[role])
        torch.testing.assert_close(value.double(), -log_p.gather(1, labels[:, None]).mean(), rtol=1e-5, atol=0)
    method = UAM(loss="representation", layer=0, trained_layers=(0,), offset=0.5)
    model, reference, objective = setting(method, seed=4)
    u = torch.randn(SHAPE.hidden_size, generator=torch.Generator().manual_seed(4)).to(DEVICE)
    start = objective(data)
    assert float(start["retain"]) == 0
    torch.testing.assert_close(start["forget"], (0.5 * u / u.norm()).square().mean(), rtol=1e-4, atol=0)
    moved(model, method)
    h, h0 = (hidden_states(m, data["retain"], 0)[all_positions(data["retain"])] for m in (model, reference))
    torch.testing.assert_close(objective(data)["retain"], ((h - h0) ** 2).mean(), rtol=1e-4, atol=1e-7)
