"""A model of another family and of other people's making, from its folder to the report."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.evaluate.test_multiple_choice import put, questions
from tests.foreign import GENERATION, qwen
from tests.settings.test_wmdp import documents
from undo.experiments import cli, worker
from undo.launch.jobs import Job
from undo.lm.vocabulary import tokenizer_files
from undo.runs.run import Run
from undo.settings import whole as run_all
from undo.settings.stages import STAGES


@pytest.fixture
def in_this_process(monkeypatch):
    """Jobs are what they are, but start no process: several seconds each."""

    def run_jobs(jobs: Sequence[Job], display: object) -> dict[str, str]:
        runs = [run for job in jobs for run in job.runs]
        for run in runs:
            worker.work(STAGES[run.name.partition("/")[0]], [run.folder])
        return {run.name: run.failure or "" for run in runs if not run.done}

    monkeypatch.setattr(worker, "_write_to", lambda *_, **__: None)
    monkeypatch.setattr(Run, "stop_on_signals", lambda: None)
    monkeypatch.setattr(cli, "run_jobs", run_jobs)


def setting(folder: Path) -> Path:
    """base, prepare, unlearn, undo and relearn of a Qwen-like model without a beginning of documents."""
    texts = {role: documents(role, 60) for role in ("retain", "forget")}
    qwen(folder / "qwen", [text for some in texts.values() for text in some])
    for role, some in texts.items():
        put(folder / f"{role}.jsonl", [{"text": text} for text in some])
    asked = {"path": put(folder / "asked.jsonl", questions(6, 0))}
    trained = {
        "name": "{variant}",
        "data": "prepare/data",
        "training": {"steps": 4, "batch_rows": 2, "learning_rate": 1e-3, "evaluate_every": 2},
        "evaluation": {"name": "cross_entropy", "choices": {"retain": asked, "forget": asked}},
    }
    undone = {"teacher": "unlearn/maxent", "mixture": {"retain": 1.0}, "noise": {"alpha": 0.3}, "save_dtype": "auto"}
    attacks = {"mixture": {"forget": 1.0}, "variants": {"maxent": {"model": "unlearn/maxent"}}}
    attacks["variants"]["undo"] = {"model": "undo/undo"}
    stages = {
        "base": {"name": "model", "model": str(folder / "qwen")},
        "prepare": {
            "name": "data",
            "tokenizer": str(folder / "qwen"),
            "length": 64,
            "shortest": 5,
            "validation_share": 0.1,
            "data": {role: {"path": str(folder / f"{role}.jsonl")} for role in texts},
        },
        "unlearn": {**trained, "reference": "base/model", "variants": {"maxent": {"method": {"name": "maxent"}}}},
        "undo": {**trained, **undone, "variants": {"undo": {}}},
        "relearn": {**trained, **attacks, "training": {**trained["training"], "warmup_steps": 1}},
    }
    made = folder / "mine"
    made.mkdir()
    for name, raw in stages.items():
        OmegaConf.save(OmegaConf.create(raw), made / f"{name}.yaml")
    return made


def test_a_model_without_a_beginning_goes_from_its_folder_to_the_report(tmp_path, in_this_process, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run_all.py", str(setting(tmp_path)), "--runs", str(tmp_path / "runs")])
    assert run_all.main() == 0
    runs = tmp_path / "runs/mine"
    done = {str(path.parent.relative_to(runs)) for path in runs.glob("*/*/run.json")}
    assert done == {"base/model", "prepare/data", "unlearn/maxent", "undo/undo", "relearn/maxent", "relearn/undo"}
    facts = json.loads((runs / "prepare/data/run.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "qwen")
    assert (facts["bos"], facts["eos"]) == (None, tokenizer.eos_token_id)
    attack = json.loads((runs / "relearn/undo/run.json").read_text())["evaluation"]
    assert {"retain", "forget", "accuracy/forget", "accuracy/forget/questions"} <= attack.keys()

    for name, dtype in (("unlearn/maxent", torch.float32), ("undo/undo", torch.bfloat16)):
        folder = runs / name / "model"
        for file in tokenizer_files(tmp_path / "qwen"):
            assert (folder / file.name).read_bytes() == file.read_bytes()
        assert json.loads((folder / "generation_config.json").read_text()) == GENERATION
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert model.dtype == dtype
        assert model.config.vocab_size == len(tokenizer) + 20
    report = (runs / "report.md").read_text()
    assert "| undo |" in report
    assert "| maxent |" in report
