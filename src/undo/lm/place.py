"""A model on its device, with the attention that is fast there, after checking that it is read correctly."""

from typing import Final, cast

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from undo.config.mistakes import ConfigError
from undo.lm.attention import unsupported
from undo.lm.read import blocks, final_norm, head, hidden_states
from undo.lm.tokens import collate

SCALES: Final = ("logit_scale", "logits_scaling", "lm_head_multiplier", "mup_width_multiplier")  # of logits, in configs


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
            raise unsupported(model, "it has no gradient checkpointing: set execution.gradient_checkpointing=false")
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
        raise unsupported(model, f"{type(error).__name__}: {error}".splitlines()[0][:200]) from error
    finally:
        if window is not None:
            config.sliding_window = window
        model.set_attn_implementation(implementation)
    exact = 1e-3 if model.device.type == "cpu" else 2e-2  # a GPU may multiply in TF32
    if not (normed - last).norm() <= exact * last.norm():
        raise unsupported(model, "what its head reads is not the norm of its last block's output")
    if not (found - expected).norm() <= exact * expected.norm():
        scaled = next((key for key in SCALES if getattr(config, key, 1.0) not in (None, 1, 1.0)), None)
        reason = "its logits are not the products of its head and its hidden states, one document at a time"
        raise unsupported(model, reason + (f" (its config has {scaled})" if scaled else ""))


def freeze(model: PreTrainedModel) -> PreTrainedModel:
    """The same model, without gradients: a teacher or a reference."""
    return model.requires_grad_(False).eval()
