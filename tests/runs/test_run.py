"""The run directory: claimed once, written atomically, and aware of its ancestors."""

import json

import pytest
import torch

from tests.conftest import metrics, training
from tests.train.test_loop import make
from undo.config.mistakes import ConfigError
from undo.runs.directory import RunDirectory


def test_a_changed_config_is_refused_with_the_difference(tmp_path):
    make(tmp_path)
    with pytest.raises(ConfigError) as error:
        make(tmp_path, training(steps=7))
    assert "training.steps: 6 -> 7" in str(error.value)
    assert "--force" in str(error.value)
    assert len(str(error.value).splitlines()) <= 3


def test_a_config_from_before_a_key_existed_is_the_same_with_its_default(tmp_path):
    """What has no `optimizer` was trained with the one that there was then."""
    run, _ = make(tmp_path)
    file = run.folder / "config.yaml"
    file.write_text(file.read_text().replace("  optimizer: adamw\n", ""))
    assert "optimizer" not in run.config["training"]
    make(tmp_path)
    file.write_text(file.read_text().replace("  optimizer: adamw\n", ""))
    with pytest.raises(ConfigError, match=r"training\.optimizer: 'adamw' -> 'adamw_8bit'"):
        make(tmp_path, training(optimizer="adamw_8bit"))


def test_execution_keys_may_change(tmp_path):
    make(tmp_path, micro_rows=1)
    run, _ = make(tmp_path, micro_rows=2, checkpoint_every=7)
    assert run.config["execution"]["micro_rows"] == 2


def test_done_means_run_json_and_nothing_else(tmp_path):
    run, _ = make(tmp_path)
    run.record(0, {"retain": 1.0})
    assert not run.done
    assert list(run.records()) == [{"step": 0, "retain": 1.0}]
    run.finish(steps=3)
    assert run.done
    assert run.facts["steps"] == 3
    assert not (run.folder / "checkpoint").exists()
    assert {
        "git_revision",
        "versions",
        "device",
        "seconds",
        "peak_rss_bytes",
        "identity",
        "parents",
    } <= run.facts.keys()


def test_a_line_that_is_being_written_is_left_out(tmp_path):
    run, _ = make(tmp_path)
    run.record(1, {"loss": 2.0})
    with open(run.folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "lo')
    assert [r["step"] for r in run.records()] == [1]


def test_checkpoint_brings_back_tensors_and_cuts_the_records(tmp_path):
    run, config = make(tmp_path)
    run.record(1, {"loss": 1.0})
    run.save_checkpoint({"w": torch.arange(3.0)}, {"step": 1})
    run.record(2, {"loss": 2.0})
    run.open(config)
    loaded = run.load_checkpoint()
    assert loaded is not None
    assert torch.equal(loaded[0]["w"], torch.arange(3.0))
    assert loaded[1] == {"step": 1}
    assert [line["step"] for line in metrics(run.folder)] == [1]


def test_without_a_checkpoint_the_records_start_anew(tmp_path):
    run, config = make(tmp_path)
    run.record(1, {"loss": 1.0})
    run.open(config)
    assert run.load_checkpoint() is None
    assert metrics(run.folder) == []


def test_a_half_written_checkpoint_does_not_replace_the_last_whole_one(tmp_path, monkeypatch):
    import safetensors.torch

    run, _ = make(tmp_path)
    run.save_checkpoint({"w": torch.zeros(2)}, {"step": 1})

    def fails_half_way(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", fails_half_way)
    with pytest.raises(OSError, match="No space left"):
        run.save_checkpoint({"w": torch.ones(2)}, {"step": 2})
    loaded = run.load_checkpoint()
    assert loaded is not None
    assert loaded[1] == {"step": 1}


def test_identity_follows_config_and_ancestors(tmp_path):
    def finished(folder, parent_identity, cfg=None):
        parent = RunDirectory(folder, "tiny", "prepare/data")
        parent.folder.mkdir(parents=True)
        (parent.folder / "run.json").write_text(json.dumps({"identity": parent_identity}))
        run, config = make(folder, cfg)
        run.finish()
        return run, config

    a, config = finished(tmp_path / "a", "p1")
    b, _ = finished(tmp_path / "b", "p1")
    c, _ = finished(tmp_path / "c", "p2")
    d, _ = finished(tmp_path / "d", "p1", training(steps=9))
    assert a.identity() == b.identity()
    assert len({run.identity() for run in (a, c, d)}) == 3
    assert a.is_stale(config) is None
    (a.folder.parents[1] / "prepare/data/run.json").write_text(json.dumps({"identity": "made anew"}))
    assert a.is_stale(config) == "prepare/data"


def test_a_held_run_is_seen_as_held(tmp_path):
    run, _ = make(tmp_path)
    assert not run.is_held()
    with run.lock(wait=False) as mine:
        assert mine
        assert run.is_held()
        with run.lock(wait=False) as again:
            assert not again
    assert not run.is_held()


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot be written .*--runs"):
        make(tmp_path / "file")
