"""Properties of every attack in the union, so that a new one is covered on arrival; then each one's own arithmetic."""

import shutil
from itertools import count
from typing import get_args

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers import GPT2Config, GPT2LMHeadModel

from tests.conftest import SHAPE, batch, lively
from undo.attacks import Ablate, AnyAttack, Change, Finetune, LoRA, Merge, Perturb, Prune, Quantise, SetDifference
from undo.attacks import stage as attack_stage
from undo.attacks.attack import Attack, Means
from undo.attacks.prune import highest, input_norms
from undo.attacks.quantise import nf4
from undo.attacks.stage import Attacked
from undo.config.mistakes import ConfigError
from undo.config.schema import validate
from undo.lm.matrices import linear_layers, matrix
from undo.lm.read import head, hidden_states
from undo.losses import cross_entropy
from undo.prepare_models.pretrain import Pretrain, pretrain
from undo.runs.directory import Interrupted
from undo.runs.run import Run

NEEDED = {  # keys without a default, and little text to read
    "set_difference": {"tokens": 500},
    "ablate": {"tokens": 500},
    "prune": {"share": 0.3},
    "merge": {"towards": "pretrain/other", "t": 0.5},
    "perturb": {"noise": {"alpha": 0.05}},
}
KINDS: list[type[Attack]] = list(get_args(get_args(AnyAttack)[0]))
ATTACKS = [
    *(kind.model_validate(NEEDED.get(kind.model_fields["name"].default, {})) for kind in KINDS),
    LoRA(rank=2, targets="mlp"),
    Quantise(bits=8),
    Quantise(levels="nf4", group=8),
    Ablate(layer=0, tokens=500),
]
every_attack = pytest.mark.parametrize("attack", ATTACKS, ids=lambda a: a.title.replace(" ", "_"))


def other() -> nn.Module:
    return lively(SHAPE.build(1), seed=5)


def means(seed: int = 3) -> Means:
    def text(role):
        return (batch(seed=10 * step + (role == "forget")) for step in count())

    return Means(torch.Generator().manual_seed(seed), text, lambda name: other(), lambda: SHAPE.build(2))  # pyright: ignore


def outputs(model) -> torch.Tensor:
    with torch.no_grad():
        return hidden_states(model, batch(seed=77)) @ head(model).weight.T


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=448, n_embd=16, n_layer=2, n_head=2, n_positions=64, resid_pdrop=0, embd_pdrop=0)
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape) * 0.1)
    return model


@every_attack
def test_it_says_whether_it_changes_what_the_model_computes(attack, model):
    before = outputs(model)
    attack.apply(model, means())
    assert torch.equal(outputs(model), before) == attack.starts_unchanged


@every_attack
def test_the_same_seed_gives_the_same_model(attack):
    found = []
    for _ in range(2):
        model = lively(SHAPE.build(0))
        attack.apply(model, means())
        found.append({name: weight.detach().clone() for name, weight in model.named_parameters()})
    assert all(torch.equal(weight, found[1][name]) for name, weight in found[0].items())


@every_attack
def test_what_it_trains_gets_a_gradient_and_what_it_does_not_train_stays(attack, model):
    names = {name: attack.trains(name) for name, _ in model.named_parameters()}
    attack.apply(model, means())
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    if not attack.finetunes:
        assert not any(names.values())
        return
    cross_entropy(model, batch()).backward()
    assert all(weight.grad is not None for name, weight in model.named_parameters() if name in trained)
    assert trained == {name for name, wanted in names.items() if wanted} or "parametrizations" in "".join(trained)


@every_attack
def test_titles_tell_attacks_apart(attack):
    assert attack.title
    assert [a.title for a in ATTACKS].count(attack.title) == 1


def test_changes_of_weights_are_attacks():
    changes = set(get_args(get_args(Change)[0]))
    assert changes < set(KINDS)
    assert not any(kind.finetunes for kind in changes)


