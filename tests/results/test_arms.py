"""What a model is comes from how it was made: renaming every variant changes what legends say, and nothing else."""

import json
import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.made_up import World
from undo.config.files import dump_yaml, load_yaml
from undo.config.mistakes import ConfigError
from undo.config.schema import as_raw
from undo.experiments import cli
from undo.report.claims import check
from undo.report.figures import FIGURES, figures_of
from undo.report.figures.missing import Missing
from undo.report.report import report
from undo.report.tables import beaten
from undo.results.arms import Distilled, Matched, Oracle, Reference, Undo, Unlearned, arm_of, method_of
from undo.results.curves import COLUMNS, curves
from undo.settings.publish import read
from undo.settings.whole import planned
from undo.train.stage import TrainingStage

NOISE = {"alpha": 0.6, "beta": 0.1}


def test_every_arm_by_its_lineage():
    configs = {
        "base/model": {"model": "owner/name"},
        "pretrain/a": {"mixture": {"retain": 0.5, "forget": 0.5}},
        "pretrain/b": {"mixture": {"retain": 1.0, "forget": 0.0}},
        "unlearn/c": {"method": {"name": "rmu"}, "reference": "pretrain/a"},
        "distill/d": {"teacher": "unlearn/c", "student": "random"},
        "distill/e": {"teacher": "pretrain/b", "student": "reference"},
        "undo/f": {"teacher": "unlearn/c", "noise": {"alpha": 0.7}, "retain_threshold": 0.05},
        "undo/g": {"teacher": "unlearn/gone", "noise": {"alpha": 0.7, "beta": 0.0, "distribution": "init"}},
        "relearn/h": {"model": "undo/f"},
    }
    arms = {name: arm_of(name, configs.get) for name in configs}
    assert arms == {
        "base/model": Reference(),
        "pretrain/a": Reference(),
        "pretrain/b": Oracle(),
        "unlearn/c": Unlearned("rmu"),
        "distill/d": Distilled(Unlearned("rmu")),
        "distill/e": Matched("reference"),
        "undo/f": Undo(0.7, 0.1, "xavier", 0.05, Unlearned("rmu")),
        "undo/g": Undo(0.7, 0.0, "init", None, None),
        "relearn/h": None,
    }
    assert [method_of(arm) for arm in arms.values()] == [None, None, None, "rmu", "rmu", None, "rmu", None, None]


# --- the demo, with other names --------------------------------------------------------------------------------------


def demo(runs: Path) -> Path:
    """Every run that configs/demo asks for, with --with robust and over two seeds, done with invented performances."""
    arguments = ["demo", "--with", "robust", "sweep.seed=[0,1]", "--runs", str(runs)]
    rng = random.Random(0)
    for run in planned(cli.parser("", "").parse_intermixed_args(arguments))[0]:
        folder, config = run.directory.folder, run.config
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(dump_yaml(as_raw(config)))
        facts = {
            "seconds": 1.0,
            "finished": "2026-01-01T00:00:00+00:00",
            "device": "none",
            "threads": 1,
            "versions": {},
        }
        facts |= {"git_revision": None, "peak_rss_bytes": 1 << 30, "peak_device_bytes": None, "parents": {}}
        lines = []
        if isinstance(config, TrainingStage):
            for step in range(config.training.steps + 1):
                if config.training.evaluates(step):
                    facts["evaluation"] = {"retain": rng.random(), "forget": rng.random()}
                    lines.append({"step": step, **facts["evaluation"]})
            facts |= {"steps": rng.randrange(100, 500), "tokens": 1000, "flops": 1e9, "evaluation_flops": 1e9}
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / "run.json").write_text(json.dumps(facts))
    return runs


def renamed(runs: Path, name: Callable[[str], str]) -> None:
    """Give every variant another name, in place."""
    for path in runs.glob("demo/*/*/config.yaml"):
        raw = load_yaml(path)
        path.write_text(dump_yaml({**raw, "variant": name(raw["variant"])}))


def drawn(figure) -> list:
    """All that is in a figure but the words of its legends: lines with their colours, marks, limits and titles."""
    found = []
    for axis in figure.axes:
        lines = [
            (
                list(map(float, line.get_xdata())),
                list(map(float, line.get_ydata())),
                line.get_color(),
                line.get_marker(),
            )
            for line in axis.get_lines()
        ]
        found.append((lines, axis.get_title(), axis.get_xlabel(), axis.get_ylabel(), axis.get_xlim(), axis.get_ylim()))
    return found


