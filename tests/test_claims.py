"""Every claim on results made up so that it holds, fails, or is not spoken to."""

import json

import pytest
from omegaconf import OmegaConf

from undo.claims import CLAIMS, as_markdown, check
from undo.figures import FIGURES, draw
from undo.results import Results, pareto_front

STEPS = (0, 20, 40, 500)


class World:
    """Finished runs, written as the stages write them, with performances of one's choice."""

    def __init__(self, folder, evaluation="accuracy"):
        self.folder, self.evaluation = folder, evaluation

    def run(self, name, variant, retain=0.9, forget=0.0, steps=100, seed=0, curve=None, **config):
        folder = self.folder / "made" / name
        folder.mkdir(parents=True)
        base = {"seed": seed, "variant": variant, "evaluation": {"name": self.evaluation}, "retain_threshold": 0.05}
        (folder / "config.yaml").write_text(OmegaConf.to_yaml({**base, **config}))
        facts = {"evaluation": {"retain": retain, "forget": forget}, "steps": steps, "flops": 1.0, "parents": {}}
        (folder / "run.json").write_text(json.dumps(facts))
        curve = curve or {0: forget}
        lines = [json.dumps({"step": s, "retain": retain, "forget": f}) + "\n" for s, f in curve.items()]
        (folder / "metrics.jsonl").write_text("".join(lines))
        return name

    def model(self, name, variant, end, seed=0, **more):
        """A model, and an attack on it that ends at `end`, in equal steps from 0."""
        self.run(name, variant, seed=seed, **more)
        curve = {step: end * i / (len(STEPS) - 1) for i, step in enumerate(STEPS)}
        self.run(f"relearn/{variant}-{seed}", variant, seed=seed, curve=curve, model=name)

    def results(self) -> Results:
        return Results.read(self.folder, "made")

    def verdicts(self) -> dict[str, str]:
        checked = check(self.results())
        return {c.claim.sentence: c.verdict for c in checked}


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


def sentence(start: str) -> str:
    return next(c.sentence for c in CLAIMS if c.sentence.startswith(start))


def test_nothing_is_claimed_without_runs(world):
    world.run("pretrain/reference", "reference")
    assert set(world.verdicts().values()) == {"not run"}


@pytest.mark.parametrize(("end", "verdict"), [(0.9, "holds"), (0.2, "fails")])
def test_oracle_matching(world, end, verdict):
    world.model("pretrain/oracle", "oracle", 0.3)
    world.model("distill/a", "matched_reference", end, teacher="pretrain/oracle")
    world.model("distill/b", "matched_random", 0.25, teacher="pretrain/oracle")
    assert world.verdicts()[sentence("A reference model taught")] == verdict


def test_distilling_and_the_teacher_s_retain_performance_seed_by_seed(world):
    for seed, (end, retain) in enumerate([(0.5, 0.9), (0.95, 0.8)]):
        world.model(f"unlearn/m-{seed}", "unlearned", 0.9, seed=seed, method={"name": "maxent"}, reference="x")
        world.model(f"distill/d-{seed}", "distilled", end, seed=seed, retain=retain, teacher=f"unlearn/m-{seed}")
    assert world.verdicts()[sentence("Distilling an unlearned")] == "mixed"
    assert world.verdicts()[sentence("A distilled student reaches")] == "mixed"
    text = as_markdown(check(world.results()))
    assert (
        "seed 0: unlearned 0.900, distilled 0.500; seed 1: unlearned 0.900, distilled 0.950 | 1 of 2 | mixed |" in text
    )


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
    assert world.verdicts()[sentence("Robustness rises")] == robust
    assert world.verdicts()[sentence("The compute that")] == "holds"


@pytest.mark.parametrize(("by_beta", "verdict"), [(10, "holds"), (400, "fails")])
def test_alpha_against_beta(world, by_beta, verdict):
    for i, alpha in enumerate((0.1, 0.5)):
        for j, beta in enumerate((0.1, 1.0)):
            noise = {"alpha": alpha, "beta": beta}
            world.run(f"undo/{alpha}-{beta}", "x", steps=100 + 200 * i + by_beta * j, noise=noise, teacher="unlearn/m")
    assert world.verdicts()[sentence("Alpha changes")] == verdict