# --- quantisation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("group", [None, 4, 5])
def test_rounding_is_off_by_half_a_step_at_most(bits, group, model):
    before = {name: matrix(layer).clone() for name, layer in linear_layers(model)}
    Quantise(bits=bits, group=group).apply(model, means())
    for name, layer in linear_layers(model):
        size = group or before[name].shape[1]
        for old, new in zip(before[name].split(size, 1), matrix(layer).split(size, 1), strict=True):
            step = old.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
            assert ((new - old).abs() <= step / 2 * (1 + 1e-5)).all()
            assert all(len(row.unique()) <= 2**bits - 1 for row in new)


def test_rounding_twice_changes_nothing(model):
    attack = Quantise(bits=4, group=8)
    attack.apply(model, means())
    once = {name: matrix(layer).clone() for name, layer in linear_layers(model)}
    attack.apply(model, means())
    for name, layer in linear_layers(model):
        torch.testing.assert_close(matrix(layer), once[name], rtol=1e-6, atol=0)


def test_a_row_of_zeros_stays_one():
    for attack in (Quantise(bits=4), Quantise(levels="nf4")):
        assert torch.equal(attack.rounded(torch.zeros(2, 8)), torch.zeros(2, 8))


def test_nf4_is_that_of_bitsandbytes():
    """Its levels, and what it makes of a matrix: the nearest level, and the same scales."""
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    stored, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    torch.testing.assert_close(nf4().float(), state.code.float(), rtol=0, atol=1e-6)
    theirs = functional.dequantize_4bit(stored, state)
    torch.testing.assert_close(Quantise(levels="nf4", group=64).rounded(weight), theirs, rtol=0, atol=1e-5)


def test_nf4_has_four_bits():
    with pytest.raises(ValueError, match="bits must be 4 where levels is nf4, not 8"):
        Quantise(levels="nf4", bits=8)


# --- pruning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5])
def test_the_smallest_weights_go_and_as_many_as_said(share, model):
    before = {name: matrix(layer).clone() for name, layer in linear_layers(model)}
    Prune(share=share).apply(model, means())
    for name, layer in linear_layers(model):
        gone = matrix(layer) == 0
        assert gone.sum() == int(share * gone.numel())
        assert before[name][gone].abs().max() <= before[name][~gone].abs().min()
        assert torch.equal(matrix(layer)[~gone], before[name][~gone])


def test_of_equal_scores_as_many_as_said_are_highest():
    assert highest(torch.ones(4, 5), 0.25).sum() == 5


def test_input_norms_are_those_of_the_inputs(model):
    """Against the inputs themselves, padding left out; and as many tokens are read as are asked for."""
    name, layer = next(linear_layers(model))
    inputs = []
    hook = layer.register_forward_pre_hook(lambda _, given: inputs.append(given[0].detach().double()))
    attacker = means()
    found = input_norms(model, attacker, "forget", 60)
    hook.remove()
    read = [tokens for tokens, _ in zip(means().text("forget"), inputs, strict=False)]
    kept = torch.cat([given[tokens.counted] for given, tokens in zip(inputs, read, strict=True)])
    torch.testing.assert_close(found[name].double(), kept.norm(dim=0), rtol=1e-5, atol=0)
    assert attacker.read == sum(tokens.input_ids.numel() for tokens in read)
    assert 60 <= attacker.read < 60 + 48


def test_what_matters_on_forget_text_alone_goes(model):
    before = {name: matrix(layer).clone() for name, layer in linear_layers(model)}
    attack = SetDifference(forget=0.2, retain=0.1, tokens=200)
    norms = {role: input_norms(model, means(), role, 200) for role in ("forget", "retain")}
    attack.apply(model, means())
    for name, layer in linear_layers(model):
        for_forget = highest(before[name].abs() * norms["forget"][name], 0.2)
        for_retain = highest(before[name].abs() * norms["retain"][name], 0.1)
        assert torch.equal(matrix(layer) == 0, for_forget & ~for_retain)
        assert (for_forget & ~for_retain).any()


# --- merging, perturbing, ablating -----------------------------------------------------------------------------------


def test_merged_whole_it_is_the_other_model(model):
    Merge(towards="pretrain/other", t=1.0).apply(model, means())
    assert torch.equal(outputs(model), outputs(other()))


def test_merged_by_nothing_it_is_itself(model):
    before = outputs(model)
    Merge(towards="pretrain/other", t=0.0).apply(model, means())
    assert torch.equal(outputs(model), before)


