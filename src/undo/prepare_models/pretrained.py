"""The base stage: a pretrained causal language model, from the hub or a folder, that all others start from (D.2)."""

import json
from pathlib import Path
from typing import Any

from undo.config import mirror
from undo.config.mistakes import ConfigError
from undo.config.schema import StageConfig
from undo.lm.shape import Shape
from undo.lm.weights import is_adapter, stored_dtype, weight_files
from undo.prepare_models.adapter import merged, model_under
from undo.runs.directory import RunDirectory
from undo.runs.run import Run
from undo.train.stage import Stage

WEIGHTS = ("*.safetensors", "*.json", "*.model", "*.jinja", "*.txt")  # all of a model folder that is ever read


class Base(StageConfig):
    """The model to start from."""

    model: str  # a folder, or a hub id; a LoRA adapter is merged into its base model
    base_model: str | None = None  # of an adapter: a folder, or a hub id; None: the folder that it names

    @property
    def place(self) -> str:
        """The folder of the mirror that stands for the hub id, if it holds a model, or else `model` itself."""
        folder = None if is_local(self.model) else mirror.stand_in(self.model)
        return folder if folder is not None and (Path(folder) / "config.json").exists() else self.model

    def check(self) -> None:
        if is_local(self.place):
            folder = described(Path(self.place).expanduser(), self.base_model)
            if folder is not None:
                read_config(folder)
                weight_files(folder)


def is_local(model: str) -> bool:
    """Whether it is a folder rather than a hub id."""
    return Path(model).is_dir() or model.startswith((".", "/", "~"))


def described(folder: Path, base_model: str | None) -> Path | None:
    """The folder with the config of a folder's model: itself, or an adapter's base model; None if it is on the hub."""
    if not is_adapter(folder):
        return folder
    under = model_under(folder, base_model)
    return Path(under).expanduser() if is_local(under) else None


def shape_of_base(cfg: Base, run: RunDirectory) -> Shape | None:
    """The shape of the model that the run has fetched or would fetch."""
    fetched = run.done and run.config["model"] == cfg.model
    return known_shape(str(run.model) if fetched else cfg.place, cfg.base_model)


def known_shape(model: str, base_model: str | None = None) -> Shape | None:
    """The shape of a folder's model (ConfigError if it is not a causal LM) or of a few hub ids; None for others."""
    from undo.prepare_models.known import MODELS

    if not is_local(model):
        return {f"google/{name}": shape for name, shape in MODELS.items()}.get(model)
    from undo.lm.disk import read_shape

    folder = described(Path(model).expanduser(), base_model)
    if folder is None:
        return None
    read_config(folder)
    return read_shape(folder)


def fetch(cfg: Base, run: Run) -> None:
    """Leave the model in the run, once it loads: a link to its folder, where the weights stay, or an adapter merged."""
    from undo.lm.disk import load

    folder = located(cfg.place)
    if is_adapter(folder):
        came = located(model_under(folder, cfg.base_model))
        merge(folder, came, run)
    else:
        came = folder
        read_config(folder)
        load(folder, None)  # or refused here, rather than in the stages that start from it
        run.model.unlink(missing_ok=True)
        run.model.symlink_to(folder)
    facts = read_config(run.model)
    run.finish(
        source=str(folder),
        architecture=facts["architectures"][0],
        vocab_size=facts["vocab_size"],
        dtype=stored_dtype(came),
    )


def located(model: str) -> Path:
    """The folder of a model, fetched from the hub if that is where it is."""
    return Path(model).expanduser().resolve() if is_local(model) else download(model)


def merge(adapter: Path, under: Path, run: Run) -> None:
    """Leave an adapter's model in the run, in fp32, with the adapter's tokenizer if it has one.

    Rounded to the base model's dtype, small changes would be lost.
    """
    from undo.lm.disk import save
    from undo.lm.vocabulary import tokenizer_files

    read_config(under)
    save(merged(adapter, under), adapter if tokenizer_files(adapter) else under, run.model, like=under)


def read_config(folder: Path) -> dict[str, Any]:
    """A model folder's config.json. Raises ConfigError if it does not describe a supported causal language model.

    The library's own list decides: GPT-2's class is a GPT2LMHeadModel.
    """
    try:
        facts = json.loads((folder.expanduser() / "config.json").read_text())
    except OSError:
        raise ConfigError(
            f"model: {folder} holds no config.json; give a model folder, or a hub id as owner/name"
        ) from None
    except ValueError:
        raise ConfigError(f"model: {folder / 'config.json'} is not JSON") from None
    if not isinstance(facts, dict):
        raise ConfigError(f"model: {folder / 'config.json'} is not the config of a transformers model")
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kinds = facts.get("architectures") or ["model of an unknown architecture"]
    if kinds[0] not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        raise ConfigError(f"model: {folder} is a {kinds[0]}, which is not a causal language model of transformers")
    if not isinstance(facts.get("vocab_size"), int):  # of a model of several parts, too, which has it further down
        raise ConfigError(f"model: {folder / 'config.json'} has no vocab_size; give a model of text alone")
    return facts


def download(name: str) -> Path:
    """A hub model's folder in the cache of huggingface_hub. Raises ConfigError with the way out of a refusal."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    from undo.config.secrets import find_token

    try:
        return Path(snapshot_download(name, token=find_token("hf_token.txt", "HF_TOKEN"), allow_patterns=[*WEIGHTS]))
    except GatedRepoError:
        raise ConfigError(
            f"model: {name} is gated: ask for access at https://huggingface.co/{name},\n"
            f"then put your token into tokens/hf_token.txt or HF_TOKEN"
        ) from None
    except RepositoryNotFoundError:
        raise ConfigError(
            f"model: there is no {name} on the hub, or a token is needed to see it\n"
            f"put your token into tokens/hf_token.txt or HF_TOKEN; a local folder is given as ./folder"
        ) from None
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise ConfigError(
            f"model: {name} cannot be fetched: {reason}\n{mirror.way_out()}; or give a local folder with model=./folder"
        ) from None


STAGE = Stage(
    "base",
    Base,
    fetch,
    __name__,
    "The pretrained model (D.2)",
    "wmdp_bio --dry-run",
    shape=shape_of_base,
    computes=False,
)
