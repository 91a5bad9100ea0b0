"""Students of one teacher side by side, and the same ones each on its own: how much less work it is.

    OMP_NUM_THREADS=1 uv run python benchmarks/students.py [--students 4] [--rounds 5] [--case demo]

The loop itself on random tokens, in fp32 on one thread, without evaluation and checkpoints. Both ways take turns in one
process and are compared in CPU seconds, so that other processes count little; every loss is compared, too. Beside the
measured ratio stands that of the arithmetic, and a table of what it would be on an H200, modelled.
"""

import argparse
import os
import statistics
import time
from importlib.metadata import version
from typing import Any

import torch

from undo.config.schema import Execution, Training
from undo.distill.teacher import Teacher
from undo.evaluate.evaluator import Measured
from undo.lm import memory, place
from undo.lm.tokens import Tokens, collate
from undo.losses import forward_kl
from undo.prepare_models.reduced_gemma2 import SIZES, ReducedGemma2
from undo.runs.company import Company
from undo.runs.precision import cpu
from undo.train.loop import stepwise
from undo.train.recorder import InMemory

DEMO = ReducedGemma2(
    vocab_size=448, hidden_size=80, intermediate_size=320, layers=2, heads=4, kv_heads=2, head_dim=16, query_scale=16
)
# name -> shape, rows of a step, length. `deep`: blocks of the 0.1B under a head with the share that a 2B's has
CASES = {
    "demo": (DEMO, 32, 64),
    "deep": (ReducedGemma2.model_validate({"size": "0.1B", "vocab_size": 7_800, "layers": 4}), 4, 128),
    "0.1B": (ReducedGemma2.model_validate({"size": "0.1B"}), 1, 128),
}
H200 = (("0.1B", 2048, 8), ("0.3B", 256, 64), ("2B", 256, 10))  # size, length, rows at once
BYTES = 141e9


class Random:
    """Stands in for a MixedStream."""

    def __init__(self, rows: int, length: int, vocabulary: int, steps: int) -> None:
        ids = torch.randint(vocabulary, (steps, rows, length), generator=torch.Generator().manual_seed(0)).numpy()
        self._batches = [collate([[row] for row in batch], length) for batch in ids]

    def batch(self, step: int) -> Tokens:
        return self._batches[step]


def train(shape: ReducedGemma2, stream: Any, cfg: Training, students: int, together: bool) -> tuple[float, list[Any]]:
    """CPU seconds of all students, and their records."""
    device, company = torch.device("cpu"), Company()
    teacher = Teacher(place.freeze(place.place(shape.build(0), device)), company)
    models = [place.place(shape.build(1 + seed), device) for seed in range(students)]
    recorders = [InMemory(cfg.steps) for _ in models]
    turns = [
        stepwise(
            model,
            lambda batch, model=model: {
                "kl": forward_kl(model, teacher.model, batch["train"], read=teacher.hidden_states)
            },
            {"train": stream},
            cfg,
            Execution(),
            recorder,
            lambda step, full: Measured({}, 0),
        )
        for model, recorder in zip(models, recorders, strict=True)
    ]
    for loop in turns:
        next(loop)
    began = time.process_time()
    order = [(s, i) for s in range(cfg.steps + 1) for i in range(students)]
    for company.step, number in order if together else sorted(order, key=lambda turn: turn[1]):
        company.followers = students - 1 - number if together else 0
        next(turns[number], None)
    return time.process_time() - began, [recorder.records for recorder in recorders]


def of_the_arithmetic(shape: Any, length: int, students: int) -> tuple[float, float]:
    """The share of the teacher's body in a distillation step, and how many times less work there is side by side."""
    body = 1 - shape.head_flops / shape.forward_flops(length)
    return body / 4, 1 / (1 - body / 4 * (students - 1) / students)


def measured(case: str, students: int, rounds: int, steps: int) -> str:
    shape, rows, length = CASES[case]
    stream = Random(rows, length, shape.vocab_size, steps)
    cfg = Training(steps=steps, batch_rows=rows, learning_rate=1e-4, evaluate_every=steps)
    train(shape, stream, cfg, 1, together=False)  # whatever is slow once
    apart, beside = [], []
    for _ in range(rounds):
        seconds, alone = train(shape, stream, cfg, students, together=False)
        apart.append(seconds)
        seconds, together = train(shape, stream, cfg, students, together=True)
        beside.append(seconds)
        assert alone == together, "side by side the losses are others"
    ratios = sorted(a / b for a, b in zip(apart, beside, strict=True))
    share, ratio = of_the_arithmetic(shape, length, students)
    seconds, middle = (statistics.median(apart), statistics.median(beside)), statistics.median(ratios)
    return (
        f"| {case}, {rows} x {length} tokens, {steps} steps | {seconds[0]:.2f} | {seconds[1]:.2f} | **{middle:.3f}** | "
        f"{ratios[0]:.3f} to {ratios[-1]:.3f} | {100 * share:.1f} % | {ratio:.3f} |"
    )


def modelled(size: str, length: int, rows: int, students: int) -> str:
    shape = ReducedGemma2.model_validate({"size": size})
    share, ratio = of_the_arithmetic(shape, length, students)
    cfg = Training(steps=1, batch_rows=rows, learning_rate=1e-4, evaluate_every=1, precision="bf16")
    asked: Any = {"shape": shape, "cfg": cfg, "execution": Execution(), "length": length, "frozen": [shape]}
    needed = [memory.needed(**asked, beside=others).total for others in range(students)]
    fit = sum(total <= BYTES for total in needed)
    _, of_those = of_the_arithmetic(shape, length, fit)
    return (
        f"| {size}, {rows} x {length} tokens | {100 * share:.1f} % | {ratio:.3f} | {needed[0] / 1e9:.0f} | "
        f"{needed[-1] / 1e9:.0f} | {fit} | {of_those:.3f} |"
    )


def main() -> None:
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("--students", type=int, default=4)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--case", choices=CASES, action="append")
    args = arguments.parse_args()
    torch.set_num_threads(1)
    machine = f"{cpu()['name']}, one thread, load {os.getloadavg()[0]:.1f}"
    print(f"{machine}; torch {version('torch')}, transformers {version('transformers')}\n")
    names = "CPU s, one by one", "side by side", "ratio", "all rounds", "teacher's body", "by arithmetic"
    print("| " + " | ".join((f"{args.students} students", *names)) + " |")
    print("| --- " * 7 + "|")
    for case in args.case or ("demo", "deep"):  # the 0.1B takes minutes
        print(measured(case, args.students, args.rounds, steps=8 if case == "demo" else 2), flush=True)
    print("\nOne H200, **modelled, not measured**: every FLOP takes the same time; memory as the estimate has it.\n")
    n = args.students
    names = "teacher's body", f"ratio of {n}", "GB alone", f"GB of {n}", f"of {n} fit in 141 GB", "ratio of those"
    print("| " + " | ".join(("step", *names)) + " |\n" + "| --- " * 7 + "|")
    for size, length, rows in H200:
        assert size in SIZES
        print(modelled(size, length, rows, args.students))


if __name__ == "__main__":
    main()
