"""KL, cross entropy and MaxEnt from hidden states, against the authors' way: full logits, formula by formula.

    uv run benchmarks/losses.py [--tokens 512] [--vocabulary 256000] [--hidden 320] [--case kl] [--repeats 3]

Forward and backward of one loss, with Gemma-2's softcap. See measure.py for the sides and how they are compared.
"""

import argparse
from collections.abc import Callable

import measure
from measure import Case, Side

SOFTCAP = 30.0


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=256_000)
    parser.add_argument("--hidden", type=int, default=320)


def cases(args: argparse.Namespace) -> dict[str, Case]:
    product = 2 * args.tokens * args.vocabulary * args.hidden
    return {
        "kl": Case(args.tokens, 4 * product),  # both heads forward; the student's gradients by hidden and weight
        "ce": Case(args.tokens, 3 * product),
        "maxent": Case(args.tokens, 3 * product),
    }


def build(case: str, side: Side, args: argparse.Namespace) -> Callable[[], float]:
    import baseline
    import torch

    from undo.lm.read import Head
    from undo.losses.linear import linear_loss
    from undo.losses.targets import CrossEntropy, ForwardKL, UniformKL
    from undo.runs.ranks import this_process

    place, rng = this_process().device, torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.empty(shape).normal_(0, 0.5, generator=rng).to(place)

    rows = 2, args.tokens // 2 + 1  # the last position of a row predicts nothing
    hidden = draw(*rows, args.hidden).requires_grad_()
    weight = draw(args.vocabulary, args.hidden).requires_grad_()
    labels = torch.randint(args.vocabulary, rows, generator=rng).to(place)
    taught = None
    if case == "kl":
        taught = draw(*rows, args.hidden), draw(args.vocabulary, args.hidden)

    def plain() -> torch.Tensor:
        logits = baseline.capped(hidden, weight)
        if taught is None:
            return baseline.cross_entropy(logits, labels) if case == "ce" else baseline.uniform_kl(logits, labels)
        with torch.no_grad():
            teacher = baseline.capped(*taught)
        return baseline.forward_kl(teacher, logits, labels)

    def fused() -> torch.Tensor:
        target = CrossEntropy(labels[:, 1:].flatten()) if case == "ce" else UniformKL()
        if taught is not None:
            target = ForwardKL(taught[0][:, :-1].flatten(0, 1), Head(taught[1], SOFTCAP))
        return linear_loss(hidden[:, :-1].flatten(0, 1), Head(weight, SOFTCAP), target) / (args.tokens // 2 * 2)

    def once() -> float:
        loss = fused() if side.ours else plain()
        loss.backward()
        hidden.grad = weight.grad = None
        return loss.item()

    return once


if __name__ == "__main__":
    measure.main(__file__, __doc__ or "", arguments, cases, build)
