"""What only a card can say of the parts: its ceilings, the kernels on tiles, memory, recompilation, synchronisations.

    uv run benchmarks/card.py ceilings|tiles|memory|recompiles|syncs [--small] [--budget SECONDS] [--out FILE.jsonl]

ceilings    a copy in TB/s, a bf16 product in TFLOP/s, and the head's three products at the widths of Table 1
tiles       each loss's kernels on one tile: microseconds a token, compile time, and memory beside the tile
memory      the peak of real training steps beside what lm/memory.py says
recompiles  the shapes of a real run, one after the other: graphs and seconds
syncs       where the host waits for the card, in steps of the loop
benchmarks/gpu.sh calls them. On a CPU they run at small sizes, to be tested.
"""

import argparse
import json
import statistics
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import measure
import numpy as np
import torch

from undo.config.schema import Execution, StageConfig, Training
from undo.data.rows import PackedDocuments
from undo.data.stream import MixedStream
from undo.evaluate.evaluator import Measured
from undo.lm import memory as modelled
from undo.lm import place as placing
from undo.lm.read import Head
from undo.lm.tokens import collate
from undo.losses import cross_entropy, forward_kl
from undo.losses.linear import linear_loss
from undo.losses.targets import CrossEntropy, ForwardKL, UniformKL
from undo.prepare_models.reduced_gemma2 import ReducedGemma2
from undo.runs.ranks import this_process
from undo.runs.run import Run
from undo.train.loop import train

VOCABULARY: Final = 256_000
TILE: Final = 2097  # rows of one tile of 2 GiB
TINY: Final = ReducedGemma2(
    vocab_size=2000, hidden_size=64, intermediate_size=128, layers=2, heads=4, kv_heads=2, head_dim=16
)


