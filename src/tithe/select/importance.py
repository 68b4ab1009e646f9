"""Formulas of importance: from the weight alone, and from the means over samples that the rules' probes accumulate.

Those that take means may overwrite them: `tithe.scoring` hands each over once.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tithe.errors import TitheError

_BLOCK = 1 << 22
"""Entries of a block of rows that is worked on in float32 at once."""


def fisher(weight: Tensor, square: Tensor) -> Tensor:
    """Return the diagonal Fisher information, mean g²."""
    return square


def gradient(weight: Tensor, mean: Tensor) -> Tensor:
    """Return |mean g|, the size of the mean gradient."""
    return mean.abs_()


def saliency(weight: Tensor, mean: Tensor) -> Tensor:
    """Return |w · mean g|, the change of the loss to first order where w is removed.

    References:
        Molchanov et al., Importance Estimation for Neural Network Pruning, CVPR 2019, equation 8 (its square root).
    """
    return mean.mul_(weight.detach()).abs_()


def snr(weight: Tensor, mean: Tensor, square: Tensor) -> Tensor:
    """Return the signal-to-noise ratio of the gradient, |mean g| / √(mean g²), in [0, 1]; 0 / 0 is 0.

    Example:
        >>> snr(torch.ones(2), torch.tensor([-3.0, 0.0]), torch.tensor([25.0, 0.0]))
        tensor([0.6000, 0.0000])
    """
    ratio = mean.abs_().div_(square.sqrt_())
    return ratio.masked_fill_(square == 0, 0.0).clamp_(max=1.0)  # above 1 by rounding alone


def magnitude(weight: Tensor) -> Tensor:
    """Return |w| of each entry in float32.

    Example:
        >>> magnitude(torch.tensor([-2.0, 1.0]))
        tensor([2., 1.])
    """
    return weight.detach().float().abs()


def random(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Draw uniform scores in [0, 1), the same on every device and rank; their largest k are a uniform draw of k."""
    return torch.rand(shape, generator=generator)


def principal(matrix: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    """Return |W_r|, the entries of the best approximation of a matrix by one of rank r, by a randomised SVD.

        W ≈ Q B,   Q = orth((W Wᵀ)² W G),   G (n, 2r) normal,   W_r = Q (U S Vᵀ)_r of B = Qᵀ W

    A matrix in half precision is read by blocks of rows, so that no copy of it in float32 stands beside the result.

    Args:
        matrix: W (m, n), of any floating-point dtype.
        rank: r, at least 1; at min(m, n) and above W_r is W.
        generator: on the CPU, of the draw of G, so that it is the same on every device and rank.

    Returns:
        (m, n), float32, or float64 of a float64 matrix.

    Raises:
        TitheError: when the rank is below 1.

    References:
        Liu et al., LIFT the Veil for the Truth: Principal Weights Emerge after Rank Reduction for Reasoning-Focused
        Supervised Fine-Tuning, ICML 2025, arXiv 2506.00772: the score. Halko, Martinsson, Tropp, Finding Structure
        with Randomness, 2011, algorithms 4.4 (two iterations, 2r columns) and 5.1.
    """
    if rank < 1:
        raise TitheError("rank", found=str(rank), expected="at least 1", remedy="try 32")
    matrix = matrix.detach()
    rows, columns = matrix.shape
    dtype = torch.float64 if matrix.dtype == torch.float64 else torch.float32
    width = min(2 * rank, rows, columns)
    draw = torch.randn(columns, width, generator=generator, dtype=dtype)
    if rank >= min(rows, columns):
        return matrix.abs().to(dtype)
    blocks = matrix.split(max(1, _BLOCK // columns))

    def times(right: Tensor) -> Tensor:
        return torch.cat([block.to(dtype) @ right for block in blocks])

    def transposed_times(left: Tensor) -> Tensor:
        parts = left.split([block.shape[0] for block in blocks])
        total = torch.zeros(columns, left.shape[1], dtype=dtype, device=matrix.device)
        for block, part in zip(blocks, parts, strict=True):
            total.addmm_(block.to(dtype).t(), part)
        return total

    basis = torch.linalg.qr(times(draw.to(matrix.device))).Q
    for _ in range(2):
        basis = torch.linalg.qr(times(torch.linalg.qr(transposed_times(basis)).Q)).Q
    left, sizes, right = torch.linalg.svd(transposed_times(basis).t(), full_matrices=False)
    left, right = basis @ (left[:, :rank] * sizes[:rank]), right[:rank]
    return (left @ right).abs_()


def as_matrix(weight: Tensor, *, convolution: bool) -> Tensor | None:
    """Return a weight as the matrix that has a low-rank part: (O, I·kh·kw); None for what is a vector.

    Axes of length one in front do not count (a table of positions). A weight of three axes that is no kernel is a stack
    of matrices, as experts in one tensor are: they share their columns.

    Example:
        >>> as_matrix(torch.zeros(8, 4, 3, 3), convolution=True).shape
        torch.Size([8, 36])
    """
    while weight.dim() > 2 and weight.shape[0] == 1:
        weight = weight[0]
    if weight.dim() < 2 or min(weight.shape[0], math.prod(weight.shape[1:])) < 2:
        return None
    return weight.flatten(0, 1) if weight.dim() == 3 and not convolution else weight.flatten(1)


def channel_sums(score: Tensor, groups: int, *, transposed: bool) -> Tensor:
    """Return the sum of a score over the weights of each input channel, (I,).

    Args:
        score: (O, I / G, *kernel), or (I, O / G, *kernel) when transposed.
        groups: G.
        transposed: the input channels are axis 0.

    Example:
        >>> channel_sums(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), 1, transposed=False)
        tensor([4., 6.])
    """
    if transposed:
        return score.flatten(1).sum(1)
    by_group = score.unflatten(0, (groups, -1))
    return by_group.sum((1, *range(3, by_group.dim()))).flatten()