def test_renaming_every_variant_of_the_demo_changes_words_only(tmp_path):
    """First to plain numbers, which stand nowhere else in a report, then to words that code once looked for."""
    before = read(demo(tmp_path), "demo")
    figures = {name: FIGURES[name](before) for name in figures_of(before)}
    assert [name for name, figure in figures.items() if isinstance(figure, Missing)] == ["fig2", "fig6"]
    verdicts = [c.verdict for c in check(before)]
    assert {"holds", "fails"} & set(verdicts)
    labels = sorted({run.label for run in before.runs} - {""})
    assert len(labels) > 15
    plain = {label: f"variant-{i:02}" for i, label in enumerate(labels)}
    tricky = {
        name: ("lora", "undo", "wmdp_best", "oracle_within_")[i % 4] + str(i) for i, name in enumerate(plain.values())
    }
    texts = []
    for names in (plain, tricky):
        renamed(tmp_path, lambda old, names=names: names.get(old, old))
        after = read(tmp_path, "demo")
        for key, figure in figures.items():
            other = FIGURES[key](after)
            assert isinstance(other, Missing) == isinstance(figure, Missing)
            if not isinstance(figure, Missing):
                assert drawn(other) == drawn(figure), key
        assert [c.verdict for c in check(after)] == verdicts
        texts.append(report(after, check(after), [], []))
    expected = re.sub(r"variant-\d\d", lambda match: tricky[match[0]], texts[0])
    assert sorted(texts[1].splitlines()) == sorted(expected.splitlines())


# --- what names once did ---------------------------------------------------------------------------------------------


@pytest.fixture
def world(tmp_path):
    made = World(tmp_path)
    made.model("pretrain/oracle", "oracle", 0.2)
    made.model("unlearn/m", "unlearned", 0.9, method={"name": "maxent"}, reference="x")
    return made


@pytest.mark.parametrize("label", ["undo_0.6", "undo_0.7", "undo", "my_undo", "undo_0.60"])
def test_an_undo_model_of_any_name_is_in_figures_5_and_7(world, label):
    world.model("undo/u", label, 0.5, teacher="unlearn/m", noise={"alpha": 0.7, "beta": 0.1})
    results = world.results()
    assert label in results.compared
    assert not isinstance(FIGURES["fig5"](results), Missing)
    (row,) = [row for row in results.table() if row["model"] == label]
    assert row["robustness"] == pytest.approx((0.5 - 0.9) / (0.2 - 0.9))


def test_unlearned_models_of_any_name_have_a_robustness(world):
    world.model("unlearn/r", "rmu", 0.7, method={"name": "rmu"}, reference="x")
    world.model("undo/u", "u", 0.5, teacher="unlearn/m", noise=NOISE)
    found = {row["model"]: row["robustness"] for row in world.results().table()}
    assert found == {"oracle": 1.0, "unlearned": 0.0, "rmu": pytest.approx(2 / 7), "u": pytest.approx(4 / 7)}


def test_an_adversary_with_a_name_changes_nothing_but_its_name(world):
    before = figures_of(world.results())
    curve = {0: 0.0, 500: 0.95}
    world.run("relearn/l", "unlearned", curve=curve, model="unlearn/m", adversary="lora", training={"learning_rate": 1})
    assert figures_of(world.results()) == before
    assert "On a pretrained model, UNDO makes what it starts from relearn less. | - | - | not run" in report(
        world.results(), check(world.results()), [], []
    )


def test_an_attack_on_a_fetched_model_alone_is_a_table(tmp_path):
    """Stages base, prepare and relearn: the attack's own first evaluation is the model's."""
    made = World(tmp_path)
    made.run("base/model", "theirs", also={"evaluation": {}, "vocab_size": 448})
    curve = {0: 0.3, 40: 0.5, 500: 0.6}
    made.run("relearn/a", "theirs", curve=curve, model="base/model", training={"learning_rate": 1e-3})
    results = made.results()
    (row,) = results.table()
    assert (row["retain"], row["forget_last"], row["robustness"]) == (0.9, 0.6, None)  # as the attack found it
    assert "theirs" in report(results, check(results), [], [])
    for name in FIGURES:
        FIGURES[name](results)


