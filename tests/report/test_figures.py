"""Figures, tables and the report, from results made up so that what they must show can be worked out by hand."""

import json
import shutil

import pytest

from tests.conftest import ROOT
from tests.made_up import World
from undo.experiments.hyperparameters import hyperparameters
from undo.experiments.remedy import remedy
from undo.report.claims import CLAIMS, check
from undo.report.figures import FIGURES, draw
from undo.report.report import report
from undo.report.tables import compute, unlearning_sweep
from undo.settings.publish import not_drawn
from undo.settings.stages import STAGES

SETTINGS = sorted(path.parent for path in (ROOT / "configs").glob("*/pretrain.yaml"))


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


def test_figures_2_6_and_7_from_what_they_need(world):
    """Drawn as files, or in words what is missing."""
    drawn, missing = draw(FIGURES, world.results(), world.folder)
    assert drawn == []
    assert [line.partition(":")[0] for line in missing] == list(FIGURES)
    world.model("pretrain/oracle", "oracle", 0.2)
    for student in ("reference", "random"):
        world.model(f"distill/{student}", f"matched_{student}", 0.5, teacher="pretrain/oracle", student=student)
        with open(world.folder / "made/distill" / student / "metrics.jsonl", "a") as file:
            file.writelines(json.dumps({"step": step, "loss/kl": 1 / step}) + "\n" for step in range(1, 30))
    world.model("unlearn/m", "unlearned", 0.9, method={"name": "maxent"}, reference="x")
    for alpha in (0.1, 0.5):
        for beta in (0.1, 1.0):
            label = f"undo_{alpha}" + ("" if beta == 0.1 else f"_beta_{beta}")
            noise = {"alpha": alpha, "beta": beta}
            world.model(f"undo/{label}", label, 0.8 - alpha, steps=int(900 * alpha), teacher="unlearn/m", noise=noise)
    drawn, missing = draw(["fig2", "fig6", "fig7"], world.results(), world.folder)
    assert ([path.stem for path in drawn], missing) == (["fig2", "fig6", "fig7"], {})
    for name in ("fig2", "fig6", "fig7"):
        for suffix in ("pdf", "png"):
            assert (world.folder / f"{name}.{suffix}").stat().st_size > 5000
    texts = [text.get_text() for axis in FIGURES["fig6"](world.results()).axes for text in axis.texts]
    assert texts == ["90", "90", "450", "450"]  # the cost matrix
    titles = [axis.get_title() for axis in FIGURES["fig7"](world.results()).axes]
    assert titles == ["before the attack", "after 40 steps", "after 500 steps"]


def a_whole_world(world) -> None:
    """An oracle, a teacher of each method with its distilled student, and UNDO over alpha."""
    world.model("pretrain/oracle", "oracle", 0.2, steps=200)
    for method in ("graddiff", "maxent", "rmu"):
        label = "" if method == "maxent" else f"_{method}"
        teacher = f"unlearn/{method}-lr"
        training = {"learning_rate": 8e-5}
        world.model(teacher, f"unlearned{label}", 0.9, method={"name": method}, reference="x", training=training)
        world.model(f"distill/d{label}", f"distilled{label}", 0.5, teacher=teacher)
    for alpha in (0.2, 0.4, 0.55, 0.65):
        noise = {"alpha": alpha, "beta": 0.1}
        tokens = {"tokens": 600}  # a step of distillation has fewer rows
        world.model(
            f"undo/{alpha}", f"undo_{alpha}", 0.9 - alpha, also=tokens, teacher="unlearn/maxent-lr", noise=noise
        )


def test_figures_4_9_and_10_have_a_panel_a_method(world):
    a_whole_world(world)
    for name in ("fig4", "fig9", "fig10"):
        assert [axis.get_title() for axis in FIGURES[name](world.results()).axes] == ["GradDiff", "MaxEnt", "RMU"]


