"""A run directory that was damaged, half deleted or tampered with: nothing wrong in it is taken for done."""

import errno
import fcntl
import json
import os
import shutil

import pytest
import torch
from safetensors.torch import save_file

from tests.conftest import metrics, training
from tests.train.test_loop import make
from undo.config.files import write_atomically
from undo.config.mistakes import ConfigError
from undo.runs import checksums
from undo.runs.directory import RunDirectory
from undo.train.parents import load_parent


def finished(folder):
    run, config = make(folder)
    run.record(0, {"retain": 0.5, "forget": 0.5})
    run.finish(steps=3)
    return run, config


def one_line(error: pytest.ExceptionInfo[ConfigError]) -> str:
    assert len(str(error.value).splitlines()) <= 2
    return str(error.value)


# --- deleted -------------------------------------------------------------------------------------------------------


def test_a_deletion_that_is_interrupted_leaves_a_run_that_is_not_done(tmp_path, monkeypatch):
    run, config = finished(tmp_path)
    monkeypatch.setattr(shutil, "rmtree", lambda folder: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run.remove()
    assert not run.folder.exists()  # nor is a part of it taken for a part of the next
    assert not list(tmp_path.rglob("run.json"))
    monkeypatch.undo()
    run.claim(config)
    assert list(run.folder.parent.iterdir()) == [run.folder]
    run.remove()
    assert list(run.folder.parent.iterdir()) == []


def test_what_cannot_be_deleted_is_an_error_with_its_place(tmp_path, monkeypatch):
    def denied(folder):
        raise PermissionError(13, "Permission denied", str(folder / "model"))

    run, _ = finished(tmp_path)
    monkeypatch.setattr(shutil, "rmtree", denied)
    with pytest.raises(ConfigError, match=r"model: cannot be deleted \(Permission denied\)") as error:
        run.remove()
    assert "--runs" in one_line(error)
    assert not run.done


def test_of_a_run_that_is_a_symbolic_link_only_the_link_is_deleted(tmp_path):
    run, config = finished(tmp_path / "runs")
    run.folder.rename(tmp_path / "elsewhere")
    run.folder.symlink_to(tmp_path / "elsewhere")
    assert run.done
    run.remove()
    assert (tmp_path / "elsewhere/run.json").exists()
    assert not run.done
    run.claim(config)
    assert not run.folder.is_symlink()


def test_a_run_json_that_is_a_folder_is_deleted_too(tmp_path):
    run, _ = make(tmp_path)
    (run.folder / "run.json/x").mkdir(parents=True)
    run.remove()
    assert not run.folder.exists()


# --- run.json and config.yaml --------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["", '{"identity": "a', "{}", "null", "[1]", '{"steps": 3}', "\udcff", None])
def test_a_damaged_run_json_is_one_line_with_the_path_and_the_cure(tmp_path, content):
    run, config = finished(tmp_path)
    path = run.folder / "run.json"
    path.unlink()
    if content is None:
        path.mkdir()
    else:
        path.write_text(content, errors="surrogateescape")
    for look in (lambda: run.claim(config), run.identity):
        with pytest.raises(ConfigError) as error:
            look()
        assert str(path) in one_line(error)
        assert "--force" in str(error.value)


def test_without_config_yaml_a_done_run_keeps_to_its_config(tmp_path):
    run, config = finished(tmp_path)
    before = (run.folder / "config.yaml").read_bytes()
    (run.folder / "config.yaml").unlink()
    with pytest.raises(ConfigError, match=r"config\.yaml: is gone or was changed") as error:
        make(tmp_path, training(steps=7))
    assert "--force" in one_line(error)
    run.claim(config)
    assert (run.folder / "config.yaml").read_bytes() == before


def test_an_edited_config_yaml_does_not_make_a_done_run_another(tmp_path):
    run, _ = finished(tmp_path)
    path = run.folder / "config.yaml"
    path.write_text(path.read_text().replace("steps: 6", "steps: 7"))
    with pytest.raises(ConfigError, match="is gone or was changed"):
        make(tmp_path, training(steps=7))
    with pytest.raises(ConfigError, match=r"training\.steps: 7 -> 6"):
        make(tmp_path)


# --- weights, checkpoint, records ----------------------------------------------------------------------------------


def flip(path, position: int) -> None:
    with open(path, "r+b") as file:
        file.seek(position, os.SEEK_SET if position >= 0 else os.SEEK_END)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))


