"""A LoRA adapter folder: the model that it adapts, and the two merged into one."""

import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING

from undo.config.mistakes import ConfigError
from undo.lm.weights import ADAPTER, ADAPTER_WEIGHTS, weight_files

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def model_under(folder: Path, given: str | None) -> str:
    """The model that an adapter was trained on, as `given` or as its adapter_config.json says.

    Raises ConfigError for a cut or missing file, another kind of adapter, a model that is not here, or without peft.
    """
    weight_files(folder)
    try:
        facts = json.loads((folder / ADAPTER).read_text())
        kind, name = facts["peft_type"], facts.get("base_model_name_or_path")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"model: {folder / ADAPTER} is not the config of an adapter") from None
    if kind != "LORA":
        raise ConfigError(
            f"model: {folder} is an adapter of the kind {kind}; only LoRA is merged here, so merge it first"
        )
    if importlib.util.find_spec("peft") is None:
        raise ConfigError(
            f"model: {folder} is a LoRA adapter, which the library peft merges; it is not installed\n"
            f"get it with: uv sync --extra lora"
        )
    if given is None and not (name and Path(name).expanduser().is_dir()):
        raise ConfigError(
            f"model: {folder} is a LoRA adapter of {name or 'a model without a name'}, which is no folder here\n"
            f"give that model with base.base_model=<folder or hub id> (run_base.py: without `base.`)"
        )
    return given or name


def merged(folder: Path, under: Path) -> "PreTrainedModel":
    """The model `under` the adapter with the adapter in it, fp32. Raises ConfigError where they do not fit."""
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    from undo.lm.disk import load, require_finite

    model = load(under)
    try:
        adapted = PeftModel.from_pretrained(model, folder)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise ConfigError(f"{folder}: does not fit {under} ({str(error).strip().splitlines()[0][:200]})") from error
    with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
        found = set(file.keys())
    expected = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    if wrong := sorted(expected - found) or sorted(found - expected - set(adapted.state_dict())):
        raise ConfigError(f"{folder}: {ADAPTER_WEIGHTS} is not what {ADAPTER} says of {under}: {wrong[0]}")
    whole = adapted.merge_and_unload()
    require_finite(folder, whole)
    return whole
