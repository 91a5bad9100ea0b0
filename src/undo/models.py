"""A causal language model as this project sees it: packed tokens -> hidden states, and the head that reads them."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, Gemma2ForCausalLM
from transformers.masking_utils import eager_mask
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

from undo.config import ConfigError
from undo.tokens import Tokens

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

BLOCK: Final = 128  # queries


class Head(NamedTuple):
    """logits = softcap * tanh(hidden @ weight.T / softcap), without the tanh where `softcap` is None."""

    weight: Tensor  # [vocabulary, hidden]
    softcap: float | None


def head(model: Gemma2ForCausalLM) -> Head:
    return Head(model.lm_head.weight, model.config.final_logit_softcapping)


def hidden_states(model: Gemma2ForCausalLM, tokens: Tokens, layer: int | None = None) -> Tensor:
    """[rows, length, hidden]: what the head reads, or with `layer` the output of that block (0-based).

    With `layer` the blocks above it do not run.
    """
    body = model.model
    if layer is None:
        return body(
            input_ids=tokens.input_ids,
            position_ids=tokens.positions,
            attention_mask=_masks(model, tokens),
            use_cache=False,
        ).last_hidden_state
    if not 0 <= layer < len(body.layers):
        raise ConfigError(f"layer {layer} does not exist: the model has blocks 0 to {len(body.layers) - 1}")
    masks = _masks(model, tokens)
    hidden = body.embed_tokens(tokens.input_ids)
    rotary = body.rotary_emb(hidden, tokens.positions)
    for block, kind in zip(body.layers[: layer + 1], body.config.layer_types or (), strict=False):
        hidden = block(hidden, attention_mask=masks[kind], position_embeddings=rotary, position_ids=tokens.positions)
    return hidden


def recorded(model: Gemma2ForCausalLM, tokens: Tokens) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs of every block, and of every block's MLP: each [rows, length, hidden]."""
    blocks: list[Tensor] = []
    mlps: list[Tensor] = []
    hooks = []
    try:
        for block in model.model.layers:
            for module, outputs in ((block, blocks), (cast(nn.Module, block.mlp), mlps)):
                hooks.append(module.register_forward_hook(lambda _, __, output, to=outputs: to.append(output)))
        hidden_states(model, tokens, len(model.model.layers) - 1)  # block by block: a compiled body may skip hooks
    finally:
        for hook in hooks:
            hook.remove()
    return blocks, mlps


class Blocks(NamedTuple):
    """The mask of blocked attention: for each block of queries, its first query, its first key, and which it sees."""

    starts: list[int]
    first_keys: list[int]
    masks: list[Tensor]  # additive, [rows, 1, 1, queries, keys]; the last key is the block's last query


def _masks(model: Gemma2ForCausalLM, tokens: Tokens) -> "dict[str, Tensor | BlockMask | Blocks]":
    """A token sees itself and what precedes it in its own document: the mask for either kind of layer."""
    length, window = tokens.positions.shape[1], model.config.sliding_window
    if window is not None and length > window:
        raise ConfigError(f"rows of {length} tokens are longer than the model's sliding window of {window}")
    document = (tokens.positions == 0).cumsum(1)
    kind = document.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else model.dtype
    match model.config._attn_implementation:
        case "flex_attention":
            mask = _block_mask(document)
        case "blocked":
            mask = _blocks(tokens.positions, document, dtype)
        case _:  # additive, [rows, 1, length, length]
            mask = _additive((document[:, None, :, None] == document[:, None, None, :]).tril(), dtype)
    return {"full_attention": mask, "sliding_attention": mask}


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill_(~visible, torch.finfo(dtype).min)


def _blocks(positions: Tensor, document: Tensor, dtype: torch.dtype) -> Blocks:
    length = positions.shape[1]
    where = torch.arange(length, device=positions.device)
    first_keys = (where - positions).amin(0)  # where the earliest document begins that a query of any row belongs to
    starts = list(range(0, length, BLOCK))
    firsts = first_keys[starts].tolist()
    masks = []
    for start, first in zip(starts, firsts, strict=True):
        queries, keys = slice(start, min(start + BLOCK, length)), slice(first, min(start + BLOCK, length))
        visible = document[:, queries, None] == document[:, None, keys]
        visible &= where[queries, None] >= where[keys]
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


def _block_mask(document: Tensor) -> "BlockMask":
    """Blocks that no token sees are skipped by the kernel. On CUDA the mask is compiled: it is never held densely."""
    from torch.nn.attention.flex_attention import create_block_mask

    def sees(row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (document[row, query] == document[row, key])

    rows, length = document.shape
    return create_block_mask(sees, rows, None, length, length, document.device, _compile=document.is_cuda)


def place(model: Gemma2ForCausalLM, device: torch.device, compiled: bool = False) -> Gemma2ForCausalLM:
    """The same model on the device, with the attention that is fast there.

    Each honours Gemma-2's softcap: flex attention as a fused kernel (which has no backward pass on a CPU), blocked
    attention elsewhere. `compiled` compiles the body at its first call; parameter names stay as they are.
    """
    nn.Module.to(model, device)
    # the fused kernel's tiles are 16 wide at least
    fused = device.type == "cuda" and model.config.head_dim >= 16
    model.set_attn_implementation("flex_attention" if fused else "blocked")
    if compiled:
        model.model.compile(dynamic=None)  # a second shape makes it dynamic, so that evaluation does not recompile
    return model


def load(folder: Path) -> Gemma2ForCausalLM:
    """fp32 master weights from a Hugging Face folder (safetensors only), whatever the folder's own precision."""
    if not (folder / "model.safetensors").exists() and not list(folder.glob("model-*.safetensors")):
        raise ConfigError(f"{folder}: holds no model.safetensors; only safetensors are loaded")
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True, use_safetensors=True
    )
    return cast(Gemma2ForCausalLM, model)


def save(model: nn.Module, tokenizer_folder: Path, folder: Path) -> None:
    """A folder that AutoModelForCausalLM and AutoTokenizer load. It appears only when it is complete."""
    import shutil

    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(tokenizer_folder, partial)
    model.save_pretrained(partial)  # pyright: ignore[reportCallIssue]
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def freeze(model: Gemma2ForCausalLM) -> Gemma2ForCausalLM:
    """The same model, without gradients: a teacher or a reference."""
    return model.requires_grad_(False).eval()