def test_a_flipped_byte_in_a_model_is_found_when_it_is_read(tmp_path):
    run, _ = make(tmp_path)
    run.model.mkdir()
    save_file({"w": torch.ones(100)}, run.model / "model.safetensors")
    (run.model / "config.json").write_text("{}")
    run.finish()
    run.check_model()
    flip(run.model / "model.safetensors", -1)
    with pytest.raises(ConfigError, match=r"model\.safetensors: is gone, or is not what pretrain/x left") as error:
        load_parent(run, run.name)
    assert "--force" in one_line(error)
    (run.model / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="is gone"):
        run.check_model()


@pytest.mark.parametrize(
    ("damaged", "said"),
    [
        (lambda text: text[: text.index("\n", 40) + 1], "is not what the run recorded"),  # whole lines are missing
        (lambda text: text.replace("0.25", "0.26"), "is not what the run recorded"),
        (lambda text: text[:-9] + "\n", "line 3: is damaged"),
    ],
)
def test_records_of_a_done_run_are_those_that_it_wrote(tmp_path, damaged, said):
    """A curve that lost its end would be a weaker attack."""
    run, _ = make(tmp_path)
    for step in range(3):
        run.record(step, {"retain": 0.5, "forget": 0.25 * step})
    run.finish()
    assert list(run.evaluations()) == [0, 1, 2]
    path = run.folder / "metrics.jsonl"
    path.write_text(damaged(path.read_text()))
    with pytest.raises(ConfigError, match=said) as error:
        run.evaluations()
    assert str(path) in one_line(error)


def test_a_checksum_sees_names_types_shapes_values_and_the_note():
    tensors = {"a": torch.arange(4.0), "b": torch.tensor(1), "c": torch.ones(2, 2, dtype=torch.bfloat16)}
    variants = [
        tensors,
        {"a2": tensors["a"], "b": tensors["b"], "c": tensors["c"]},
        {**tensors, "a": tensors["a"].double()},
        {**tensors, "a": tensors["a"].reshape(2, 2)},
        {**tensors, "b": torch.tensor(2)},
        {**tensors, "d": torch.ones(0)},
    ]
    sums = [checksums.of_tensors(each, "note") for each in variants] + [checksums.of_tensors(tensors, "other")]
    assert len(set(sums)) == len(sums)
    assert checksums.of_tensors(dict(reversed(tensors.items())), "note") == sums[0]


@pytest.mark.parametrize("damage", ["flipped", "flipped header", "cut", "empty", "no metadata", "text"])
def test_a_damaged_checkpoint_is_named_with_the_way_out(tmp_path, damage):
    run, config = make(tmp_path)
    run.save_checkpoint({"w": torch.ones(1000)}, {"step": 1})
    path = run.folder / "checkpoint/state.safetensors"
    match damage:
        case "flipped":
            flip(path, -1000)
        case "flipped header":
            flip(path, path.read_bytes().index(b"step") + 8)
        case "cut":
            os.truncate(path, path.stat().st_size // 2)
        case "empty":
            os.truncate(path, 0)
        case "no metadata":
            save_file({"w": torch.ones(3)}, path)
        case _:
            path.write_text("no tensors here")
    run.open(config)
    with pytest.raises(ConfigError, match=r"state\.safetensors: is damaged") as error:
        run.load_checkpoint()
    assert "delete it to start this run afresh" in one_line(error)
    path.unlink()
    assert run.load_checkpoint() is None


def test_a_checkpoint_does_not_go_on_from_a_parent_that_was_made_anew(tmp_path):
    """Half of the run would be the old one's child."""
    parent = RunDirectory(tmp_path, "tiny", "prepare/data")
    parent.folder.mkdir(parents=True)
    (parent.folder / "run.json").write_text('{"identity": "first"}')
    run, config = make(tmp_path)
    run.save_checkpoint({"w": torch.ones(3)}, {"step": 1})
    run.open(config)
    assert run.load_checkpoint() is not None
    (parent.folder / "run.json").write_text('{"identity": "second"}')
    run.open(config)
    with pytest.raises(ConfigError, match="was made from another prepare/data than there is now") as error:
        run.load_checkpoint()
    assert "delete it to start this run afresh" in one_line(error)


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_records_that_are_not_those_of_the_checkpoint_are_refused(tmp_path, damage):
    run, config = make(tmp_path)
    run.record(1, {"loss": 1.0})
    run.record(2, {"loss": 2.0})
    run.save_checkpoint({"w": torch.ones(3)}, {"step": 2})
    path = run.folder / "metrics.jsonl"
    match damage:
        case "cut":
            os.truncate(path, 10)
        case "flipped":
            flip(path, -4)
        case _:
            path.unlink()
    run.open(config)
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=r"metrics\.jsonl: is damaged") as error:
        run.load_checkpoint()
    assert "state.safetensors" in one_line(error)
    assert path.read_bytes() == before  # no NUL bytes


