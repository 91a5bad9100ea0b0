"""One run on several devices: one process (a rank of torchrun) per device, and what the ranks must agree on.

Every rank computes; only the first one, the leader, writes to the run's directory. Ranks must make the same collective
calls in the same order, so they first agree on whatever decides about such a call: to stop, to evaluate, to skip.
Agreements use gloo on the CPU and never wait for a GPU. With one process nothing here imports torch.
"""

import os
from datetime import timedelta
from typing import TYPE_CHECKING, Final, TypeVar

from undo.config.mistakes import ConfigError

if TYPE_CHECKING:
    from accelerate import PartialState

# Set by torchrun. Values inherited from the user's shell are removed.
VARIABLES: Final = (
    "RANK",
    "LOCAL_RANK",
    "GROUP_RANK",
    "ROLE_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_WORLD_SIZE",
    "ROLE_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)
PATIENCE: Final = timedelta(days=7)  # the leader may wait for a file lock; a rank that dies is torchrun's business

Value = TypeVar("Value")


def count() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def leads() -> bool:
    return os.environ.get("RANK", "0") == "0"


def this_process() -> "PartialState":
    """The device of this process, and its place among the run's. Without CUDA it is the CPU, also on a Mac.

    Raises ConfigError if a GPU was named, and none is there: a run must not compute on what it was not given.
    """
    import torch
    from accelerate import PartialState

    card, named = torch.cuda.is_available(), os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if not card and named not in ("", "-1", "NoDevFiles"):
        raise ConfigError(
            f"CUDA_VISIBLE_DEVICES={named}: torch sees no such GPU\n"
            f"name one that is there, install torch for it, or compute on the CPU with CUDA_VISIBLE_DEVICES="
        )
    if count() == 1:
        return PartialState(cpu=not card)
    return PartialState(cpu=not card, backend="cuda:nccl,cpu:gloo" if card else "gloo", timeout=PATIENCE)


def of_the_leader(value: Value) -> Value:
    """The leader's value, on every rank. It is pickled, which is safe between processes of one run."""
    if count() == 1:
        return value
    import torch

    this_process()
    values = [value]
    torch.distributed.broadcast_object_list(values, src=0, device=torch.device("cpu"))
    return values[0]


def any_of(flag: bool) -> bool:
    """Whether the flag is set on any rank."""
    if count() == 1:
        return flag
    import torch

    this_process()
    found = torch.tensor(int(flag))
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    return bool(found)


def wait_for_all() -> None:
    any_of(False)
