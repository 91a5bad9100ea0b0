"""Which model fits on which card, modelled by lm/memory.py; with --measure, what this device really held beside it.

uv run benchmarks/fits.py                          no device is asked
uv run benchmarks/fits.py --measure [--small]      a line of JSON each; fails where more was held than modelled
"""

import argparse
import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple

from undo.config.schema import Execution, Training
from undo.lm import memory
from undo.lm.shape import Shape
from undo.prepare_models.known import MODELS
from undo.prepare_models.reduced_gemma2 import ReducedGemma2

CARDS: Final = {24: 23.6, 40: 39.4, 80: 79.1, 141: 139.8}  # the GB of their names, and the GiB that CUDA reports
SMALL: Final = ReducedGemma2(
    vocab_size=6000, hidden_size=192, intermediate_size=768, layers=3, heads=4, kv_heads=2, head_dim=32
)
WORKSPACE: Final = 1 << 26  # bytes that cuBLAS may take for itself
NEAR: Final = 1.02  # vectors of a number a token are not modelled


def table(length: int = 1024, batch_rows: int = 8) -> str:
    """Modelled: for each model and kind of run the least change to its config with which it fits on a card."""
    from undo.unlearn import SAM

    cfg = Training(
        steps=1, batch_rows=batch_rows, learning_rate=1e-5, evaluate_every=1, precision="bf16", warmup_steps=0
    )
    lines = [
        f"bf16 autocast, fp32 weights, batches of {batch_rows} rows of {length} tokens; modelled, not measured",
        f"{'model':14}{'run':32}{'as it is':>9}   " + "".join(f"{card:>3} GB{'':24}" for card in CARDS).rstrip(),
    ]
    for name, shape in MODELS.items():
        for kind, frozen, held in (
            ("finetuning", (), 0),
            ("with a teacher or reference", (shape,), 0),
            ("SAM, with a reference", (shape,), SAM(ascent="total").held_per_weight),
        ):
            found = list(memory.options(shape, cfg, Execution(), length, frozen=frozen, held=held))
            cells = []
            for gib in CARDS.values():
                fitting = next((option for option in found if option.memory.total <= gib * 2**30), None)
                cells.append("does not fit" if fitting is None else _short(fitting.keys))
            total = f"{found[0].memory.total / 1e9:.0f} GB"
            lines.append(f"{name:14}{kind:32}{total:>9}   " + "".join(f"{cell:30}" for cell in cells).rstrip())
    return "\n".join(lines)


def _short(keys: str) -> str:
    names = {"execution.gradient_checkpointing=true": "checkpointing", "training.optimizer=adamw_8bit": "8-bit"}
    parts = [names.get(key, key.removeprefix("execution.").replace("micro_rows=", "rows ")) for key in keys.split()]
    return ", ".join(parts) or "as it is"


# --- what a device holds -------------------------------------------------------------------------------------------


class Peak(NamedTuple):
    """Bytes that tensors held at most, and what was said of them. Without CUDA's context, or Python and libraries."""

    name: str
    measured: int
    modelled: float

    @property
    def enough(self) -> bool:
        return self.measured <= self.modelled


