"""What a training run takes of its device's memory, from the shape of its model and its config alone.

Said before any weight is loaded, so that a model that is too large fails at once, with the keys that make it fit. The
bytes of weights, gradients and optimiser states are counted; those of activations are fitted to what autograd was
measured to keep of Llama, Qwen-3, Gemma-2 and Gemma-3 on a CPU (an upper bound of the four); what a GPU's kernels take
is modelled. Five runs on a CPU peaked at 0.85 to 1.15 times the estimate; tests/test_memory.py holds one of them to a
factor of 1.4, with a plain step and with SAM's.

uv run python benchmarks/fits.py        what fits on which card
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from undo.config.mistakes import ConfigError
from undo.config.schema import Execution, Training
from undo.lm.shape import Shape

FP32: Final = 4  # bytes
BF16: Final = 2
STATE: Final = {  # bytes for each weight; 8 bits have two fp32 scales a block; Muon's ends have AdamW's, so at most
    "adamw": 8.0,
    "adamw_8bit": 2 + 8 / 256,
    "sgd": 4.0,
    "muon": 8.0,
}
PROCESS: Final = {"cuda": 1 << 30, "cpu": 1 << 29}  # CUDA's context and kernels; Python and its libraries


class Memory(NamedTuple):
    """Bytes at the peak of a step."""

    weights: float
    frozen: float  # teacher or reference
    gradients: float
    step: float  # what a step with a second gradient holds beside it
    optimizer: float
    activations: float
    loss: float
    process: float
    beside: float = 0.0  # the other students of the same process

    @property
    def total(self) -> float:
        return sum(self)

    def __str__(self) -> str:
        parts = (f"{name} {value / 1e9:.1f}" for name, value in self._asdict().items() if value >= 5e7)
        return f"{self.total / 1e9:.1f} GB ({', '.join(parts)})"


def needed(
    shape: Shape,
    cfg: Training,
    execution: Execution,
    length: int,
    *,
    frozen: Sequence[Shape] = (),
    trained: int | None = None,
    held: int = 0,
    streams: int = 1,
    device: str = "cuda",
    beside: int = 0,
) -> Memory:
    """Memory of a run that trains `trained` weights (None: all) of a model on rows of `length` tokens.

    frozen: the models that run along without a gradient. held: bytes for each trained weight that its step holds beside
    the gradient (Method.held_per_weight). streams: entries of a batch, whose activations are held together. device:
    cuda or cpu. beside: other runs like this one that take turns with it and learn from the same frozen models.
    """
    trained = shape.parameters if trained is None else trained
    own = -(-cfg.batch_rows // execution.devices)  # rows of the device that has most
    rows = min(execution.micro_rows or own, own)
    tokens = rows * length * streams
    mixed = cfg.precision == "bf16"
    embedding = shape.vocab_size * shape.hidden_size
    head_is_trained = trained > shape.body_parameters
    whole = 1.0  # of the trained weights' gradients and states; the weights themselves are whole when they are loaded
    if execution.shard == "full":
        divided = min(1.0, shape.body_parameters / trained)
        whole = 1 - divided + divided / execution.devices
    casts = BF16 * (shape.body_parameters if mixed else 0)  # autocast keeps them from the forward to the backward pass
    # The tied matrix has one gradient from the head and one from the embedding; micro-batches add both to a third.
    more_gradients = (2 if rows < own else 1) * embedding if head_is_trained else 0
    block = _activations(shape, length, mixed, device)
    kept = FP32 * shape.hidden_size if execution.gradient_checkpointing else block
    at_once = 2 * block  # of the block whose gradient is being formed: what it kept, and as much again in gradients
    read = 4 * FP32 * shape.hidden_size  # embedded, normed, at the labels, and its gradient
    others = max((2 * FP32 * (f.hidden_size + f.intermediate_size) for f in frozen), default=0)
    student = FP32 * shape.parameters + STATE[cfg.optimizer] * trained * whole  # between its turns, without a gradient
    remembered = FP32 * own * length * streams * sum(f.hidden_size for f in frozen)  # of one step, for all
    return Memory(
        weights=FP32 * shape.parameters + casts,
        frozen=FP32 * sum(f.parameters for f in frozen),
        gradients=FP32 * (trained * whole + more_gradients),
        step=held * trained,
        optimizer=STATE[cfg.optimizer] * trained * whole,
        activations=tokens * (shape.layers * kept + at_once + read + others),
        loss=_loss(shape, frozen, min(tokens // streams, rows * length), mixed, device),
        process=PROCESS[device],
        beside=beside * student + (remembered if beside else 0),
    )


def _activations(shape: Shape, length: int, mixed: bool, device: str) -> float:
    """Bytes that one block keeps of one token for the backward pass."""
    width = 2 * (shape.heads + shape.kv_heads) * shape.head_dim
    kept = 42 * shape.hidden_size + (8 if mixed else 16) * shape.intermediate_size + (6 if mixed else 8) * width
    # a CPU's blocked attention keeps scores and weights, of three quarters of the keys in rows of two blocks
    return kept + (6 * shape.heads * length if device == "cpu" else 8 * shape.heads)


def _loss(shape: Shape, frozen: Sequence[Shape], tokens: int, mixed: bool, device: str) -> float:
    """See losses.grid: logits of a chunk of tokens, once for each model that is read, what is made of a tile of them,
    and the heads' casts. A GPU's one tile is the chunk, and its kernels make nothing but the gradient.
    """
    gpu, heads = device == "cuda", [shape, *frozen]
    rows = max(1, min((1 << 29) // shape.vocab_size if gpu else min(512, (1 << 25) // shape.vocab_size), tokens))
    columns = shape.vocab_size if gpu else min(2048, shape.vocab_size)
    chunk = FP32 * rows * columns * -(-shape.vocab_size // columns)
    # on a CPU: both models' probabilities, their difference, and the gradient with that of the tile before
    made = (BF16 if mixed else FP32) if gpu else FP32 * (5 if frozen else 3)
    casts = sum(BF16 * f.vocab_size * f.hidden_size for f in heads) if mixed else 0
    return chunk * len(heads) + made * rows * columns + casts


class Option(NamedTuple):
    """Keys that save memory, and the run with them."""

    keys: str
    memory: Memory


def options(shape: Shape, cfg: Training, execution: Execution, length: int, **more: Any) -> Iterator[Option]:
    """What can be changed about a run, that which costs least first: no result before speed, and 8 bits at the end."""
    own = -(-cfg.batch_rows // execution.devices)
    rows = min(execution.micro_rows or own, own)
    fewer = []
    while rows > 1:
        rows //= 2
        fewer.append(rows)
    less = [{}, {"optimizer": "adamw_8bit"}] if cfg.optimizer == "adamw" and execution.shard == "none" else [{}]
    for training in less:
        for checkpointing in {execution.gradient_checkpointing: None, True: None}:
            for micro_rows in [None, *fewer]:
                changed: dict[str, object] = {} if micro_rows is None else {"micro_rows": micro_rows}
                if checkpointing and not execution.gradient_checkpointing:
                    changed["gradient_checkpointing"] = True
                keys = [f"execution.{key}={str(value).lower()}" for key, value in changed.items()]
                keys += [f"training.{key}={value}" for key, value in training.items()]
                memory = needed(
                    shape, cfg.model_copy(update=training), execution.model_copy(update=changed), length, **more
                )
                yield Option(" ".join(keys), memory)


def require(available: float, shape: Shape, cfg: Training, execution: Execution, length: int, **more: Any) -> Memory:
    """What the run needs. Raises ConfigError, with the keys that make it fit, where that is more than `available`."""
    first, *others = options(shape, cfg, execution, length, **more)
    if first.memory.total <= available:
        return first.memory
    fitting = next((option for option in others if option.memory.total <= available), None)
    least = min(option.memory.total for option in (first, *others))
    advice = (
        f"it would fit with: {fitting.keys} ({fitting.memory.total / 1e9:.1f} GB)"
        if fitting
        else f"no key makes it fit (at least {least / 1e9:.1f} GB): take a larger device or a smaller model"
    )
    raise ConfigError(f"this run needs {first.memory}\nand has {available / 1e9:.1f} GB of memory; {advice}")


def available(runs: int = 1, devices: int = 1) -> tuple[float, str]:
    """Bytes of this process's device that one of `runs` that share it may take, and its kind: cuda or cpu.

    The processes of a run on several `devices` that are a CPU's cores share the machine's memory.
    """
    import torch

    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[1] / runs, "cuda"
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):  # of a container
        try:
            limits.append(int(Path(path).read_text()))
        except (OSError, ValueError):  # not there, or "max"
            continue
    return min(limits) / devices, "cpu"
