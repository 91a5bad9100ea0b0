"""Models from and to Hugging Face folders, fresh ones from a config, and their shape without their weights."""

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from undo.config.mistakes import ConfigError
from undo.lm.read import blocks
from undo.lm.shape import Attention, CountedShape


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
        raise ConfigError(f"{folder}: not a transformers model ({str(error).splitlines()[0][:150]})") from None


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
    attention = Attention.of(config, len(every))
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * config.hidden_size
    return CountedShape(
        layers=len(every),
        hidden_size=config.hidden_size,
        intermediate_size=inner,
        heads=attention.heads,
        kv_heads=attention.kv_heads,
        head_dim=attention.head_dim,
        vocab_size=len(out.weight),
        block_parameters=round(count["blocks"] / len(every)),
        other_parameters=count["all"] - len(every) * round(count["blocks"] / len(every)) - on_top - embedding,
        head_parameters=on_top,
        embedding_parameters=embedding,
        window=attention.window,
        sliding_layers=sum(attention.slides),
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