def peaks(small: bool = False) -> Iterator[Peak]:
    """On this device: the losses alone, then whole steps. A CPU is asked for small ones only."""
    from train import SHAPES

    from undo.runs.ranks import this_process

    device = this_process().device
    assert device is not None
    small = small or device.type == "cpu"
    yield from _of_losses(device.type, SMALL if small else SHAPES["0.1B"], 600 if small else 5000)
    length, rows = (64, 4) if small else (2048, 8)
    cfg = Training(steps=1, batch_rows=rows, learning_rate=1e-5, evaluate_every=1, warmup_steps=0, precision="bf16")
    for name in ("small",) if small else ("0.1B", "0.3B"):
        shape = SMALL if small else SHAPES[name]
        for taught in (False, True):
            for micro in (None, rows // 2):
                execution = Execution(micro_rows=micro)
                held = peak_of_two_steps(shape, cfg, execution, length, device, taught=taught)
                frozen = [shape] if taught else []
                said = memory.needed(shape, cfg, execution, length, frozen=frozen, device=device.type)
                kind = "distill" if taught else "pretrain"
                workspace = WORKSPACE if device.type == "cuda" else 0
                yield Peak(f"{name} {kind}, {micro or rows} rows", held, said.total - said.process + workspace)


def _of_losses(device: str, shape: Shape, tokens: int) -> Iterator[Peak]:
    import torch
    from generated import KINDS, work

    gradients = memory.FP32 * shape.hidden_size * (tokens + shape.vocab_size)
    for kind in KINDS:
        for precision in (torch.bfloat16, torch.float32):
            run = work(
                kind,
                tokens=tokens,
                hidden=shape.hidden_size,
                vocabulary=shape.vocab_size,
                precision=precision,
                device=device,
            )
            with held_at_most(device, from_now=True) as peak:
                run()
            frozen = [shape] if "kl" in kind else []
            said = memory._loss(shape, frozen, tokens, precision == torch.bfloat16, device)
            more = WORKSPACE if device == "cuda" else 0
            yield Peak(f"{kind}, {str(precision)[6:]}", peak(), NEAR * (said + gradients) + more)


@contextlib.contextmanager
def held_at_most(device: str, from_now: bool = False) -> Iterator[Callable[[], int]]:
    """Bytes of tensors at the peak, all those of the device or only what is made from now on."""
    import torch
    from counting import Held

    if device == "cpu":
        with Held() as held:
            yield lambda: held.peak
        return
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if from_now else 0
    yield lambda: torch.cuda.max_memory_allocated() - before


def peak_of_two_steps(
    shape: ReducedGemma2,
    cfg: Training,
    execution: Execution,
    length: int,
    device: Any,
    *,
    taught: bool = False,
    method: Any = None,
) -> int:
    """Bytes that tensors held at most, weights included: steps of cross entropy or KL, or of a method like SAM's."""
    import torch
    from accelerate import PartialState

    from undo.lm import place as placing
    from undo.lm.tokens import collate
    from undo.losses import cross_entropy, forward_kl
    from undo.train.gradient import BatchGradient
    from undo.train.optimizer import optimizer_of

    ids = torch.randint(4, shape.vocab_size, (cfg.batch_rows, length), generator=torch.Generator().manual_seed(0))
    tokens = collate([[row] for row in ids.numpy()], length).to(device)
    micro = execution.micro_rows or cfg.batch_rows
    mixed = torch.autocast(device.type, torch.bfloat16, enabled=cfg.precision == "bf16")
    with held_at_most(device.type) as peak:
        model = placing.place(shape.build(0), device)
        teacher = placing.place(placing.freeze(shape.build(1)), device) if taught else None
        weights = list(model.parameters())
        optimizer = optimizer_of(model, weights, cfg)
        for _ in range(2):
            if method is None:
                for part in tokens.micro_batches(micro):
                    with mixed:
                        loss = cross_entropy(model, part) if teacher is None else forward_kl(model, teacher, part)
                    loss.backward()
            else:
                objective = lambda batch: {"forget": -cross_entropy(model, batch["forget"])}  # noqa: E731
                state = PartialState(cpu=device.type == "cpu")
                gradient = BatchGradient(objective, {"forget": tokens}, weights, 0.0, micro, state, mixed)
                for weight, value in zip(weights, method.step(gradient, torch.Generator())[1], strict=True):
                    weight.grad = value
            optimizer.step(cfg.learning_rate)
        return peak()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--small", action="store_true", help="with --measure: on a card, too")
    args = parser.parse_args()
    if not args.measure:
        print(table())
        return
    found = []
    for peak in peaks(args.small):
        found.append(peak)
        sizes = {"measured_gb": round(peak.measured / 1e9, 3), "modelled_gb": round(peak.modelled / 1e9, 3)}
        share = round(peak.measured / peak.modelled, 3)
        print(json.dumps({"name": f"memory/{peak.name}", **sizes, "share": share, "enough": peak.enough}), flush=True)
    if more := [peak.name for peak in found if not peak.enough]:
        raise SystemExit(f"more was held than modelled: {'; '.join(more)}")


if __name__ == "__main__":
    main()
