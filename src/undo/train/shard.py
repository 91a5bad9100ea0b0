"""The weights of the blocks divided over the devices of a run (FSDP2), with their gradients and optimiser states.

Embedding, final norm and head stay whole on each device: the losses read the head's weight itself. A block's weights
are put together for its forward and backward pass; its gradient is summed over the devices and comes out divided.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from undo.lm.read import blocks
from undo.runs import ranks


def divide(model: PreTrainedModel) -> None:
    """In place: from now on the parameters of the blocks are DTensors."""
    device = ranks.this_process().device
    assert device is not None
    mesh = init_device_mesh(device.type, (ranks.count(),))
    for block in blocks(model):
        divided = fully_shard(block, mesh=mesh)
        divided.set_gradient_divide_factor(1.0)  # a sum, as everywhere here; FSDP's own choice is the mean
        divided.set_force_sum_reduction_for_comms(True)  # gloo knows no other


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor, on every rank. Every rank must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(value: Tensor, weight: Tensor) -> Tensor:
    """This rank's part of a whole tensor, divided as `weight` is."""
    if not isinstance(weight, DTensor):
        return value.to(weight.device)
    value = value.to(weight.device)
    return distribute_tensor(value, weight.device_mesh, weight.placements, src_data_rank=None)  # all have all of it


def norm(tensors: Sequence[Tensor]) -> Tensor:
    """The global 2-norm over divided and whole tensors, each element once. Scalar. Every rank must call this."""
    parts = [t.to_local() for t in tensors if isinstance(t, DTensor)]
    if not parts:
        return nn.utils.get_total_norm(tensors)
    square = nn.utils.get_total_norm(parts).square()
    torch.distributed.all_reduce(square)
    rest = [t for t in tensors if not isinstance(t, DTensor)]
    return (square + nn.utils.get_total_norm(rest).square()).sqrt() if rest else square.sqrt()


def clip(weights: Sequence[nn.Parameter], longest: float | None) -> Tensor:
    """Scale all gradients to a global norm of at most `longest`; returns the norm before that."""
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    if not any(isinstance(g, DTensor) for g in gradients):
        return nn.utils.clip_grad_norm_(weights, math.inf if longest is None else longest)
    total = norm(gradients)
    if longest is not None:
        factor = (longest / (total + 1e-6)).clamp(max=1.0)  # as torch has it
        for gradient in gradients:
            (gradient.to_local() if isinstance(gradient, DTensor) else gradient).mul_(factor)
    return total
