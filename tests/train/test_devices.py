"""One run on several devices, by the real launcher: two gloo processes say what one says, and end as one."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import HANGS, ROOT, SHAPE, TINY, lively, metrics, run_script, training
from tests.train.test_loop import make, stream
from undo.evaluate.evaluator import Measured
from undo.launch.devices import cores, take_slot
from undo.launch.jobs import DeviceShare
from undo.lm.place import freeze
from undo.runs.run import Run
from undo.train import shard
from undo.train.loop import train
from undo.unlearn import NPO, RMU, SAM, UAM, UNDIAL, GradDiff, MaxEnt, RepNoise, SimNPO, Smoothing, health

NAME = "pretrain/reference-seed_0"
FINE = [  # an update that does not magnify rounding: Adam's first steps are signs of gradients
    "training.steps=24",
    "training.batch_rows=6",
    "training.evaluate_every=8",
    "training.learning_rate=1e-4",
    "execution.checkpoint_every=3",
]
two_cores = pytest.mark.skipif(len(cores()) < 2, reason="a run on two devices takes two cores")


def command(runs: Path, *overrides: str) -> list[str]:
    return ["run_pretrain.py", "demo", *TINY["pretrain"], *FINE, *overrides, "--runs", str(runs), "--only", "refer*"]


def with_data(runs: Path, data) -> Path:
    shutil.copytree(data.folder, runs / "demo/prepare/data")
    return runs


def files(runs: Path) -> dict[str, bytes]:
    """What must not depend on how often the run was interrupted."""
    folder = runs / "demo" / NAME
    return {name: (folder / name).read_bytes() for name in ("metrics.jsonl", "model/model.safetensors")}


def same_records(a: Path, b: Path) -> None:
    one, two = (metrics(runs / "demo" / NAME) for runs in (a, b))
    assert len(one) == len(two)
    for x, y in zip(one, two, strict=True):
        assert y == pytest.approx(x, rel=1e-6, abs=1e-9)


@pytest.fixture(scope="module")
def one(tmp_path_factory, data) -> Path:
    runs = with_data(tmp_path_factory.mktemp("one"), data)
    finished = run_script(*command(runs))
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return runs


WAYS = {"whole": ["devices=2"], "divided": ["devices=2", "shard=full", "gradient_checkpointing=true", "micro_rows=2"]}


def on_two(runs: Path, way: str) -> list[str]:
    return command(runs, *(f"execution.{key}" for key in WAYS[way]))


def ranks(runs: Path) -> dict[int, int]:
    """Rank -> process id, of all that work on these runs; -1: launcher's children that are no rank."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            line, environment = ((entry / name).read_bytes().decode().split("\0") for name in ("cmdline", "environ"))
        except (OSError, ValueError):
            continue
        if "undo.experiments.worker" in line and any(str(runs) in part for part in line):
            rank = next((variable[5:] for variable in environment if variable.startswith("RANK=")), "-1")
            found[int(rank)] = int(entry.name)
    return found