def test_models_of_one_label_are_rows_of_their_own(world):
    """An own method's UNDO is made by the setting's YAML, whose variants call it as they call MaxEnt's."""
    world.run("unlearn/own", "own", method={"name": "own"}, reference="x")
    for teacher in ("m", "own"):
        world.run(f"undo/{teacher}", "undo_0.6", teacher=f"unlearn/{teacher}", noise=NOISE)
        world.run(f"relearn/{teacher}", "undo_0.6", curve={0: 0.0, 500: 0.5}, model=f"undo/{teacher}")
    assert {"undo_0.6 (maxent)", "undo_0.6 (own)"} < world.results().compared.keys()


def test_undo_of_a_method_stands_beside_the_others_at_any_alpha(world):
    """The point of figures.yaml chooses among the models of a method; it leaves no method out."""
    world.run("unlearn/own", "own", method={"name": "own"}, reference="x")
    world.model("undo/m", "undo_0.6", 0.4, teacher="unlearn/m", noise=NOISE)
    for name, teacher, alpha in (("a", "m", 0.8), ("b", "own", 0.5)):
        world.model(f"undo/{name}", name, 0.3, teacher=f"unlearn/{teacher}", noise={"alpha": alpha, "beta": 0.1})
    results = world.results(figure_7={"alpha": 0.6, "beta": 0.1})
    assert results.compared.keys() == {"unlearned", "undo_0.6", "b"}
    assert "| b | " in beaten(results)


# --- the worst case --------------------------------------------------------------------------------------------------


def attack(made: World, name: str, kind: str, end: float) -> None:
    evaluation = {"name": kind}
    made.run(f"relearn/{name}", "m", curve={0: 0.0, 500: end}, model="unlearn/m", evaluation=evaluation)


def test_the_worst_case_goes_by_the_evaluation_that_made_its_curves(tmp_path):
    """In nats the strongest adversary is the one with the least, whatever the model itself was evaluated by."""
    made = World(tmp_path, "accuracy")
    made.run("unlearn/m", "m", method={"name": "maxent"}, reference="x")
    attack(made, "weak", "cross_entropy", 6.0)
    attack(made, "strong", "cross_entropy", 3.0)
    (attacked,) = made.results().attacked
    assert attacked.last == 3.0
    assert attacked.model.higher_is_better
    assert attacked.unit == "cross entropy (nats)"


def test_curves_of_two_kinds_are_refused_with_both_names(tmp_path):
    made = World(tmp_path, "accuracy")
    made.run("unlearn/m", "m", method={"name": "maxent"}, reference="x")
    attack(made, "a", "accuracy", 0.5)
    attack(made, "b", "cross_entropy", 3.0)
    with pytest.raises(ConfigError, match=r"relearn/a was evaluated by accuracy, relearn/b by cross entropy"):
        _ = made.results().attacked


def test_figures_yaml_is_checked(tmp_path):
    from undo.settings.publish import shown_in

    for text, words in (
        ("papr: language", "did you mean 'paper'"),
        ("paper: langauge", "there are: language, arithmetic"),
        ("figures: [fig99]", "there is no 'fig99'"),
        ("figure_7: {alpha: 2, beta: 0}", "figure_7.alpha"),
    ):
        (tmp_path / "figures.yaml").write_text(text)
        with pytest.raises(ConfigError, match=re.escape(words)):
            shown_in(tmp_path)


def test_every_evaluation_is_a_row_of_one_tidy_table(world):
    world.model("undo/u", "u", 0.6, teacher="unlearn/m", noise=NOISE, retain=0.8)
    world.run("relearn/d", "u", curve={0: 0.0}, model="undo/u", adversary="lora", also={"tokens": None})
    rows = list(curves(world.results()))
    assert all(tuple(row) == COLUMNS for row in rows)
    last = {"stage": "relearn", "run": "relearn/u-0", "arm": "undo", "method": "maxent", "alpha": 0.6, "beta": 0.1}
    last |= {"within": 0.05, "variant": "u", "seed": 0, "adversary": None, "learning_rate": 1e-3}
    (row,) = [row for row in rows if (row["run"], row["step"]) == ("relearn/u-0", 40)]
    assert row == last | {"step": 40, "tokens": 400, "retain": 0.9, "forget": pytest.approx(0.4)}
    assert [(row["adversary"], row["tokens"]) for row in rows if row["run"] == "relearn/d"] == [("lora", None)]
    assert {(row["stage"], row["arm"]) for row in rows if row["stage"] != "relearn"} == {
        ("pretrain", "oracle"),
        ("unlearn", "unlearned"),
        ("undo", "undo"),
    }