class Card:
    """The device, how large to ask, when to begin nothing new, and where lines go."""

    def __init__(self, small: bool, budget: float, out: Path | None) -> None:
        device = this_process().device
        assert device is not None
        self.device, self.cuda, self.small, self.out = device, device.type == "cuda", small, out
        self._end = time.monotonic() + budget

    @property
    def late(self) -> bool:
        return time.monotonic() > self._end

    def say(self, **line: Any) -> None:
        text = json.dumps(line)
        print(text, flush=True)
        if self.out:
            with open(self.out, "a") as file:
                file.write(text + "\n")

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], Any], times: int = 5) -> tuple[float, float]:
        """The first call, and the median of the others."""
        taken = []
        for _ in range(times + 1):
            self.wait()
            began = time.perf_counter()
            work()
            self.wait()
            taken.append(time.perf_counter() - began)
        return taken[0], statistics.median(taken[1:])

    def draw(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(shape, generator=torch.Generator(self.device).manual_seed(0), device=self.device).to(dtype)


def ceilings(card: Card) -> None:
    size = 1 << (22 if card.small else 31)
    source = torch.zeros(size, dtype=torch.uint8, device=card.device)
    copied = card.seconds(source.clone)[1]
    card.say(name="copy", tb_per_s=round(2 * size / copied / 1e12, 3))
    side = 256 if card.small else 8192
    a, b = (card.draw(side, side, dtype=torch.bfloat16) for _ in range(2))
    card.say(name="product", tflop_per_s=round(2 * side**3 / card.seconds(lambda: a @ b)[1] / 1e12, 2))
    rows, vocabulary = (64, 2000) if card.small else (TILE, VOCABULARY)
    slope = card.draw(rows, vocabulary, dtype=torch.bfloat16)
    for width in (320, 768, 2304):
        hidden, weight = (card.draw(n, width, dtype=torch.bfloat16) for n in (rows, vocabulary))
        products = {
            "logits": (hidden, weight.T),
            "hidden_gradient": (slope, weight),
            "weight_gradient": (slope.T, hidden),
        }
        for name, (x, y) in products.items():
            seconds = card.seconds(lambda x=x, y=y: _in_fp32(x, y))[1]
            rate = 2 * rows * vocabulary * width / seconds / 1e12
            card.say(name=f"head/{width}/{name}", tflop_per_s=round(rate, 2), ms=round(1e3 * seconds, 3))


def _in_fp32(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The product of bf16 matrices with an fp32 result, which a CPU does not have."""
    return torch.mm(x, y, out_dtype=torch.float32) if x.is_cuda else torch.mm(x, y)  # pyright: ignore[reportCallIssue]


def tiles(card: Card) -> None:
    """Whole losses of one tile, forward and backward, at a narrow width: the products are a small part of it."""
    rows, vocabulary, width = (64, 2000, 16) if card.small else (TILE, VOCABULARY, 64)
    hidden, weight = card.draw(rows, width).requires_grad_(), card.draw(vocabulary, width).requires_grad_()
    teacher = card.draw(rows, width), Head(card.draw(vocabulary, width), 30.0)
    labels = torch.randint(vocabulary, (rows,), device=card.device)
    for name, target in {
        "ce": CrossEntropy(labels),
        "maxent": UniformKL(),
        "kl": ForwardKL(*teacher),
    }.items():

        def once(target: Any = target) -> None:
            with torch.autocast(card.device.type, torch.bfloat16):
                loss = linear_loss(hidden, Head(weight, 30.0), target)
            loss.backward()
            hidden.grad = weight.grad = None

        first, seconds = card.seconds(once)
        peak = None
        if card.cuda:
            held = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            once()
            peak = round((torch.cuda.max_memory_allocated() - held) / 1e9, 2)
        us = round(1e6 * seconds / rows, 3)
        card.say(name=f"tile/{name}", us_per_token=us, first_call_s=round(first, 2), peak_gb=peak)


class _Step:
    """A few real steps of the loop; the pace is the loop's own, which leaves the first step out."""

    def __init__(self, card: Card, shape: ReducedGemma2, length: int, rows: int, micro: int, distils: bool) -> None:
        self.card, self.shape, self.length, self.rows, self.distils = card, shape, length, rows, distils
        self.training = Training(
            steps=4, batch_rows=rows, learning_rate=1e-5, weight_decay=0.1, precision="bf16", evaluate_every=4
        )
        self.execution = Execution(micro_rows=micro)

    def needed(self) -> modelled.Memory:
        frozen = [self.shape] if self.distils else []
        return modelled.needed(
            self.shape, self.training, self.execution, self.length, frozen=frozen, device=self.card.device.type
        )

    def run(self) -> float:
        """-> tokens per second."""
        student, teacher = placing.place(self.shape.build(0), self.card.device), None
        if self.distils:
            teacher = placing.place(placing.freeze(self.shape.build(1)), self.card.device)
        texts = np.random.default_rng(0).integers(0, self.shape.vocab_size, (2 * self.rows, self.length))
        documents = PackedDocuments([*texts], self.length, self.shape.vocab_size)
        stream = MixedStream({"retain": documents}, {"retain": 1.0}, self.rows, seed=0)

        def objective(batch: Any) -> dict[str, torch.Tensor]:
            if teacher is None:
                return {"ce": cross_entropy(student, batch["train"])}
            return {"kl": forward_kl(student, teacher, batch["train"])}

        with tempfile.TemporaryDirectory() as folder:
            run, config = Run(Path(folder), "benchmark", "train/x"), StageConfig(name="x")
            run.claim(config)
            run.open(config)
            outcome = train(
                student, objective, {"train": stream}, self.training, self.execution, run, lambda *_: Measured({}, 0)
            )
        assert outcome.tokens_per_second is not None
        return outcome.tokens_per_second


def memory(card: Card) -> None:
    plan = [
        ("0.1B", 2048, 32, 16, False),
        ("0.1B", 2048, 24, 12, True),
        ("0.3B", 256, 240, 120, False),
        ("0.3B", 256, 120, 60, True),
        ("2B", 1024, 8, 4, False),
    ]
    for size, length, rows, micro, distils in plan[:2] if card.small else plan:
        name = f"memory/{size}/{'distill' if distils else 'pretrain'}"
        if card.late:
            card.say(name=name, skipped="no time left")
            continue
        shape = TINY if card.small else ReducedGemma2.model_validate({"size": size})
        step = _Step(card, shape, *((64, 4, 2) if card.small else (length, rows, micro)), distils)
        if card.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        pace, said = step.run(), step.needed()
        peak = round(torch.cuda.max_memory_allocated() / 1e9, 2) if card.cuda else None
        total = round(said.total / 1e9, 2)
        card.say(name=name, tokens_per_s=round(pace), peak_gb=peak, modelled_gb=total, modelled=str(said))


def recompiles(card: Card) -> None:
    from torch._dynamo.utils import counters

    network = placing.place(TINY.build(0), card.device, compiled=card.cuda)
    shapes = [(12, 256, True), (32, 256, False), (16, 256, False), (7, 256, False), (12, 100, False), (8, 256, True)]
    for rows, length, gradient in shapes[:3] if card.small else shapes:
        drawn = torch.randint(TINY.vocab_size, (rows, length), generator=torch.Generator().manual_seed(0)).numpy()
        text, began = collate([[row] for row in drawn], length).to(card.device), time.perf_counter()
        with torch.set_grad_enabled(gradient), torch.autocast(card.device.type, torch.bfloat16):
            loss = cross_entropy(network, text)
        if gradient:
            loss.backward()
        card.wait()
        graphs, seconds = counters["stats"].get("unique_graphs", 0), round(time.perf_counter() - began, 2)
        card.say(name=f"recompiles/{rows}x{length}", gradient=gradient, seconds=seconds, graphs=graphs)


def syncs(card: Card) -> None:
    shape = TINY if card.small else ReducedGemma2.model_validate({"size": "0.1B", "layers": 2})
    step = _Step(card, shape, 64 if card.small else 512, 4, 2, distils=False)
    step.run()  # compiled by now
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        if card.cuda:
            torch.cuda.set_sync_debug_mode("warn")
        step.run()
        if card.cuda:
            torch.cuda.set_sync_debug_mode("default")
    where = Counter(f"{Path(w.filename).name}:{w.lineno}" for w in found if "synchroniz" in str(w.message))
    card.say(name="syncs", steps=4, micro_batches=8, where=dict(where))


PARTS: Final[dict[str, Callable[[Card], None]]] = {
    "ceilings": ceilings,
    "tiles": tiles,
    "memory": memory,
    "recompiles": recompiles,
    "syncs": syncs,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument("--small", action="store_true", help="seconds on one core; always on a CPU")
    parser.add_argument("--budget", type=float, default=240, metavar="SECONDS", help="after these, no step begins")
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file as well")
    args = parser.parse_args()
    on_a_card = torch.cuda.is_available()
    card = Card(args.small or not on_a_card, args.budget, args.out)
    card.say(name="card", parts=args.parts, **measure.environment())
    failed = []
    for name in args.parts:
        try:
            PARTS[name](card)
        except Exception as error:  # another part may still say something
            traceback.print_exc()
            card.say(name=name, failed=f"{type(error).__name__}: {error}"[:500])
            failed.append(name)
    raise SystemExit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
