"""Rules' parts for whole input channels: what is kept of x, and the columns of the weight gradient.

Shapes: K selected channels, N positions of a matrix or samples of a convolution, O outputs, G groups, T touched groups;
x (N, I, ...), gy (N, O, ...).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tithe.selection import Channels

WeightGradient = Callable[[Tensor, Tensor, tuple[int, ...], int], Tensor]
"""(gy, x, shape of the weight, groups) → the weight's gradient."""


@dataclass(frozen=True)
class Usage:
    """How one call used a weight: what the price of its channels depends on.

    Args:
        groups: of the convolution; 1 for a matrix.
        transposed: the weight's input channels are its axis 0: a matrix stored as (I, O), a transposed convolution.
        positions: values of one input channel, all samples together.
        out_positions: values that each weight is multiplied by: those of one output channel, all samples together, or
            of one input channel where a convolution is transposed.
        itemsize: bytes of one such value.
    """

    groups: int
    transposed: bool
    positions: int
    out_positions: int
    itemsize: int

    @classmethod
    def matrix(cls, x: Tensor, *, transposed: bool) -> Usage:
        """Of x (..., I) times a matrix."""
        positions = x.numel() // max(x.shape[-1], 1)
        return cls(1, transposed, positions, positions, x.element_size())

    @classmethod
    def convolution(cls, x: Tensor, y: Tensor, groups: int, *, transposed: bool) -> Usage:
        """Of x (N, I, ...) convolved to y (N, O, ...)."""
        positions, out_positions = (t.numel() // max(t.shape[1], 1) for t in (x, y))
        return cls(groups, transposed, positions, positions if transposed else out_positions, x.element_size())


class Columns:
    """The selected columns of a matrix's gradient: keeps x[..., channels], multiplies only those.

    Args:
        selection: channels of one group.
    """

    def __init__(self, selection: Channels) -> None:
        self.selection = selection

    def keep(self, x: Tensor) -> Tensor:
        """The selected columns of x as a compact copy; x itself when all are."""
        return x if self.selection.full else x.index_select(-1, self.selection.channels)

    def grad(self, gy_NO: Tensor, kept: Tensor) -> Tensor:
        """gyᵀ x at the selected columns, in the shape of θ."""
        kept_NK = kept.reshape(gy_NO.shape[0], self.selection.channels.numel())
        return kept_NK.t() @ gy_NO if self.selection.transposed else gy_NO.t() @ kept_NK


class ChannelCut:
    """The selected input channels of a convolution: keeps x[:, channels], convolves only those backward.

    Args:
        selection: channels of the convolution's groups.
    """

    def __init__(self, selection: Channels) -> None:
        self.selection = selection

    def keep(self, x: Tensor) -> Tensor:
        """The selected channels of x as a compact copy; x itself when all are."""
        return x if self.selection.full else x.index_select(1, self.selection.channels)

    def grad(self, gradient: WeightGradient, gy: Tensor, kept: Tensor) -> Tensor:
        """The selected columns of the weight's gradient, in the shape of θ."""
        selection = self.selection
        channels, count = selection.channels, selection.channels.numel()
        num_ins, num_outs = self.per_group
        if selection.groups == 1:
            return gradient(gy, kept, self._shape(count, num_outs), 1)
        if num_ins == 1:  # depthwise: a channel is a group
            if not selection.full:
                gy = gy.index_select(1, members(channels, num_outs))
            return gradient(gy, kept, self._shape(count, num_outs, count), count).view(selection.theta_shape)
        # Groups may hold different numbers of selected channels: all are padded with zeros to the most.
        group = torch.div(channels, num_ins, rounding_mode="floor")
        touched, place, counts = group.unique(return_inverse=True, return_counts=True)
        width = int(counts.max())
        first = torch.cumsum(counts, 0) - counts
        slot = place * width + torch.arange(count, device=place.device) - first.index_select(0, place)
        padded = kept.new_zeros(kept.shape[0], touched.numel() * width, *kept.shape[2:]).index_copy_(1, slot, kept)
        gy = gy.index_select(1, members(touched, num_outs))
        num_groups = touched.numel()
        grad = gradient(gy, padded, self._shape(num_groups * width, num_outs, num_groups), num_groups)
        if not selection.transposed:
            grad = grad.unflatten(0, (num_groups, num_outs)).transpose(1, 2).flatten(0, 1)
        return grad.index_select(0, slot)

    @property
    def per_group(self) -> tuple[int, int]:
        """Input channels and output channels of a group."""
        first, second = self.selection.shape[:2]
        first //= self.selection.groups
        return (first, second) if self.selection.transposed else (second, first)

    def _shape(self, num_ins: int, num_outs: int, groups: int = 1) -> tuple[int, ...]:
        """The shape of a weight of so many input channels, and output channels in each group."""
        kernel = self.selection.shape[2:]
        if self.selection.transposed:
            return (num_ins, num_outs, *kernel)
        return (num_outs * groups, num_ins // groups, *kernel)


def members(groups: Tensor, size: int) -> Tensor:
    """The channels of `groups`, `size` in each."""
    return (groups[:, None] * size + torch.arange(size, device=groups.device)).reshape(-1)
