"""Before anything is timed: are the fast paths of this device equal to the formulas? Ends in a line of JSON.

    uv run benchmarks/equality.py [--vocabulary 32000]

Losses and their gradients against full logits in float64, in fp32 (1e-5) and with bf16 products (2e-2); the attention
of the device against eager attention; with --compile, the compiled body against the plain one.
"""

import argparse
import json
import math

import baseline
import measure
import torch

from undo.lm import place as placing
from undo.lm.read import Head
from undo.lm.tokens import collate
from undo.losses import cross_entropy
from undo.losses.linear import linear_loss
from undo.losses.targets import CrossEntropy, ForwardKL, UniformKL
from undo.prepare_models.reduced_gemma2 import ReducedGemma2
from undo.runs.ranks import this_process

SOFTCAP = 30.0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    device = this_process().device
    assert device is not None
    errors: dict[str, tuple[float, float]] = {}  # what: relative error, bound
    for kind in ("kl", "ce", "maxent"):
        for precision, bound in (("fp32", 1e-5), ("bf16", 2e-2)):
            for name, error in losses(kind, precision, args, device).items():
                errors[f"{kind}/{precision}/{name}"] = error, bound
    for name, error in attention(device, args.compile).items():
        errors[f"attention/{name}"] = error, 1e-3 if device.type == "cuda" else 1e-5
    line = {
        "name": "equality",
        "relative_errors": {name: float(f"{error:.1e}") for name, (error, _) in errors.items()},
        "too_large": [name for name, (error, bound) in errors.items() if not error <= bound],
        **measure.environment(),
    }
    print(json.dumps(line))
    if line["too_large"]:
        raise SystemExit(f"not equal: {', '.join(line['too_large'])}")


def losses(kind: str, precision: str, args: argparse.Namespace, device: torch.device) -> dict[str, float]:
    rng = torch.Generator().manual_seed(0)

    def draw(rows: int) -> torch.Tensor:
        return torch.randn(rows, 64, generator=rng).to(device)

    hidden, weight, taught = draw(args.tokens), draw(args.vocabulary), (draw(args.tokens), draw(args.vocabulary))
    labels = torch.randint(args.vocabulary, (args.tokens,), generator=rng).to(device)
    single, double = [
        [t.detach().to(d, copy=True).requires_grad_() for t in (hidden, weight)] for d in (torch.float32, torch.float64)
    ]
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        target = {
            "kl": ForwardKL(taught[0], Head(taught[1], SOFTCAP)),
            "ce": CrossEntropy(labels),
            "maxent": UniformKL(),
        }
        loss = linear_loss(single[0], Head(single[1], SOFTCAP), target[kind]) / args.tokens
    loss.backward()
    p = baseline.capped(double[0], double[1]).log_softmax(-1)
    if kind == "kl":
        q = baseline.capped(taught[0].double(), taught[1].double()).log_softmax(-1)
        exact = (q.exp() * (q - p)).sum(-1).mean()
    else:
        exact = -(p.gather(1, labels[:, None]) if kind == "ce" else p + math.log(args.vocabulary)).mean()
    exact.backward()
    names = zip(("hidden", "weight"), single, double, strict=True)
    return {"loss": _error(loss, exact)} | {f"d_{name}": _error(a.grad, b.grad) for name, a, b in names}


def attention(device: torch.device, compiled: bool) -> dict[str, float]:
    """A two-layer model on packed rows: documents across the kernel's blocks, grouped heads, the paper's widths."""
    shape = ReducedGemma2(vocab_size=500, hidden_size=320, intermediate_size=640, layers=2, attention_softcap=5.0)
    tokens = collate([[torch.arange(n).numpy() % 500 for n in row] for row in ((700, 324), (100, 100, 800))], 1024)
    values = []
    for fast in (False, True):
        model = shape.build(0).to(device)  # pyright: ignore[reportArgumentType, reportCallIssue]
        if fast:
            placing.place(model, device, compiled)
        loss = cross_entropy(model, tokens.to(device))
        loss.backward()
        values.append([loss, *(weight.grad for weight in model.parameters())])
    norms = [_error(a, b) for a, b in zip(values[1], values[0], strict=True)]
    return {"loss": norms[0], "worst_gradient": max(norms[1:])}


def _error(value: torch.Tensor | None, exact: torch.Tensor | None) -> float:
    assert value is not None
    assert exact is not None
    return ((value.double() - exact.double()).norm() / exact.double().norm()).item()


if __name__ == "__main__":
    main()
