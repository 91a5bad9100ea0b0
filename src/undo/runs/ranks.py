"""One run on several devices: a process for each, a rank of torchrun's. What the ranks must agree on goes through here.

Every rank computes along; the first, the leader, alone writes to the run's directory. Ranks take part in the same
collective calls in the same order, so whatever decides about one (to stop, to evaluate, to skip) is agreed on before.
Agreements go through gloo on the CPU: they never wait for a GPU. With one process nothing here imports torch.
"""

import os
from datetime import timedelta
from typing import TYPE_CHECKING, Final, TypeVar

if TYPE_CHECKING:
    from accelerate import PartialState

# Set by torchrun for its ranks; what a user's environment says of them is not about our runs.
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
    """Its device, and its place among the processes of the run. Without CUDA: the CPU, on a Mac too."""
    import torch
    from accelerate import PartialState

    if count() == 1:
        return PartialState(cpu=not torch.cuda.is_available())
    backend = "cuda:nccl,cpu:gloo" if torch.cuda.is_available() else "gloo"
    return PartialState(cpu=not torch.cuda.is_available(), backend=backend, timeout=PATIENCE)


def of_the_leader(value: Value) -> Value:
    """What the leader has; the others' is not looked at. Only between processes of one run: it is pickled."""
    if count() == 1:
        return value
    import torch

    this_process()
    values = [value]
    torch.distributed.broadcast_object_list(values, src=0, device=torch.device("cpu"))
    return values[0]


def any_of(flag: bool) -> bool:
    """Whether any rank says so."""
    if count() == 1:
        return flag
    import torch

    this_process()
    found = torch.tensor(int(flag))
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    return bool(found)


def wait_for_all() -> None:
    any_of(False)
