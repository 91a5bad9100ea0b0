"""The configs of the paper's settings against its tables, typed in here from the paper, not read from the configs."""

import pytest

from tests.conftest import ROOT
from undo.experiments.costs import Costs
from undo.experiments.plan import plan
from undo.prepare_models.reduced_gemma2 import ReducedGemma2
from undo.settings.stages import STAGES
from undo.train.stage import TrainingStage

ENGLISH_AND_KOREAN = {"retain": 0.5, "forget": 0.5}
ALL_OPERATIONS_AND_ENGLISH = {"retain": 0.125, "forget": 0.125, "auxiliary": 0.75}  # 1:3
ALPHAS = {0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.55, 0.65, 0.75}
RELEARNING_RATES = {1e-3, 7e-4, 4e-4, 1e-4, 7e-5, 5e-5, 1e-5, 7e-6, 4e-6, 1e-6}


@pytest.fixture(scope="module", params=["language", "arithmetic"])
def setting(request):
    return request.param


@pytest.fixture(scope="module")
def planned(setting, tmp_path_factory):
    """stage -> its planned runs."""
    runs = tmp_path_factory.mktemp("runs")
    folder = ROOT / "configs" / setting
    paths = {name: folder / f"{name}.yaml" for name in STAGES}
    return {name: plan(STAGES[name], [path], {}, runs) for name, path in paths.items() if path.exists()}


def configs(planned, stage, variant=None):
    return [run.config for run in planned[stage] if variant is None or run.config.variant == variant]


def settings(config) -> dict:
    """In the tables' terms. The batch is the product of batch size and accumulation: one device."""
    training = config.training
    return {
        "rate": training.learning_rate,
        "minimum": training.min_learning_rate,
        "batch": training.batch_rows,
        "decay": training.weight_decay,
        "warmup": training.warmup_steps,
        "steps": training.steps,
    }


def test_table_1_and_the_data(setting, planned):
    (data,) = configs(planned, "prepare")
    models = {run.model for run in configs(planned, "pretrain")}
    assert len(models) == 1
    shape: ReducedGemma2 = models.pop()
    assert (shape.layers, shape.heads, shape.head_dim) == (14, 8, 128)
    assert data.tokenizer == "google/gemma-2-2b"
    assert data.seed == 42
    if setting == "language":
        assert (shape.hidden_size, shape.intermediate_size, shape.parameters) == (320, 1280, 112_904_000)
        assert (data.length, data.shortest, data.validation_tokens) == (2048, 50, 500_000)
        assert {role: source.tokens for role, source in data.data.items()} == {"retain": 10**9, "forget": 10**9}
        assert data.data["retain"].hub == "HuggingFaceFW/fineweb-edu"
        assert (data.data["forget"].hub, data.data["forget"].subset) == ("HuggingFaceFW/fineweb-2", "kor_Hang")
    else:
        assert (shape.hidden_size, shape.intermediate_size, shape.parameters) == (768, 3072, 328_772_352)
        assert data.length == 256
        world = data.world
        assert (world.problems, world.largest_term, world.largest_factor, world.holdout) == (1_000_000, 50, 20, 0)


def test_table_2_pretraining(setting, planned):
    (reference,), (oracle,) = (configs(planned, "pretrain", variant) for variant in ("reference", "oracle"))
    if setting == "language":
        common = {"rate": 4e-4, "minimum": 4e-5, "batch": 5 * 80, "decay": 0.1, "warmup": 50}
        assert settings(reference) == {**common, "steps": round(2e9 / (5 * 80 * 2048))}  # one epoch of 2 B tokens
        assert settings(oracle) == {**common, "steps": round(1e9 / (5 * 80 * 2048))}
        assert reference.mixture == ENGLISH_AND_KOREAN
        assert oracle.mixture == {"retain": 1.0}
    else:
        common = {"rate": 4e-4, "minimum": 4e-4, "batch": 15 * 24, "decay": 0, "warmup": 50, "steps": 1000}
        assert settings(reference) == settings(oracle) == common
        assert reference.mixture == ALL_OPERATIONS_AND_ENGLISH
        assert oracle.mixture == {"retain": 0.125, "auxiliary": 0.875}  # 1:7


