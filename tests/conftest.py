"""Shared fixtures. Everything is made here: no network, no files from outside, a few seconds of one core."""

import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from transformers import Gemma2ForCausalLM

from tests import pretend
from undo.config.schema import Execution, Training
from undo.lm.tokens import MARK, Tokens, collate
from undo.prepare_data.prepare import Prepare, prepare
from undo.prepare_models.reduced_gemma2 import ReducedGemma2
from undo.runs import ranks
from undo.runs.directory import RunDirectory
from undo.runs.run import Run

ON = os.environ.get("UNDO_TESTS_ON", "cpu")  # cuda: the marked tests on the card; pretend: see tests/pretend.py
DEVICE = pretend.begin() if ON == "pretend" else torch.device(ON)

settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")
ROOT = Path(__file__).parents[1]
SHAPE = ReducedGemma2(
    vocab_size=448, hidden_size=16, intermediate_size=32, layers=2, heads=2, kv_heads=1, head_dim=8, query_scale=8
)
HANGS = 1800  # seconds after which a process is taken to hang, and not to be slow
TINY = {  # overrides that make any training stage of the demo take a second
    "pretrain": ["model.hidden_size=16", "model.intermediate_size=32", "model.heads=2", "model.kv_heads=1"],
    "steps": [
        "training.steps=12",
        "training.batch_rows=8",
        "training.evaluate_every=4",
        "execution.checkpoint_every=3",
    ],
}

MODEL = {"hidden_size": 32, "intermediate_size": 64, "heads": 2, "kv_heads": 1}
SMALL = [  # the demo's own configs, so small that every stage takes a second or two
    "prepare.world={problems: 2000, largest_term: 8, largest_factor: 5, validation_per_cell: 6}",
    *(f"pretrain.model.{key}={value}" for key, value in MODEL.items()),
    *(f"{stage}.training.steps=60" for stage in ("pretrain", "distill", "undo")),
    *(f"{stage}.training.batch_rows=4" for stage in ("pretrain", "unlearn", "distill", "undo")),
    "unlearn.training.steps=20",
    "undo.retain_threshold=null",  # a model that has learned nothing would meet it at once
    "relearn.training.steps=6",
    "relearn.training.evaluate_every=2",
    *(f"{stage}.execution.checkpoint_every=3" for stage in ("pretrain", "unlearn", "distill", "undo", "relearn")),
]
CHAIN = ("*undo_0.6-lr_4e-03*",)  # one adversary, and with it prepare, reference, unlearn and undo


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "device: what it asserts holds on every device; UNDO_TESTS_ON=cuda takes it")
    config.addinivalue_line("markers", "cpu: of such a module, what holds on a CPU only")
    if ON == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("UNDO_TESTS_ON=cuda, but torch sees no card")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if DEVICE.type == "cpu":
        return
    left = [item for item in items if not item.get_closest_marker("device") or item.get_closest_marker("cpu")]
    config.hook.pytest_deselected(items=left)
    items[:] = [item for item in items if item not in left]


@pytest.fixture(scope="session", autouse=True)
def _one_thread_and_slots_of_our_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Bit-equal results need a fixed number of threads; device locks must not meet those of a user's launcher.

    A shell makes what it starts in the background ignore SIGINT, and all of its children: tests of Ctrl-C would wait.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    os.environ["TMPDIR"] = str(tmp_path_factory.mktemp("slots"))
    if ON != "cuda":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if ON == "pretend":
        ranks.this_process().device = DEVICE
    return


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A finished prepare run of a small arithmetic world, under the setting `tiny`."""
    run = Run(tmp_path_factory.mktemp("runs"), "tiny", "prepare/data")
    world = {"problems": 4000, "largest_term": 10, "largest_factor": 6, "validation_per_cell": 12, "holdout": 0.1}
    config = Prepare.model_validate(
        {"name": "data", "world": world, "tokenizer": {"name": "words", "vocab_size": 448}, "length": 32}, strict=False
    )
    run.claim(config)
    run.open(config)
    prepare(config, run)
    return run


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of a chain of all stages that nothing happened to, made once for all of pytest's processes. To be read."""
    common = tmp_path_factory.getbasetemp()
    common = common.parent if os.environ.get("PYTEST_XDIST_WORKER") else common
    runs = common / "undisturbed"
    with open(common / "undisturbed.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (runs / "demo/summary.csv").exists():
            finished = run_script("run_all.py", "demo", *SMALL, "--runs", str(runs), "--only", *CHAIN)
            assert finished.returncode == 0, finished.stdout + finished.stderr
    return runs


@pytest.fixture
def model() -> Gemma2ForCausalLM:
    """A random model whose outputs are far from uniform, so that losses and gradients have something to show."""
    return lively(SHAPE.build(seed=0))


def lively(model: Gemma2ForCausalLM, seed: int = 1) -> Gemma2ForCausalLM:
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=rng) * 0.3)
    return model.to(DEVICE)  # pyright: ignore[reportArgumentType, reportCallIssue]


def batch(rows: int = 4, length: int = 12, seed: int = 0, vocab_size: int = SHAPE.vocab_size) -> Tokens:
    """Packed rows of two documents each, of random lengths, half of their tokens marked, with padding behind them."""
    import numpy as np

    rng = np.random.default_rng(seed)

    def document(size: int) -> np.ndarray:
        return rng.integers(4, vocab_size, size=size) | np.where(rng.random(size) < 0.5, MARK, 0)

    sizes = rng.integers(2, length // 2, size=(rows, 2))
    return collate([[document(a), document(b)] for a, b in sizes.tolist()], length).to(DEVICE)


def training(**changes: object) -> Training:
    settings = {"steps": 6, "batch_rows": 4, "learning_rate": 1e-2, "evaluate_every": 3}
    return Training.model_validate(settings | changes, strict=False)


def execution(**changes: object) -> Execution:
    return Execution.model_validate(changes)


def run_script(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """A stage script (or -m and a module) as a user calls it."""
    command = [sys.executable, *(str(ROOT / a) if a.startswith("run_") and a.endswith(".py") else a for a in arguments)]
    environment = {**os.environ, **environment}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=HANGS)


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