def test_merging_needs_the_same_shape():
    model = SHAPE.model_copy(update={"hidden_size": 24}).build(0)
    with pytest.raises(ConfigError, match=r"attack.towards=pretrain/other: is of another architecture"):
        Merge(towards="pretrain/other", t=0.5).apply(model, means())


def test_perturbing_shrinks_by_alpha(model):
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    Perturb.model_validate({"noise": {"alpha": 0.25, "beta": 0.0}}).apply(model, means())
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight, 0.75 * before[name])


@pytest.mark.parametrize("layer", [0, 1])
def test_nothing_is_left_along_the_ablated_direction(layer, model):
    from undo.attacks.ablate import mean_state

    mean = {role: mean_state(model, means(), role, layer, 200) for role in ("forget", "retain")}
    direction = mean["forget"] - mean["retain"]
    before = hidden_states(model, batch(seed=5), layer) @ (direction / direction.norm())
    Ablate(layer=layer, tokens=200).apply(model, means())
    states = hidden_states(model, batch(seed=5), layer)
    left = states @ (direction / direction.norm())
    assert before.abs().max() > 0.1
    assert left.abs().max() <= 1e-5 * states.norm(dim=-1).max()


# --- LoRA ------------------------------------------------------------------------------------------------------------


def test_lora_computes_the_merged_model(model):
    LoRA(rank=3).apply(model, means())
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(".up"):
                weight.copy_(torch.randn(weight.shape, generator=rng) * 0.1)
    adapted = outputs(model)
    for _, layer in linear_layers(model):
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
    assert torch.equal(outputs(model), adapted)


def test_at_full_rank_lora_goes_where_full_finetuning_goes():
    """B's gradient is that of the weight times A's transpose: with A the identity they are one. up is B, down is A."""
    full, adapted = lively(SHAPE.build(0)), lively(SHAPE.build(0))
    cross_entropy(full, batch()).backward()
    LoRA(rank=1024, scale=1024.0).apply(adapted, means())
    for _, layer in linear_layers(adapted):
        low, (size, width) = layer.parametrizations.weight[0], matrix(layer).shape
        low.down, low.up = nn.Parameter(torch.eye(width)), nn.Parameter(torch.zeros(size, width))
    cross_entropy(adapted, batch()).backward()
    for (name, layer), (_, other_layer) in zip(linear_layers(full), linear_layers(adapted), strict=True):
        found, expected = other_layer.parametrizations.weight[0].up.grad, layer.weight.grad
        assert found is not None, name
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_lora_of_targets_that_are_nowhere():
    with pytest.raises(ConfigError, match=r"attack\.targets=nowhere: is in the name of no linear layer"):
        LoRA(targets="nowhere").apply(SHAPE.build(0), means())


