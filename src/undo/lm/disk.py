"""Models from and to Hugging Face folders, fresh ones from a config, and their shape without their weights."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel

from undo.config.mistakes import ConfigError
from undo.lm.read import blocks
from undo.lm.shape import Attention, CountedShape
from undo.lm.vocabulary import copy_tokenizer
from undo.lm.weights import require_fit, weight_files

GENERATION: Final = "generation_config.json"


def load(folder: Path, dtype: torch.dtype | None = torch.float32) -> PreTrainedModel:
    """fp32 master weights from a Hugging Face folder (safetensors only), whatever the folder's own precision.

    dtype: another precision; None: the folder's own. Without dropout, whatever the folder's config says: a gradient
    here is a function of the batch. Raises ConfigError for weights that are not all of the model, and for NaN or
    infinity among them.
    """
    weight_files(folder)
    try:
        with _without_its_report():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                config=read_config(folder),
                dtype=dtype or "auto",
                attn_implementation="eager",
                local_files_only=True,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # they are in the report
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise ConfigError(f"{folder}: cannot be loaded ({reason})") from error
    model, report = loaded
    require_fit(folder, report)
    require_one_head(folder, model)
    require_finite(folder, model)
    return model.eval()


@contextmanager
def _without_its_report() -> Iterator[None]:
    """The library's table of weights that do not fit: we raise it."""
    logger = logging.getLogger("transformers.modeling_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def require_one_head(folder: Path, model: PreTrainedModel) -> None:
    """Raises ConfigError where the config ties the head to the embedding, and the files hold two different ones."""
    tied = model.config.tie_word_embeddings and model._tied_weights_keys
    head, embedding = (cast(nn.Linear, part) for part in (model.get_output_embeddings(), model.get_input_embeddings()))
    if tied and head is not None and head.weight is not embedding.weight:
        raise ConfigError(
            f"{folder}: its config.json ties the head to the embedding, but its weights hold two different ones\n"
            f"set tie_word_embeddings to false there if the model has a head of its own, or leave that head out"
        )


def require_finite(what: Path | str, model: nn.Module) -> None:
    """Raises ConfigError for NaN or infinity among the weights: such a model is broken before anything is done to it.

    A sum is finite only if all its terms are, and takes no memory.
    """
    for name, weight in model.named_parameters():
        if not weight.detach().sum(dtype=torch.float32).isfinite() and not weight.detach().isfinite().all():
            raise ConfigError(f"{what}: {name} holds NaN or infinity; the model is broken, take another checkpoint")


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


def save(
    model: PreTrainedModel,
    tokenizer_folder: Path,
    folder: Path,
    weights: "Mapping[str, Tensor] | None" = None,
    *,
    like: Path | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """A folder that AutoModelForCausalLM and AutoTokenizer load. It appears only when it is complete.

    The tokenizer's files are copied as they are, and so is the generation config of the model folder `like`. `weights`
    are the model's, by name, where it does not hold them whole. dtype: of the weights in the files, to which the model
    itself may be changed; None: as they are.
    """
    import shutil

    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    copy_tokenizer(tokenizer_folder, partial)
    dtype = dtype or model.dtype
    if weights is None:
        nn.Module.to(model, dtype)
    else:
        weights = {name: weight.to(dtype) for name, weight in weights.items()}
    model.generation_config = GenerationConfig.from_model_config(model.config)  # the library refuses to write some
    model.save_pretrained(partial, state_dict=weights)
    model.config.dtype = dtype
    model.config.save_pretrained(partial)
    if like is not None and (like / GENERATION).exists():
        shutil.copyfile(like / GENERATION, partial / GENERATION)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
