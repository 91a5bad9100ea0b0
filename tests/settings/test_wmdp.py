"""run_wmdp.py from data to figures on a made-up world, in real processes; the choice of points; the base model."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from tests.conftest import HANGS, ROOT, SHAPE, lively, run_script, training
from tests.lm.test_architectures import CPU
from tests.made_up import World
from undo.attacks.relearn import Relearn, relearn
from undo.config.mistakes import ConfigError
from undo.config.schema import as_raw, validate
from undo.config.sweep import read_yaml
from undo.corrupt import Noise
from undo.evaluate import TokenCrossEntropy
from undo.experiments import cli
from undo.experiments.points import FILE
from undo.lm.disk import load, save
from undo.lm.place import place
from undo.report.claims import check
from undo.report.figures import draw, figures_of
from undo.report.report import report
from undo.results.selection import RANKS, Point, across_the_frontier
from undo.runs.run import Run
from undo.settings import whole as run_all
from undo.settings import wmdp as run_wmdp
from undo.settings.publish import not_drawn
from undo.train.parents import generator

THINGS = {
    "forget": ["firewall", "cipher", "token", "proxy", "sandbox", "salt", "nonce", "digest", "honeypot", "patch"],
    "retain": ["parser", "module", "iterator", "tuple", "decorator", "lexer", "closure", "slice", "codec", "frame"],
    "wiki": ["river", "castle", "comet", "violin", "glacier", "harbor", "orchard", "canyon", "meadow", "tower"],
}
KINDS = ("component", "device", "program", "structure", "procedure", "method")
DEEDS = ("separates inputs from outputs", "keeps a record of every change", "turns long texts into short ones")


def documents(role: str, count: int = 160) -> list[str]:
    """Texts full of sentences that define something."""
    rng = random.Random(role)

    def sentence() -> str:
        thing, kind, deed = rng.choice(THINGS[role]), rng.choice(KINDS), rng.choice(DEEDS)
        return f"A {rng.choice(THINGS[role])} {thing} is a {kind} of the system that {deed} when it is asked to."

    return [" ".join(sentence() for _ in range(6)) for _ in range(count)]


def questions(folder: Path) -> Path:
    file, choices = folder / "questions.jsonl", ["a", "b", "c", "d"]
    rows = [{"question": f"What is a {thing}?", "choices": choices, "answer": 1} for thing in THINGS["forget"]]
    file.write_text("".join(json.dumps({**row, "subject": "things"}) + "\n" for row in rows))
    return file


def world(folder: Path) -> Path:
    """configs/wmdp_small with a mirror of other texts, and so small that a run takes a second."""
    for role in THINGS:
        (folder / f"{role}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in documents(role)))
    mirror = {f"cais/wmdp-corpora:cyber-{role}-corpus": f"{role}.jsonl" for role in ("forget", "retain")}
    mirror |= {"cais/wmdp-corpora:bio-retain-corpus": "wiki.jsonl", "Salesforce/wikitext": "wiki.jsonl"}
    (folder / "mirror.yaml").write_text(json.dumps(mirror))
    made = folder / "tiny_wmdp"
    made.mkdir()
    shutil.copy(ROOT / "configs/wmdp_small/figures.yaml", made)
    for name in ("prepare", "pretrain", "unlearn_search", "unlearn", "undo", "relearn"):
        raw = read_yaml(ROOT / f"configs/wmdp_small/{name}.yaml")
        if name == "prepare":
            raw |= {"length": 32, "validation_share": 0.2, "shortest": 5}
            raw["variants"]["corpora"]["tokenizer"]["vocab_size"] = 448
            for variant in raw["variants"].values():
                if "length" in variant:
                    variant["length"] = 64 if variant["length"] == 1024 else 32
            raw["variants"]["mixture"]["data"]["auxiliary"]["tokens"] = 3000
            raw["variants"].pop("corpora_long")
            raw["execution"] = {"runs_per_process": 4}
        else:
            if name.startswith("unlearn"):  # the harness takes a process seconds to import
                raw["evaluation"].pop("choices", None)
            if "choices" in raw["evaluation"]:
                asked = {"path": str(questions(folder))}
                raw["evaluation"]["choices"] = {"retain": asked, "forget": asked}
            raw["training"] |= {"steps": 4, "evaluate_every": 4, "evaluate_at": [2], "batch_rows": 2}
            raw["training"]["warmup_steps"] = min(1, raw["training"].get("warmup_steps", 0))
            raw["execution"] = {"runs_per_process": 4, "checkpoint_every": 1}
        if name == "pretrain":
            raw["model"] |= {"vocab_size": 448, "hidden_size": 16, "intermediate_size": 32, "head_dim": 8}
            raw["training"] |= {"steps": 40, "evaluate_every": 40}
        if name == "unlearn":
            raw["variants"] = {k: v for k, v in raw["variants"].items() if k in ("maxent_best", "sam_medium")}
        if name == "undo":
            raw["variants"].pop("undo_rmu")
            raw["variants"].pop("undo_maxent_{noise.alpha}")
        if name == "unlearn_search":  # three points a method, in one process
            raw["sweep"]["training.learning_rate"] = [2e-3]
        if name == "relearn":
            raw["variants"] = {k: v for k, v in raw["variants"].items() if k in ("maxent_best", "undo_maxent")}
            raw["adversaries"] = {k: raw["adversaries"][k] for k in ("forget-retain", "sp-wiki-qa-long")}
        OmegaConf.save(OmegaConf.create(raw), made / f"{name}.yaml")
    return made


def wmdp(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    runs, mirror = folder.parent / "runs", folder.parent / "mirror.yaml"
    return run_script("run_wmdp.py", str(folder), "--runs", str(runs), "--mirror", str(mirror), *arguments)


def test_all_stages_killed_on_the_way(tmp_path):
    made = world(tmp_path)
    listed = wmdp(made, "--dry-run")
    assert listed.returncode == 0, listed.stderr
    assert "search-rmu" in listed.stdout
    assert "relearn/" not in listed.stdout  # nobody knows its models yet
    early = wmdp(made, "--stage", "unlearn")
    assert early.returncode == 2
    assert "make it with: uv run run_wmdp.py tiny_wmdp --stage search" in early.stderr

    command = [sys.executable, str(ROOT / "run_wmdp.py"), str(made), "--runs", str(tmp_path / "runs")]
    command += ["--mirror", str(tmp_path / "mirror.yaml")]
    runs = tmp_path / "runs" / "tiny_wmdp"
    for moment in ("unlearn/search-*/metrics.jsonl", "relearn/*/metrics.jsonl"):
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as launcher:
            deadline = time.monotonic() + HANGS
            while not list(runs.glob(moment)) and launcher.poll() is None and time.monotonic() < deadline:
                time.sleep(0.05)
            assert list(runs.glob(moment)), "it ended before that"
            os.kill(launcher.pid, signal.SIGKILL)

    finished = wmdp(made)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    points = read_yaml(runs / FILE)
    assert {method: set(ranks) for method, ranks in points.items()} == {"maxent": set(RANKS), "rmu": set(RANKS)}
    best = read_yaml(runs / "unlearn/maxent_best-seed_0/config.yaml")
    assert best["method"]["alpha"] == points["maxent"]["best"]["alpha"]
    assert best["training"]["learning_rate"] == points["maxent"]["best"]["learning_rate"]
    sam = read_yaml(runs / "unlearn/sam_medium-seed_0/config.yaml")
    assert sam["method"]["base"]["alpha"] == points["maxent"]["medium"]["alpha"]
    assert (runs / "figures/fig8.png").stat().st_size > 10_000
    assert (runs / "figures/fig11.png").stat().st_size > 10_000
    text = (runs / "report.md").read_text()
    assert "## The points (Table 10)" in text
    assert "## Multiple choice, by the lm-evaluation-harness (D.2.1)" in text
    assert "## Noise, and what is retained after it (Table 13)" in text
    long = read_yaml(runs / "prepare/qa_long/config.yaml")
    assert long["length"] == 64
    assert "Question: What is" in json.dumps(first_question(runs))

    made_when = {path: path.stat().st_mtime_ns for path in runs.glob("*/*/run.json")}
    again = wmdp(made)
    assert again.returncode == 0
    assert {path: path.stat().st_mtime_ns for path in runs.glob("*/*/run.json")} == made_when


def first_question(runs: Path) -> str:
    from transformers import AutoTokenizer

    from undo.data.store import TokenStore

    tokenizer = AutoTokenizer.from_pretrained(runs / "prepare/qa/tokenizer")
    return tokenizer.decode(TokenStore(runs / "prepare/qa/train/forget")[0][0].tolist(), skip_special_tokens=True)


# --- the choice of points ------------------------------------------------------------------------------------------


def points(*pairs: tuple[float, float]) -> list[Point]:
    return [Point(f"unlearn/{i}", 0.1 * i, 1e-5, retain, forget) for i, (retain, forget) in enumerate(pairs)]


def chosen(found: dict[str, Point]) -> dict[str, tuple[float, float]]:
    return {rank: (point.retain, point.forget) for rank, point in found.items()}


def test_three_points_across_the_frontier():
    made = points((0.54, 0.60), (0.52, 0.40), (0.50, 0.35), (0.45, 0.30), (0.40, 0.38), (0.30, 0.25), (0.55, 0.66))
    # start 0.65: the most that is forgotten is 0.40, so 0.54/0.60 and 0.55/0.66 forget too little, 0.40/0.38 is beaten
    found = across_the_frontier(made, 0.65, higher_is_better=True)
    assert chosen(found) == {"best": (0.52, 0.40), "medium": (0.45, 0.30), "worst": (0.30, 0.25)}


def test_points_by_cross_entropy_go_the_other_way():
    made = points((4.5, 6.0), (4.7, 7.0), (5.5, 8.0), (6.0, 7.5))
    assert chosen(across_the_frontier(made, 5.0, higher_is_better=False)) == {
        "best": (4.7, 7.0),
        "medium": (
            5.5,
            8.0,
        ),  # 4.7/7.0 and 5.5/8.0 are the frontier; the third is the one that retains best of the rest
        "worst": (6.0, 7.5),
    }


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (points((0.5, 0.3), (0.4, 0.2)), "three points"),
        (points((0.5, 0.7), (0.4, 0.65), (0.5, 0.8)), "forgets anything"),
    ],
)
def test_no_choice_without_a_frontier(made, words):
    with pytest.raises(ConfigError, match=words):
        across_the_frontier(made, 0.65, higher_is_better=True)


def test_one_base_model_serves_all_seeds(tmp_path):
    args = cli.parser("", "").parse_intermixed_args(["wmdp_small", "sweep.seed=[0,1]", "--runs", str(tmp_path)])
    folder = ROOT / "configs/wmdp_small"
    runs, _ = run_all.planned_in(folder, args, ("pretrain", "undo"), run_wmdp.BASE)
    names = [run.name for run in runs]
    assert [name for name in names if name.startswith("pretrain/")] == ["pretrain/base"]
    assert {"undo/undo_rmu-seed_0", "undo/undo_rmu-seed_1"} < set(names)


# --- figures, claims ------------------------------------------------------------------------------------------------


@pytest.fixture
def attacked(tmp_path) -> World:
    """Two seeds of a world in which UNDO outlasts its teachers and costs 0.05."""
    made = World(tmp_path, "multiple_choice", "wmdp_cyber")
    rates = {"forget-retain": (1e-5, 2e-5), "sp-forget-retain": (1e-5,)}
    for seed in (0, 1):
        for method in ("maxent", "rmu"):
            for rank, end in (("best", 0.6), ("medium", 0.58), ("worst", 0.56)):
                label, values = f"{method}_{rank}", {"name": method, "alpha": 0.3}
                name = f"unlearn/{label}-seed_{seed}"
                made.run(
                    name,
                    label,
                    0.55,
                    0.27,
                    seed=seed,
                    curve={0: 0.65, 90: 0.27},
                    method=values,
                    training={"learning_rate": 2e-5},
                )
                attack(made, label, name, seed, end, rates)
            label, name = f"undo_{method}", f"undo/undo_{method}-seed_{seed}"
            noise = {"alpha": 0.25, "beta": 0.0}
            made.run(name, label, 0.5, 0.26, seed=seed, teacher=f"unlearn/{method}_best-seed_{seed}", noise=noise)
            attack(made, label, name, seed, 0.4, rates)
    for alpha, retain in ((0.35, 0.4), (0.6, 0.25)):
        noise = {"alpha": alpha, "beta": 0.0}
        made.run(
            f"undo/{alpha}", f"undo_maxent_{alpha}", retain, 0.25, teacher="unlearn/maxent_best-seed_0", noise=noise
        )
    return made


def attack(made: World, label: str, model: str, seed: int, end: float, rates: dict) -> None:
    for kind, values in rates.items():
        for rate in values:
            curve = {0: 0.27, 40: (end + 0.27) / 2, 500: end - 1000 * rate}
            made.run(
                f"relearn/{label}-{kind}-{rate}-{seed}",
                label,
                seed=seed,
                curve=curve,
                model=model,
                adversary=kind,
                training={"learning_rate": rate},
            )


def test_figures_tables_and_claims_of_wmdp(attacked):
    results = attacked.results()
    assert figures_of(results) == ["fig8", "fig11"]
    figures, missing = draw(figures_of(results), results, attacked.folder / "figures")
    assert [path.name for path in figures] == ["fig8.png", "fig11.png"]
    text = report(results, check(results), figures, not_drawn("made", missing))
    assert "| model | seed | retain | forget | forget_40 | forget_last |" in text  # evaluated at 0, 40 and 500
    assert "| rmu | best | α = 0.3, 2e-05 | α = 0.5, 2e-05 | 0.550 | 0.270 |" in text
    assert "| 0.25 | 0.49 | 0.500 |" in text
    assert "| before | 0.55 | 0.550 |" in text
    assert "rmu_best 0.590, undo_rmu 0.390" in text
    assert "| D.2.7, Tab. 13 |" in text
    verdicts = {checked.claim.sentence: checked.verdict for checked in check(results)}
    assert verdicts["On a pretrained model, UNDO makes what it starts from relearn less."] == "holds"
    assert verdicts["On a pretrained model, what is retained falls with alpha."] == "holds"
    assert verdicts["Robustness rises with alpha."] == "not run"


@pytest.mark.parametrize(
    ("evaluated", "shown"),
    [
        ((10, 25, 50, 150, 500), (25, 50)),  # Table 12's
        ((3, 8, 20, 40), (20, 70)),  # one of them is enough
        ((500,), (20, 70)),
    ],
)
def test_the_table_shows_steps_that_were_evaluated(tmp_path, evaluated, shown):
    made = World(tmp_path)
    made.run("unlearn/m", "unlearned", method={"name": "maxent"})
    made.run("relearn/m", "unlearned", model="unlearn/m", curve={step: step / 500 for step in (0, *evaluated)})
    results = made.results()
    assert results.shown_steps == shown
    (row,) = results.table()
    assert tuple(row) == results.columns
    assert [row[f"forget_{step}"] for step in shown] == [s / 500 if s in evaluated else None for s in shown]


def test_a_search_of_another_setting_does_not_come_into_a_table_of_wmdp(tmp_path):
    """UNDIAL has no alpha: the report of such a setting must not ask for one."""
    made = World(tmp_path)
    values = {"method": {"name": "undial"}, "training": {"learning_rate": 1e-3}}
    made.run("unlearn/search-undial", "undial", curve={0: 0.9, 60: 0.4}, **values)
    assert "Table 10" not in report(made.results(), check(made.results()), [], [])


def test_other_settings_have_no_figure_of_wmdp(tmp_path):
    made = World(tmp_path)
    made.model("unlearn/m", "unlearned", 0.9, method={"name": "maxent"})
    assert not {"fig8", "fig11"} & set(figures_of(made.results()))


@pytest.mark.parametrize(("factor", "said"), [(float("nan"), "holds NaN or infinity"), (1e30, "before any update")])
def test_a_broken_model_is_no_outcome_of_an_attack(data, factor, said):
    """Before, such an attack was done, with the forget performance of a perfect method."""
    broken = lively(SHAPE.build(0))
    with torch.no_grad():
        broken.model.layers[0].mlp.down_proj.weight.mul_(factor)
        broken.model.layers[0].mlp.up_proj.weight.mul_(1e30)
    start = Run(data.runs, "tiny", f"unlearn/broken-{factor}")
    start.folder.mkdir(parents=True)
    save(broken, data.folder / "tokenizer", start.model)
    raw = {"name": f"broken-{factor}", "data": "prepare/data", "model": start.name, "mixture": {"forget": 1.0}}
    raw |= {"training": as_raw(training(steps=1)), "evaluation": {"name": "cross_entropy"}}
    config, run = validate(Relearn, raw, "here"), Run(data.runs, "tiny", f"relearn/broken-{factor}")
    run.claim(config)
    run.open(config)
    with pytest.raises(ConfigError, match=said):
        list(relearn(config, run))
    assert not run.done


def test_shrink_perturb_moves_the_model_that_an_attack_starts_from(data):
    """What it finds at step 0 is that model, shrunk and perturbed by the config's alpha and beta, or left alone."""
    start = Run(data.runs, "tiny", "unlearn/to-be-perturbed")
    start.folder.mkdir(parents=True)
    save(lively(SHAPE.build(0)), data.folder / "tokenizer", start.model)
    measure = TokenCrossEntropy().load(data, CPU)

    def attacked(name: str, **more: object) -> tuple[Relearn, dict[str, float]]:
        raw = {"name": name, "data": "prepare/data", "model": start.name, "mixture": {"forget": 1.0}}
        raw |= {"training": as_raw(training(steps=1)), "evaluation": {"name": "cross_entropy"}, **more}
        config, run = validate(Relearn, raw, "here"), Run(data.runs, "tiny", f"relearn/{name}")
        run.claim(config)
        run.open(config)
        list(relearn(config, run))
        first = run.evaluations()[0]
        return config, {role: first[role] for role in ("retain", "forget")}

    def expected(noise: Noise | None, config: Relearn) -> dict[str, float]:
        model = place(load(start.model), CPU)
        if noise is not None:
            noise.apply(model, SHAPE.build(1), generator(config.seed_for("noise")))
        with torch.no_grad():
            return measure(model, True).values

    config, unperturbed = attacked("unperturbed")
    assert unperturbed == expected(None, config)
    for alpha, beta in ((0.05, 0.1), (0.05, 2.0), (0.3, 0.1)):
        config, perturbed = attacked(f"perturbed-{alpha}-{beta}", noise={"alpha": alpha, "beta": beta})
        assert perturbed == expected(Noise(alpha=alpha, beta=beta), config) != unperturbed
