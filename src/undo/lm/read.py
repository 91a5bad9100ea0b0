"""A causal language model as this project reads it: packed tokens -> hidden states, and the head that reads them.

Any causal LM of transformers works whose body is a list of blocks between an embedding and a final norm, and whose
logits are one linear map of the norm's output (Gemma, Llama, Qwen, Mistral, Phi, GPT-NeoX, ...). This module is
architecture-agnostic. For every model except Gemma-2 (covered by tests), `place` compares our logits with those of
transformers and refuses the model if they differ.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, NamedTuple, cast

from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
)

from undo.config.mistakes import ConfigError
from undo.lm import flops
from undo.lm.attention import masks, unsupported
from undo.lm.tokens import Tokens, check_tokens

BLOCKS: Final = ("layers", "h")  # what a body calls the list of its blocks
FINAL_NORMS: Final = ("norm", "final_layernorm", "final_layer_norm", "ln_f", "norm_f")


class Head(NamedTuple):
    """logits = softcap * tanh((hidden @ weight.T + bias) / softcap), without the tanh where `softcap` is None."""

    weight: Tensor  # [vocabulary, hidden]
    softcap: float | None
    bias: Tensor | None = None  # [vocabulary]

    def first(self, tokens: int | None) -> "Head":
        """The head of the first `tokens` of the vocabulary; itself where it has no more, or for None."""
        if tokens is None or tokens >= len(self.weight):
            return self
        return Head(self.weight[:tokens], self.softcap, None if self.bias is None else self.bias[:tokens])


def head(model: PreTrainedModel) -> Head:
    layer = cast(nn.Linear, model.get_output_embeddings())
    return Head(layer.weight, getattr(model.config, "final_logit_softcapping", None), layer.bias)


def hidden_states(model: PreTrainedModel, tokens: Tokens, layer: int | None = None) -> Tensor:
    """[rows, length, hidden]: what the head reads, or with `layer` the output of that block (0-based).

    With `layer` the blocks above it do not run. Raises TypeError for anything but Tokens.
    """
    check_tokens(tokens)
    every = blocks(model)
    if layer is None:
        output = model.base_model(**_inputs(model, tokens)).last_hidden_state
        flops.body_ran(model, every, tokens, output)
        return output
    if not 0 <= layer < len(every):
        raise ConfigError(f"layer {layer} does not exist: the model has blocks 0 to {len(every) - 1}")
    with _outputs_of([every[layer]]) as (found,), _only(model, layer + 1):
        _uncompiled(model, tokens)
    flops.body_ran(model, every[: layer + 1], tokens, found[0])
    return found[0]


def recorded(model: PreTrainedModel, tokens: Tokens) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs of every block, and of every block's MLP: each [rows, length, hidden]."""
    every = list(blocks(model))
    mlps = [getattr(block, "mlp", None) for block in every]
    if not all(isinstance(mlp, nn.Module) for mlp in mlps):
        raise ConfigError(f"{type(model).__name__} has blocks without an `mlp`, but the method reads their outputs")
    with _outputs_of([*every, *cast(list[nn.Module], mlps)]) as found:
        _uncompiled(model, tokens)
    outputs = [output for (output,) in found]
    flops.body_ran(model, every, tokens, outputs[-1])  # the last MLP: any gradient passes it
    return outputs[: len(every)], outputs[len(every) :]


def blocks(model: PreTrainedModel) -> nn.ModuleList:
    """Raises ConfigError for a model that is not a list of blocks."""
    return getattr(model.base_model, _blocks_name(model))


def final_norm(model: PreTrainedModel) -> nn.Module:
    """What stands between the last block and the head. Raises ConfigError if it is not found."""
    for name in FINAL_NORMS:
        if isinstance(norm := getattr(model.base_model, name, None), nn.Module):
            return norm
    raise unsupported(model, "its final norm is not found")


def _blocks_name(model: PreTrainedModel) -> str:
    for name in BLOCKS:
        if isinstance(getattr(model.base_model, name, None), nn.ModuleList):
            return name
    raise unsupported(model, "its body is not a list of blocks")


def _inputs(model: PreTrainedModel, tokens: Tokens) -> dict[str, Any]:
    return {
        "input_ids": tokens.input_ids,
        "position_ids": tokens.positions,
        "attention_mask": masks(model, tokens),
        "use_cache": False,
    }


def _uncompiled(model: PreTrainedModel, tokens: Tokens) -> None:
    """The body's own forward pass, block by block: a compiled body may skip hooks."""
    model.base_model.forward(**_inputs(model, tokens))


@contextmanager
def _outputs_of(modules: list[nn.Module]) -> Iterator[list[list[Tensor]]]:
    """For each module the list of what it puts out while the context lasts."""
    found: list[list[Tensor]] = [[] for _ in modules]

    def remember(to: list[Tensor], output: Any) -> None:
        to.append(output[0] if isinstance(output, tuple) else output)

    hooks = [
        module.register_forward_hook(lambda _, __, output, to=to: remember(to, output))
        for module, to in zip(modules, found, strict=True)
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _only(model: PreTrainedModel, count: int) -> Iterator[None]:
    """The model without the blocks from `count` on. (A hook that raised would tear checkpointing apart.)"""
    name = _blocks_name(model)
    every = getattr(model.base_model, name)
    setattr(model.base_model, name, every[:count])
    try:
        yield
    finally:
        setattr(model.base_model, name, every)
