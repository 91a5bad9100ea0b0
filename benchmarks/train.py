"""Training steps of the paper's models, clipping and AdamW included: ours is the real loop, the baseline a plain one.

    uv run benchmarks/train.py [--case distill-0.1B] [--length 256] [--rows 1] [--steps 2]

Cases: cross entropy and KL of the 0.1B and 0.3B shapes (Table 1), RMU on 14 layers, and a relearning attack on the 2B.
The 0.3B ones need about 5 GiB a side, the attack 60: they are measured on a GPU, or on request. MFU counts the FLOPs of
the model, causal attention included, and no recomputation; the floor of performance.md is an MFU of 0.8 (790 of 989
TFLOP/s).
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
from measure import Case, Side

from undo.prepare_models.reduced_gemma2 import ReducedGemma2

SHAPES = {
    "0.1B": ReducedGemma2(hidden_size=320, intermediate_size=1280),
    "0.3B": ReducedGemma2(hidden_size=768, intermediate_size=3072),
    "2B": ReducedGemma2.model_validate({"size": "2B"}),
}
CASES = {  # and how many forward passes a step's arithmetic is
    "pretrain-0.1B": 3,
    "pretrain-0.3B": 3,
    "distill-0.1B": 4,
    "distill-0.3B": 4,
    "rmu-0.1B": None,
    "attack-2B": 3,
}
EVERYWHERE = ("pretrain-0.1B", "distill-0.1B", "rmu-0.1B")
RMU = {"layer": 10, "trained_layers": [8, 9, 10]}
FOUR_SIDES = ("published", "fixed", "ours", "ours_bf16")  # more do not fit 24 GiB side by side


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rows", type=int, default=1, help="of the batch")
    parser.add_argument("--micro-rows", type=int, help="rows in one forward and backward; default: the batch")
    parser.add_argument("--our-micro-rows", type=int, help="ours, which takes less memory; default: the same")
    parser.add_argument("--steps", type=int, default=2, help="in one repetition")
    parser.add_argument("--vocabulary", type=int, default=256_000)
    parser.add_argument("--compile", action="store_true", help="our model's body")
    parser.add_argument("--small", action="store_true", help="tiny models, to try the script")


def shape_of(case: str, args: argparse.Namespace) -> ReducedGemma2:
    tiny = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "layers": 11} if args.small else {}
    return SHAPES[case.partition("-")[2]].model_copy(update=tiny | {"vocab_size": args.vocabulary})


def cases(args: argparse.Namespace) -> dict[str, Case]:
    found = {}
    for name, passes in CASES.items():
        if name not in (args.case or (CASES if measure.cuda() else EVERYWHERE)):
            continue
        tokens = args.steps * args.rows * args.length * (2 if name.startswith("rmu") else 1)
        flops = passes and passes * shape_of(name, args).forward_flops(args.length) * tokens
        # gradients of two models that start apart by rounding: the loss after a step of Adam differs more
        found[name] = Case(tokens, flops, tolerance=0.02, sides=FOUR_SIDES)
    return found


def build(case: str, side: Side, args: argparse.Namespace) -> Callable[[], float]:
    import torch

    from undo.lm import place as placing
    from undo.runs.ranks import this_process

    device = this_process().device
    assert device is not None
    student, teacher = shape_of(case, args).build(0), None
    if case.startswith(("distill", "rmu")):
        teacher = placing.freeze(shape_of(case, args).build(1))
    if side.ours:
        student = placing.place(student, device, args.compile)
        teacher = teacher and placing.place(teacher, device, args.compile)
    else:
        torch.nn.Module.to(student, device)
        teacher = teacher and torch.nn.Module.to(teacher, device)
    rng = torch.Generator().manual_seed(0)
    streams = 2 if case.startswith("rmu") else 1
    ids = torch.randint(args.vocabulary, (args.steps, streams, args.rows, args.length), generator=rng)
    side_of = ours if side.ours else plain
    return side_of(case, side, args, student, teacher, ids)


def plain(case: str, side: Side, args: argparse.Namespace, student: Any, teacher: Any, ids: Any) -> Callable[[], float]:
    import baseline
    import torch

    if case.startswith("rmu"):
        for name, weight in student.named_parameters():
            weight.requires_grad_(any(f"layers.{i}.mlp.down_proj" in name for i in RMU["trained_layers"]))
    weights = [weight for weight in student.parameters() if weight.requires_grad]
    direction = torch.ones(student.config.hidden_size, device=student.device)
    micro = args.micro_rows or args.rows

    def loss_of(part: Any) -> Any:
        if case.startswith("rmu"):
            return baseline.rmu(student, teacher, part, RMU["layer"], direction)
        part = part[0]
        if teacher is None:
            return baseline.cross_entropy(student(part, use_cache=False).logits, part)
        with torch.no_grad():
            target = teacher(part, use_cache=False).logits
        return baseline.forward_kl(target, student(part, use_cache=False).logits, part)

    def once() -> float:
        optimizer = torch.optim.AdamW(weights, 1e-5, fused=side.fixes or None)  # anew each time, as in the loop
        first = 0.0
        for step, batch in enumerate(ids.to(student.device)):
            value = 0.0
            for start in range(0, args.rows, micro):
                loss = loss_of(batch[:, start : start + micro]) * micro / args.rows
                loss.backward()
                value += loss.item()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            first = value if step == 0 else first
        return first

    return once


def ours(case: str, side: Side, args: argparse.Namespace, student: Any, teacher: Any, ids: Any) -> Callable[[], float]:
    """The loop itself, with its records; checkpoints, evaluation and the reading of stores are left out."""
    import torch

    from undo.config.schema import StageConfig, Training
    from undo.evaluate.evaluator import Measured
    from undo.lm.tokens import collate
    from undo.losses import cross_entropy, forward_kl
    from undo.runs.run import Run
    from undo.train.loop import train
    from undo.unlearn import rmu

    class Rows:
        """Stands in for a MixedStream."""

        def __init__(self, index: int) -> None:
            self.index = index

        def batch(self, step: int, rank: int, ranks: int) -> Any:
            return collate([[row] for row in ids[step, self.index].numpy()], args.length)

    names = ("forget", "retain") if case.startswith("rmu") else ("train",)
    streams: Any = {name: Rows(i) for i, name in enumerate(names)}
    if case.startswith("rmu"):
        method = rmu.RMU.model_validate(RMU, strict=False)
        for name, weight in student.named_parameters():
            weight.requires_grad_(method.trains(name))
        objective = method.objective(student, teacher, torch.Generator().manual_seed(0))
    elif teacher is None:
        objective = lambda batch: {"ce": cross_entropy(student, batch["train"])}  # noqa: E731
    else:
        objective = lambda batch: {"kl": forward_kl(student, teacher, batch["train"])}  # noqa: E731
    training = Training(
        steps=args.steps,
        batch_rows=args.rows,
        learning_rate=1e-5,
        weight_decay=0.01,
        precision="bf16" if side.bf16 else "fp32",
        evaluate_every=args.steps,
    )

    def once() -> float:
        with tempfile.TemporaryDirectory() as folder:
            run = Run(Path(folder), "benchmark", "train/x")
            execution = {"micro_rows": args.our_micro_rows or args.micro_rows}
            config = StageConfig.model_validate({"name": "x", "execution": execution})
            run.claim(config)
            run.open(config)
            train(
                student, objective, streams, training, run.configured.execution, run, lambda step, full: Measured({}, 0)
            )
            return next(line["loss"] for line in run.records() if "loss" in line)

    return once


if __name__ == "__main__":
    measure.main(__file__, __doc__ or "", arguments, cases, build)
