"""Logits of a chunk of tokens, formed tile by tile; products in low precision with fp32 results."""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from undo.lm.read import Head


class Grid(NamedTuple):
    """Logits are formed for `rows` tokens at a time, in tiles of `columns` words of the vocabulary."""

    rows: int
    columns: int


def grid(weight: Tensor, tokens: int) -> Grid:
    """On a CPU a tile stays in the cache for all that is done to it; a GPU wants few and large operations."""
    vocabulary = weight.shape[0]
    if weight.is_cuda:
        rows, columns = (1 << 29) // vocabulary, vocabulary  # 2 GiB of fp32 logits at once
    else:
        rows, columns = min(512, (1 << 25) // vocabulary), min(2048, vocabulary)  # 128 MiB at most
    return Grid(max(1, min(rows, tokens)), columns)


class Logits:
    """Logits of a chunk of tokens: `tiles` hold them divided by `scale`, `log_z` is their log-sum-exp, [tokens, 1]."""

    def __init__(self, head: Head, grid: Grid, precision: torch.dtype) -> None:
        self.softcap, self.scale = head.softcap, head.softcap or 1.0
        self.weights = [weight.to(precision) for weight in head.weight.split(grid.columns)]
        self._biases = None if head.bias is None else (head.bias / self.scale).split(grid.columns)
        shape = len(self.weights), grid.rows, grid.columns  # one buffer for all chunks: fresh memory costs page faults
        self._buffer = head.weight.new_empty(shape, dtype=torch.promote_types(head.weight.dtype, torch.float32))

    def products(self, hidden: Tensor) -> Iterator[Tensor]:
        """(hidden @ weight.T + bias) / scale, tile by tile, without the softcap."""
        hidden = (hidden / self.scale).to(self.weights[0].dtype)
        for i, (weight, buffer) in enumerate(zip(self.weights, self._buffer, strict=True)):
            tile = _product(hidden, weight.T, out=buffer[: len(hidden), : len(weight)])
            yield tile if self._biases is None else tile.add_(self._biases[i])

    def read(self, hidden: Tensor) -> None:
        self.tiles, sums = [], []
        for tile in self.products(hidden):
            sums.append(fused(_squash, tile, self.softcap))
            self.tiles.append(tile)
        self.log_z = torch.cat(sums, 1).logsumexp(1, keepdim=True)


def _product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=out.dtype, out=out)  # pyright: ignore[reportCallIssue]
    return out.copy_(torch.mm(a, b))  # a CPU rounds bf16 products


def add_product(total: Tensor, a: Tensor, b: Tensor, anew: bool) -> None:
    """total += a @ b, or total = a @ b."""
    if a.dtype == total.dtype:
        total.addmm_(a, b, beta=0 if anew else 1)
    elif anew:
        _product(a, b, out=total)
    else:
        total += torch.mm(a, b, out_dtype=total.dtype) if a.is_cuda else torch.mm(a, b)  # pyright: ignore[reportCallIssue]


def fused(function: Callable[..., Any], tile: Tensor, *others: Any) -> Any:
    return (_compiled(function) if tile.is_cuda else function)(tile, *others)


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)


def _squash(tile: Tensor, softcap: float | None) -> Tensor:
    """Products -> logits / scale, in place; returns the log-sum-exp of the logits, [tokens, 1]."""
    if softcap is None:
        return tile.logsumexp(1, keepdim=True)
    if softcap > 64:  # exp could overflow
        return tile.tanh_().mul(softcap).logsumexp(1, keepdim=True)
    return tile.tanh_().mul(softcap).exp_().sum(1, keepdim=True).log_()
