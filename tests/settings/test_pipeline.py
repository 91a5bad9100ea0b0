"""The stage scripts as a user runs them, in real processes: tiny models, real kills, and the demo's own result."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import CHAIN, HANGS, ROOT, SMALL, run_script

ONE = ("pretrain/reference-seed_0",)  # where more stages would show nothing more


def run_all(runs: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return run_script("run_all.py", "demo", *SMALL, "--runs", str(runs), *arguments, **environment)


def results(runs: Path) -> dict[str, bytes]:
    """What must not depend on how often a run was interrupted: weights and records of all runs."""
    wanted = [
        *runs.rglob("metrics.jsonl"),
        *runs.rglob("model.safetensors"),
        *runs.rglob("tokens.bin"),
        *runs.rglob("evaluations/*.json"),
    ]
    return {str(path.relative_to(runs)): path.read_bytes() for path in sorted(wanted)}


def test_the_chain_of_all_stages(undisturbed):
    done = {str(p.parent.relative_to(undisturbed / "demo")) for p in undisturbed.rglob("run.json")}
    assert done == {
        "prepare/data",
        "pretrain/reference-seed_0",
        "unlearn/maxent-lr_2e-03-seed_0",
        "undo/undo_0.6-seed_0",
        "relearn/undo_0.6-lr_4e-03-seed_0",
    }
    facts = json.loads((undisturbed / "demo/undo/undo_0.6-seed_0/run.json").read_text())
    assert set(facts["parents"]) == {"prepare/data", "unlearn/maxent-lr_2e-03-seed_0"}
    assert facts["flops"] > 0
    assert not list(undisturbed.rglob("checkpoint"))


def test_no_run_evaluates_a_model_that_was_evaluated_before(undisturbed):
    """The first evaluation of unlearning and of an attack is the last of the run that made the model, for nothing."""
    demo = undisturbed / "demo"
    for parent, child, evaluated in (
        ("pretrain/reference-seed_0", "unlearn/maxent-lr_2e-03-seed_0", None),
        ("undo/undo_0.6-seed_0", "relearn/undo_0.6-lr_4e-03-seed_0", 3),  # at 0, 2, 4 and 6 of 6 steps
    ):
        first = json.loads((demo / child / "metrics.jsonl").read_text().splitlines()[0])
        recorded = json.loads((demo / parent / "run.json").read_text())["evaluation"]
        assert first == {"step": 0, **recorded}
        evaluations = [*(demo / parent / "evaluations").glob("*.json")]
        assert len(evaluations) == 1
        flops = json.loads((demo / child / "run.json").read_text())["evaluation_flops"]
        if evaluated:
            lines = (demo / child / "metrics.jsonl").read_text().splitlines()
            assert sum('"retain"' in line for line in lines) == evaluated + 1
            noised = json.loads((demo / "undo/undo_0.6-seed_0/run.json").read_text())["evaluation_flops"]
            count = sum('"retain"' in line for line in (demo / parent / "metrics.jsonl").read_text().splitlines())
            assert flops * count == noised * evaluated  # a noised student is evaluated for itself


def test_the_same_command_again_redoes_nothing(undisturbed):
    before = {
        p: p.stat().st_mtime_ns for p in undisturbed.rglob("*") if p.is_file() and p.suffix in (".json", ".safetensors")
    }
    again = run_all(undisturbed, "--only", *CHAIN)
    assert again.returncode == 0
    assert "5 skipped" in again.stdout
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_a_model_folder_loads_with_plain_transformers_and_has_the_recorded_accuracy(undisturbed):
    folder = undisturbed / "demo/pretrain/reference-seed_0"
    recorded = json.loads((folder / "run.json").read_text())["evaluation"]
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    problems = [json.loads(x) for x in (undisturbed / "demo/prepare/data/problems.jsonl").read_text().splitlines()]
    right: dict[str, list[bool]] = {"retain": [], "forget": []}
    for problem in problems:
        prompt = tokenizer(problem["prompt"], return_tensors="pt")
        with torch.no_grad():
            written = model.generate(**prompt, max_new_tokens=5, do_sample=False)
        role = "retain" if problem["operation"] in ("addition", "subtraction") else "forget"
        text = tokenizer.decode(written[0], skip_special_tokens=True)
        right[role].append(text == problem["prompt"] + problem["answer"])
    for role, hits in right.items():
        assert sum(hits) / len(hits) == recorded[role]


def test_an_unlearning_run_says_how_it_is(undisturbed):
    (folder,) = (undisturbed / "demo/unlearn").glob("maxent-lr_2e-03*")
    found = json.loads((folder / "run.json").read_text())["health"]
    assert found["gradient/uniform"] > 0
    assert found["gradient/retain"] > 0
    assert 0 < found["relative_weight_change"] < 1
    assert "health: " in (folder / "log.txt").read_text()


# --- kill -9 -------------------------------------------------------------------------------------------------------


def processes_under(runs: Path) -> list[int]:
    """Workers (not nannies or launchers) whose command line names this runs folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes().decode().split("\0")
            except OSError:
                continue
            if (
                "undo.experiments.worker" in command
                and str(runs) in " ".join(command)
                and not any("nanny" in part for part in command)
            ):
                found.append(int(entry.name))
    return found


