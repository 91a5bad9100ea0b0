"""A causal language model as this project sees it: packed tokens -> hidden states, and the head that reads them.

Any causal LM of the library will do whose body is a list of blocks between an embedding and a final norm, and whose
logits are one linear map of what the norm says (Gemma, Llama, Qwen, Mistral, Phi, GPT-NeoX, ...). Nothing is known here
about an architecture: `place` asks each model but Gemma-2, which the tests know, whether what is read here is what the
library says, and refuses it if not.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.masking_utils import eager_mask
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

from undo.config import ConfigError
from undo.shape import CountedShape
from undo.tokens import Tokens, collate

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

BLOCK: Final = 128  # queries
BLOCKS: Final = ("layers", "h")  # what a body calls the list of its blocks
FINAL_NORMS: Final = ("norm", "final_layernorm", "final_layer_norm", "ln_f", "norm_f")
SCALES: Final = ("logit_scale", "logits_scaling", "lm_head_multiplier", "mup_width_multiplier")  # of logits, in configs


class Head(NamedTuple):
    """logits = softcap * tanh((hidden @ weight.T + bias) / softcap), without the tanh where `softcap` is None."""

    weight: Tensor  # [vocabulary, hidden]
    softcap: float | None
    bias: Tensor | None = None  # [vocabulary]


def head(model: PreTrainedModel) -> Head:
    layer = cast(nn.Linear, model.get_output_embeddings())
    return Head(layer.weight, getattr(model.config, "final_logit_softcapping", None), layer.bias)


def hidden_states(model: PreTrainedModel, tokens: Tokens, layer: int | None = None) -> Tensor:
    """[rows, length, hidden]: what the head reads, or with `layer` the output of that block (0-based).

    With `layer` the blocks above it do not run.
    """
    if layer is None:
        return model.base_model(**_inputs(model, tokens)).last_hidden_state
    every = blocks(model)
    if not 0 <= layer < len(every):
        raise ConfigError(f"layer {layer} does not exist: the model has blocks 0 to {len(every) - 1}")
    with _outputs_of([every[layer]]) as (found,), _only(model, layer + 1):
        _uncompiled(model, tokens)
    return found[0]


def recorded(model: PreTrainedModel, tokens: Tokens) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs of every block, and of every block's MLP: each [rows, length, hidden]."""
    every = list(blocks(model))
    mlps = [getattr(block, "mlp", None) for block in every]
    if not all(isinstance(mlp, nn.Module) for mlp in mlps):
        raise ConfigError(f"{type(model).__name__} has blocks without an `mlp`, whose outputs are asked for")
    with _outputs_of([*every, *cast(list[nn.Module], mlps)]) as found:
        _uncompiled(model, tokens)
    outputs = [output for (output,) in found]
    return outputs[: len(every)], outputs[len(every) :]


def blocks(model: PreTrainedModel) -> nn.ModuleList:
    """Raises ConfigError for a model that is not a list of blocks."""
    return getattr(model.base_model, _blocks_name(model))


def final_norm(model: PreTrainedModel) -> nn.Module:
    """What stands between the last block and the head. Raises ConfigError if it is not found."""
    for name in FINAL_NORMS:
        if isinstance(norm := getattr(model.base_model, name, None), nn.Module):
            return norm
    raise _unsupported(model, "its final norm is not found")


def _blocks_name(model: PreTrainedModel) -> str:
    for name in BLOCKS:
        if isinstance(getattr(model.base_model, name, None), nn.ModuleList):
            return name
    raise _unsupported(model, "its body is not a list of blocks")


