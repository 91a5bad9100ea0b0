"""The matrix of attacks from made-up runs: worst cases, what keeps its retain performance, order, and certainty."""

import json

import numpy as np
import pytest

from tests.made_up import World
from undo.config.mistakes import ConfigError
from undo.report.attacks import attacks
from undo.report.figures.attacks import attack_matrix
from undo.results import intervals
from undo.results.matrix import matrix
from undo.settings.publish import publish

TEACHER = {"method": {"name": "maxent"}}


def world(tmp_path, evaluation="accuracy"):
    """A reference, an oracle, an unlearned model and UNDO at three alphas, each relearned, all but the oracle's."""
    made = World(tmp_path, evaluation)
    made.model("pretrain/reference-0", "reference", 0.9, forget=0.9)
    made.model("pretrain/oracle-0", "oracle", 0.3)
    made.run("unlearn/maxent-0", "maxent", curve={0: 0.9, 100: 0.0}, **TEACHER)
    for alpha, end in ((0.2, 0.7), (0.5, 0.5), (0.8, 0.4)):
        noise = {"alpha": alpha, "beta": 0.1}
        made.model(f"undo/{alpha}-0", f"undo_{alpha}", end, teacher="unlearn/maxent-0", noise=noise)
    made.run("relearn/maxent-0", "unlearned", curve={0: 0.0, 500: 0.8}, forget=0.8, model="unlearn/maxent-0")
    return made


def attacked(made, model, title, forget, retain=0.9, seed=0, number=0, items=None):
    variant = model.partition("/")[2].rpartition("-")[0]
    name = f"attack/{variant}-{title.replace(' ', '_')}_{number}-{seed}"
    made.run(name, variant, retain=retain, forget=forget, seed=seed, model=model, also={"attack": title})
    if items is not None:
        content = {"forget": {"scored": items, "weights": [1.0] * len(items)}}
        (made.folder / made.setting / name / "outcomes.json").write_text(json.dumps(content))
    return name


def lora(made, values=(0.85, 0.7, 0.5, 0.3)):
    for model, forget in zip(("unlearn/maxent-0", "undo/0.2-0", "undo/0.5-0", "undo/0.8-0"), values, strict=True):
        attacked(made, model, "LoRA, rank 16", forget)


def test_there_is_none_where_only_relearning_attacked(tmp_path):
    assert matrix(world(tmp_path).results()) is None
    assert attacks(world(tmp_path / "other").results()) is None


def test_the_worst_adversary_of_an_attack_and_the_worst_that_keeps_retain(tmp_path):
    made = world(tmp_path)
    for number, (forget, retain) in enumerate([(0.9, 0.2), (0.6, 0.81), (0.5, 0.9), (float("nan"), 0.9)]):
        attacked(made, "undo/0.2-0", "LoRA, rank 16", forget, retain, number=number)
    found = matrix(made.results())
    assert found is not None
    assert found.elicited("undo_0.2", "LoRA, rank 16") == (0.9, 0.2)
    assert found.elicited("undo_0.2", "LoRA, rank 16", kept=True) == (0.6, 0.81)
    assert found.worst("undo_0.2") == ("LoRA, rank 16", 0.9, 0.2)
    assert found.worst("undo_0.2", kept=True) == ("LoRA, rank 16", 0.6, 0.81)


def test_of_cross_entropies_the_lowest_is_the_worst(tmp_path):
    made = world(tmp_path, "cross_entropy")
    for number, (forget, retain) in enumerate([(3.0, 1.5), (4.0, 0.98), (5.0, 0.9)]):
        attacked(made, "undo/0.2-0", "LoRA, rank 16", forget, retain, number=number)
    found = matrix(made.results())
    assert found is not None
    assert found.elicited("undo_0.2", "LoRA, rank 16") == (3.0, 1.5)
    assert found.elicited("undo_0.2", "LoRA, rank 16", kept=True) == (4.0, 0.98)


def test_relearning_is_the_first_column_of_what_other_attacks_met(tmp_path):
    made = world(tmp_path)
    lora(made)
    found = matrix(made.results())
    assert found is not None
    assert found.attacks == ["finetuning", "LoRA, rank 16"]
    assert found.models == ["unlearned", "undo_0.2", "undo_0.5", "undo_0.8"]  # none but relearning met the others


