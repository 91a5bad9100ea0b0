"""The configs of WMDP against Appendix D.2 (Tables 9 to 13), typed in here from the paper, not from the configs."""

import pytest

from tests.conftest import ROOT
from undo.experiments.costs import Costs
from undo.experiments.plan import plan, sources
from undo.prepare_models.pretrained import known_shape
from undo.settings.stages import STAGES

TABLE_10 = {
    "bio": {
        "rmu": [(0.5, 5e-5), (0.3, 1e-4), (0.1, 1e-4)],
        "maxent": [(0.3, 2e-5), (0.1, 2e-5), (0.75, 5e-5)],
    },
    "cyber": {
        "rmu": [(0.5, 2e-5), (0.2, 2e-5), (0.1, 2e-5)],
        "maxent": [(0.2, 2e-5), (0.3, 3.5e-5), (0.3, 5e-5)],
    },
}
RANKS = ("best", "medium", "worst")
TABLE_11 = {
    "HuggingFaceFW/fineweb-edu": 0.35,
    "legacy-datasets/wikipedia": 0.35,
    "Magpie-Align/Magpie-Llama-3.3-Pro-1M-v0.1": 0.05,
    "Magpie-Align/Magpie-Llama-3.1-Pro-1M-v0.1": 0.04,
    "Magpie-Align/Llama-3-Magpie-Pro-1M-v0.1": 0.04,
    "Magpie-Align/Magpie-Gemma2-Pro-534K-v0.1": 0.04,
    "Magpie-Align/Magpie-Phi3-Pro-1M-v0.1": 0.04,
    "Magpie-Align/Magpie-Qwen2.5-Pro-1M-v0.1": 0.04,
    "Magpie-Align/Magpie-Qwen2-Pro-1M-v0.1": 0.04,
    None: 0.01,  # Wikipedia question-answer
}
CORPORA, QUESTIONS = {"forget": 0.5, "retain": 0.5}, {"forget": 0.25, "retain": 0.25, "auxiliary": 0.5}
RATES = (2.15e-5, 1e-5, 4.62e-6)  # of the authors' code, as the next: the paper prints none
OTHER_RATES = {
    "forget-retain-qa-long": (4.62e-6, 2.15e-6),
    "wiki-qa-long": (1e-5, 4.62e-6, 2.15e-6),
    "sp-wiki-qa-long": (1e-5, 4.62e-6, 2.15e-6),
}
TABLE_12 = {  # name here -> data (1, 2, 3), length, shrink-perturb
    "forget-retain": (1, 256, False),
    "forget-retain-qa": (2, 256, False),
    "forget-retain-long": (1, 1024, False),
    "forget-retain-qa-long": (2, 1024, False),
    "wiki-qa-long": (3, 1024, False),
    "sp-forget-retain": (1, 256, True),
    "sp-forget-retain-qa": (2, 256, True),
    "sp-wiki-qa-long": (3, 1024, True),
}
DATA = {1: ("corpora", CORPORA), 2: ("qa", CORPORA), 3: ("qa", QUESTIONS)}
MODELS = {
    *(f"{method}_{rank}" for method in ("maxent", "rmu") for rank in RANKS),
    *(f"{method}_{rank}" for method in ("sam", "repnoise") for rank in RANKS[:2]),
    "undo_maxent",
    "undo_rmu",
}


@pytest.fixture(scope="module", params=["bio", "cyber"])
def domain(request):
    return request.param


@pytest.fixture(scope="module")
def planned(domain, tmp_path_factory):
    """stage -> its planned runs."""
    folder, runs = ROOT / "configs" / f"wmdp_{domain}", tmp_path_factory.mktemp("runs")
    found = {name: sources(folder, name)[:1] for name in STAGES}
    return {name: plan(STAGES[name], paths, {}, runs) for name, paths in found.items() if paths}


def configs(planned, stage) -> list:
    return [run.config for run in planned[stage]]


def test_the_model_and_the_evaluation(planned, domain):
    (base,) = configs(planned, "base")
    assert base.model == "google/gemma-2-2b"
    assert known_shape(base.model).parameters == 2_614_341_888  # as the hub counts them
    for stage in ("unlearn", "undo", "relearn"):
        for config in configs(planned, stage):
            retain, forget = config.evaluation.retain, config.evaluation.forget
            assert (retain.task, retain.shots, retain.share) == ("mmlu", 5, 0.4)
            assert (forget.task, forget.shots, forget.share) == (f"wmdp_{domain}", 0, 1)