def test_figure_4_is_bold_for_the_worst_case_and_figure_10_for_the_average(world):
    a_whole_world(world)
    curve = {0: 0.0, 20: 0.9, 40: 0.3, 500: 0.1}
    world.run("relearn/another", "unlearned", curve=curve, model="unlearn/maxent-lr")
    for name, expected in (("fig4", [0.0, 0.9, 0.6, 0.9]), ("fig10", [0.0, 0.6, 0.45, 0.5])):
        lines = FIGURES[name](world.results()).axes[1].get_lines()
        (bold,) = [line for line in lines if line.get_label() == "unlearn"]
        assert bold.get_ydata() == pytest.approx(expected)
        assert bold.get_linewidth() > 2 * max(line.get_linewidth() for line in lines if line.get_linewidth() < 2)


@pytest.mark.parametrize(
    ("setting", "alphas"), [("made", ["0.2", "0.4", "0.55", "0.65"]), ("arithmetic", ["0.55", "0.65"])]
)
def test_figure_5_shows_robustness_against_compute_and_the_paper_s_alphas(tmp_path, setting, alphas):
    world = World(tmp_path, setting=setting)
    a_whole_world(world)
    scaling, relearning = FIGURES["fig5"](world.results()).axes
    (line,) = [line for line in scaling.get_lines() if len(line.get_xdata()) == 4]
    assert list(line.get_xdata()) == [0.3] * 4  # 600 tokens against the oracle's 2,000, in 100 and 200 steps
    assert scaling.get_xlabel() == "compute: training tokens / those of data filtering"
    assert line.get_ydata() == pytest.approx([alpha / 0.7 for alpha in (0.2, 0.4, 0.55, 0.65)])
    assert [axis.get_title().splitlines()[1] for axis in (scaling, relearning)] == ["1 seed a point", "seed 0"]
    drawn = [line.get_label() for line in relearning.get_lines() if not line.get_label().startswith("_")]
    assert drawn == ["unlearn", *(f"α = {alpha}" for alpha in alphas), "data filtering (oracle)"]


def test_what_is_missing_is_named_with_the_command_that_makes_it(tmp_path):
    for setting, words in (
        ("language", "uv run run_all.py language --only 'relearn/matched_r*'"),
        ("demo", "configs/demo has no relearn/matched_*"),
    ):
        world = World(tmp_path, setting=setting)
        world.run("pretrain/reference", "reference")
        _, missing = draw(["fig2"], world.results(), tmp_path)
        assert words in remedy(setting, *missing["fig2"][1:])


def test_the_sweep_stands_beside_the_paper_s(tmp_path):
    world = World(tmp_path, "cross_entropy", "language")
    for rate in (7e-5, 8e-5):
        training = {"learning_rate": rate}
        curve = {0: 3.5, 100: 12.0}
        world.run(
            f"unlearn/{rate}",
            "maxent",
            retain=5.0,
            forget=12.0,
            curve=curve,
            method={"name": "maxent"},
            training=training,
        )
    world.run("distill/d", "distilled", teacher="unlearn/8e-05")
    table = unlearning_sweep(world.results())
    assert table is not None
    seven, eight = table.splitlines()[2:]
    assert "| 5.000 → 5.000 | 3.500 → 12.000 | 4.936 → 4.976 | 3.467 → 12.361 | +0.024 | -0.361 |" in seven
    assert "| **4.936 → 4.989** | **3.467 → 12.381** | **+0.011** | **-0.381** |" in eight  # bold: it is distilled


def test_another_size_stands_beside_the_paper_s_own_choice(tmp_path):
    world = World(tmp_path, "cross_entropy", "language_small")
    world.run("unlearn/m", "maxent", method={"name": "maxent"}, training={"learning_rate": 1e-3})
    world.run("distill/d", "distilled", teacher="unlearn/m")
    table = unlearning_sweep(world.results())
    assert table is not None
    assert "12.381" in table
    assert "difference" not in table
    world = World(tmp_path, setting="made")
    world.run("unlearn/m", "maxent", method={"name": "maxent"}, training={"learning_rate": 1e-3})
    assert "paper" not in (unlearning_sweep(world.results()) or "")


