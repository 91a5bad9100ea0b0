"""How likely continuations are: requests -> forward passes of any causal LM -> log-likelihoods.

Work is shared where that changes nothing. Choices that differ in their last token only are read off one forward pass.
The questions of a task stand behind one prefix (the description and the shots), which is computed once; every batch
uses its keys and values. Rows are padded on the right, so that no token sees the padding and positions need no
correction.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


TOKENS_AT_ONCE: Final = 1 << 13  # of a forward pass behind the prefix: attention takes the square of a row's length


class Encoded(NamedTuple):
    """A continuation whose likelihood is wanted, and its context. Neither is empty."""

    context: list[int]
    continuation: list[int]


class Batch(NamedTuple):
    """Rows behind a prefix, and the places (row, column) at which the probability of the next token is read."""

    ids: Tensor  # int64 [rows, width], padded on the right with 0
    row: Tensor  # int64 [reads]
    column: Tensor  # int64 [reads], counted behind the prefix
    read: Tensor  # int64 [picks]: which of the reads
    token: Tensor  # int64 [picks]
    owner: tuple[int, ...]  # [picks]: the request that the pick is a part of


class Plan(NamedTuple):
    """The forward passes that answer a task's requests."""

    prefix: tuple[int, ...]
    batches: tuple[Batch, ...]

    @property
    def tokens(self) -> int:
        """That go through the model, padding included."""
        return len(self.prefix) + sum(batch.ids.numel() for batch in self.batches)


def plan(requests: Sequence[Encoded], rows: int, reuse: bool = True) -> Plan:
    """Each distinct input once, in batches of similar length, behind their common beginning if `reuse` is set."""
    inputs = [(*context, *continuation[:-1]) for context, continuation in requests]
    prefix: tuple[int, ...] = ()
    if reuse and len(set(inputs)) > 1:
        first, last = min(inputs), max(inputs)  # what these two begin with, all others begin with
        most = min(len(request.context) for request in requests) - 1  # every row keeps a token
        prefix = first[: next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), most)][:most]
    tails = [ids[len(prefix) :] for ids in inputs]
    holder: dict[tuple[int, ...], tuple[int, ...]] = {}  # an input that begins another one needs no row of its own
    following: tuple[int, ...] = ()
    for tail in sorted(set(tails), reverse=True):
        following = holder[following] if following[: len(tail)] == tail else tail
        holder[tail] = following
    distinct = sorted(set(holder.values()), key=lambda tail: (len(tail), tail))
    asked: dict[tuple[int, ...], list[int]] = {tail: [] for tail in distinct}
    for index, tail in enumerate(tails):
        asked[holder[tail]].append(index)
    batches = []
    for part in _bounded(distinct, rows):
        ids = torch.zeros(len(part), len(part[-1]), dtype=torch.long)
        reads: dict[tuple[int, int], int] = {}
        picks = []
        for number, tail in enumerate(part):
            ids[number, : len(tail)] = torch.tensor(tail)
            for index in asked[tail]:
                first = len(requests[index].context) - 1 - len(prefix)
                for column, token in enumerate(requests[index].continuation, first):
                    picks.append((reads.setdefault((number, column), len(reads)), token, index))
        row, column = torch.tensor(list(reads)).T
        read, token, owner = zip(*picks, strict=True)
        batches.append(Batch(ids, row, column, torch.tensor(read), torch.tensor(token), owner))
    return Plan(prefix, tuple(batches))


def _bounded(tails: Sequence[tuple[int, ...]], rows: int) -> Iterator[list[tuple[int, ...]]]:
    """Inputs, short ones first, in batches of at most `rows` and TOKENS_AT_ONCE, padding included, or of one alone."""
    batch: list[tuple[int, ...]] = []
    for tail in tails:
        if batch and (len(batch) == rows or (len(batch) + 1) * len(tail) > TOKENS_AT_ONCE):
            yield batch
            batch = []
        batch.append(tail)
    if batch:
        yield batch


class Score(NamedTuple):
    """log P(continuation | context) in nats, and whether greedy decoding would write it."""

    loglikelihood: float
    greedy: bool