def test_table_9_and_10_unlearning(planned, domain):
    by_variant: dict[str, list] = {}
    for config in configs(planned, "unlearn"):
        by_variant.setdefault(config.variant, []).append(config)
        training = config.training
        assert (training.batch_rows, training.steps, training.weight_decay, training.warmup_steps) == (40, 90, 0, 0)
        assert training.min_learning_rate is None  # fixed
        assert config.data == "prepare/qa"
        assert config.retain_mixture == {"retain": 0.5, "auxiliary": 0.5}
        method = getattr(config.method, "base", config.method)
        assert method.convex
        if method.name == "maxent":
            assert method.retain == "kl"
        else:
            assert (method.c, method.trained_layers, method.layer) == (80, tuple(range(10, 16)), 15)
    assert set(by_variant) == MODELS - {"undo_maxent", "undo_rmu"}
    for variant, runs in by_variant.items():
        name, _, rank = variant.partition("_")
        points = TABLE_10[domain]["rmu" if name == "rmu" else "maxent"]
        methods = [getattr(run.method, "base", run.method) for run in runs]
        found = {(m.alpha, run.training.learning_rate) for m, run in zip(methods, runs, strict=True)}
        assert found == {points[RANKS.index(rank)]}
        assert {run.seed for run in runs} == {0, 1, 2, 3}
        if name == "sam":
            assert {run.method.rho for run in runs} == {0.01}
        if name == "repnoise":
            assert {(run.method.noise_weight, run.method.ascent_weight) for run in runs} == {(1, 1)}


def test_d_2_4_undo_and_table_13(planned):
    assert all(run.config.tokens(1024) == pytest.approx(300e6, rel=1e-3) for run in planned["undo"])
    found = {(c.variant, c.seed, c.teacher, c.noise.alpha, c.noise.beta) for c in configs(planned, "undo")}
    assert found == {
        *((f"undo_{m}", s, f"unlearn/{m}_best-seed_{s}", 0.25, 0.0) for m in ("maxent", "rmu") for s in range(4)),
        *((f"undo_maxent_{alpha}", 0, "unlearn/maxent_best-seed_0", alpha, 0.0) for alpha in (0.35, 0.6)),
    }
    assert all(c.retain_threshold is None for c in configs(planned, "undo"))


def test_table_11_the_mixture(planned):
    mixture = next(c for c in configs(planned, "prepare") if c.name == "mixture")
    parts = mixture.data["auxiliary"].parts
    assert {part.hub: part.proportion for part in parts.values()} == TABLE_11
    assert mixture.data["auxiliary"].tokens == 300_000_000
    subsets = {part.hub: part.subset for part in parts.values() if part.subset}
    assert subsets == {"HuggingFaceFW/fineweb-edu": "sample-10BT", "legacy-datasets/wikipedia": "20220301.en"}


def test_table_12_adversaries(planned):
    length = {c.name: c.length for c in configs(planned, "prepare")}
    attacks = configs(planned, "relearn")
    assert {c.adversary for c in attacks} == set(TABLE_12)
    for config in attacks:
        data, tokens, perturbed = TABLE_12[config.adversary]
        name, mixture = DATA[data]
        prepared = config.data.removeprefix("prepare/")
        assert prepared.removesuffix("_long") == name
        assert length[prepared] == tokens
        assert config.mixture == mixture
        assert (config.noise is not None) == perturbed
        if perturbed:
            assert (config.noise.alpha, config.noise.beta) == (0.05, 0.1)  # beta: the authors' code
        training = config.training
        assert training.steps == 500
        assert [step for step in range(501) if training.evaluates(step)] == [0, 10, 25, 50, 150, 500]
        assert training.batch_rows * tokens == 20 * 256
    by_model: dict[str, set] = {}
    for c in attacks:
        by_model.setdefault(c.model, set()).add((c.adversary, c.training.learning_rate))
    assert len(by_model) == len(MODELS) * 4
    assert {c.variant for c in attacks} == MODELS
    wanted = {(kind, rate) for kind in TABLE_12 for rate in OTHER_RATES.get(kind, RATES)}
    assert all(pairs == wanted for pairs in by_model.values())  # the same attacks on every model and seed
    assert len(attacks) == len(by_model) * len(wanted) == 48 * 23
    made = {run.name for stage in ("unlearn", "undo") for run in planned[stage]}
    assert set(by_model) == {name for name in made if "undo_maxent_" not in name}


def test_a_model_is_asked_once(planned):
    """The evaluation after a stage is step 0 of what starts from its model, if both name the same data."""
    shared = {
        (config.validated_on, config.evaluation, config.training.precision)
        for stage in ("unlearn", "undo", "relearn")
        for config in configs(planned, stage)
    }
    assert len(shared) == 1


def test_attacks_leave_nothing_on_the_disk_but_numbers(planned):
    for config in configs(planned, "relearn"):
        assert not config.save_model
        assert config.execution.checkpoint_every >= config.training.steps


def test_a_run_of_undo_costs_what_the_reference_counts(planned, domain):
    """performance.md: 6.40e18 FLOPs for 300 M tokens."""
    runs = [run for part in planned.values() for run in part]
    costs = Costs(runs, ROOT / "configs" / f"wmdp_{domain}", STAGES)
    undo = next(run for run in planned["undo"] if run.config.variant == "undo_maxent")
    assert costs.of(undo).flops == pytest.approx(6.40e18, rel=0.05)