@pytest.mark.parametrize(("retain", "verdict"), [(0.9, "holds"), (0.6, "fails")])
def test_pareto_front(world, retain, verdict):
    """Dominated once its retain performance is below that of a method that is relearned as little."""
    world.model("unlearn/m", "unlearned", 0.9, retain=0.95, method={"name": "maxent"}, reference="x")
    world.model("unlearn/r", "unlearned_rmu", 0.3, retain=0.7, method={"name": "rmu"}, reference="x")
    noise = {"alpha": 0.6, "beta": 0.1}
    world.model("undo/a", "undo_0.6", 0.3, retain=retain, teacher="unlearn/m", noise=noise)
    assert world.verdicts()[sentence("After 40 steps")] == verdict
    assert world.verdicts()[sentence("After 500 steps")] == verdict


@pytest.mark.parametrize(("forget", "verdict"), [(6.8, "holds"), (5.0, "fails")])
def test_maxent_against_ln_v(tmp_path, forget, verdict):
    world = World(tmp_path, "cross_entropy")
    world.run("pretrain/r", "reference", model={"vocab_size": 1000})
    world.run("unlearn/m", "maxent", forget=forget, method={"name": "maxent"}, reference="pretrain/r")
    world.run("undo/a", "undo_0.6", teacher="unlearn/m", noise={"alpha": 0.6, "beta": 0.1})
    assert world.verdicts()[sentence("MaxEnt leaves")] == verdict


def test_lower_is_better_for_cross_entropy(tmp_path):
    world = World(tmp_path, "cross_entropy")
    world.model("unlearn/m", "unlearned", 3.0, retain=4.0, method={"name": "rmu"}, reference="x")
    world.model("distill/d", "distilled", 6.0, retain=4.1, teacher="unlearn/m")
    assert world.verdicts()[sentence("Distilling an unlearned")] == "holds"
    assert world.verdicts()[sentence("A distilled student reaches")] == "holds"


def test_figures_2_6_and_7_from_what_they_need(world):
    """Drawn as files, or in words what is missing."""
    missing = dict(
        zip(("fig2", "fig6", "fig7"), draw(["fig2", "fig6", "fig7"], world.results(), world.folder), strict=True)
    )
    assert all("not drawn" in line for line in missing.values())
    world.model("pretrain/oracle", "oracle", 0.2)
    for student in ("reference", "random"):
        world.model(f"distill/{student}", f"matched_{student}", 0.5, teacher="pretrain/oracle")
        with open(world.folder / "made/distill" / student / "metrics.jsonl", "a") as file:
            file.writelines(json.dumps({"step": step, "loss/kl": 1 / step}) + "\n" for step in range(1, 30))
    world.model("unlearn/m", "unlearned", 0.9, method={"name": "maxent"}, reference="x")
    for alpha in (0.1, 0.5):
        for beta in (0.1, 1.0):
            label = f"undo_{alpha}" + ("" if beta == 0.1 else f"_beta_{beta}")
            noise = {"alpha": alpha, "beta": beta}
            world.model(f"undo/{label}", label, 0.8 - alpha, steps=int(900 * alpha), teacher="unlearn/m", noise=noise)
    lines = draw(["fig2", "fig6", "fig7"], world.results(), world.folder)
    assert not any("not drawn" in line for line in lines)
    for name in ("fig2", "fig6", "fig7"):
        for suffix in ("pdf", "png"):
            assert (world.folder / f"{name}.{suffix}").stat().st_size > 5000
    texts = [text.get_text() for axis in FIGURES["fig6"](world.results()).axes for text in axis.texts]
    assert texts == ["90", "90", "450", "450"]  # the cost matrix
    titles = [axis.get_title() for axis in FIGURES["fig7"](world.results()).axes]
    assert titles == ["before the attack", "after 40 steps", "after 500 steps"]


def test_pareto_front_by_hand():
    points = {"a": (0.9, 0.5), "b": (0.8, 0.2), "c": (0.8, 0.3), "d": (0.9, 0.5), "e": (0.1, 0.9)}
    assert pareto_front(points, higher_is_better=True) == ["a", "b", "d"]
    losses = {"a": (4.0, 9.0), "b": (5.0, 11.0), "c": (5.0, 10.0)}
    assert pareto_front(losses, higher_is_better=False) == ["a", "b"]
