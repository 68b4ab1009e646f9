"""Select positions along several axes: the rest of a weight when channels are absent on both of its sides."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tithe.errors import TitheError
from tithe.selection.base import Coordinates, Selection, beside, check_ids


@dataclass(frozen=True, eq=False)
class Grid(Selection):
    """A grid selects the entries at given positions along each named axis; θ is the smaller tensor itself.

        θ = w[rows][:, columns]          axes = {0: rows, 1: columns}

    Args:
        shape: the weight's shape.
        axes: axis → int64 positions, 1-D, strictly increasing; along an axis that is not named every position is there.

    Raises:
        TitheError: when an axis does not exist, or positions are out of range, unsorted or repeated.

    Example:
        >>> corner = Grid((3, 4), {0: torch.tensor([0, 2]), 1: torch.tensor([3])})
        >>> corner.theta_shape, corner.indices
        ((2, 1), tensor([ 3, 11]))
    """

    shape: tuple[int, ...]
    axes: Mapping[int, Tensor]

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))
        object.__setattr__(self, "axes", dict(sorted(self.axes.items())))
        for axis, positions in self.axes.items():
            if not 0 <= axis < len(self.shape):
                raise TitheError(
                    "Grid",
                    found=f"axis {axis}",
                    expected=f"an axis of shape {self.shape}",
                    remedy="count axes from 0",
                )
            check_ids("Grid", positions, self.shape[axis], self.shape)

    @classmethod
    def trusted(cls, shape: tuple[int, ...], axes: Mapping[int, Tensor]) -> Grid:
        """Make a grid without checking its positions: reading them for a check costs more than a small layer."""
        grid = object.__new__(cls)
        object.__setattr__(grid, "shape", shape)
        object.__setattr__(grid, "axes", axes)
        return grid

    @property
    def items(self) -> Tensor:
        """Return the flat indices of the selected entries."""
        return self.indices

    @cached_property
    def theta_shape(self) -> tuple[int, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the shape of the smaller tensor."""
        return tuple(self.axes[axis].numel() if axis in self.axes else length for axis, length in enumerate(self.shape))

    @property
    def indices(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Return the sorted flat int64 indices, computed when asked for."""
        at = self._rows.reshape(-1, 1) * self._depth + torch.arange(self._depth, device=self._rows.device)
        return at.reshape(-1)

    @cached_property
    def full(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return whether every entry is selected."""
        return self.theta_shape == self.shape

    def gather(self, weight: Tensor) -> Tensor:
        """Return Sᵀ w, the smaller tensor, as a copy."""
        if self.full:
            return weight.clone()
        # One pass over stretches of memory is quicker than one an axis, which copies more, unless each is a number.
        if weight.is_contiguous() and (self._depth > 1 or len(self.axes) == 1):
            picked = weight.view(-1, self._depth).index_select(0, beside(self._rows, weight))
            return picked.view(self.theta_shape)
        for axis, positions in self.axes.items():
            if positions.numel() != self.shape[axis]:
                weight = weight.index_select(axis, beside(positions, weight))
        return weight

    def scatter_(self, weight: Tensor, values: Tensor) -> None:
        """Write `values` (`theta_shape`) over the selected entries of `weight`, in place."""
        weight, values = weight.detach(), values.detach().to(weight.dtype)
        if self.full:
            weight.copy_(values.view(self.shape))
        elif weight.is_contiguous():
            rows = beside(self._rows, weight)
            weight.view(-1, self._depth).index_copy_(0, rows, values.reshape(-1, self._depth))
        else:
            _put_(weight, values.view(self.theta_shape), list(self.axes.items()))

    def by_item(self, values: Tensor) -> Tensor:
        """Return the values as a column."""
        return values.reshape(-1, 1)

    def of_items(self, rows: Tensor) -> Tensor:
        """Return the column as the smaller tensor."""
        return rows.view(self.theta_shape)

    def state(self) -> dict[str, Tensor]:
        """Return `{"axis 0": int64 positions, …}`, ready for a file."""
        return {f"axis {axis}": positions for axis, positions in self.axes.items()}

    def take(self, items: Tensor) -> Coordinates:
        """Return the selection of other entries, which need not form a grid."""
        return Coordinates(self.shape, items)

    def to(self, device: torch.device) -> Grid:
        """Return the same positions on `device`; they do not move to a device without memory ("meta")."""
        moved = {axis: ids if device.type == "meta" else ids.to(device) for axis, ids in self.axes.items()}
        return Grid(self.shape, moved)

    @cached_property
    def _depth(self) -> int:
        """Entries that follow one another in memory whatever is selected: the axes after the last that is named."""
        return math.prod(self.shape[max(self.axes, default=-1) + 1 :])

    @cached_property
    def _rows(self) -> Tensor:
        """Which stretches of that many entries are selected, sorted int64."""
        rows: Tensor | None = None
        for axis, length in enumerate(self.shape[: max(self.axes, default=-1) + 1]):
            every = self.axes[axis] if axis in self.axes else torch.arange(length)
            rows = every if rows is None else (rows.to(every.device)[:, None] * length + every).reshape(-1)
        return torch.zeros(1, dtype=torch.int64) if rows is None else rows


def _put_(weight: Tensor, values: Tensor, axes: list[tuple[int, Tensor]]) -> None:
    """Write `values` at the positions of several axes of a weight of any memory layout, axis by axis."""
    (axis, positions), *rest = axes
    positions = beside(positions, weight)
    if rest:
        part = weight.index_select(axis, positions)
        _put_(part, values, rest)
        values = part
    weight.index_copy_(axis, positions, values)