def lines_in(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


MOMENTS = {  # victim -> what is run, after how many records of which run it is killed
    "launcher": (
        CHAIN,
        [("pretrain/reference-seed_0", 5), ("unlearn/maxent-lr_2e-03-seed_0", 2), ("undo/undo_0.6-seed_0", 20)],
    ),
    "run": (ONE, [("pretrain/reference-seed_0", 11)]),
}


def of(names: Iterable[str], runs: Path) -> dict[str, bytes]:
    """The results of those runs alone."""
    return {path: content for path, content in results(runs).items() if any(f"{name}/" in path for name in names)}


@pytest.mark.parametrize("victim", MOMENTS)
def test_killed_at_several_moments_the_same_command_ends_with_the_same_bits(undisturbed, tmp_path, victim):
    """The kill comes at another point of another stage each time; after each, the same command goes on."""
    shutil.copytree(undisturbed / "demo/prepare", tmp_path / "demo/prepare")  # killed while preparing: the next test
    only, moments = MOMENTS[victim]
    for name, lines in moments:
        command = [sys.executable, str(ROOT / "run_all.py"), "demo", *SMALL, "--runs", str(tmp_path), "--only", *only]
        launcher = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        records = tmp_path / "demo" / name / "metrics.jsonl"
        while lines_in(records) < lines and launcher.poll() is None:
            time.sleep(0.002)
        assert launcher.poll() is None, "the run was over before it could be killed"
        workers = processes_under(tmp_path)
        assert workers
        if victim == "launcher":
            launcher.kill()
        for pid in workers[:1] if victim == "run" else []:
            os.kill(pid, signal.SIGKILL)
        status = launcher.wait(timeout=HANGS)
        assert status != 0
        deadline = time.monotonic() + HANGS
        while processes_under(tmp_path) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not processes_under(tmp_path)
        assert not (tmp_path / "demo" / name / "run.json").exists()
    finished = run_all(tmp_path, "--only", *only)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    made = [str(path.parent.relative_to(tmp_path)) for path in tmp_path.rglob("run.json")]
    assert len(made) == {CHAIN: 5, ONE: 2}[only]
    assert results(tmp_path) == of(made, undisturbed)


DIES_IN_THE_MIDDLE = """
import os, signal, sys
from pathlib import Path
import {module} as script
from dataclasses import replace
from undo.experiments import cli

def die(moment):  # once
    if not (marker := Path({markers!r}) / moment).exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    pass  # the launcher: it writes none of this
elif "{stage}" == "pretrain":
    import safetensors.torch
    import transformers
    import undo.runs.run
    save, saved = safetensors.torch.save_file, []
    def save_file(tensors, path, metadata=None):
        save(tensors, path, metadata)
        saved.append(path)
        if len(saved) == 3 and not (Path({markers!r}) / "checkpoint").exists():
            os.truncate(path, os.path.getsize(path) // 2)  # half of the third checkpoint is on disk
            die("checkpoint")
    safetensors.torch.save_file = save_file
    save_model = transformers.PreTrainedModel.save_pretrained
    def save_pretrained(self, folder, **more):
        save_model(self, folder, **more)
        die("model")  # its folder is half written, run.json is not there
    transformers.PreTrainedModel.save_pretrained = save_pretrained
    write = undo.runs.run.write_atomically
    def write_atomically(path, text):
        if path.name == "run.json":
            die("run.json")  # everything is done but the last rename
        write(path, text)
    undo.runs.run.write_atomically = write_atomically
else:
    import undo.data.store as store
    pack, packs = store.pack, []
    def dying_pack(documents, folder, *rest):
        packs.append(folder)
        if len(packs) == 3 and not (Path({markers!r}) / "store").exists():  # one of four token stores is being written
            (folder.with_name(folder.name + ".partial")).mkdir(parents=True)
            (folder.with_name(folder.name + ".partial") / "tokens.bin").write_bytes(b"torn")
            die("store")
        return pack(documents, folder, *rest)
    store.pack = dying_pack

STAGE = replace(script.STAGE, module="dying")  # a worker imports this file, too
if __name__ == "__main__":
    sys.exit(cli.main(STAGE, {{STAGE.name: STAGE}}))
"""


@pytest.mark.parametrize(
    ("stage", "module", "only", "moments"),
    [
        ("pretrain", "undo.prepare_models.pretrain", "reference*", ("checkpoint", "model", "run.json")),
        ("prepare", "undo.prepare_data.prepare", "data", ("store",)),
    ],
)
def test_killed_while_it_writes(undisturbed, tmp_path, stage, module, only, moments):
    """SIGKILL by the run itself exactly while a checkpoint, the model, run.json or a token store is being written."""
    script, runs = tmp_path / "dying.py", tmp_path / "runs"
    script.write_text(DIES_IN_THE_MIDDLE.format(module=module, stage=stage, markers=str(tmp_path)))
    if stage == "pretrain":
        shutil.copytree(undisturbed / "demo/prepare", runs / "demo/prepare")
    overrides = [text.removeprefix(f"{stage}.") for text in SMALL if text.startswith(f"{stage}.")]
    command = [str(script), "demo", *overrides, "--runs", str(runs), "--only", only]
    for moment in moments:
        died = run_script(*command, PYTHONPATH=str(tmp_path))
        assert died.returncode == 1
        assert "SIGKILL" in died.stdout
        assert (tmp_path / moment).exists()
    finished = run_script(*command, PYTHONPATH=str(tmp_path))
    assert finished.returncode == 0, finished.stdout + finished.stderr
    here, there = results(runs), results(undisturbed)
    assert here
    assert all(there[name] == content for name, content in here.items())
    assert not list(runs.rglob("*.partial"))


def test_ctrl_c_saves_a_checkpoint_and_exits_130(undisturbed, tmp_path):
    shutil.copytree(undisturbed / "demo/prepare", tmp_path / "demo/prepare")
    command = [sys.executable, str(ROOT / "run_all.py"), "demo", *SMALL, "--runs", str(tmp_path), "--only", *ONE]
    launcher = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    run = tmp_path / "demo/pretrain/reference-seed_0"
    while lines_in(run / "metrics.jsonl") < 5 and launcher.poll() is None:
        time.sleep(0.002)
    launcher.send_signal(signal.SIGINT)
    output, _ = launcher.communicate(timeout=HANGS)
    assert launcher.returncode == 130
    assert "the same command continues" in output
    assert "Traceback" not in output
    assert not processes_under(tmp_path)
    assert (run / "checkpoint/state.safetensors").exists()
    finished = run_all(tmp_path, "--only", *ONE)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert results(tmp_path) == of(["prepare/data", *ONE], undisturbed)


# --- what a user gets wrong ----------------------------------------------------------------------------------------


def refused(*arguments: str, **environment: str) -> str:
    """Exit status 2, at most three lines on stderr, no traceback -> stderr."""
    result = run_script(*arguments, **environment)
    assert result.returncode == 2, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    assert 1 <= len(result.stderr.strip().splitlines()) <= 3, result.stderr
    assert result.stderr.startswith("error: ")
    return result.stderr


def test_bad_input_is_refused_in_a_line_or_three(undisturbed, tmp_path):
    runs = ("--runs", str(undisturbed))
    assert "did you mean" in refused("run_pretrain.py", "demo", "training.stepz=3", *runs)
    assert "integer" in refused("run_pretrain.py", "demo", "training.steps=x", *runs)
    assert "greater than 0" in refused("run_pretrain.py", "demo", "training.learning_rate=0", *runs)
    assert "there is no" in refused("run_pretrain.py", "dmeo", *runs)
    assert "matches none of" in refused("run_pretrain.py", "demo", "--only", "nothing", *runs)
    message = refused("run_unlearn.py", "demo", "--runs", str(tmp_path))
    assert "uv run run_prepare.py demo --only data" in message
    message = refused("run_distill.py", "demo", "--runs", str(undisturbed), "teacher=unlearn/other-seed_0")
    assert "uv run run_unlearn.py demo --only other-seed_0" in message
    message = refused("run_all.py", "demo", *SMALL, *runs, "--only", *CHAIN, "pretrain.training.steps=61")
    assert "training.steps: 60 -> 61" in message
    assert "--force" in message
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refused("run_all.py", "demo", "--runs", str(tmp_path / "file"))
    assert "say which stage" in refused("run_all.py", "demo", "training.steps=3", *runs)
    assert "there is no figure 'fig99'" in refused("run_figures.py", "demo", "fig99", *runs)
    assert "holds no finished run" in refused("run_figures.py", "demo", "--runs", str(tmp_path / "empty"))
    empty = tmp_path / "pretrain.yaml"
    empty.write_text("")
    assert "is empty" in refused("run_pretrain.py", str(empty), *runs)
    message = refused("run_pretrain.py", "demo", "execution.tracking=online", *runs, WANDB_API_KEY="")
    assert "tokens/wandb_token.txt" in message
    assert "WANDB_API_KEY" in message


def test_a_changed_parent_makes_its_children_stale(undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "runs")
    runs = ("--runs", str(tmp_path / "runs"))
    path = tmp_path / "runs/demo/unlearn/maxent-lr_2e-03-seed_0/run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"identity": "of another config"}))
    small = [text.removeprefix("undo.") for text in SMALL if text.startswith("undo.")]
    message = refused("run_undo.py", "demo", *small, *runs, "--only", "undo_0.6*")
    assert "has since been made anew" in message
    assert "--force" in message


def test_a_run_that_fails_in_python_is_named_with_its_log(undisturbed, tmp_path):
    """That its numbers are no longer finite is found by the run itself; the other run of the sweep goes on."""
    shutil.copytree(undisturbed / "demo/prepare", tmp_path / "demo/prepare")
    small = [text.removeprefix("pretrain.") for text in SMALL if text.startswith("pretrain.")]
    config = (ROOT / "configs/demo/pretrain.yaml").read_text()
    config = config.replace("oracle: {", "oracle: {training: {learning_rate: 1e30}, ")
    (tmp_path / "demo/pretrain.yaml").write_text(config)
    result = run_script("run_pretrain.py", str(tmp_path / "demo/pretrain.yaml"), *small, "--runs", str(tmp_path))
    assert result.returncode == 1
    assert (tmp_path / "demo/pretrain/reference-seed_0/run.json").exists()
    assert re.search(r"failed pretrain/oracle-seed_0: .*diverged at step 1", result.stdout)
    assert str(tmp_path / "demo/pretrain/oracle-seed_0/log.txt") in result.stdout


def test_oracle_matching_and_dry_run(undisturbed, tmp_path):
    """Student = reference (Section 3) runs from the demo's config with two keys changed."""
    shutil.copytree(undisturbed, tmp_path / "runs")
    runs = ("--runs", str(tmp_path / "runs"))
    matching = [
        "student=reference",
        "reference=pretrain/reference-seed_0",
        'variant="oracle_matched"',
        'name="oracle_matched-seed_0"',
        *(text.removeprefix("distill.") for text in SMALL if text.startswith("distill.")),
    ]
    listed = run_script("run_distill.py", "demo", *matching, *runs, "--dry-run")
    assert listed.returncode == 0
    assert re.search(r"distill/oracle_matched-seed_0 .*pretrain/reference-seed_0.*to do +\d", listed.stdout)
    done = run_script("run_distill.py", "demo", *matching, *runs)
    assert done.returncode == 0, done.stdout
    records = (tmp_path / "runs/demo/distill/oracle_matched-seed_0/metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss/kl"] for line in records if "loss/kl" in line]
    assert losses[-1] < losses[0]