@pytest.mark.parametrize("attack", [LoRA(rank=2), Quantise(group=4), Prune(share=0.5)], ids=lambda a: a.title)
def test_transposed_layers_are_changed_along_the_right_side(attack):
    """GPT-2's layers keep [inputs, outputs]: what is done to their transposes is what is done to linear layers."""
    model, linear = gpt2(), gpt2()
    for module in list(linear.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__ == "Conv1D":
                layer = nn.Linear(child.weight.shape[0], child.weight.shape[1])
                layer.weight, layer.bias = nn.Parameter(child.weight.detach().T.clone()), child.bias
                setattr(module, name, layer)
    for one in (model, linear):
        attack.apply(one, means())
    ours, theirs = (dict(linear_layers(one)) for one in (model, linear))
    assert ours.keys() == theirs.keys()
    for name, layer in ours.items():
        assert torch.equal(matrix(layer), matrix(theirs[name]))


def test_full_finetuning_changes_nothing_by_itself(model):
    before = outputs(model)
    Finetune().apply(model, means())
    assert torch.equal(outputs(model), before)


# --- the stage -------------------------------------------------------------------------------------------------------


def stage_run(data, folder, name: str, **keys) -> Run:
    """A claimed run of the stage `attack` beside the small arithmetic world, on a random model."""
    runs = folder / "runs"
    if not runs.exists():
        shutil.copytree(data.runs, runs)
        made = Run(runs, "tiny", "pretrain/m")
        model = {"mixture": {"retain": 1.0}, "model": SHAPE.model_dump(), "evaluation": {"name": "accuracy"}}
        trained = {"steps": 1, "batch_rows": 4, "learning_rate": 1e-3, "evaluate_every": 1}
        config = Pretrain.model_validate(
            {"name": "m", "data": "prepare/data", "training": trained, **model}, strict=False
        )
        made.claim(config)
        made.open(config)
        list(pretrain(config, made))
    raw = {"name": name, "data": "prepare/data", "model": "pretrain/m", "evaluation": {"name": "accuracy"}, **keys}
    run = Run(runs, "tiny", f"attack/{name}")
    run.claim(Attacked.model_validate(raw, strict=False))
    return run


def work_on(run: Run, stop_at: int | None = None) -> None:
    """Execute it in this process, up to a step if one is given: what a signal there would have left."""
    config = validate(Attacked, run.config, "test")
    run.open(config)
    turns = attack_stage.STAGE.execute(config, run)
    for step in turns:
        if step == stop_at:
            Run._stop_requested = True
            try:
                with pytest.raises(Interrupted):
                    list(turns)
            finally:
                Run._stop_requested = False
            return


LORA = {
    "before": [{"name": "quantise", "bits": 4}],
    "attack": {"name": "lora", "rank": 2},
    "training": {"steps": 6, "batch_rows": 4, "learning_rate": 1e-2, "evaluate_every": 2},
    "examples": 8,
}


def test_an_interrupted_attack_is_resumed_bit_by_bit(data, tmp_path):
    whole, stopped = (stage_run(data, tmp_path, name, **LORA) for name in ("whole", "stopped"))
    work_on(whole)
    work_on(stopped, stop_at=3)
    assert not stopped.done
    work_on(stopped)
    assert list(whole.records()) == list(stopped.records())
    assert whole.outcomes == stopped.outcomes
    assert whole.facts["attack"] == "INT4 → LoRA, rank 2, 8 examples"
    assert whole.facts["steps"] == 6


def test_an_attack_leaves_the_attacked_model_as_it_is(data, tmp_path):
    run = stage_run(data, tmp_path, "prune", attack={"name": "prune", "share": 0.5})
    folder = run.sibling("pretrain/m").model
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    work_on(run)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert run.facts["steps"] == 0
    assert run.facts["evaluation"] == {key: v for key, v in next(run.records()).items() if key != "step"}
    items = run.outcomes["forget"]
    assert sum(items["scored"]) / sum(items["weights"]) == pytest.approx(run.facts["evaluation"]["forget"])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"attack": {"name": "lora"}}, "lora trains: give training.steps, batch_rows and learning_rate"),
        (
            {"attack": {"name": "quantise"}, "training": {"steps": 3, "evaluate_every": 1}},
            "quantise trains nothing: leave `training` out, or put it into `before`",
        ),
        ({"attack": {"name": "quantise"}, "before": [{"name": "lora"}]}, "lora"),
        ({"attack": {"name": "prune", "share": 1.0}}, "attack.share: input should be less than 1"),
    ],
)
def test_mistakes_are_named(keys, message):
    raw = {"name": "x", "data": "prepare/data", "model": "pretrain/m", "evaluation": {"name": "accuracy"}, **keys}
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        validate(Attacked, raw, "attack.yaml")


def test_too_few_documents_for_as_many_examples(data, tmp_path):
    run = stage_run(data, tmp_path, "many", **{**LORA, "examples": 10**6})
    with pytest.raises(ConfigError, match=r"examples=1000000, but there are \d+ documents: take fewer"):
        work_on(run)


def test_what_it_merges_with_is_a_parent():
    raw = {"name": "x", "data": "prepare/data", "model": "undo/u", "evaluation": {"name": "accuracy"}}
    merge = {"name": "merge", "towards": "pretrain/reference", "t": 0.1}
    config = validate(Attacked, {**raw, "before": [merge], "attack": {"name": "quantise"}}, "attack.yaml")
    assert config.parents() == ("prepare/data", "undo/u", "pretrain/reference")