def test_table_3_oracle_matching(setting, planned):
    if setting == "language":
        expected = {"rate": 4e-4, "minimum": 4e-5, "batch": 4 * 160, "decay": 0.1, "warmup": 50}
        expected["steps"] = round(2e9 / (4 * 160 * 2048))
    else:
        expected = {"rate": 7e-4, "minimum": 7e-5, "batch": 15 * 24, "decay": 0, "warmup": 50, "steps": 1000}
    for student in ("reference", "random"):
        (config,) = configs(planned, "distill", f"matched_{student}")
        assert settings(config) == expected
        assert (config.student, config.teacher) == (student, "pretrain/oracle-seed_0")
        assert config.reference == ("pretrain/reference-seed_0" if student == "reference" else None)
        assert config.mixture == (ENGLISH_AND_KOREAN if setting == "language" else ALL_OPERATIONS_AND_ENGLISH)
        assert config.retain_threshold is None


def test_table_4_relearning(setting, planned):
    runs = configs(planned, "relearn")
    expected = {"batch": 8 if setting == "language" else 15, "steps": 500, "warmup": 1, "minimum": None, "decay": 0}
    for config in runs:
        assert {key: value for key, value in settings(config).items() if key != "rate"} == expected
        assert config.training.evaluate_every == 5
        assert config.mixture == ({"forget": 1.0} if setting == "language" else {"forget": 0.25, "auxiliary": 0.75})
    by_model: dict[str, list[float]] = {}
    for config in runs:
        by_model.setdefault(config.model, []).append(config.training.learning_rate)
    assert all(len(rates) == 10 and set(rates) == RELEARNING_RATES for rates in by_model.values())
    made = {run.name for stage in ("pretrain", "distill", "undo") for run in planned[stage]}
    assert made <= set(by_model)  # every model is attacked, and the three unlearned ones that are taught from
    assert len([model for model in by_model if model.startswith("unlearn/")]) == 3
    tokens = next(run.config.tokens(2048 if setting == "language" else 256) for run in planned["relearn"])
    assert tokens == pytest.approx(8e6 if setting == "language" else 2e6, rel=0.05)  # "~8M", "~2M tokens"


def test_table_5_and_b_1_unlearning(setting, planned):
    low = {6e-6, 7e-6, 8e-6, 9e-6, 1e-5, 2e-5, 3e-5, 4e-5}
    rates = {
        "language": {method: {n * 1e-5 for n in range(1, 9)} for method in ("graddiff", "maxent", "rmu")},
        "arithmetic": {"graddiff": low, "maxent": {6e-5, 7e-5, 8e-5, 9e-5, 1e-4, 2e-4, 3e-4, 4e-4}, "rmu": low},
    }[setting]
    batch, steps = (4, {"graddiff": 100, "maxent": 100, "rmu": 500}) if setting == "language" else (
        40, {"graddiff": 10, "maxent": 10, "rmu": 500}
    )  # fmt: skip
    for method in ("graddiff", "maxent", "rmu"):
        runs = configs(planned, "unlearn", method)
        assert sorted(run.training.learning_rate for run in runs) == pytest.approx(sorted(rates[method]))
        for run in runs:
            assert run.method.name == method
            assert (run.training.batch_rows, run.training.steps) == (batch, steps[method])
            assert (run.training.weight_decay, run.training.clip_norm) == (0, 1.0)  # Appendix D.1
            assert run.training.min_learning_rate is None  # constant: docs/differences.md, 9
    (graddiff, *_), (rmu, *_) = configs(planned, "unlearn", "graddiff"), configs(planned, "unlearn", "rmu")
    assert graddiff.method.alpha == (1 if setting == "language" else 15)
    assert (rmu.method.alpha, rmu.method.c) == ((1200, 6.5) if setting == "language" else (200, 6))
    assert (rmu.method.layer, rmu.method.trained_layers) == (11, (5, 6, 7, 8, 9, 10, 11))


def table_6(setting) -> dict:
    if setting == "language":
        common = {"rate": 9e-4, "minimum": 7e-4, "batch": 4 * 60, "decay": 0.1, "warmup": 50}
        return {**common, "steps": round(2e9 / (4 * 60 * 2048))}
    return {"rate": 7e-4, "minimum": 7e-5, "batch": 15 * 24, "decay": 0, "warmup": 50, "steps": 1000}


def test_table_6_unlearn_and_distill(setting, planned):
    for variant, method in (("distilled", "maxent"), ("distilled_graddiff", "graddiff"), ("distilled_rmu", "rmu")):
        (config,) = configs(planned, "distill", variant)
        assert settings(config) == table_6(setting)
        assert config.student == "random"
        assert config.teacher.startswith(f"unlearn/{method}-")
        assert config.mixture == (ENGLISH_AND_KOREAN if setting == "language" else ALL_OPERATIONS_AND_ENGLISH)


