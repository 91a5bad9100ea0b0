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
    """Logits of a chunk of tokens: `log_z` is their log-sum-exp, [tokens, 1]; `over_scale` reads a tile of `tiles`."""

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
            sums.append(fused(_log_z, tile, self.softcap))
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
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)  # pyright: ignore[reportCallIssue]
    else:
        total += torch.mm(a, b)


def in_one_kernel(tile: Tensor) -> bool:
    """Whether what is done to a tile is compiled to one kernel. Then arithmetic is cheap, and each pass over it is not.

    On a CPU it is the reverse: the tile stays in the cache, and a tanh costs as much as ten passes.
    """
    return tile.is_cuda


def fused(function: Callable[..., Any], tile: Tensor, *others: Any) -> Any:
    return (_compiled(function) if in_one_kernel(tile) else function)(tile, *others)


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)


def over_scale(tile: Tensor, softcap: float | None) -> Tensor:
    """Logits / scale of a tile that was read: a CPU has kept its tanh there, a GPU takes it anew in each kernel."""
    return tile if softcap is None or not in_one_kernel(tile) else tile.tanh()


def located(labels: Tensor, tile: Tensor) -> tuple[Tensor, Tensor]:
    """Of labels [tokens, 1], counted from the tile's first column: a column each, and 1.0, or 0.0 in another tile."""
    here = ((labels >= 0) & (labels < tile.shape[1])).to(tile.dtype)
    return labels.clamp(0, tile.shape[1] - 1), here


def less_at(tile: Tensor, columns: Tensor, amounts: Tensor) -> Tensor:
    """The tile with an amount taken off at one column of each token, both [tokens, 1]; on a CPU in place.

    To scatter would end a kernel. To look at each word for its column is two passes, and free only within a kernel.
    """
    if in_one_kernel(tile):
        return tile - amounts * (torch.arange(tile.shape[1], device=tile.device) == columns)
    return tile.scatter_add_(1, columns, -amounts)


def log_sum_exp(logits: Tensor) -> Tensor:
    """[tokens, 1]. In a kernel the maximum and the sum take one reading together; logsumexp, which minds inf, two."""
    if not in_one_kernel(logits):
        return logits.logsumexp(1, keepdim=True)
    largest = logits.amax(1, keepdim=True)
    return (logits - largest).exp().sum(1, keepdim=True).log() + largest


def _log_z(tile: Tensor, softcap: float | None) -> Tensor:
    """The log-sum-exp of a tile's logits, [tokens, 1], from its products. A CPU keeps their tanh there instead."""
    if softcap is None:
        return log_sum_exp(tile)
    logits = (tile.tanh() if in_one_kernel(tile) else tile.tanh_()).mul(softcap)
    if softcap > 64:  # exp could overflow
        return log_sum_exp(logits)
    return logits.exp_().sum(1, keepdim=True).log_()
