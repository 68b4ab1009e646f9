"""Compute importance from the weight alone; the rules' probes accumulate importance from gradients."""

from __future__ import annotations

import torch
from torch import Tensor


def magnitude(weight: Tensor) -> Tensor:
    """Return |w| of each entry in float32.

    Example:
        >>> magnitude(torch.tensor([-2.0, 1.0]))
        tensor([2., 1.])
    """
    return weight.detach().float().abs()


def random(weight: Tensor, generator: torch.Generator) -> Tensor:
    """Draw uniform scores in [0, 1), the same on every device and rank; their largest k are a uniform draw of k."""
    return torch.rand(weight.shape, generator=generator)


def channel_magnitude(weight: Tensor, groups: int, *, transposed: bool) -> Tensor:
    """Return Σ |w| over the columns of each input channel, (I,), in float32.

    Args:
        weight: (O, I / G, *kernel), or (I, O / G, *kernel) when transposed.
        groups: G.
        transposed: the input channels are axis 0.
    """
    size = weight.detach().abs().float()
    if transposed:
        return size.flatten(1).sum(1)
    return size.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1).flatten(1).sum(1)