def test_appendix_c_and_figures_5_to_7_undo(setting, planned):
    runs = configs(planned, "undo")
    rate = "8e-05" if setting == "language" else "9e-05"
    for config in runs:
        assert settings(config) == table_6(setting)
        assert config.teacher == f"unlearn/maxent-lr_{rate}-seed_0"
        assert (config.noise.distribution, config.noise.norms) == ("xavier", "paper")
    points = [(c.noise.alpha, c.noise.beta, c.retain_threshold, c.seed) for c in runs]
    assert len(points) == len(set(points)) == 55 + 12 + 7
    assert {(a, s) for a, b, t, s in points if b == 0.1 and t == 0.05} == {(a, s) for a in ALPHAS for s in range(5)}
    grid = {(a, b) for a, b, t, s in points if t == 0.05 and s == 0}
    assert {(a, b) for a in (0.1, 0.3, 0.5, 0.7) for b in (0.05, 0.1, 0.5, 1.0)} <= grid
    thresholds = {t for a, b, t, s in points if (a, b, s) == (0.6, 0.1, 0)}
    assert thresholds == {0.05, 0.09, 0.13, 0.17, 0.21, 0.25, 0.29, 0.33}


def test_tables_7_and_8_and_appendix_d_1(setting, tmp_path):
    """The robust baselines of Section 6, all on MaxEnt at its chosen rate; D.1's twelve rates for the others."""
    runs = plan(STAGES["unlearn"], [ROOT / "configs" / setting / "unlearn_robust.yaml"], {}, tmp_path)
    by_method: dict[str, list] = {}
    for run in runs:
        by_method.setdefault(run.config.method.name, []).append(run.config)
    rate = 8e-5 if setting == "language" else 9e-5
    for config in (*by_method["sam"], *by_method["repnoise"]):
        assert config.method.base.name == "maxent"
        assert config.training.learning_rate == rate
    assert {c.method.rho for c in by_method["sam"]} == {0.001, 0.003, 0.005, 0.01, 0.02, 0.04, 0.07, 0.1}
    assert {c.method.ascent for c in by_method["sam"]} == {"total"}
    noise_and_ascent = [
        (0.1, 1e-4),
        (0.1, 1e-3),
        (0.5, 0.01),
        (0.5, 0.1),
        (1.0, 0.1),
        (1.0, 1.0),
        (2.0, 2.0),
        (4.0, 4.0),
    ]
    assert [(c.method.noise_weight, c.method.ascent_weight) for c in by_method["repnoise"]] == noise_and_ascent
    twelve = {mantissa * 10.0**-power for power in range(3, 9) for mantissa in (3, 8)}
    for method in ("undial", "graddiff", "maxent", "rmu"):
        assert sorted(c.training.learning_rate for c in by_method[method]) == pytest.approx(sorted(twelve))
    batch = 4 if setting == "language" else 40
    for method, configs_of in by_method.items():
        expected = 20 if (setting, method) == ("arithmetic", "graddiff") else batch
        assert {c.training.batch_rows for c in configs_of} == {expected}
        assert {(c.training.weight_decay, c.training.clip_norm) for c in configs_of} == {(0, 1.0)}
        assert {c.training.min_learning_rate for c in configs_of} == {None}  # docs/differences.md, 9
    attacked = plan(STAGES["relearn"], [ROOT / "configs" / setting / "relearn_robust.yaml"], {}, tmp_path)
    models = {run.config.model for run in attacked}
    assert models == {run.name for run in runs if "_wide" not in run.name}
    assert len(attacked) == 10 * len(models)


def test_costs_against_the_reference_s_count(setting, planned):
    """performance.md section 4.1: 1.71e18 and 2.28e18 FLOP for language, 1.84e17 and 2.45e17 for arithmetic."""
    every = [run for stage in planned.values() for run in stage]
    costs = Costs(every, ROOT / "configs" / setting, STAGES)
    expected = (1.71e18, 2.28e18) if setting == "language" else (1.84e17, 2.45e17)
    for name, flops in zip(("pretrain/reference-seed_0", "distill/distilled-seed_0"), expected, strict=True):
        cost = costs.of(next(run for run in every if run.name == name))
        assert cost is not None
        assert cost.flops == pytest.approx(flops, rel=0.02)
    assert all(costs.of(run) for run in every if isinstance(run.config, TrainingStage))