# --- the demo's own result -----------------------------------------------------------------------------------------


SHORT = [  # equations only, fewer steps and adversaries: the whole pipeline, and it still shows the ordering
    "prepare.world={problems: 20000, largest_term: 12, largest_factor: 7, validation_per_cell: 80, forms: [equation]}",
    *(f"{stage}.training.steps=180" for stage in ("pretrain", "distill", "undo")),
    *(f"{stage}.training.batch_rows=16" for stage in ("pretrain", "distill", "undo")),
    "unlearn.training.steps=100",
    "unlearn.training.batch_rows=12",
    "relearn.training.batch_rows=3",
    "relearn.sweep.training.learning_rate=[4e-3]",
    "undo.sweep.noise.alpha=[0.8, 0.4]",
    *(f"{stage}.execution.runs_per_process=2" for stage in ("pretrain", "undo")),
]


def test_the_demo_shows_the_paper_s_ordering(tmp_path):
    """unlearn only < UNDO of a small alpha < UNDO of a large one, distilled < oracle in robustness, on one seed.

    Which of the two in the middle is ahead, one seed leaves to a machine's rounding: 0.420 and 0.420 on one with AMX.
    UNDO_DEMO_RUNS names finished runs of the demo itself, as CI makes them; without it a shorter demo is run here.
    """
    runs = Path(os.environ.get("UNDO_DEMO_RUNS", tmp_path))
    if runs == tmp_path:
        finished = run_script("run_all.py", "demo", *SHORT, "--runs", str(runs), "--only", "relearn/[!r]*[de48]-lr*")
        assert finished.returncode == 0, finished.stdout + finished.stderr
    with open(runs / "demo/summary.csv") as file:
        rows = {row["model"]: row for row in csv.DictReader(file)}
    forget = {model: float(row["forget_last"]) for model, row in rows.items()}
    assert forget["unlearned"] > forget["undo_0.4"] > max(forget["undo_0.8"], forget["distilled"])
    assert min(forget["undo_0.8"], forget["distilled"]) > forget["oracle"]
    assert all(float(rows[model]["forget"]) < 0.15 for model in ("unlearned", "distilled", "undo_0.4", "undo_0.8"))
    reference = json.loads((runs / "demo/pretrain/reference-seed_0/run.json").read_text())
    assert reference["evaluation"]["forget"] > 0.8
    columns = "model,seed,retain,forget,forget_20,forget_70,forget_last,robustness,steps,flops"
    assert ",".join(rows["oracle"]) == columns
    for figure in ("fig3", "fig4", "fig5"):
        for suffix in ("pdf", "png"):
            assert (runs / f"demo/figures/{figure}.{suffix}").stat().st_size > 5000