def test_a_baseline_s_robustness_is_measured_against_the_unlearned_model(world):
    a_whole_world(world)  # the oracle ends at 0.2, unlearned at 0.9
    world.model("unlearn/sam", "sam", 0.55, method={"name": "sam"}, reference="x", training={"learning_rate": 1e-3})
    results = world.results()
    found = {a.label: results.robustness(a) for a in results.attacked}
    assert found["sam"] == pytest.approx(0.5)
    assert found["unlearned"] == found["unlearned_rmu"] == 0


def test_figure_7_compares_methods_and_undo_at_the_paper_s_alpha(world):
    a_whole_world(world)
    noise = {"alpha": 0.6, "beta": 0.1}
    for label in ("undo_0.6", "undo_0.6_within_0.33"):
        world.model(f"undo/{label}", label, 0.3, teacher="unlearn/maxent-lr", noise=noise)
    expected = {"unlearned", "unlearned_graddiff", "unlearned_rmu", "undo_0.6", "undo_0.6_within_0.33"}
    results = world.results(figure_7={"alpha": 0.6, "beta": 0.1})
    assert results.compared.keys() == expected
    assert len(FIGURES["fig7"](results).axes[0].containers) == len(expected) + 1  # and the oracle
    assert world.results().compared.keys() == expected | {f"undo_{alpha}" for alpha in (0.2, 0.4, 0.55, 0.65)}


def marks(axis) -> dict[str, tuple]:
    """Name in the legend -> what tells its point from others."""
    found = {container.get_label(): container[0] for container in axis.containers}
    return {
        label: (
            line.get_color(),
            line.get_marker(),
            line.get_fillstyle(),
            line.get_markerfacecolor(),
            line.get_markersize(),
        )
        for label, line in found.items()
    }


def many_points(world) -> None:
    """Eight points of a method, UNDO at three thresholds, and a method that nobody here knows with its UNDO."""
    a_whole_world(world)
    for rank in range(8):
        world.model(f"unlearn/{rank}", f"{rank}", 0.9, retain=0.9 - rank / 9, method={"name": "npo"}, reference="x")
    world.model("unlearn/own", "own", 0.8, method={"name": "own"}, reference="x")
    for teacher in ("maxent-lr", "own"):
        for within in (0.05, 0.13, 0.33):
            noise, label = {"alpha": 0.6, "beta": 0.1}, f"undo_{teacher}_{within}"
            made = {"teacher": f"unlearn/{teacher}", "noise": noise, "retain_threshold": within}
            world.model(f"undo/{label}", label, 0.5, **made)


def test_points_of_figure_7_are_told_apart_and_share_an_axis(world):
    many_points(world)
    figure = FIGURES["fig7"](world.results(figure_7={"alpha": 0.6, "beta": 0.1}))
    found = marks(figure.axes[0])
    assert len(found) == 19  # the oracle, three methods, eight points of another, own, six UNDO
    assert len(set(found.values())) == len(found)
    assert {color for color, *_ in found.values()}.isdisjoint({"#777777", "#444444"})
    assert [label for label, (color, *_) in found.items() if color == "#000000"] == ["oracle (data filtering)"]
    (legend,) = figure.legends
    assert {text.get_text() for text in legend.get_texts()} == {*found, "Pareto front"}
    assert legend.get_title().get_text() == "1 seed a point"
    assert len({axis.get_ylim() for axis in figure.axes}) == 1


def test_what_lies_far_above_stands_at_the_edge_and_is_said_to(tmp_path):
    """A GradDiff of 90 nats before the attack would leave nothing to see of what is under attack."""
    world = World(tmp_path, "cross_entropy")
    for name, start in (("maxent", 8.0), ("graddiff", 90.0)):
        world.run(f"unlearn/{name}", name, forget=start, method={"name": name}, reference="x")
        world.run(f"relearn/{name}", name, curve={0: start, 40: 6.0, 500: 5.5}, model=f"unlearn/{name}")
    figure = FIGURES["fig7"](world.results())
    assert figure.axes[0].get_ylim()[1] == pytest.approx(5.5 + 4 * 0.5)
    assert figure.legends[0].get_title().get_text() == "1 seed a point; at the upper edge: beyond it"