def test_a_checkpoint_right_after_another_start_can_be_read(tmp_path):
    """Records behind a checkpoint are cut off; one that is asked to stop at once writes none before it saves again."""
    run, config = make(tmp_path)
    run.record(1, {"loss": 1.0})
    run.save_checkpoint({"w": torch.ones(3)}, {"step": 1})
    run.record(2, {"loss": 2.0})
    for _ in range(2):
        run.open(config)
        assert run.load_checkpoint() is not None
        run.save_checkpoint({"w": torch.ones(3)}, {"step": 1})
    assert [json.loads(line)["step"] for line in (run.folder / "metrics.jsonl").read_text().splitlines()] == [1]
    run.record(2, {"loss": 2.0})
    run.save_checkpoint({"w": torch.ones(3)}, {"step": 2})
    run.open(config)
    assert run.load_checkpoint() is not None
    assert [line["step"] for line in metrics(run.folder)] == [1, 2]


# --- symbolic links and locks --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "metrics.jsonl",
        "log.txt",
        "config.yaml",
        "config.yaml.partial",
        "checkpoint",
        "checkpoint/state.partial",
        "train",
    ],
)
def test_a_planted_link_is_not_followed_when_a_run_writes(tmp_path, name):
    run, config = make(tmp_path / "runs")
    victim = tmp_path / "victim"
    victim.mkdir() if name in ("checkpoint", "train") else victim.write_text("precious")
    path = run.folder / name
    path.parent.mkdir(exist_ok=True)
    shutil.copy(run.folder / "config.yaml", victim) if name == "config.yaml" else None
    before = None if victim.is_dir() else victim.read_bytes()
    path.unlink(missing_ok=True)
    path.symlink_to(victim)
    with pytest.raises(ConfigError, match=f"{name}: is a symbolic link") as error:
        run.claim(config)
    assert "delete the link" in one_line(error)
    assert (victim.read_bytes() if before else list(victim.iterdir())) == (before or [])


def test_links_that_belong_there_are_left_alone(tmp_path):
    run, config = make(tmp_path / "runs")
    (run.folder / "model").symlink_to(tmp_path)
    (run.folder / "wandb").mkdir()
    (run.folder / "wandb/latest-run").symlink_to(tmp_path)
    run.claim(config)


def test_a_planted_lock_is_neither_emptied_nor_followed(tmp_path):
    run, _ = make(tmp_path / "runs")
    (tmp_path / "victim").write_text("precious")
    (run.folder / ".lock").unlink(missing_ok=True)
    (run.folder / ".lock").symlink_to(tmp_path / "victim")
    with pytest.raises(ConfigError, match=r"\.lock: cannot be locked"):
        run.is_held()
    assert (tmp_path / "victim").read_text() == "precious"


def test_a_file_that_is_replaced_does_not_lead_elsewhere(tmp_path):
    (tmp_path / "victim").write_text("precious")
    for name in ("run.json", "run.json.partial"):
        (tmp_path / name).symlink_to(tmp_path / "victim")
    write_atomically(tmp_path / "run.json", "é")
    assert (tmp_path / "victim").read_text() == "precious"
    assert (tmp_path / "run.json").read_bytes() == "é".encode()
    assert not (tmp_path / "run.json").is_symlink()


def test_where_locks_cannot_be_kept_another_place_is_asked_for(tmp_path, monkeypatch):
    run, _ = make(tmp_path)
    monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOLCK, "No locks available")))
    with pytest.raises(ConfigError, match=r"cannot be locked \(No locks available\)") as error:
        run.is_held()
    assert "--runs" in one_line(error)


def test_a_run_that_is_not_there_has_no_identity(tmp_path):
    assert RunDirectory(tmp_path, "tiny", "prepare/data").identity() == ""
