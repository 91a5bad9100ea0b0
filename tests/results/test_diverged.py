"""Performances that are not finite: valid JSON on disk, NaN when read, and never a matter of order."""

import itertools
import json
import math

import pytest

from tests.made_up import STEPS, World
from undo.config.files import as_json, numbers
from undo.config.mistakes import ConfigError
from undo.report.claims import check
from undo.report.figures import FIGURES
from undo.report.figures.wmdp import adversaries
from undo.report.report import report
from undo.results.attacked import worst_case
from undo.results.frontier import pareto_front
from undo.results.seeds import median
from undo.results.selection import Point, across_the_frontier
from undo.results.text import as_text

NAN, INF = math.nan, math.inf


def strictly(text: str):
    """As a reader that knows no NaN."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_what_is_not_finite_is_null_and_read_as_nan(value):
    written = strictly(as_json({"a": value, "b": [1.5, {"c": value}], "d": (value, 2)}))
    assert written == {"a": None, "b": [1.5, {"c": None}], "d": [None, 2]}
    back = numbers(strictly(as_json({"retain": value, "forget": 0.25})))
    assert math.isnan(back["retain"])
    assert back["forget"] == 0.25


@pytest.mark.parametrize("higher_is_better", [True, False])
def test_the_worst_case_does_not_depend_on_the_order_of_adversaries(higher_is_better):
    curves = [{0: 0.1, 20: NAN, 40: NAN}, {0: 0.2, 20: 0.5, 40: INF}, {0: NAN, 20: 0.4}]
    best = {True: {0: 0.2, 20: 0.5}, False: {0: 0.1, 20: 0.4}}[higher_is_better]
    for order in itertools.permutations(curves):
        assert worst_case(order, higher_is_better) == best
    assert worst_case([{0: NAN}], higher_is_better) == {}


def test_a_diverged_seed_is_not_passed_over_in_a_median():
    for order in itertools.permutations([0.1, NAN, 0.3]):
        assert math.isnan(median(order))
    assert median([3.0, 1.0, 2.0]) == 2.0


def test_a_diverged_run_is_on_no_front_and_is_no_point_of_a_search():
    points = {"a": (0.9, 0.2), "b": (NAN, 0.0), "c": (0.8, NAN), "d": (0.7, 0.1)}
    for order in itertools.permutations(points):
        assert set(pareto_front({name: points[name] for name in order}, (True, True))) == {"a", "d"}
    runs = [Point(name, 1.0, 1e-3, *performance) for name, performance in points.items()]
    with pytest.raises(ConfigError, match="a search of 2 that did not diverge"):
        across_the_frontier(runs, 0.9, True)
    runs.append(Point("e", 1.0, 1e-3, 0.85, 0.15))
    for order in itertools.permutations(runs):
        chosen = across_the_frontier(order, 0.9, True)
        assert [chosen[rank].run for rank in ("best", "medium", "worst")] == ["a", "e", "d"]


def test_figure_8_draws_an_adversary_as_far_as_it_is_finite(tmp_path):
    for order in (("a", "b", "c"), ("c", "b", "a")):
        made = World(tmp_path / order[0], setting="wmdp_bio")
        made.run("unlearn/m", "maxent", reference="base/model", method={"name": "maxent"})
        curves = {"a": {0: 0.1, 500: NAN}, "b": {0: 0.1, 500: 0.6}, "c": dict.fromkeys((0, 500), NAN)}
        for position, name in enumerate(order):
            made.run(f"relearn/{position}", "maxent", curve=curves[name], model="unlearn/m", adversary=name)
        (attacked,) = made.results().attacked
        found = adversaries([attacked])
        assert {name: curve for (name, _), curve in found.items()} == {"a": {0: 0.1}, "b": {0: 0.1, 500: 0.6}}


def world(folder, end) -> World:
    made = World(folder)
    made.model("pretrain/oracle-seed_0", "oracle", 0.5)
    made.model("unlearn/maxent-seed_0", "maxent", 0.9, reference="pretrain/reference-seed_0", method={"name": "maxent"})
    noise = {"alpha": 0.6, "beta": 0.1, "distribution": "xavier"}
    made.model("undo/undo-seed_0", "undo", end, retain=NAN, teacher="unlearn/maxent-seed_0", noise=noise)
    return made


def test_a_model_whose_attacks_are_not_finite_is_called_diverged_and_stops_no_report(tmp_path):
    made = world(tmp_path, NAN)
    for name, curve in (("a", dict.fromkeys(STEPS, NAN)), ("z", {0: 0.0, 20: 0.7, 40: NAN})):
        config = {"model": "undo/undo-seed_0", "training": {"learning_rate": 1e-3}}
        made.run(f"relearn/{name}-seed_0", "undo", curve=curve, **config)
    results = made.results()
    row = next(row for row in results.table() if row["model"] == "undo")
    assert math.isnan(row["retain"])
    assert (row["forget_20"], row["forget_last"]) == (0.7, 0.7)  # of the one that got so far
    assert "diverged" in as_text([row])[0]
    assert "diverged" in report(results, check(results), [], [])
    for draw in FIGURES.values():
        draw(results)


def test_a_model_without_a_finite_attack_is_called_diverged(tmp_path):
    results = world(tmp_path, NAN).results()
    row = next(row for row in results.table() if row["model"] == "undo")
    cells = dict(zip(row, as_text([row])[0], strict=True))
    assert cells["forget_last"] == cells["robustness"] == cells["retain"] == "diverged"
    assert "diverged" in report(results, check(results), [], [])
    for draw in FIGURES.values():
        draw(results)
