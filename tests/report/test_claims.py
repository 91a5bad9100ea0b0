"""Every claim on results made up so that it holds, fails, or is not spoken to."""

import pytest

from tests.made_up import World
from undo.report.claims import CLAIMS, as_rows, check
from undo.report.report import report
from undo.report.tables import beaten
from undo.results.frontier import pareto_front


def verdicts(world) -> dict[str, str]:
    return {c.claim.sentence: c.verdict for c in check(world.results())}


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


def sentence(start: str) -> str:
    return next(c.sentence for c in CLAIMS if c.sentence.startswith(start))


def test_nothing_is_claimed_without_runs(world):
    world.run("pretrain/reference", "reference")
    assert set(verdicts(world).values()) == {"not run"}


@pytest.mark.parametrize(("end", "verdict"), [(0.9, "holds"), (0.2, "fails")])
def test_oracle_matching(world, end, verdict):
    world.model("pretrain/oracle", "oracle", 0.3)
    world.model("distill/a", "matched_reference", end, teacher="pretrain/oracle", student="reference")
    world.model("distill/b", "matched_random", 0.25, teacher="pretrain/oracle", student="random")
    assert verdicts(world)[sentence("A reference model taught")] == verdict


def test_distilling_and_the_teacher_s_retain_performance_seed_by_seed(world):
    for seed, (end, retain) in enumerate([(0.5, 0.9), (0.95, 0.8)]):
        world.model(f"unlearn/m-{seed}", "unlearned", 0.9, seed=seed, method={"name": "maxent"}, reference="x")
        world.model(f"distill/d-{seed}", "distilled", end, seed=seed, retain=retain, teacher=f"unlearn/m-{seed}")
    assert verdicts(world)[sentence("Distilling an unlearned")] == "mixed"
    assert verdicts(world)[sentence("A distilled student reaches")] == "mixed"
    (row,) = [row for row in as_rows(check(world.results())) if row[1] == sentence("Distilling an unlearned")]
    measured = "seed 0: unlearned 0.900, distilled 0.500; seed 1: unlearned 0.900, distilled 0.950"
    assert row[2:] == (measured, "1 of 2", "mixed")


@pytest.mark.parametrize(
    ("ends", "robust"),
    [([0.8, 0.6, 0.4], "holds"), ([0.8, 0.82, 0.4], "holds"), ([0.8, 0.9, 0.4], "fails"), ([0.4, 0.6, 0.8], "fails")],
)
def test_robustness_and_compute_over_alpha(world, ends, robust):
    """A dip of a tenth of the whole rise is allowed, a larger one is not."""
    world.model("pretrain/oracle", "oracle", 0.2)
    world.model("unlearn/m", "unlearned", 1.0, method={"name": "maxent"}, reference="x")
    for alpha, end, steps in zip((0.2, 0.4, 0.6), ends, (50, 100, 200), strict=True):
        world.model(
            f"undo/a{alpha}",
            f"undo_{alpha}",
            end,
            steps=steps,
            teacher="unlearn/m",
            noise={"alpha": alpha, "beta": 0.1},
        )
    assert verdicts(world)[sentence("Robustness rises")] == robust
    assert verdicts(world)[sentence("The compute that")] == "holds"


@pytest.mark.parametrize(("by_beta", "verdict"), [(10, "holds"), (400, "fails")])
def test_alpha_against_beta(world, by_beta, verdict):
    for i, alpha in enumerate((0.1, 0.5)):
        for j, beta in enumerate((0.1, 1.0)):
            noise = {"alpha": alpha, "beta": beta}
            world.run(f"undo/{alpha}-{beta}", "x", steps=100 + 200 * i + by_beta * j, noise=noise, teacher="unlearn/m")
    assert verdicts(world)[sentence("Alpha changes")] == verdict


def test_two_points_are_no_front(world):
    world.model("unlearn/m", "unlearned", 0.9, retain=0.95, method={"name": "maxent"}, reference="x")
    world.model("undo/a", "undo_0.6", 0.3, teacher="unlearn/m", noise={"alpha": 0.6, "beta": 0.1})
    (row,) = [row for row in as_rows(check(world.results())) if row[1] == sentence("After a moderate")]
    assert row[2:] == ("too few points: unlearned, undo_0.6", "-", "undecided")


