"""What may move: injective linear maps from a small vector θ into a weight tensor.

    w = b + S θ            ∇θ = Sᵀ ∇w

A selection knows shapes and indices. It never sees a module, an optimizer or a rank.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from tithe.errors import TitheError


class Selection(ABC):
    """An injective linear map S from θ into a weight of a fixed shape; `gather` is Sᵀ and `scatter_` is S.

    θ is a few `items`, each of `num_weights_each` values: single entries, or whole channels.
    """

    shape: tuple[int, ...]
    indices: Tensor
    """Sorted flat int64 indices of the selected entries of the weight; may be computed when asked for."""

    @property
    @abstractmethod
    def items(self) -> Tensor:
        """What is selected: sorted int64 ids (K,) of entries, or of channels."""

    @property
    @abstractmethod
    def theta_shape(self) -> tuple[int, ...]:
        """The shape of θ."""

    @abstractmethod
    def gather(self, weight: Tensor) -> Tensor:
        """Sᵀ w: the selected values of `weight`, a new tensor of `theta_shape` in the weight's dtype."""

    @abstractmethod
    def scatter_(self, weight: Tensor, values: Tensor) -> None:
        """Write `values` (`theta_shape`) into `weight` in place; every other entry keeps its bits."""

    @abstractmethod
    def by_item(self, values: Tensor) -> Tensor:
        """`values` of `theta_shape` as one row for each item, (K, size / K): what belongs to an item moves with it."""

    @abstractmethod
    def of_items(self, rows: Tensor) -> Tensor:
        """The inverse of `by_item`."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """The tensors that rebuild this selection for its shape, ready for a file; `restore` reads them."""

    @abstractmethod
    def take(self, items: Tensor) -> Self:
        """The same kind of selection with other items, on their device."""

    @property
    def size(self) -> int:
        """Number of values in θ."""
        return math.prod(self.theta_shape)

    @property
    def num_weights(self) -> int:
        """Number of entries of the weight that the selection maps into."""
        return math.prod(self.shape)

    @property
    def full(self) -> bool:
        """Whether every entry is selected."""
        return self.size == self.num_weights

    def to(self, device: torch.device) -> Self:
        """The same selection with its ids on `device`; a device without memory ("meta") leaves them where they are."""
        return self if device.type == "meta" or self.items.device == device else self.take(self.items.to(device))

    def alike(self, other: Selection) -> bool:
        """Whether the items of both mean the same places of the same weight."""
        mine, theirs = self.take(self.items[:0]).state(), other.take(other.items[:0]).state()
        same = type(self) is type(other) and self.shape == other.shape
        return same and all(torch.equal(mine[key].cpu(), theirs[key].cpu()) for key in mine)

    def union(self, other: Selection) -> Selection:
        """What either selects."""
        if not self.size or not other.size:
            return self if self.size else other
        device = self.items.device
        if self.alike(other):
            return self.take(torch.cat([self.items, other.items.to(device)]).unique())
        return Coordinates(self.shape, torch.cat([self.indices, other.indices.to(device)]).unique())


def restore(shape: tuple[int, ...], state: Mapping[str, Tensor]) -> Selection:
    """The selection whose `state()` this is.

    Raises:
        TitheError: when no known kind has such a state.
    """
    if set(state) == {"indices"}:
        return Coordinates(shape, state["indices"])
    if set(state) == {"channels", "layout"}:
        groups, transposed = state["layout"].tolist()
        return Channels(shape, state["channels"], groups=int(groups), transposed=bool(transposed))
    raise TitheError(
        "selection",
        found=f"a state of {', '.join(sorted(state)) or 'nothing'}",
        expected="indices, or channels and layout",
        remedy="save it with Selection.state()",
    )


def _check_ids(place: str, ids: Tensor, count: int, shape: tuple[int, ...]) -> None:
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


@dataclass(frozen=True, eq=False)
class Coordinates(Selection):
    """Single entries of a weight, named by flat row-major index; θ is a list of values.

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
        _check_ids("Coordinates", self.indices, self.num_weights, self.shape)

    @classmethod
    def nothing(cls, shape: tuple[int, ...]) -> Coordinates:
        """The empty selection: the weight is frozen."""
        return cls(shape, torch.empty(0, dtype=torch.int64))

    @classmethod
    def everything(cls, shape: tuple[int, ...]) -> Coordinates:
        """Every entry: ordinary training."""
        return cls(shape, torch.arange(math.prod(shape)))

    @property
    def items(self) -> Tensor:
        """The indices."""
        return self.indices

    @property
    def theta_shape(self) -> tuple[int, ...]:
        """One value for each entry."""
        return (self.indices.numel(),)

    def gather(self, weight: Tensor) -> Tensor:
        """Sᵀ w: `weight.flatten()[indices]`, a copy."""
        flat = weight.reshape(-1)
        return flat.clone() if self.full else flat.index_select(0, _beside(self.indices, weight))

    def scatter_(self, weight: Tensor, values: Tensor) -> None:
        """Write `values` (1-D, `size`) at the selected entries of `weight`, in place."""
        with torch.no_grad():
            if self.full:
                weight.copy_(values.view(self.shape))
            elif weight.is_contiguous():
                weight.view(-1).index_copy_(0, _beside(self.indices, weight), values.to(weight.dtype))
            else:
                at = torch.unravel_index(_beside(self.indices, weight), self.shape)
                weight.index_put_(at, values.to(weight.dtype))

    def by_item(self, values: Tensor) -> Tensor:
        """A column."""
        return values.view(-1, 1)

    def of_items(self, rows: Tensor) -> Tensor:
        """The column as a list."""
        return rows.view(-1)

    def state(self) -> dict[str, Tensor]:
        """`{"indices": int64 (K,)}`."""
        return {"indices": self.indices}

    def take(self, items: Tensor) -> Coordinates:
        """Other entries."""
        return Coordinates(self.shape, items)


