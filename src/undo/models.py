"""A causal language model as this project sees it: packed tokens -> hidden states, and the head that reads them."""

from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Gemma2ForCausalLM

from undo.config import ConfigError
from undo.tokens import Tokens

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

FLEX: Final = "flex_attention"


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


def _masks(model: Gemma2ForCausalLM, tokens: Tokens) -> "dict[str, Tensor | BlockMask]":
    """A token sees itself and what precedes it in its own document: the mask for either kind of layer."""
    length, window = tokens.positions.shape[1], model.config.sliding_window
    if window is not None and length > window:
        raise ConfigError(f"rows of {length} tokens are longer than the model's sliding window of {window}")
    document = (tokens.positions == 0).cumsum(1)
    if model.config._attn_implementation == FLEX:
        mask = _block_mask(document)
    else:  # additive, [rows, 1, length, length]
        device = document.device
        visible = (document[:, None, :, None] == document[:, None, None, :]).tril()
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else model.dtype
        mask = torch.zeros(visible.shape, dtype=dtype, device=device).masked_fill_(~visible, torch.finfo(dtype).min)
    return {"full_attention": mask, "sliding_attention": mask}


def _block_mask(document: Tensor) -> "BlockMask":
    """Blocks that no token sees are skipped by the kernel. On CUDA the mask is compiled: it is never held densely."""
    from torch.nn.attention.flex_attention import create_block_mask

    def sees(row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (document[row, query] == document[row, key])

    rows, length = document.shape
    return create_block_mask(sees, rows, None, length, length, document.device, _compile=document.is_cuda)


def place(model: Gemma2ForCausalLM, device: torch.device, compiled: bool = False) -> Gemma2ForCausalLM:
    """The same model on the device, with the attention that is fast there.

    Both honour Gemma-2's softcap: flex attention as a fused kernel (which has no backward pass on a CPU), eager
    attention everywhere. `compiled` compiles the body at its first call; parameter names stay as they are.
    """
    nn.Module.to(model, device)
    if device.type == "cuda" and model.config.head_dim >= 16:  # the kernel's tiles are 16 wide at least
        model.set_attn_implementation(FLEX)
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