@two_cores
@pytest.mark.parametrize("way", WAYS)
def test_two_devices_say_what_one_says_and_end_as_one(one, tmp_path, data, way):
    """Batches divided, or the weights as well. Then, of the latter, the rank that does not write is ended: by SIGTERM,
    after which both stop at one step with a checkpoint, and by SIGKILL; the same command ends with the same bits."""
    undisturbed = with_data(tmp_path / "undisturbed", data)
    finished = run_script(*on_two(undisturbed, way))
    assert finished.returncode == 0, finished.stdout + finished.stderr
    same_records(one, undisturbed)
    saved, alone = (load_file(path / "demo" / NAME / "model/model.safetensors") for path in (undisturbed, one))
    assert saved.keys() == alone.keys()
    for name, weight in saved.items():
        torch.testing.assert_close(weight, alone[name], rtol=0, atol=2e-6)
    assert not list(undisturbed.rglob("failure.json"))
    if way == "whole":
        return

    runs = with_data(tmp_path / "ended", data)
    records = runs / "demo" / NAME / "metrics.jsonl"
    script, *arguments = on_two(runs, way)

    def recorded() -> int:
        return records.read_bytes().count(b"\n") if records.exists() else 0

    for number in (signal.SIGTERM, signal.SIGKILL):  # at a step with a checkpoint behind it: nothing is cut back
        wanted = recorded() + 5
        launcher = subprocess.Popen(
            [sys.executable, str(ROOT / script), *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        while recorded() < wanted and launcher.poll() is None:
            time.sleep(0.002)
        working = ranks(runs)
        assert working.keys() >= {0, 1}, "the run was over before it could be ended"
        os.kill(working[1], number)
        said, _ = launcher.communicate(timeout=HANGS)
        assert launcher.returncode == 1, said
        assert f"failed  {NAME}" in said
        assert ranks(runs) == {}
        assert not (runs / "demo" / NAME / "run.json").exists()
        log = (runs / "demo" / NAME / "log.txt").read_text()
        assert "interrupted; the next start goes on from here" in log
    finished = run_script(*on_two(runs, way))
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert files(runs) == files(undisturbed)


METHODS = {
    "graddiff": GradDiff(),
    "maxent": MaxEnt(retain="kl"),
    "rmu": RMU(layer=1, trained_layers=(0, 1), c=4.0, alpha=2.0),
    "undial": UNDIAL(),
    "npo": NPO(),
    "simnpo": SimNPO(),
    "repnoise": RepNoise(),
}
MOVING = {"sam": SAM(), "smoothing": Smoothing(sigma=1e-3, samples=2), "uam": UAM(gamma=0.7)}  # whole weights only


def unlearn(folder: Path, data, method, divided: bool, stop_at: int | None = None) -> None:
    """A few steps in this process, which may be a rank, into a folder of its own."""
    run, config = make(folder, training(steps=4, batch_rows=4, learning_rate=1e-5, clip_norm=0.5), micro_rows=1)
    model = lively(SHAPE.build(0)).double()
    health.choose_weights(model, method)
    if divided:
        shard.divide(model)
    objective = method.objective(model, freeze(lively(SHAPE.build(0), 2).double()), torch.Generator().manual_seed(0))
    rng = torch.Generator().manual_seed(1)
    streams = {role: stream(data, seed=seed) for seed, role in enumerate(("retain", "forget"))}

    def step(gradient):
        if gradient.progress == 0:
            run.record(0, health.gradient_norms(gradient, method))
        if round(4 * gradient.progress) + 1 == stop_at:
            Run._stop_requested = True
        return method.step(gradient, rng)

    def evaluate(*_):
        return Measured({"retain": 0.0, "forget": 0.0}, 1)

    train(model, objective, streams, config.training, config.execution, run, evaluate, step=step)
    run.record(9, {name: float(shard.whole(w).detach().norm()) for name, w in model.named_parameters()})


@two_cores
def test_two_devices_give_every_method_the_same_steps_and_a_divided_checkpoint_serves_one(tmp_path, data):
    """Sums, not means; the global norm of divided and whole weights; terms alone; a part of the blocks; the second
    gradients of SAM, smoothing and UAM at weights that the whole batch's first one moves."""
    program = f"""
import os, sys
from pathlib import Path
sys.path[:0] = [{str(ROOT)!r}]
import torch; torch.set_num_threads(1)
from accelerate import PartialState
PartialState(cpu=True, backend="gloo")
from tests.train.test_devices import METHODS, MOVING, unlearn
from undo.runs.directory import Interrupted, RunDirectory
data = RunDirectory.at(Path({str(data.folder)!r}))
folder = Path({str(tmp_path)!r}) / ("two-" + os.environ["RANK"])
for name, method in {{"whole": METHODS["graddiff"], **MOVING}}.items():
    unlearn(folder / name, data, method, divided=False)
for name, method in METHODS.items():
    unlearn(folder / name, data, method, divided=True)
try:
    unlearn(folder / "stopped", data, METHODS["graddiff"], divided=True, stop_at=2)
except Interrupted:
    sys.exit(0)
sys.exit("not interrupted")
"""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            env={**os.environ, **world, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=HANGS)
        assert process.returncode == 0, errors
    alone = tmp_path / "one"
    for name, method in (METHODS | MOVING).items():
        unlearn(alone / name, data, method, divided=False)
    unlearn(tmp_path / "two-0/stopped", data, METHODS["graddiff"], divided=False)
    for name in ["whole", *METHODS, *MOVING, "stopped"]:
        expected = metrics(alone / {"stopped": "graddiff", "whole": "graddiff"}.get(name, name) / "tiny/pretrain/x")
        for folder in ["two-0"] if name == "stopped" else ["two-0", "two-1"]:
            found = metrics(tmp_path / folder / name / "tiny/pretrain/x")
            assert len(found) == len(expected)
            for a, b in zip(found, expected, strict=True):
                assert a == pytest.approx(b, rel=1e-6, abs=1e-9), name


def test_more_devices_than_there_are_is_refused_before_anything_starts(tmp_path, data):
    runs = with_data(tmp_path, data)
    for visible, message in (("0,GPU-1a", "execution.devices=3, but 2 GPUs are visible: 0, GPU-1a"), ("", "cores")):
        devices = 3 if visible else len(cores()) + 1
        refused = run_script(*command(runs, f"execution.devices={devices}"), CUDA_VISIBLE_DEVICES=visible)
        assert refused.returncode == 2
        assert message in refused.stderr
        assert len(refused.stderr.splitlines()) <= 3
    assert not (runs / "demo/pretrain").exists()


FULL = ("execution.devices=2", "execution.shard=full")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("execution.devices=2", "execution.runs_per_gpu=2"), "runs_per_gpu must be 1"),
        (("execution.devices=2", "execution.students=2"), "students must be 1"),
        (("execution.devices=2", "training.batch_rows=1"), "execution.devices=2 is more than the 1 rows of a batch"),
        ((*FULL, "training.batch_rows=5"), "training.batch_rows=5 must be a multiple of execution.devices=2"),
        ((*FULL, "execution.compile=true"), "execution.compile=true does not go with it"),
        (("execution.shard=full",), "set devices above 1"),
    ],
)
def test_what_cannot_be_divided_is_refused(tmp_path, data, overrides, message):
    runs = with_data(tmp_path, data)
    refused = run_script(*command(runs, *overrides), CUDA_VISIBLE_DEVICES="0,1")
    assert refused.returncode == 2
    assert message in refused.stderr
    assert not (runs / "demo/pretrain").exists()


def test_a_method_that_moves_weights_wants_them_whole(tmp_path):
    wanted = ("variant=x", "method={name: sam}", *FULL, "--runs", str(tmp_path))
    refused = run_script("run_unlearn.py", "demo", *wanted, CUDA_VISIBLE_DEVICES="0,1")
    assert refused.returncode == 2
    assert "sam moves single weights; set execution.shard=none" in refused.stderr


def test_several_devices_are_taken_together_or_not_at_all(tmp_path):
    several = DeviceShare(devices=2)
    pair = take_slot(several, ["0", "1", "2"], tmp_path)
    assert pair
    assert pair.device == "0,1"
    assert take_slot(several, ["0", "1", "2"], tmp_path) is None  # one is free, and stays so
    single = take_slot(DeviceShare(), ["0", "1", "2"], tmp_path)
    assert single
    assert single.device == "2"
    pair.release()
    assert take_slot(several, ["2", "0", "1"], tmp_path) is not None