@pytest.mark.parametrize(
    ("values", "ordered"),
    [((0.85, 0.7, 0.5, 0.3), True), ((0.85, 0.7, 0.2, 0.3), False), ((0.01, 0.02, 0.0, 0.0), None)],
)
def test_undos_order(values, ordered, tmp_path):
    made = world(tmp_path)
    lora(made, values)
    found = matrix(made.results())
    assert found is not None
    assert found.series == ["unlearned", "undo_0.2", "undo_0.5", "undo_0.8"]
    assert found.in_order("LoRA, rank 16") is ordered


def test_seeds_are_summed_up_by_their_median(tmp_path):
    made = world(tmp_path)
    for seed, forget in ((0, 0.2), (1, 0.6), (2, 0.3)):
        if seed:
            made.run(f"pretrain/reference-{seed}", "reference", seed=seed, forget=0.9)
        attacked(made, f"pretrain/reference-{seed}", "INT4", forget, seed=seed)
    found = matrix(made.results())
    assert found is not None
    assert found.elicited("reference", "INT4") == (0.3, 0.9)


@pytest.mark.parametrize(("lost", "bracketed"), [(0, False), (1, False), (2, True), (3, True)])
def test_brackets_are_for_attacks_that_cost_retain_performance_on_most_seeds(lost, bracketed, tmp_path):
    made = World(tmp_path)
    for seed in range(3):
        made.run(f"pretrain/reference-{seed}", "reference", seed=seed, retain=0.9, forget=0.9)
        attacked(made, f"pretrain/reference-{seed}", "INT4", 0.5, retain=0.5 if seed < lost else 0.85, seed=seed)
    found = matrix(made.results())
    assert found is not None
    assert found.costs_retain("reference", "INT4") is bracketed
    text = attacks(made.results()) or ""
    assert ("| INT4 | (0.500 / " in text) is bracketed
    assert ("INT4: 0.500 / 0.850 (" in text) is (0 < lost < 3)
    assert (f"({3 - lost} of 3 seeds)" in text) is (0 < lost < 3)
    assert ("| INT4: 0.500 / 0.500 | none |" in text) is (lost == 3)


def test_a_student_that_did_not_recover_is_broken(tmp_path):
    made = World(tmp_path)
    made.run("unlearn/maxent-0", "maxent", retain=0.8, curve={0: 0.9, 100: 0.0}, **TEACHER)
    for name, retain in (("whole", 0.73), ("broken", 0.71)):
        noise = {"alpha": 0.9, "beta": 0.1}
        made.run(f"undo/{name}-0", name, retain=retain, teacher="unlearn/maxent-0", noise=noise)
        attacked(made, f"undo/{name}-0", "INT4", 0.0)
    found = matrix(made.results())
    assert found is not None
    assert [found.broken(model) for model in ("whole", "broken")] == [False, True]
    assert "broken, broken" in (attacks(made.results()) or "")


def test_models_are_compared_on_the_same_problems(tmp_path):
    made = world(tmp_path)
    rng = np.random.default_rng(0)
    easy = rng.random(400) < 0.95
    hard = easy & (rng.random(400) < 0.8)
    for model, items in (("unlearn/maxent-0", easy), ("undo/0.5-0", hard)):
        attacked(made, model, "LoRA, rank 16", float(items.mean()), items=items.astype(float).tolist())
    attacked(made, "undo/0.8-0", "LoRA, rank 16", 0.1, items=[0.0, 1.0])
    found = matrix(made.results())
    assert found is not None
    apart = found.paired("undo_0.5", "unlearned")
    assert apart is not None
    assert apart.value == pytest.approx(hard.mean() - easy.mean())
    assert apart.low < apart.value < apart.high < 0
    assert found.paired("undo_0.8", "unlearned") is None  # of other problems