def test_shades_rates_and_lines_are_named(world):
    for rate in (1e-3, 5e-4):
        training = {"learning_rate": rate}
        curve = {0: 0.9, 100: 0.1}
        world.run(f"unlearn/{rate}", "m", method={"name": "maxent"}, training=training, reference="x", curve=curve)
        curve = {0: 0.1, 100: 100 * rate}
        world.run(f"relearn/{rate}", "a", model="unlearn/0.001", training=training, curve=curve)
    assert FIGURES["fig3"](world.results()).axes[0].get_title() == "MaxEnt\nrates, light to dark: 0.0005, 0.001"
    figure = FIGURES["fig8"](world.results())  # no UNDO: a panel a model
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["rate 0.001", "before unlearning"]
    assert figure.legends[0].get_title().get_text().startswith("thin: each adversary; bold, and named: the strongest")


def test_no_legend_leaves_its_figure(world):
    many_points(world)
    world.model("distill/m", "matched", 0.4, teacher="pretrain/oracle", student="random")
    with open(world.folder / "made/distill/m/metrics.jsonl", "a") as file:
        file.write('{"step": 1, "loss/kl": 1.0}\n')
    noise = {"alpha": 0.4, "beta": 1.0}
    world.model("undo/beta", "undo_beta", 0.4, teacher="unlearn/maxent-lr", noise=noise)
    results = world.results()
    for name, draw_it in FIGURES.items():
        if name == "attacks":  # it has a bar of colours
            continue
        figure = draw_it(results)
        figure.draw_without_rendering()
        (legend,) = figure.legends
        box, whole = legend.get_window_extent(), figure.bbox
        assert whole.x0 <= box.x0 < box.x1 <= whole.x1, name
        assert whole.y0 <= box.y0 < box.y1 < min(axis.get_window_extent().y0 for axis in figure.axes), name


def test_the_report_holds_everything(world):
    a_whole_world(world)
    for seed, end in ((1, 0.7), (2, 0.4)):
        noise = {"alpha": 0.2, "beta": 0.1}
        world.model(f"undo/0.2-{seed}", "undo_0.2", end, seed=seed, noise=noise, teacher="unlearn/maxent-lr")
    results = world.results()
    figures, missing = draw(["fig2", "fig4"], results, world.folder / "figures")
    text = report(results, check(results), figures, not_drawn("made", missing))
    assert "| undo_0.2 | 0.900 (0.900 to 0.900) | 0.000 (0.000 to 0.000) | 0.233 (0.133 to 0.233)" in text
    assert "![fig4](figures/fig4.png)" in text
    assert "fig2: not drawn" in text
    assert "| relearn | 13 | 13.0 | 13000 | 13 | - | 1.00 |" in text
    assert "torch 2.15.0. Code: 012345678+." in text
    assert text.count("| holds |") + text.count("| mixed |") + text.count("| fails |") + text.count(
        "| not run |"
    ) == len(CLAIMS)


@pytest.mark.parametrize("folder", [f for f in SETTINGS if f.name != "wmdp_small"], ids=lambda folder: folder.name)
def test_the_committed_tables_are_those_of_the_configs(folder):
    """Those of wmdp_small depend on its search.

    Make them anew with: uv run run_all.py <setting> --tables > docs/settings/<setting>.md
    """
    committed = ROOT / "docs/settings" / f"{folder.name}.md"
    assert committed.read_text() == hyperparameters(folder, STAGES)


def test_tables_hold_what_the_paper_s_hold():
    text = hyperparameters(ROOT / "configs/language", STAGES)
    assert "| `parameters` | 112,904,000 |" in text
    assert "| 1e-05, 2e-05, 3e-05, 4e-05, 5e-05, 6e-05, 7e-05, 8e-05 |" in text
    assert "| `mixture` | retain 0.5, forget 0.5 |" in text
    assert "| distilled | 4,069 | 240 | 0.0009 | 0.0007 | unlearn/maxent-lr_8e-05-seed_0 | random | - |" in text