@pytest.mark.parametrize(("retain", "verdict"), [(0.9, "holds"), (0.6, "fails")])
def test_pareto_front(world, retain, verdict):
    """Dominated once its retain performance is below that of a method that is relearned as little."""
    world.model("unlearn/m", "unlearned", 0.9, retain=0.95, method={"name": "maxent"}, reference="x")
    world.model("unlearn/r", "unlearned_rmu", 0.3, retain=0.7, method={"name": "rmu"}, reference="x")
    noise = {"alpha": 0.6, "beta": 0.1}
    world.model("undo/a", "undo_0.6", 0.3, retain=retain, teacher="unlearn/m", noise=noise)
    world.model("unlearn/n", "npo", 1.0, retain=0.3, method={"name": "npo"}, reference="x")
    assert verdicts(world)[sentence("After a moderate")] == verdict
    assert verdicts(world)[sentence("After the whole")] == verdict


@pytest.mark.parametrize(("forget", "verdict"), [(6.8, "holds"), (5.0, "fails")])
def test_maxent_against_ln_v(tmp_path, forget, verdict):
    world = World(tmp_path, "cross_entropy")
    world.run("pretrain/r", "reference", model={"vocab_size": 1000})
    world.run("unlearn/m", "maxent", forget=forget, method={"name": "maxent"}, reference="pretrain/r")
    world.run("undo/a", "undo_0.6", teacher="unlearn/m", noise={"alpha": 0.6, "beta": 0.1})
    assert verdicts(world)[sentence("MaxEnt leaves")] == verdict


def test_the_vocabulary_of_a_base_model_is_in_its_facts(tmp_path):
    """Its config says which model it is, no more."""
    world = World(tmp_path, "cross_entropy")
    world.run("base/model", "", model="owner/name", also={"vocab_size": 1000})
    world.run("unlearn/m", "maxent", forget=6.8, method={"name": "maxent"}, reference="base/model")
    world.run("undo/a", "undo_0.6", teacher="unlearn/m", noise={"alpha": 0.6, "beta": 0.1})
    (row,) = [row for row in as_rows(check(world.results())) if row[1] == sentence("MaxEnt leaves")]
    assert row[2:] == ("seed 0: 6.80 of ln V = 6.91", "1 of 1", "holds")


def test_lower_is_better_for_cross_entropy(tmp_path):
    world = World(tmp_path, "cross_entropy")
    world.model("unlearn/m", "unlearned", 3.0, retain=4.0, method={"name": "rmu"}, reference="x")
    world.model("distill/d", "distilled", 6.0, retain=4.1, teacher="unlearn/m")
    assert verdicts(world)[sentence("Distilling an unlearned")] == "holds"
    assert verdicts(world)[sentence("A distilled student reaches")] == "holds"


def test_who_beats_undo_is_said(world):
    noise = {"alpha": 0.6, "beta": 0.1}
    world.model("undo/a", "undo_0.6", 0.4, retain=0.8, teacher="unlearn/m", noise=noise)
    world.model(
        "unlearn/a", "npo", 0.2, retain=0.8, method={"name": "npo"}, training={"learning_rate": 1e-3}, reference="x"
    )
    world.model(
        "unlearn/b", "sam", 0.1, retain=0.7, method={"name": "sam"}, training={"learning_rate": 1e-3}, reference="x"
    )
    assert beaten(world.results()).splitlines()[2:] == [
        "| 0 | undo_0.6 | 0.800 | 0.000 | nobody |",
        "| 40 | undo_0.6 | 0.800 | 0.267 | npo (0.800, 0.133) |",
        "| 500 | undo_0.6 | 0.800 | 0.400 | npo (0.800, 0.200) |",
    ]
    assert "## Who beats UNDO (Figures 7 and 11)" in report(world.results(), [], [], [])


def test_pareto_front_by_hand():
    points = {"a": (0.9, 0.5), "b": (0.8, 0.2), "c": (0.8, 0.3), "d": (0.9, 0.5), "e": (0.1, 0.9)}
    assert pareto_front(points, (True, True)) == ["a", "b", "d"]
    losses = {"a": (4.0, 9.0), "b": (5.0, 11.0), "c": (5.0, 10.0)}
    assert pareto_front(losses, (False, False)) == ["a", "b"]
    mixed = {"a": (0.9, 4.0), "b": (0.9, 5.0), "c": (0.8, 6.0)}  # retained in accuracy, attacked in nats
    assert pareto_front(mixed, (True, False)) == ["b", "c"]