@dataclass(frozen=True, eq=False)
class Channels(Selection):
    """Whole input channels of a matrix or a convolution: along them both the weight gradient and the kept input shrink.

    A weight (O, I / G, *kernel) of G groups has I input channels; channel c belongs to group ⌊c G / I⌋ and meets that
    group's O / G output channels. θ has the shape of the selected columns:

        (O, K, *kernel)         one group
        (K, O / G, *kernel)     several groups, depthwise included
        (K, O)                  a matrix stored as (I, O)

    Args:
        shape: the weight's shape, two axes or more.
        channels: int64, 1-D, strictly increasing, each in [0, I).
        groups: G of the convolution.
        transposed: the weight is a matrix stored as (I, O), as in Hugging Face's `Conv1D`.

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
        matrix = len(self.shape) == 2 and self.groups == 1
        if len(self.shape) < 2 or self.shape[0] % max(self.groups, 1) or (self.transposed and not matrix):
            raise TitheError(
                "Channels",
                found=f"shape {self.shape}, {self.groups} groups, transposed={self.transposed}",
                expected="two axes or more, axis 0 a multiple of the groups; transposed only for a matrix",
                remedy="pass the weight's own shape and the convolution's groups",
            )
        _check_ids("Channels", self.channels, self.num_channels, self.shape)

    @property
    def num_channels(self) -> int:
        """I, the number of input channels."""
        return self.shape[0] if self.transposed else self.shape[1] * self.groups

    @property
    def items(self) -> Tensor:
        """The channels."""
        return self.channels

    @property
    def theta_shape(self) -> tuple[int, ...]:
        """The shape of the selected columns."""
        count = self.channels.numel()
        if self.transposed:
            return (count, self.shape[1])
        if self.groups == 1:
            return (self.shape[0], count, *self.shape[2:])
        return (count, self.shape[0] // self.groups, *self.shape[2:])

    @property
    def indices(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Sorted flat int64 indices, computed when asked for: eight bytes for each selected entry."""
        if self.transposed:
            return (self.channels[:, None] * self.shape[1] + _range(self.shape[1], self.channels)).reshape(-1)
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
        """Sᵀ w: the selected columns, a copy."""
        channels = _beside(self.channels, weight)
        if self.groups == 1:
            return weight.index_select(0 if self.transposed else 1, channels)
        group = torch.div(channels, self.shape[1], rounding_mode="floor")
        return self._columns(weight)[group, channels % self.shape[1]].reshape(self.theta_shape)

    def scatter_(self, weight: Tensor, values: Tensor) -> None:
        """Write `values` (`theta_shape`) over the selected columns of `weight`, in place."""
        channels, values = _beside(self.channels, weight), values.to(weight.dtype)
        with torch.no_grad():
            if self.groups == 1:
                weight.index_copy_(0 if self.transposed else 1, channels, values.view(self.theta_shape))
                return
            group, column = torch.div(channels, self.shape[1], rounding_mode="floor"), channels % self.shape[1]
            parts = weight.unflatten(0, (self.groups, -1)).transpose(1, 2)
            parts[group, column] = values.view(self.theta_shape)

    def by_item(self, values: Tensor) -> Tensor:
        """One row for each channel."""
        first = self.transposed or self.groups > 1
        each = self.num_weights // max(self.num_channels, 1)
        return (values if first else values.transpose(0, 1)).reshape(self.channels.numel(), each)

    def of_items(self, rows: Tensor) -> Tensor:
        """The rows as columns of the weight."""
        if self.transposed or self.groups > 1:
            return rows.reshape(self.theta_shape)
        count, num_out = self.channels.numel(), self.shape[0]
        return rows.reshape(count, num_out, *self.shape[2:]).transpose(0, 1).contiguous()

    def state(self) -> dict[str, Tensor]:
        """`{"channels": int64 (K,), "layout": int64 (2,) of groups and transposed}`."""
        return {"channels": self.channels, "layout": torch.tensor([self.groups, int(self.transposed)])}

    def take(self, items: Tensor) -> Channels:
        """Other channels."""
        return Channels(self.shape, items, groups=self.groups, transposed=self.transposed)


def _range(count: int, beside: Tensor) -> Tensor:
    return torch.arange(count, device=beside.device)


def _beside(ids: Tensor, weight: Tensor) -> Tensor:
    """`ids` where the weight's data is; a weight that has a shape alone ("meta") has none."""
    return ids if weight.is_meta else ids.to(weight.device)
