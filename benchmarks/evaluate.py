"""Evaluations: arithmetic accuracy and validation loss, against decoding prompt by prompt and padding to the maximum.

    uv run benchmarks/evaluate.py [--case accuracy] [--problems 800] [--documents 64] [--length 512]

The accuracy is that of the paper's 14 layers of width 320 with a small vocabulary; the validation loss that of 4
layers with 32,000 words. Its documents are as long as the authors' text is on average: 690 tokens of 2,048.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import measure
import numpy as np
from measure import Case, Side

from undo.prepare_models.reduced_gemma2 import ReducedGemma2

SHAPE = ReducedGemma2(vocab_size=32_000, hidden_size=320, intermediate_size=1280)
FOUR_SIDES = ("published", "fixed", "ours", "ours_bf16")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--problems", type=int, default=800)
    parser.add_argument("--documents", type=int, default=64)
    parser.add_argument("--length", type=int, default=512, help="of a row of text; the baseline pads to it")


def documents(args: argparse.Namespace) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    sizes = np.clip(
        rng.lognormal(np.log(args.length * 690 / 2048) - 0.32, 0.8, args.documents).astype(int), 50, args.length
    )
    return [rng.integers(4, SHAPE.vocab_size, size) for size in sizes]


def cases(args: argparse.Namespace) -> dict[str, Case]:
    tokens = sum(map(len, documents(args)))
    return {
        "accuracy": Case(args.problems, sides=FOUR_SIDES),  # problems, not tokens
        "validation_loss": Case(
            tokens, SHAPE.model_copy(update={"layers": 4}).forward_flops(args.length) * tokens, sides=FOUR_SIDES
        ),
    }


def build(case: str, side: Side, args: argparse.Namespace) -> Callable[[], float]:
    return (accuracy if case == "accuracy" else validation_loss)(side, args)


def accuracy(side: Side, args: argparse.Namespace) -> Callable[[], float]:
    import baseline
    import torch
    from transformers import AutoTokenizer

    from undo.data.problems import Problem
    from undo.evaluate import Accuracy
    from undo.lm import place as placing
    from undo.prepare_data.prepare import Prepare, prepare
    from undo.runs.ranks import this_process
    from undo.runs.run import Run

    device = this_process().device
    assert device is not None
    world = {"problems": 8000, "largest_term": 20, "largest_factor": 10, "validation_per_cell": args.problems // 8}
    config = Prepare.model_validate(
        {"name": "data", "world": world, "tokenizer": {"name": "words", "vocab_size": 448}, "length": 64}, strict=False
    )
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder), "benchmark", "prepare/data")
        run.claim(config)
        run.open(config)
        prepare(config, run)
        tokenizer = AutoTokenizer.from_pretrained(run.folder / "tokenizer")
        evaluate = Accuracy().load(run, device)
        problems = [Problem(**json.loads(line)) for line in (run.folder / "problems.jsonl").read_text().splitlines()]
    model = SHAPE.build(0)
    if side.ours:
        placing.place(model, device)
    else:
        torch.nn.Module.to(model, device)

    def once() -> float:  # a random model: both sides find next to nothing right. Tests hold the two methods equal
        with torch.no_grad():
            if side.ours:
                return sum(evaluate(model, True).values[role] for role in ("retain", "forget")) / 2
            return baseline.accuracy(model, tokenizer, problems, at_once=100 if side.fixes else 1)

    return once


def validation_loss(side: Side, args: argparse.Namespace) -> Callable[[], float]:
    import baseline
    import torch

    from undo.data.store import pack
    from undo.evaluate import TokenCrossEntropy
    from undo.lm import place as placing
    from undo.runs.directory import RunDirectory
    from undo.runs.ranks import this_process

    device = this_process().device
    assert device is not None
    texts = documents(args)
    model = SHAPE.model_copy(update={"layers": 4}).build(0)
    if side.ours:
        placing.place(model, device)
    else:
        torch.nn.Module.to(model, device)
    with tempfile.TemporaryDirectory() as folder:
        run = RunDirectory(Path(folder), "benchmark", "prepare/data")
        for role, part in (("retain", texts[::2]), ("forget", texts[1::2])):
            (run.folder / "validation").mkdir(parents=True, exist_ok=True)
            pack(part, run.folder / "validation" / role, args.length, SHAPE.vocab_size)
        evaluate = TokenCrossEntropy(rows=2 if device.type == "cpu" else 32).load(run, device)

    def once() -> float:
        with torch.no_grad():
            if side.ours:
                return sum(evaluate(model, True).values[role] for role in ("retain", "forget")) / 2
            return sum(baseline.validation_loss(model, texts[i::2], 8, args.length) for i in (0, 1)) / 2

    return once


if __name__ == "__main__":
    measure.main(__file__, __doc__ or "", arguments, cases, build)
