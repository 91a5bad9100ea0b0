"""What a run takes from its parents (models, token stores, shapes), and the model that it leaves behind."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, get_args

from undo.config.mistakes import ConfigError
from undo.config.schema import ROLES, Role, RunName, Training
from undo.lm.shape import Shape
from undo.runs import precision
from undo.runs.company import Turns
from undo.runs.directory import RunDirectory
from undo.runs.run import Run
from undo.train.stage import SaveDtype, TrainingStage

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from undo.data.store import TokenStore


def require_memory(cfg: TrainingStage, run: Run, model: Shape | RunName, frozen: Sequence[RunName] = ()) -> None:
    """Raises ConfigError, before any weight is loaded, if training `model` beside the frozen ones cannot fit.

    The shape of a run's model is read from its folder's config.json.
    """
    from undo.lm import memory

    memory.require(**_memory_asked(cfg, run, model, frozen))


def wait_for_room(cfg: TrainingStage, run: Run, model: RunName, frozen: Sequence[RunName]) -> Turns:
    """Halts until `model` can be trained beside the runs of this process that have begun. Raises ConfigError as
    `require_memory` does, if it does not even fit alone."""
    from undo.lm import memory

    asked = _memory_asked(cfg, run, model, frozen)
    memory.require(**asked)
    available = asked.pop("available")
    while beside := run.company.beside:
        needed = memory.needed(**asked, beside=beside)
        if needed.total <= available:
            return
        print(f"waits: {beside + 1} students side by side need {needed} and have {available / 1e9:.1f} GB", flush=True)
        yield None


def _memory_asked(cfg: TrainingStage, run: Run, model: Shape | RunName, frozen: Sequence[RunName]) -> dict[str, Any]:
    """The arguments of memory.require for this run."""
    from undo.lm import memory
    from undo.lm.disk import shape, skeleton

    trained = None
    if isinstance(model, str):
        empty = skeleton(run.sibling(model).model)
        trained = sum(weight.numel() for name, weight in empty.named_parameters() if cfg.trains(name))
        model = shape(empty)
    available, device = memory.available(cfg.execution.runs_per_gpu, cfg.execution.devices)
    return {
        "available": available,
        "shape": model,
        "cfg": computed_in(cfg.training),
        "execution": cfg.execution,
        "length": max(store.length for store in open_stores(cfg, run).values()),
        "frozen": [shape_of_parent(run, name) for name in frozen],
        "trained": trained,
        "held": cfg.held_per_weight,
        "streams": len(cfg.streams()),
        "device": device,
    }


def computed_in(training: Training) -> Training:
    """The same values, with the precision that this process computes in."""
    return training.model_copy(update={"precision": precision.taken(training.precision)})


def open_stores(cfg: TrainingStage, run: Run) -> "dict[Role, TokenStore]":
    """The token stores of all roles that the run trains on."""
    used = {role for mixture in cfg.streams().values() for role, share in mixture.items() if share > 0}
    return {role: open_store(run.sibling(cfg.data), role) for role in ROLES if role in used}


def open_store(data: RunDirectory, role: Role) -> "TokenStore":
    """The training text of a role. Raises ConfigError if the prepare run has none."""
    from undo.data.store import TokenStore

    folder = data.folder / "train" / role
    if not folder.exists():
        present = ", ".join(sorted(path.name for path in folder.parent.glob("*")))
        raise ConfigError(f"{data.folder} holds no {role} data; its roles: {present}")
    return TokenStore(folder)


def keep(model: "PreTrainedModel", cfg: TrainingStage, run: Run, like: RunName | None = None) -> None:
    """Save the model, with the tokenizer, templates and generation config of the run `like`, whose model it was.

    Where that one has no tokenizer, or there is none, it is the tokenizer of its data.
    """
    from undo.lm.disk import save
    from undo.lm.vocabulary import tokenizer_files
    from undo.train import shard

    source = None if like is None else run.sibling(like).model
    tokenizer = source if source and tokenizer_files(source) else run.sibling(cfg.data).folder / "tokenizer"

    weights = None
    if cfg.execution.shard == "full":
        weights = {name: shard.whole(weight) for name, weight in model.state_dict().items()}
    if run.leads:
        save(model, tokenizer, run.model, weights, like=source, dtype=saved_dtype(cfg, run))


def saved_dtype(cfg: TrainingStage, run: RunDirectory) -> "torch.dtype":
    """The dtype of the weights in the run's model folder."""
    import torch

    name = input_dtype(run, cfg.parents()) if cfg.save_dtype == "auto" else cfg.save_dtype
    return getattr(torch, name if name in get_args(SaveDtype) else "float32")  # not in eight bits


def input_dtype(run: RunDirectory, parents: Iterable[str]) -> str:
    """The dtype of the pretrained model that a run with these parents descends from; float32 if there is none."""
    for name in parents:
        if not name.startswith("prepare/"):
            facts = run.sibling(name).facts
            return facts.get("dtype") or input_dtype(run, facts["parents"])
    return "float32"


def load_parent(run: Run, name: str) -> "PreTrainedModel":
    """The model of another run, on this run's device, in fp32.

    Raises ConfigError if its files have changed since, or if its tokens are not the data's.
    """
    from undo.lm.disk import load
    from undo.lm.vocabulary import same_tokens

    cfg, parent = run.configured, run.sibling(name)
    assert isinstance(cfg, TrainingStage)
    parent.check_model()
    if not same_tokens(parent.model, run.sibling(cfg.data).folder / "tokenizer"):
        raise ConfigError(
            f"{cfg.data} was prepared with another tokenizer than that of {name}, {parent.model.resolve()}\n"
            f"prepare the data with prepare.tokenizer=<that folder>"
        )
    return place(load(parent.model), run)


def shape_of_parent(run: Run, name: str) -> Shape:
    """The shape of another run's model, without loading its weights."""
    from undo.lm.disk import read_shape

    return read_shape(run.sibling(name).model)


def fresh_like(run: Run, name: str, seed: int) -> "PreTrainedModel":
    """A random initialisation of another run's architecture, on this run's device."""
    from undo.lm.disk import fresh, read_config

    return place(fresh(read_config(run.sibling(name).model), seed), run)


def place(model: "PreTrainedModel", run: Run) -> "PreTrainedModel":
    """The same model, on this process's device, compiled if the run's config says so."""
    from undo.lm import place as on_device
    from undo.runs.ranks import this_process

    device, cfg = this_process().device, run.configured
    assert device is not None
    assert isinstance(cfg, TrainingStage)
    return on_device.place(model, device, cfg.compiles(device.type), cfg.execution.gradient_checkpointing)


def generator(seed: int) -> "torch.Generator":
    import torch

    return torch.Generator().manual_seed(seed)