def test_seeds_are_no_further_problems(tmp_path):
    """Three seeds that answer alike are as sure as one of them."""
    made, rng = World(tmp_path), np.random.default_rng(3)
    a, b = ((rng.random(200) < share).astype(float).tolist() for share in (0.7, 0.4))
    for seed in range(3):
        for name, items in (("a", a), ("b", b)):
            made.run(f"pretrain/{name}-{seed}", name, seed=seed, forget=0.9)
            attacked(made, f"pretrain/{name}-{seed}", "INT4", float(np.mean(items)), seed=seed, items=items)
    found = matrix(made.results())
    assert found is not None
    weights = [1.0] * 200
    alone = intervals.difference({"scored": a, "weights": weights}, {"scored": b, "weights": weights})
    assert found.paired("a", "b") == pytest.approx(alone)


def test_a_model_of_the_series_that_was_not_attacked_moves_no_other(tmp_path):
    """What is elicited is compared with the same model before: here nothing comes back, though what is left differs."""
    made = World(tmp_path)
    made.run("unlearn/maxent-0", "unlearned", forget=0.1, curve={0: 0.9, 100: 0.1}, **TEACHER)
    for alpha, left in ((0.2, 0.0), (0.5, 0.3), (0.8, 0.2)):
        noise = {"alpha": alpha, "beta": 0.1}
        made.run(f"undo/{alpha}-0", f"undo_{alpha}", forget=left, teacher="unlearn/maxent-0", noise=noise)
    for model, forget in (("unlearn/maxent-0", 0.1), ("undo/0.5-0", 0.3), ("undo/0.8-0", 0.2)):
        attacked(made, model, "INT4", forget)
    attacked(made, "undo/0.2-0", "INT8", 0.0)
    found = matrix(made.results())
    assert found is not None
    assert len(found.series) == 4
    assert found.in_order("INT4") is None


def test_an_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        items = {"scored": (rng.random(100) < 0.3).astype(float).tolist(), "weights": [1.0] * 100}
        interval = intervals.performance(items)
        covered += interval.low <= 0.3 <= interval.high
    assert 180 <= covered <= 199  # 95 % of 200, within 3 standard deviations, and a bootstrap is a little narrow


def test_items_count_by_their_weights():
    """Nats of a batch over its tokens, as cross entropy has them."""
    items = {"scored": [10.0, 400.0], "weights": [10.0, 100.0]}
    assert intervals.performance(items).value == pytest.approx(410 / 110)


def test_paired_items_are_surer_than_either_alone():
    rng = np.random.default_rng(2)
    a = (rng.random(300) < 0.5).astype(float)
    b = np.where(rng.random(300) < 0.05, 1 - a, a)
    both = [{"scored": items.tolist(), "weights": [1.0] * 300} for items in (a, b)]
    alone, together = intervals.performance(both[0]), intervals.difference(*both)
    assert together is not None
    assert together.high - together.low < (alone.high - alone.low) / 2


def test_the_report_its_figure_and_its_csv(tmp_path):
    made = world(tmp_path)
    lora(made)
    attacked(made, "undo/0.5-0", "INT4", 0.0, retain=0.1)
    results = made.results()
    text = attacks(results) or ""
    assert "| LoRA, rank 16 | 0.850 / 0.900 | 0.700 / 0.900 | 0.500 / 0.900 | 0.300 / 0.900 | yes |" in text
    assert "| INT4 | not run | not run | (0.000 / 0.100) | not run | - |" in text
    assert "seed 0 alone (1 seed)" in text
    assert type(attack_matrix(results)).__name__ == "Figure"
    publish(made.folder / made.setting, made.folder, out=tmp_path / "out")
    assert (tmp_path / "out/figures/attacks.png").stat().st_size > 10_000
    lines = (tmp_path / "out/attacks.csv").read_text().splitlines()
    assert lines[0].startswith("model,seed,attack,worst,keeps_retain,run,forget")
    assert len(lines) == 1 + 4 + 5  # relearning of four, LoRA of four, INT4 of one


def test_items_that_were_changed_are_refused(tmp_path):
    made = world(tmp_path)
    name = attacked(made, "undo/0.5-0", "INT4", 0.5, items=[1.0, 0.0])
    run = made.folder / made.setting / name
    facts = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**facts, "checksums": {"outcomes.json": "0" * 32}}))
    with pytest.raises(ConfigError, match=r"outcomes\.json: is not what the run recorded"):
        list((matrix(made.results()) or pytest.fail("there is one")).rows())
