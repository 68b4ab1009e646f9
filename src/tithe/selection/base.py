"""Define selections, and their simplest kind: single entries.

    w = b + S θ            ∇θ = Sᵀ ∇w

A selection knows shapes and indices. It never sees a module, an optimizer or a rank.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from tithe.errors import TitheError


class Selection(ABC):
    """A selection is an injective linear map S from θ into a weight; `gather` is Sᵀ and `scatter_` is S.

    θ is a few `items`, each of `num_weights_each` values: single entries, or whole channels.
    """

    shape: tuple[int, ...]
    indices: Tensor
    """Sorted flat int64 indices of the selected entries of the weight; may be computed when asked for."""

    @property
    @abstractmethod
    def items(self) -> Tensor:
        """Return the sorted int64 ids (K,) of the selected entries, or of the selected channels."""

    @property
    @abstractmethod
    def theta_shape(self) -> tuple[int, ...]:
        """Return the shape of θ."""

    @abstractmethod
    def gather(self, weight: Tensor) -> Tensor:
        """Return Sᵀ w, the selected values of `weight`: a new tensor of `theta_shape` in the weight's dtype."""

    @abstractmethod
    def scatter_(self, weight: Tensor, values: Tensor) -> None:
        """Write `values` (`theta_shape`) into `weight` in place; every other entry keeps its bits."""

    @abstractmethod
    def by_item(self, values: Tensor) -> Tensor:
        """Return `values` of `theta_shape` with one row for each item, (K, size / K): a row moves with its item."""

    @abstractmethod
    def of_items(self, rows: Tensor) -> Tensor:
        """Undo `by_item`: return rows as values of `theta_shape`."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Return the tensors that rebuild this selection for its shape, ready for a file; `restore` reads them."""

    @abstractmethod
    def take(self, items: Tensor) -> Selection:
        """Return the selection of other items of the same kind, on their device."""

    @property
    def size(self) -> int:
        """Return the number of values in θ."""
        return math.prod(self.theta_shape)

    @property
    def num_weights(self) -> int:
        """Return the number of entries of the weight that the selection maps into."""
        return math.prod(self.shape)

    @property
    def full(self) -> bool:
        """Return whether every entry is selected."""
        return self.size == self.num_weights

    @property
    def whole(self) -> bool:
        """Return whether Sᵀ∇w needs every entry of ∇w, so that a rule cannot skip any."""
        return self.full

    def to(self, device: torch.device) -> Selection:
        """Return the same selection with its ids on `device`; ids do not move to a device without memory ("meta")."""
        return self if device.type == "meta" or self.items.device == device else self.take(self.items.to(device))

    def alike(self, other: Selection) -> bool:
        """Return whether the items of both selections mean the same places of the same weight."""
        mine, theirs = self.take(self.items[:0]).state(), other.take(other.items[:0]).state()
        same = type(self) is type(other) and self.shape == other.shape
        return same and all(torch.equal(mine[key].cpu(), theirs[key].cpu()) for key in mine)

    def union(self, other: Selection) -> Selection:
        """Return the selection of every item that either one selects."""
        if not self.size or not other.size:
            return self if self.size else other
        device = self.items.device
        if self.alike(other):
            return self.take(torch.cat([self.items, other.items.to(device)]).unique())
        return Coordinates(self.shape, torch.cat([self.indices, other.indices.to(device)]).unique())


def carried(old: Selection, new: Selection, values: Tensor, start: Tensor) -> Tensor:
    """Return values at `new`: those of the items that `old` selects too, the others as they start.

    Args:
        old: what was selected before.
        new: what is selected now; of another kind or layout than `old`, nothing of it stays.
        values: at `old`.
        start: at `new`; the result has its dtype.
    """
    if not old.size or not new.size or not old.alike(new):
        return start
    before = old.items.to(new.items.device)
    at = torch.searchsorted(before, new.items).clamp_(max=before.numel() - 1)
    stays = before[at] == new.items
    rows = new.by_item(start).clone()
    rows[stays] = old.by_item(values)[at[stays]].to(rows.dtype)
    return new.of_items(rows)


