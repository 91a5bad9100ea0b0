"""One whole relearning attack, evaluations included: ours is the relearn stage, the baseline a plain loop.

    uv run benchmarks/relearn.py [--case demo] [--case language-0.1B]

demo: the demo's model, 100 steps, 400 problems every 10 steps. language-0.1B: the paper's shape, a token cross entropy
on documents of mixed length at every step, about twelve evaluated tokens for each that is trained on, as in the
authors' runs of Table 4; shortened to --steps. language-0.1B-subset: the same with ours on a quarter of the validation
text but for the first and the last evaluation. As in a sweep, the first evaluation was left by an earlier run.
"""

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import numpy as np
from measure import Case, Side

from undo.prepare_models.reduced_gemma2 import ReducedGemma2

DEMO = ReducedGemma2(
    vocab_size=448,
    hidden_size=80,
    intermediate_size=320,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=16,
    query_scale=16,
    init_std=0.05,
)
PAPER = ReducedGemma2(hidden_size=320, intermediate_size=1280)
FOUR_SIDES = ("published", "fixed", "ours", "ours_bf16")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=4, help="of the language cases")
    parser.add_argument("--rows", type=int, default=1, help="of the language cases' batch")
    parser.add_argument("--length", type=int, default=256, help="of a row of the language cases")
    parser.add_argument("--documents", type=int, default=24, help="of validation text")


def cases(args: argparse.Namespace) -> dict[str, Case]:
    language = Case(args.steps * args.rows * args.length, sides=FOUR_SIDES)
    return {
        "demo": Case(100 * 4 * 64, sides=FOUR_SIDES),
        "language-0.1B": language,
        "language-0.1B-subset": language,
    }


def build(case: str, side: Side, args: argparse.Namespace) -> Callable[[], float]:
    import atexit

    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    prepare = _prepare_demo if case == "demo" else _prepare_language
    settings = prepare(folder, args)
    if side.ours:
        return lambda: ours(folder, case, side, settings, args)
    return lambda: plain(folder, case, side, settings, args)


def ours(folder: Path, case: str, side: Side, settings: dict[str, Any], args: argparse.Namespace) -> float:
    from undo.attacks import relearn as run_relearn
    from undo.runs.run import Run

    evaluation = settings["evaluation"]
    if case.endswith("subset"):
        evaluation = {**evaluation, "subset": settings["validation_rows"] // 4}
    config = run_relearn.Relearn.model_validate(
        {
            "name": "attack",
            "data": "prepare/data",
            "model": "pretrain/parent",
            "mixture": {"forget": 1.0},
            "training": {**settings["training"], "precision": "bf16" if side.bf16 else "fp32"},
            "evaluation": evaluation,
        },
        strict=False,
    )
    run = Run(folder, "benchmark", "relearn/attack")
    run.remove()
    run.claim(config)
    run.open(config)
    list(run_relearn.relearn(config, run))
    return run.evaluations()[0]["forget"]


def plain(folder: Path, case: str, side: Side, settings: dict[str, Any], args: argparse.Namespace) -> float:
    import baseline
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from undo.data.problems import Problem
    from undo.data.store import TokenStore
    from undo.runs.ranks import this_process

    data, training = folder / "benchmark/prepare/data", settings["training"]
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder / "benchmark/pretrain/parent/model", dtype=torch.float32, attn_implementation="eager"
    )
    torch.nn.Module.to(model, this_process().device)
    optimizer = torch.optim.AdamW(model.parameters(), training["learning_rate"], fused=side.fixes or None)
    store = TokenStore(data / "train/forget")
    tokenizer = AutoTokenizer.from_pretrained(data / "tokenizer") if case == "demo" else None
    problems, texts = [], []
    if tokenizer is not None:
        problems = [Problem(**json.loads(line)) for line in (data / "problems.jsonl").read_text().splitlines()]
    else:
        texts = [_documents(role, "validation", args) for role in ("retain", "forget")]

    def evaluate() -> float:
        with torch.no_grad():
            if tokenizer is not None:
                return baseline.accuracy(model, tokenizer, problems, at_once=100 if side.fixes else 1)
            return [baseline.validation_loss(model, documents, 8, args.length) for documents in texts][-1]

    first = evaluate()
    for step in range(training["steps"]):
        rows = [np.concatenate(store[step * training["batch_rows"] + i]) for i in range(training["batch_rows"])]
        ids = torch.from_numpy(np.stack([row[: min(map(len, rows))] for row in rows]).astype(np.int64)).to(model.device)
        loss = baseline.cross_entropy(model(ids, use_cache=False).logits, ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % training["evaluate_every"] == 0:
            evaluate()
    return first


def _documents(role: str, part: str, args: argparse.Namespace) -> list[np.ndarray]:
    """Random words; lengths of 50 to a whole row, a third of a row in the median."""
    rng = np.random.default_rng([role == "forget", part == "train"])
    count = 4 * args.steps * args.rows + 8 if part == "train" else args.documents // 2
    sizes = np.clip(rng.lognormal(np.log(args.length / 3), 0.8, count).astype(int), 50, args.length)
    return [rng.integers(4, PAPER.vocab_size, size) for size in sizes]


def _prepare_language(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    from undo.data.store import pack
    from undo.runs.directory import RunDirectory

    data = RunDirectory(folder, "benchmark", "prepare/data")
    rows = {}
    for role in ("retain", "forget"):
        for part in ("train", "validation"):
            (data.folder / part).mkdir(parents=True, exist_ok=True)
            texts = _documents(role, part, args)
            rows[part, role] = len(pack(texts, data.folder / part / role, args.length, PAPER.vocab_size))
    (data.folder / "run.json").write_text(json.dumps({"identity": "data"}))
    _parent(folder, PAPER)
    training = {"steps": args.steps, "batch_rows": args.rows, "learning_rate": 1e-5, "evaluate_every": 1}
    evaluation = {"name": "cross_entropy", "rows": 4 if not measure.cuda() else 32}
    return {"training": training, "evaluation": evaluation, "validation_rows": rows["validation", "forget"]}


def _prepare_demo(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    from undo.prepare_data.prepare import Prepare, prepare
    from undo.runs.run import Run

    world = {"problems": 8000, "largest_term": 20, "largest_factor": 10, "validation_per_cell": 50}
    config = Prepare.model_validate(
        {"name": "data", "world": world, "tokenizer": {"name": "words", "vocab_size": 448}, "length": 64}, strict=False
    )
    run = Run(folder, "benchmark", "prepare/data")
    run.claim(config)
    run.open(config)
    prepare(config, run)
    _parent(folder, DEMO)
    training = {"steps": 100, "batch_rows": 4, "learning_rate": 1e-3, "evaluate_every": 10}
    return {"training": training, "evaluation": {"name": "accuracy"}}


def _parent(folder: Path, shape: ReducedGemma2) -> None:
    model = shape.build(0)
    parent = folder / "benchmark/pretrain/parent"
    model.save_pretrained(parent / "model")  # pyright: ignore[reportCallIssue]
    (parent / "run.json").write_text(json.dumps({"identity": "parent"}))


if __name__ == "__main__":
    measure.main(__file__, __doc__ or "", arguments, cases, build)
