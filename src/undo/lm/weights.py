"""The weight files of a model folder: which they are, whether they are whole, whether they are what the config says.

Nothing here needs torch, so that a folder's mistakes are known before anything starts.
"""

import json
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Final

from undo.config.mistakes import ConfigError

WHOLE: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
ADAPTER: Final = "adapter_config.json"  # a LoRA adapter: what a model learned beside its weights
ADAPTER_WEIGHTS: Final = "adapter_model.safetensors"
PICKLES: Final = ("*.bin", "*.pt", "*.pth", "*.ckpt")
PREFIXES: Final = {  # of all names of weights -> who puts it there, and the cure
    "module.": ("DistributedDataParallel", "save the model inside it: model.module.save_pretrained(...)"),
    "base_model.model.": ("peft", "merge the adapter first: model.merge_and_unload().save_pretrained(...)"),
    "_orig_mod.": ("torch.compile", "save the model inside it: model._orig_mod.save_pretrained(...)"),
}
DTYPES: Final = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
NAMED: Final = 3  # weights of each kind in a message


def is_adapter(folder: Path) -> bool:
    """Whether it holds a LoRA adapter. Raises ConfigError where it holds a model, too: peft would take both."""
    if not (folder / ADAPTER).exists():
        return False
    if (folder / WHOLE).exists() or (folder / INDEX).exists():
        raise ConfigError(
            f"{folder}: holds a model and an adapter; move {ADAPTER} away if the adapter is merged into the model,\n"
            f"or give a folder with the adapter alone"
        )
    return True


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model, or of an adapter. Their headers are read, and their lengths compared.

    Raises ConfigError for a folder without any, and for a missing, empty or cut file.
    """
    if is_adapter(folder):
        names = [ADAPTER_WEIGHTS]
    elif (folder / INDEX).exists() and not (folder / WHOLE).exists():  # the library's order
        names = _shards(folder / INDEX)
    else:
        names = [WHOLE]
    files = [folder / name for name in names]
    absent = [file.name for file in files if not file.exists()]
    if absent and (pickles := sorted(path.name for kind in PICKLES for path in folder.glob(kind))):
        raise ConfigError(
            f"{folder}: holds its weights as pickles ({_some(pickles)}), which can run code; only safetensors are "
            f"loaded\nwhere you trust them: from_pretrained(...).save_pretrained(<folder>, safe_serialization=True)"
        )
    if absent:
        raise ConfigError(f"{folder}: holds no {_some(absent)}; only safetensors are loaded")
    for file in files:
        _check(file)
    return files


def stored_dtype(folder: Path) -> str:
    """What most tensors in a model's files are: float32, bfloat16, float16, or another kind in the files' own word."""
    from safetensors import safe_open

    found = Counter[str]()
    for file in weight_files(folder):
        with safe_open(file, framework="np") as opened:
            found.update(opened.get_slice(name).get_dtype() for name in opened.keys())  # noqa: SIM118  # not a dict
    kind = found.most_common(1)[0][0] if found else "F32"
    return DTYPES.get(kind, kind)


def _shards(index: Path) -> list[str]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        raise ConfigError(f"{index}: is not the index of a model's weight files") from None
    if outside := [name for name in names if Path(name).name != name]:
        raise ConfigError(f"{index}: names a file outside its folder: {outside[0]}")
    return names


def _check(file: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np"):
            pass
    except (OSError, SafetensorError) as error:
        with open(file, "rb") as start:
            pointer = start.read(20).startswith(b"version https://git")
        cure = "get it with: git lfs pull" if pointer else "copy or download it again"
        raise ConfigError(f"{file}: is empty, cut or no safetensors file ({error})\n{cure}") from None


def require_fit(folder: Path, report: Mapping[str, Collection[Any]]) -> None:
    """Raises ConfigError for weights that are missing, not in the model, or of another shape.

    report: what transformers says of loading (`output_loading_info`), in which tied heads are not missing.
    """
    missing, unexpected = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    mismatched = sorted(f"{key}: {list(found)}, not {list(said)}" for key, found, said in report["mismatched_keys"])
    found = [
        f"{len(keys)} {kind} ({_some(keys)})"
        for kind, keys in (("missing", missing), ("not in the model", unexpected), ("of another shape", mismatched))
        if keys
    ]
    if not found:
        return
    cure = "mend its config.json, or save the whole model again with save_pretrained"
    for prefix, (wrapper, way_out) in PREFIXES.items():
        if any(key.startswith(prefix) for key in unexpected):
            cure = f"their names begin with {prefix!r}, as {wrapper} names them; {way_out}"
            break
    raise ConfigError(f"{folder}: its weights are not those of its config.json: {', '.join(found)}\n{cure}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + ", ..." * (len(names) > NAMED)