def _inputs(model: PreTrainedModel, tokens: Tokens) -> dict[str, Any]:
    return {
        "input_ids": tokens.input_ids,
        "position_ids": tokens.positions,
        "attention_mask": _masks(model, tokens),
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


# --- masks and attention -------------------------------------------------------------------------------------------


class Blocks(NamedTuple):
    """The mask of blocked attention: for each block of queries, its first query, its first key, and which it sees."""

    starts: list[int]
    first_keys: list[int]
    masks: list[Tensor]  # additive, [rows, 1, 1, queries, keys]; the last key is the block's last query


def _masks(model: PreTrainedModel, tokens: Tokens) -> "Tensor | BlockMask | Blocks | dict[str, Any]":
    """A token sees itself and what precedes it in its own document, in sliding layers not beyond their window.

    By kind of layer for a model that has kinds, else the one mask that all its layers share.
    """
    config, length = model.config, tokens.positions.shape[1]
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    window = window if window is not None and length > window else None  # else sliding layers see what all see
    if kinds is None:
        return _mask(model, tokens, window)
    if unknown := sorted(set(kinds) - {"full_attention", "sliding_attention"}):
        raise _unsupported(model, f"documents cannot be kept apart in layers of {', '.join(unknown)}")
    full = _mask(model, tokens, None) if window is None or "full_attention" in kinds else None
    return {"full_attention": full, "sliding_attention": full if window is None else _mask(model, tokens, window)}


def _mask(model: PreTrainedModel, tokens: Tokens, window: int | None) -> "Tensor | BlockMask | Blocks":
    document = (tokens.positions == 0).cumsum(1)
    kind = document.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else model.dtype
    if model.config._attn_implementation == "flex_attention":
        return _block_mask(document, window)
    if model.config._attn_implementation == "blocked":
        return _blocks(tokens.positions, document, dtype, window)
    visible = (document[:, None, :, None] == document[:, None, None, :]).tril()  # [rows, 1, length, length]
    if window is not None:
        visible = visible.triu(1 - window)
    return visible if model.config._attn_implementation == "sdpa" else _additive(visible, dtype)


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill_(~visible, torch.finfo(dtype).min)


def _blocks(positions: Tensor, document: Tensor, dtype: torch.dtype, window: int | None) -> Blocks:
    length = positions.shape[1]
    where = torch.arange(length, device=positions.device)
    first_keys = (where - positions).amin(0)  # where the earliest document begins that a query of any row belongs to
    if window is not None:
        first_keys = first_keys.maximum(where - window + 1)
    starts = list(range(0, length, BLOCK))
    firsts = first_keys[starts].tolist()
    masks = []
    for start, first in zip(starts, firsts, strict=True):
        queries, keys = slice(start, min(start + BLOCK, length)), slice(first, min(start + BLOCK, length))
        visible = document[:, queries, None] == document[:, None, keys]
        visible &= where[queries, None] >= where[keys]
        if window is not None:
            visible &= where[queries, None] - where[keys] < window
        masks.append(_additive(visible[:, None, None], dtype))
    return Blocks(starts, firsts, masks)


def blocked_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | Blocks | None,
    scaling: float,
    softcap: float | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Exact softcapped attention for a CPU: blocks of queries against the keys that one of them can see.

    Keys in the future or in earlier documents are never multiplied, and a block's scores stay in the cache.
    query: [rows, heads, length, width]; key, value: [rows, kv heads, length, width] -> [rows, length, heads, width].
    """
    if not isinstance(attention_mask, Blocks):  # a call that is not ours, such as generate()
        return eager_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, softcap=softcap, **options
        )
    rows, heads, length, width = query.shape
    kv_heads = key.shape[1]
    query = query.reshape(rows, kv_heads, heads // kv_heads, length, width) * (scaling / (softcap or 1.0))
    key, value = key.unsqueeze(2), value.unsqueeze(2)
    outputs = []
    for start, first, mask in zip(*attention_mask, strict=True):
        end = first + mask.shape[-1]
        scores = query[..., start:end, :] @ key[..., first:end, :].mT
        scores = mask + scores if softcap is None else torch.add(mask, scores.tanh_(), alpha=softcap)
        weights = scores.softmax(-1, dtype=torch.float32 if scores.dtype == torch.bfloat16 else None)
        outputs.append(weights.to(value.dtype) @ value[..., first:end, :])
    return torch.cat(outputs, 3).reshape(rows, heads, length, width).transpose(1, 2), None


AttentionInterface.register("blocked", blocked_attention)
AttentionMaskInterface.register("blocked", eager_mask)


def _block_mask(document: Tensor, window: int | None) -> "BlockMask":
    """Blocks that no token sees are skipped by the kernel. On CUDA the mask is compiled: it is never held densely."""
    from torch.nn.attention.flex_attention import create_block_mask

    def sees(row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        own = (query >= key) & (document[row, query] == document[row, key])
        return own if window is None else own & (query - key < window)

    rows, length = document.shape
    return create_block_mask(sees, rows, None, length, length, document.device, _compile=document.is_cuda)


def place(
    model: PreTrainedModel, device: torch.device, compiled: bool = False, checkpointed: bool = False
) -> PreTrainedModel:
    """The same model on the device, with the attention that is fast there.

    Gemma-2's softcap leaves flex attention as a fused kernel (which has no backward pass on a CPU), and blocked
    attention elsewhere; other models without a softcap have torch's own on a CPU. `compiled` compiles the body at its
    first call; parameter names stay as they are. `checkpointed` keeps of each block only its input for the backward
    pass, which runs it once more: the same numbers. Raises ConfigError for an architecture that is read wrongly.
    """
    nn.Module.to(model, device)
    config = model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if device.type == "cuda" and width >= 16 and model._supports_flex_attn:  # the kernel's tiles are 16 wide at least
        model.set_attn_implementation("flex_attention")
    elif hasattr(config, "attn_logit_softcapping"):
        model.set_attn_implementation("blocked")
    else:
        model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    if config.model_type != "gemma2":
        verify(model)
    if compiled:
        model.base_model.compile(dynamic=None)  # a second shape makes it dynamic, so that evaluation does not recompile
    if checkpointed:
        if not model.supports_gradient_checkpointing:
            raise _unsupported(model, "it has no gradient checkpointing: set execution.gradient_checkpointing=false")
        model.gradient_checkpointing_enable({"use_reentrant": False})
        for module in (model.base_model, *blocks(model)):
            module.training = True  # the library asks for it; not in what they are made of, so dropout stays off
    return model


@torch.no_grad()
def verify(model: PreTrainedModel) -> None:
    """Raises ConfigError unless two documents in one row have, read here, the library's own logits of each alone.

    On a few tokens, and with sliding windows shorter than they are, so that windows are seen to slide.
    """
    config, implementation = model.config, cast(str, model.config._attn_implementation)
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, config.vocab_size, size) for size in (9, 6)]
    tokens = collate([documents]).to(model.device)
    window = getattr(config, "sliding_window", None)
    try:
        if window is not None:
            config.sliding_window = min(window, 4)
        last = hidden_states(model, tokens)
        normed = final_norm(model)(hidden_states(model, tokens, len(blocks(model)) - 1))
        weight, softcap, bias = head(model)
        found = nn.functional.linear(last[0], weight, bias)
        found = found if softcap is None else softcap * torch.tanh(found / softcap)
        model.set_attn_implementation("eager")  # the plainest of the library's own
        alone = [torch.from_numpy(document)[None].to(model.device) for document in documents]
        expected = torch.cat([model(input_ids=ids, use_cache=False).logits[0] for ids in alone])
    except ConfigError:
        raise
    except Exception as error:  # whatever an unknown architecture does not like about being called like this
        raise _unsupported(model, f"{type(error).__name__}: {error}".splitlines()[0][:200]) from error
    finally:
        if window is not None:
            config.sliding_window = window
        model.set_attn_implementation(implementation)
    exact = 1e-3 if model.device.type == "cpu" else 2e-2  # a GPU may multiply in TF32
    if not (normed - last).norm() <= exact * last.norm():
        raise _unsupported(model, "what its head reads is not the norm of its last block's output")
    if not (found - expected).norm() <= exact * expected.norm():
        scaled = next((key for key in SCALES if getattr(config, key, 1.0) not in (None, 1, 1.0)), None)
        reason = "its logits are not its head's products with its hidden states, documents apart"
        raise _unsupported(model, reason + (f" (its config has {scaled})" if scaled else ""))


def _unsupported(model: PreTrainedModel, reason: str) -> ConfigError:
    return ConfigError(f"{type(model).__name__} cannot be used here: {reason}")


# --- from and to disk ----------------------------------------------------------------------------------------------


def load(folder: Path) -> PreTrainedModel:
    """fp32 master weights from a Hugging Face folder (safetensors only), whatever the folder's own precision.

    Without dropout, whatever the folder's config says: a gradient here is a function of the batch.
    """
    if not (folder / "model.safetensors").exists() and not list(folder.glob("model-*.safetensors")):
        raise ConfigError(f"{folder}: holds no model.safetensors; only safetensors are loaded")
    return AutoModelForCausalLM.from_pretrained(
        folder,
        config=read_config(folder),
        dtype=torch.float32,
        attn_implementation="eager",
        local_files_only=True,
        use_safetensors=True,
    ).eval()


def read_config(folder: Path) -> PreTrainedConfig:
    """The config of a model folder. Raises ConfigError if the library knows no such model."""
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder}: no model of the library's ({str(error).splitlines()[0][:150]})") from None


def fresh(config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    """A randomly initialised model, fp32, from its own generator: the same whatever was drawn before."""
    with torch.random.fork_rng():  # the library draws from the global generator
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(deepcopy(config), dtype=torch.float32, attn_implementation="eager")
    return model.eval()


def shape(model: PreTrainedModel) -> CountedShape:
    """Raises ConfigError for a model whose parts are not found."""
    config, every = model.config, blocks(model)
    count = {name: sum(w.numel() for w in part.parameters()) for name, part in (("all", model), ("blocks", every))}
    out, into = cast(nn.Linear, model.get_output_embeddings()), cast(nn.Embedding, model.get_input_embeddings())
    on_top = sum(w.numel() for w in out.parameters())
    embedding = 0 if into.weight is out.weight else into.weight.numel()
    kinds, window = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
    sliding = len(every) if kinds is None else list(kinds).count("sliding_attention")
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * config.hidden_size
    return CountedShape(
        layers=len(every),
        hidden_size=config.hidden_size,
        intermediate_size=inner,
        heads=config.num_attention_heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        vocab_size=len(out.weight),
        block_parameters=round(count["blocks"] / len(every)),
        other_parameters=count["all"] - len(every) * round(count["blocks"] / len(every)) - on_top - embedding,
        head_parameters=on_top,
        embedding_parameters=embedding,
        window=window,
        sliding_layers=0 if window is None else sliding,
    )


def skeleton(folder: Path) -> PreTrainedModel:
    """The model of a folder's config.json, without weights and without memory for them."""
    config = read_config(folder)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def read_shape(folder: Path) -> CountedShape:
    """From a model folder's config.json alone."""
    return shape(skeleton(folder))


def save(model: nn.Module, tokenizer_folder: Path, folder: Path, weights: "Mapping[str, Tensor] | None" = None) -> None:
    """A folder that AutoModelForCausalLM and AutoTokenizer load. It appears only when it is complete.

    `weights` are the model's, by name, where it does not hold them whole.
    """
    import shutil

    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(tokenizer_folder, partial)
    model.save_pretrained(partial, state_dict=weights)  # pyright: ignore[reportCallIssue]
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def freeze(model: PreTrainedModel) -> PreTrainedModel:
    """The same model, without gradients: a teacher or a reference."""
    return model.requires_grad_(False).eval()
