"""Select whole input channels of a weight."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tithe.errors import TitheError
from tithe.selection.base import Selection, beside, check_ids


@dataclass(frozen=True, eq=False)
class Channels(Selection):
    """A set of whole input channels of a weight: both the weight gradient and the kept input shrink along them.

    A weight (O, I / G, *kernel) of G groups has I input channels; channel c belongs to group ⌊c G / I⌋ and meets that
    group's O / G output channels. θ has the shape of the selected columns:

        (O, K, *kernel)         one group
        (K, O / G, *kernel)     several groups, depthwise included
        (K, O / G, *kernel)     a weight whose axis 0 is the input channels: (I, O) or (I, O / G, *kernel), transposed

    Args:
        shape: the weight's shape, two axes or more.
        channels: int64, 1-D, strictly increasing, each in [0, I).
        groups: G of the convolution.
        transposed: the input channels are axis 0 of the weight: a matrix stored as (I, O), as in Hugging Face's
            `Conv1D`, or the weight of a transposed convolution.

    Raises:
        TitheError: when the shape has fewer than two axes or does not divide into the groups, or the channels are not
            int64, not 1-D, out of range, unsorted or repeated.

    References:
        Quélennec et al., Study of Training Dynamics for Memory-Constrained Fine-Tuning, arXiv 2510.19675, 2025: the
        unit that costs C'·D² weights and H·W kept values a sample.

    Example:
        >>> picked = Channels((2, 3), torch.tensor([0, 2]))
        >>> picked.gather(torch.arange(6.0).reshape(2, 3))
        tensor([[0., 2.],
                [3., 5.]])
    """

    shape: tuple[int, ...]
    channels: Tensor
    groups: int = 1
    transposed: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))
        if len(self.shape) < 2 or self.shape[0] % max(self.groups, 1):
            raise TitheError(
                "Channels",
                found=f"shape {self.shape}, {self.groups} groups",
                expected="two axes or more, axis 0 a multiple of the groups",
                remedy="pass the weight's own shape and the convolution's groups",
            )
        check_ids("Channels", self.channels, self.num_channels, self.shape)

    @property
    def num_channels(self) -> int:
        """Return I, the number of input channels."""
        return self.shape[0] if self.transposed else self.shape[1] * self.groups

    @property
    def items(self) -> Tensor:
        """Return the numbers of the selected channels."""
        return self.channels

    @property
    def theta_shape(self) -> tuple[int, ...]:
        """Return the shape of the selected columns."""
        count = self.channels.numel()
        if self.transposed:
            return (count, *self.shape[1:])
        if self.groups == 1:
            return (self.shape[0], count, *self.shape[2:])
        return (count, self.shape[0] // self.groups, *self.shape[2:])

    @property
    def indices(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Return the sorted flat int64 indices, computed when asked for: eight bytes for each selected entry."""
        if self.transposed:
            each = math.prod(self.shape[1:])
            return (self.channels[:, None] * each + _range(each, self.channels)).reshape(-1)
        num_in, num_out, depth = self.shape[1], self.shape[0] // self.groups, math.prod(self.shape[2:])
        group, column = torch.div(self.channels, num_in, rounding_mode="floor"), self.channels % num_in
        row_KO = group[:, None] * num_out + _range(num_out, self.channels)
        flat = (row_KO * num_in + column[:, None])[:, :, None] * depth + _range(depth, self.channels)
        return flat.reshape(-1).sort().values

    def _columns(self, weight: Tensor) -> Tensor:
        """A view of a contiguous weight of several groups as (G, I / G, O / G, prod(kernel))."""
        num_in, num_out = self.shape[1], self.shape[0] // self.groups
        return weight.reshape(self.groups, num_out, num_in, -1).transpose(1, 2)

    def gather(self, weight: Tensor) -> Tensor:
        """Return Sᵀ w, the selected columns, as a copy."""
        channels = beside(self.channels, weight)
        if self.groups == 1 or self.transposed:
            return weight.index_select(0 if self.transposed else 1, channels)
        group = torch.div(channels, self.shape[1], rounding_mode="floor")
        return self._columns(weight)[group, channels % self.shape[1]].reshape(self.theta_shape)

    def scatter_(self, weight: Tensor, values: Tensor) -> None:
        """Write `values` (`theta_shape`) over the selected columns of `weight`, in place."""
        channels, values = beside(self.channels, weight), values.to(weight.dtype)
        with torch.no_grad():
            if self.groups == 1 or self.transposed:
                weight.index_copy_(0 if self.transposed else 1, channels, values.view(self.theta_shape))
                return
            group, column = torch.div(channels, self.shape[1], rounding_mode="floor"), channels % self.shape[1]
            parts = weight.unflatten(0, (self.groups, -1)).transpose(1, 2)
            parts[group, column] = values.view(self.theta_shape)

    def by_item(self, values: Tensor) -> Tensor:
        """Return the values with one row for each channel."""
        first = self.transposed or self.groups > 1
        each = self.num_weights // max(self.num_channels, 1)
        return (values if first else values.transpose(0, 1)).reshape(self.channels.numel(), each)

    def of_items(self, rows: Tensor) -> Tensor:
        """Return the rows as columns of the weight."""
        if self.transposed or self.groups > 1:
            return rows.reshape(self.theta_shape)
        count, num_out = self.channels.numel(), self.shape[0]
        return rows.reshape(count, num_out, *self.shape[2:]).transpose(0, 1).contiguous()

    def state(self) -> dict[str, Tensor]:
        """Return `{"channels": int64 (K,), "layout": int64 (2,) of groups and transposed}`."""
        return {"channels": self.channels, "layout": torch.tensor([self.groups, int(self.transposed)])}

    def take(self, items: Tensor) -> Channels:
        """Return the selection of other channels."""
        return Channels(self.shape, items, groups=self.groups, transposed=self.transposed)


def _range(count: int, beside: Tensor) -> Tensor:
    return torch.arange(count, device=beside.device)