def test_what_undo_takes_stands_beside_the_paper_s_numbers(tmp_path):
    world = World(tmp_path, setting="arithmetic_small")
    world.run("pretrain/reference", "reference", steps=200)
    world.model("pretrain/oracle", "oracle", 0.2, steps=200)
    world.run("unlearn/m", "unlearned", method={"name": "maxent"}, training={"learning_rate": 1e-3})
    for alpha, steps in ((0.6, 60), (0.8, 180)):
        noise = {"alpha": alpha, "beta": 0.1}
        world.model(f"undo/{alpha}", f"undo_{alpha}", 0.5, steps=steps, teacher="unlearn/m", noise=noise)
    table = compute(world.results())
    assert table is not None
    assert "| about 20% | 30% | +10% |" in table
    assert "| 60% to 80% | 90% | +10% |" in table
    assert compute(World(tmp_path / "other").results()) is None


GONE = (*((stage,) for stage in STAGES), ("pretrain", "unlearn"), ("pretrain", "base"))


@pytest.mark.parametrize("gone", GONE, ids="+".join)
def test_what_there_is_is_drawn_and_reported(world, gone):
    """Whole stages may be missing: their runs live elsewhere, or were never wanted."""
    a_whole_world(world)
    world.run("prepare/data", "")
    world.model("base/model", "theirs", 0.9, also={"evaluation": {}, "vocab_size": 448}, model="./theirs")
    world.model("undo/b", "undo_base", 0.3, teacher="base/model", noise={"alpha": 0.6, "beta": 0.1})
    world.run("attack/q", "undo_0.2", model="undo/0.2", also={"attack": "INT4"})
    for stage in gone:
        shutil.rmtree(world.folder / "made" / stage)
    for paper in (None, "wmdp"):
        results = world.results(paper=paper)
        for figure in FIGURES.values() if paper is None else ():
            figure(results)
        assert "## Cost" in report(results, check(results), [], [])


def test_a_report_says_what_it_is_about(tmp_path):
    """A model and data of somebody's own: their names, the setting's claims, and why a number is missing."""
    world = World(tmp_path, setting="own")
    world.run(
        "base/model", "", also={"evaluation": {}, "architecture": "Qwen3ForCausalLM", "vocab_size": 9}, model="./q"
    )
    read = {"forget": "novel.jsonl", "retain.parts.a": "owner/set:kor@1 (mirrored by a.txt)", "retain.parts.b": "b.txt"}
    world.run("prepare/data", "", data={"forget": {"questions": "definitions"}}, also={"sources": read})
    world.model("unlearn/m", "m", 0.9, method={"name": "maxent"}, reference="base/model")
    world.model("undo/u", "u", 0.5, teacher="unlearn/m", noise={"alpha": 0.6, "beta": 0.1})
    text = report(world.results(), check(world.results()), [], [])
    assert "| base/model | ./q (Qwen3ForCausalLM, vocabulary 9) |" in text
    retained = "owner/set:kor@1 (mirrored by a.txt); b.txt"
    assert f"| prepare/data | {retained} | novel.jsonl, questions made from it | - |" in text
    assert (
        "No robustness: m, u: no oracle of its seed (a model that never saw the forget data) has been attacked." in text
    )
    assert "On a pretrained model, UNDO makes what it starts from relearn less. | seed 0: m 0.900, u 0.500" in text
    assert "wmdp" not in text.lower()


def test_a_label_is_text_whatever_it_holds(world):
    label = "a|b<script>alert(1)</script>[x](http://y)\n$\\frac$"
    many_points(world)
    world.model("unlearn/t", "_hidden", 0.9, method={"name": "npo"}, reference="x")
    folder = world.folder / "made/relearn/_hidden-0/config.yaml"
    folder.write_text(folder.read_text().replace("_hidden", json.dumps(label)))
    results = world.results()
    text = report(results, check(results), [], [])
    assert "<script>" not in text
    assert "](http" not in text.replace("\\](http", "")
    assert r"| a\|b&lt;script&gt;alert(1)&lt;/script&gt;[x\](http://y) $\frac$ | 0 |" in text
    FIGURES["fig7"](results).draw_without_rendering()
