"""The worker: why a run failed, as the launcher's table has it, and the same bits however its process came about."""

import shutil
from pathlib import Path
from typing import get_args

import pytest

from tests.conftest import ROOT, TINY
from tests.fake_stage import Recorder
from undo.config.mistakes import ConfigError
from undo.config.sweep import parse_overrides
from undo.experiments.check import Start, jobs
from undo.experiments.plan import plan
from undo.experiments.worker import reason
from undo.launch.local import run_jobs
from undo.launch.template import Template
from undo.settings.stages import STAGES


@pytest.mark.parametrize(
    ("place", "variable"),
    [
        ("/home/me/.cache/huggingface/hub/x.lock", "HF_HOME"),
        ("/scratch/tmp/made", "TMPDIR"),
        ("/home/me/.triton/cache", "HOME"),
        ("/runs/demo/log.txt", None),
        ("/home/me/project/runs/demo/log.txt", None),
    ],
)
def test_a_folder_of_a_library_that_cannot_be_written_names_its_variable(monkeypatch, place, variable):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("TMPDIR", "/scratch/tmp")
    monkeypatch.delenv("HF_HOME", raising=False)
    first, *cure = reason(PermissionError(13, "Permission denied", place)).splitlines()
    assert first == f"PermissionError: [Errno 13] Permission denied: {place!r}"
    assert cure == ([] if variable is None else [f"set {variable} to a folder that can be written"])
    monkeypatch.setenv("HF_HOME", "/scratch/hub")
    assert "set" not in reason(FileNotFoundError(2, "No such file or directory", "/home/me/.cache/x"))
    assert "set HF_HOME" in reason(OSError(30, "Read-only file system", Path("/scratch/hub/datasets")))


def test_a_mistake_keeps_all_its_lines():
    assert reason(ConfigError("what\ncure")) == "what\ncure"


def test_the_reason_of_a_library_is_one_line_that_is_not_cut_after_its_first():
    """transformers says what is wrong with a config in its second line."""
    assert (
        reason(ValueError("class X:\n    the hidden size (81) is odd"))
        == "ValueError: class X: the hidden size (81) is odd"
    )
    assert len(reason(ValueError("long " * 1000))) == 300


def test_forked_runs_have_the_bits_of_fresh_ones(tmp_path, data, monkeypatch):
    forked, fork = [], Template.fork
    monkeypatch.setattr(Template, "fork", lambda *args: forked.append(fork(*args)) or forked[-1])
    found = {}
    for way in get_args(Start):
        shutil.copytree(data.folder, tmp_path / way / "demo/prepare/data")
        overrides = parse_overrides([*TINY["pretrain"], "training.steps=6", "training.batch_rows=4"])
        planned = plan(STAGES["pretrain"], [ROOT / "configs/demo/pretrain.yaml"], overrides, tmp_path / way)
        for run in planned:
            run.directory.claim(run.config)
        assert run_jobs(jobs(planned, way), Recorder()) == {}
        files = ("metrics.jsonl", "model/model.safetensors")
        found[way] = [(run.directory.folder / name).read_bytes() for run in planned for name in files]
        assert all("leaked" not in run.directory.log.read_text() for run in planned)
    assert found["fork"] == found["fresh"]
    assert [process.returncode for process in forked] == [0, 0]