def score(model: "PreTrainedModel", plan: Plan) -> list[Score]:
    """The answer to each request that the plan was made for, in order."""
    sums: dict[int, float] = {}
    greedy: dict[int, bool] = {}
    device = model.device
    with torch.no_grad(), _for_reading(model) as forward:
        shared, prefix = None, torch.tensor([plan.prefix], dtype=torch.long, device=device)
        if plan.prefix:
            shared = _reusable(forward(prefix, None, None)[1])
        for batch in plan.batches:
            ids, column = batch.ids.to(device), batch.column.to(device)
            behind = None
            if shared is not None:
                behind = _repeated(shared, len(ids))
            elif plan.prefix:  # a model whose state cannot be shared by rows reads the prefix with each of them
                ids, column = torch.cat([prefix.expand(len(ids), -1), ids], 1), column + len(plan.prefix)
            logits, _ = forward(ids, behind, (batch.row.to(device), column))
            logs = logits.float().log_softmax(-1)
            read, token = batch.read.to(device), batch.token.to(device)
            likelihoods, hits = logs[read, token], logs.argmax(-1)[read] == token
            for index, value, hit in zip(batch.owner, likelihoods.tolist(), hits.tolist(), strict=True):
                sums[index] = sums.get(index, 0.0) + value
                greedy[index] = greedy.get(index, True) and hit
    return [Score(sums[index], greedy[index]) for index in range(len(sums))]


Forward = Callable[[Tensor, DynamicCache | None, tuple[Tensor, Tensor] | None], tuple[Tensor, Any]]


@contextmanager
def _for_reading(model: "PreTrainedModel") -> Iterator[Forward]:
    """A forward pass of the model -> logits [reads, vocabulary] at the wanted (rows, columns) only, and the cache.

    The model's own code runs around its head, so that any scaling or softcap holds; the head sees the wanted positions
    only, in the weights' precision, because autocast's bf16 would make ties of close choices, and ties say A. Attention
    made for packed rows gives way to the eager one, which has Gemma-2's softcap and takes a cache.
    """
    head = cast(nn.Module, model.get_output_embeddings())
    weight, whole = cast(Tensor, head.weight), head.forward
    at: list[tuple[Tensor, Tensor] | None] = [None]

    def at_reads(hidden: Tensor) -> Tensor:
        chosen = hidden[:1, :0] if at[0] is None else hidden[at[0]][None]
        with torch.autocast(hidden.device.type, enabled=False):
            return whole(chosen.to(weight.dtype))

    def forward(ids: Tensor, behind: DynamicCache | None, reads: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Any]:
        at[0] = reads
        state: dict[str, Any] = {} if behind is None else {"past_key_values": behind}
        outputs = model(input_ids=ids, use_cache=behind is not None or reads is None, **state)
        return outputs.logits[0], getattr(outputs, "past_key_values", None)

    attention, training = cast(str, model.config._attn_implementation), model.training
    head.forward = at_reads
    model.eval()
    try:
        if attention in ("blocked", "flex_attention"):
            model.set_attn_implementation("eager")
        with torch.compiler.set_stance("force_eager"):  # a body compiled for packed rows would be compiled anew
            yield forward
    finally:
        del head.forward
        model.train(training)
        if model.config._attn_implementation != attention:
            model.set_attn_implementation(attention)


def _reusable(state: Any) -> DynamicCache | None:
    """A model's cache, if it holds keys and values and nothing else. A recurrent state is left alone."""
    if type(state) is not DynamicCache:
        return None
    plain = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in state.layers)
    return state if plain else None


def _repeated(shared: DynamicCache, rows: int) -> DynamicCache:
    """The same keys and values for several rows, without a copy. Additions leave the original as it is."""
    repeated = copy.copy(shared)
    repeated.layers = [copy.copy(layer) for layer in shared.layers]
    for layer in cast(list[DynamicLayer], repeated.layers):
        if isinstance(layer.keys, Tensor) and isinstance(layer.values, Tensor):  # not where layers share them
            layer.keys = layer.keys.expand(rows, -1, -1, -1)
            layer.values = layer.values.expand(rows, -1, -1, -1)
    return repeated
