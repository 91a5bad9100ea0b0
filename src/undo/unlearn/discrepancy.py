"""How far activations are from Gaussian noise: RepNoise's maximum mean discrepancy."""

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from undo.lm.tokens import Tokens


def noise_distance(activations: Sequence[Tensor], tokens: Tokens, sample: int, seed: int) -> Tensor:
    """Sum over documents of the mean over `activations` of MMD^2(their tokens, Gaussian noise). Scalar.

    activations: each [rows, length, width]. Each document contributes at most `sample` of its labelled positions. Which
    ones, and the noise, depend only on `seed` and the document's tokens, so a second pass over the batch, or another
    packing of it, gives the same value.
    """
    _, sizes = tokens.at_labels(tokens.document).unique_consecutive(return_counts=True)
    ids = tokens.at_labels(tokens.input_ids).cpu().split(counts := sizes.tolist())
    documents = zip(*(tokens.at_labels(a).float().split(counts) for a in activations), strict=True)
    total = torch.stack([a[:0].float().sum() for a in activations]).sum()  # 0, with a gradient: no document may count
    for own, layers in zip(ids, documents, strict=True):
        rng = torch.Generator().manual_seed((seed + zlib.crc32(own.numpy().tobytes())) % 2**63)
        chosen = torch.randperm(len(own), generator=rng)[:sample]
        for layer in layers:
            noise = torch.randn(len(chosen), layer.shape[1], generator=rng)
            total = total + mmd(layer[chosen.to(layer.device)], noise.to(layer)) / len(layers)
    return total


def mmd(x: Tensor, y: Tensor, kernels: int = 5, factor: float = 2.0) -> Tensor:
    """Squared maximum mean discrepancy, a sum of RBF kernels around the mean squared distance. x, y: [n, width].

    As in RepNoise (Rosati et al. 2024); the kernels' width is a constant to the gradient.
    """
    points = torch.cat([x, y])
    distances = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist").square()
    n = len(points)
    width = distances.detach().sum() / (n * n - n) / factor ** (kernels // 2)
    similarity = torch.stack([(-distances / (width * factor**i)).exp() for i in range(kernels)]).sum(0)
    sign = torch.cat([torch.ones(len(x)), -torch.ones(len(y))]).to(points)
    return sign @ similarity @ sign / len(x) ** 2