def check_ids(place: str, ids: Tensor, count: int, shape: tuple[int, ...]) -> None:
    """Check that ids are sorted, distinct and in range.

    Raises:
        TitheError: when they are not int64, not 1-D, not in [0, count), unsorted or repeated.
    """
    noun = "indices" if place == "Coordinates" else "channels"
    if ids.dtype != torch.int64 or ids.dim() != 1:
        raise TitheError(
            place,
            found=f"{noun} of dtype {ids.dtype} and {ids.dim()} dimensions",
            expected="a 1-D int64 tensor",
            remedy=f"pass {noun}.flatten().long()",
        )
    if ids.numel() == 0:
        return
    low, high = int(ids[0]), int(ids[-1])
    if low < 0 or high >= count:
        raise TitheError(
            place,
            found=f"{noun} from {low} to {high}",
            expected=f"{noun} in [0, {count}) for shape {shape}",
            remedy="use flat row-major indices, or input channels, of this weight",
        )
    if ids.numel() > 1 and not bool((ids[1:] > ids[:-1]).all()):
        raise TitheError(
            place,
            found=f"unsorted or repeated {noun}",
            expected=f"strictly increasing {noun}",
            remedy=f"pass {noun}.unique()",
        )


def beside(ids: Tensor, weight: Tensor) -> Tensor:
    """Return `ids` on the device of the weight's data; a weight without data ("meta") has no such device."""
    return ids if weight.is_meta else ids.to(weight.device)


@dataclass(frozen=True, eq=False)
class Coordinates(Selection):
    """A list of single entries of a weight, named by flat row-major index; θ is a list of values.

    Args:
        shape: the weight's shape.
        indices: int64, 1-D, strictly increasing, each in [0, prod(shape)).

    Raises:
        TitheError: when the indices are not int64, not 1-D, out of range, unsorted or repeated.

    Example:
        >>> picked = Coordinates((2, 3), torch.tensor([0, 4]))
        >>> picked.gather(torch.arange(6.0).reshape(2, 3))
        tensor([0., 4.])
    """

    shape: tuple[int, ...]
    indices: Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))
        check_ids("Coordinates", self.indices, self.num_weights, self.shape)

    @classmethod
    def nothing(cls, shape: tuple[int, ...]) -> Coordinates:
        """Return the empty selection, under which the weight is frozen."""
        return cls(shape, torch.empty(0, dtype=torch.int64))

    @classmethod
    def everything(cls, shape: tuple[int, ...]) -> Coordinates:
        """Return the selection of every entry, which is ordinary training."""
        return cls(shape, torch.arange(math.prod(shape)))

    @property
    def items(self) -> Tensor:
        """Return the flat indices of the entries."""
        return self.indices

    @property
    def theta_shape(self) -> tuple[int, ...]:
        """Return a shape with one value for each entry."""
        return (self.indices.numel(),)

    def gather(self, weight: Tensor) -> Tensor:
        """Return Sᵀ w, `weight.flatten()[indices]`, as a copy."""
        flat = weight.reshape(-1)
        return flat.clone() if self.full else flat.index_select(0, beside(self.indices, weight))

    def scatter_(self, weight: Tensor, values: Tensor) -> None:
        """Write `values` (1-D, `size`) at the selected entries of `weight`, in place."""
        with torch.no_grad():
            if self.full:
                weight.copy_(values.view(self.shape))
            elif weight.is_contiguous():
                weight.view(-1).index_copy_(0, beside(self.indices, weight), values.to(weight.dtype))
            else:
                at = torch.unravel_index(beside(self.indices, weight), self.shape)
                weight.index_put_(at, values.to(weight.dtype))

    def by_item(self, values: Tensor) -> Tensor:
        """Return the values as a column."""
        return values.view(-1, 1)

    def of_items(self, rows: Tensor) -> Tensor:
        """Return the column as a list of values."""
        return rows.view(-1)

    def state(self) -> dict[str, Tensor]:
        """Return `{"indices": int64 (K,)}`, ready for a file."""
        return {"indices": self.indices}

    def take(self, items: Tensor) -> Coordinates:
        """Return the selection of other entries."""
        return Coordinates(self.shape, items)
