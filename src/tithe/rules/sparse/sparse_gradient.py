"""Ways to get Sᵀ∇w of a matrix, ∇w = leftᵀ right, and the price of each.

Shapes: N rows of both factors, O columns of `left`, I columns of `right`, K selected entries,
R of the O and C of the I touched by them. The weight is (O, I), or (I, O) when transposed.
"""

from __future__ import annotations

import math
import warnings
import weakref
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from tithe.rules.base import Cost
from tithe.rules.double_backward import differentiated

_SAMPLED_SLOWNESS = 16.0
"""Time of one multiply-add in `sampled_addmm` against one in a dense product (2048 × 384 … 4096², one core)."""


@dataclass(frozen=True, eq=False)
class Touch:
    """Where a weight of two or more axes is touched: its rows (axis 0), its columns (axis 1), the rest within.

    Args:
        rows: distinct touched rows, int64 (R,).
        columns: distinct touched columns, int64 (C,).
        row: for each selected entry its position in `rows`, int32 (K,).
        column: for each selected entry its position in `columns`, int32 (K,).
        inner: for each selected entry its place within the other axes, int32 (K,); None for a matrix.
        shape: the weight's shape.
        indices: what all this was made from.
        cheapest: the ways already found cheapest, by what the choice depends on.
    """

    rows: Tensor
    columns: Tensor
    row: Tensor
    column: Tensor
    inner: Tensor | None
    shape: tuple[int, ...]
    indices: Tensor
    cheapest: dict[Any, Way] = field(default_factory=dict[Any, "Way"])

    @classmethod
    def of(cls, indices: Tensor, shape: tuple[int, ...], weight: Tensor | None = None) -> Touch:
        """From flat row-major indices, ascending, into a weight of `shape`.

        Of the same tensor of indices it is the same again: equal layers that are priced share theirs, and the largest
        masks would not fit into memory otherwise. Of a weight that has a shape and no data, positions have none either.
        """
        blank = weight if isinstance(weight, FakeTensor) else None
        key = id(indices), shape, None if blank is None else id(blank.fake_mode)
        known = _known.get(key)
        if known is not None and known.indices is indices:
            return known
        made = _known[key] = cls._made(indices, shape) if blank is None else cls._counted(indices, shape, blank)
        return made

    @classmethod
    def _counted(cls, indices: Tensor, shape: tuple[int, ...], weight: FakeTensor) -> Touch:
        """As `_made`; only the touched rows and columns have values, since counts follow from them."""
        depth = math.prod(shape[2:])
        marks = [torch.zeros(count, dtype=torch.bool) for count in shape[:2]]
        for part in indices.split(_PART):
            outer = part if depth == 1 else torch.div(part, depth, rounding_mode="floor")
            row = torch.div(outer, shape[1], rounding_mode="floor")
            marks[0][row] = True
            marks[1][outer - row * shape[1]] = True
        rows, columns = (mark.nonzero().flatten() for mark in marks)
        row, column = (weight.new_empty(indices.numel(), dtype=torch.int32) for _ in range(2))
        inner = weight.new_empty(indices.numel(), dtype=torch.int32) if len(shape) > 2 else None
        return cls(rows, columns, row, column, inner, shape, indices)

    @classmethod
    def _made(cls, indices: Tensor, shape: tuple[int, ...]) -> Touch:
        depth = math.prod(shape[2:])
        outer = indices if depth == 1 else torch.div(indices, depth, rounding_mode="floor")
        row = torch.div(outer, shape[1], rounding_mode="floor")
        column = outer - row * shape[1]
        rows, columns = _touched(row, shape[0]), _touched(column, shape[1])
        row, column = _places(row, rows, shape[0]), _places(column, columns, shape[1])
        inner = (indices % depth).int() if len(shape) > 2 else None
        return cls(rows, columns, row, column, inner, shape, indices)

    def at(self, by_rows: bool, by_columns: bool) -> Tensor:
        """Flat indices of the selected entries in the weight cut down to its touched rows and/or columns."""
        row = self.row if by_rows else self.rows.index_select(0, self.row)
        column = self.column if by_columns else self.columns.index_select(0, self.column)
        flat = row.long() * (self.columns.numel() if by_columns else self.shape[1]) + column
        return flat if self.inner is None else flat * math.prod(self.shape[2:]) + self.inner


_known: weakref.WeakValueDictionary[tuple[int, tuple[int, ...], int | None], Touch] = weakref.WeakValueDictionary()

_PART = 1 << 17
"""Indices that are looked at together where little else is kept of them."""


def _touched(numbers: Tensor, count: int) -> Tensor:
    """The different ones of many numbers below `count`, ascending; sorting them would take longer."""
    mark = torch.zeros(count, dtype=torch.bool, device=numbers.device)
    mark[numbers] = True
    return mark.nonzero().flatten()


def _places(numbers: Tensor, different: Tensor, count: int) -> Tensor:
    """For each number its place among the `different`, int32."""
    if different.numel() == count:
        return numbers.int()
    place = torch.zeros(count, dtype=torch.int32, device=numbers.device)
    place[different] = torch.arange(different.numel(), dtype=torch.int32, device=numbers.device)
    return place[numbers]


@torch.library.custom_op("tithe::sampled_product", mutates_args=())
def sampled_product(starts: Tensor, column: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """The entries of left @ right at a CSR pattern; an operator of its own so that runs on shapes alone know its size.

    Args:
        starts: row offsets, int64 (A + 1,).
        column: columns, int64 (K,).
        left: (A, N).
        right: (N, B).

    Returns:
        (K,), row by row.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse")
        shape = (left.shape[0], right.shape[1])
        pattern = torch.sparse_csr_tensor(starts, column, left.new_zeros(column.numel()), shape)
        return torch.sparse.sampled_addmm(pattern, left, right, beta=0.0).values()


@sampled_product.register_fake
def _(starts: Tensor, column: Tensor, left: Tensor, right: Tensor) -> Tensor:
    return left.new_empty(column.numel())


class Way(ABC):
    """How one matrix's selected gradient is computed, and what must be kept of `right` for it.

    Args:
        touch: where the stored weight is touched.
        transposed: the weight is stored as (I, O): `left` runs along its columns, `right` along its rows.
    """

    name: str

    def __init__(self, touch: Touch, transposed: bool) -> None:
        self.touch, self.transposed = touch, transposed
        self.num_right, self.num_left = touch.shape[:2] if transposed else (touch.shape[1], touch.shape[0])

    @abstractmethod
    def keep(self, right: Tensor) -> Tensor:
        """What backward needs of `right` (..., I)."""

    @abstractmethod
    def grad(self, left: Tensor, kept: Tensor) -> Tensor:
        """The K selected entries of ∇w, in the order of their flat indices; `left` is (N, O)."""

    @abstractmethod
    def cost(self, num_positions: int, itemsize: int) -> Cost:
        """The price for N = `num_positions` rows of `itemsize` bytes an entry."""


class Block(Way):
    """Dense product over the touched columns of `right`, those of `left`, both, or everything; then gather.

    Args:
        touch: where the stored weight is touched.
        transposed: the weight is stored as (I, O).
        cut_left: multiply only the touched columns of `left`.
        cut_right: multiply, and keep, only the touched columns of `right`.
    """

    def __init__(self, touch: Touch, transposed: bool, *, cut_left: bool, cut_right: bool) -> None:
        super().__init__(touch, transposed)
        right, left = (touch.rows, touch.columns) if transposed else (touch.columns, touch.rows)
        self.right = right if cut_right else None
        self.left = left if cut_left else None
        self.width = right.numel() if cut_right else self.num_right
        self.height = left.numel() if cut_left else self.num_left
        self.name = {(False, False): "dense", (False, True): "columns", (True, False): "rows", (True, True): "block"}[
            cut_left, cut_right
        ]

    def keep(self, right: Tensor) -> Tensor:
        """The touched columns as a compact copy, or `right` itself."""
        return right if self.right is None else right.index_select(-1, self.right)

    def grad(self, left: Tensor, kept: Tensor) -> Tensor:
        """The product over the block, gathered."""
        if self.left is not None:
            left = left.index_select(1, self.left)
        kept = kept.reshape(left.shape[0], self.width)
        cut_left, cut_right = self.left is not None, self.right is not None
        if self.transposed:
            return (kept.t() @ left).reshape(-1).index_select(0, self.touch.at(cut_right, cut_left))
        return (left.t() @ kept).reshape(-1).index_select(0, self.touch.at(cut_left, cut_right))

    def cost(self, num_positions: int, itemsize: int) -> Cost:
        """2NRC operations, the copies of the touched columns, the product, and what is kept."""
        copied = (self.right is not None) * self.width + (self.left is not None) * self.height
        return Cost(
            flops=2.0 * num_positions * self.height * self.width,
            moved=itemsize * (2.0 * num_positions * copied + 2.0 * self.height * self.width),
            kept=itemsize * num_positions * self.width,
        )


class Sampled(Way):
    """`torch.sparse.sampled_addmm`: only the selected entries are multiplied; all of `right` is kept."""

    name = "sampled"

    def keep(self, right: Tensor) -> Tensor:
        """All of `right`, itself."""
        return right

    def grad(self, left: Tensor, kept: Tensor) -> Tensor:
        """The sampled entries of the product."""
        touch, kept = self.touch, kept.reshape(left.shape[0], self.num_right)
        if differentiated():  # autograd does not know the sampled product
            product = kept.t() @ left if self.transposed else left.t() @ kept
            return product.reshape(-1).index_select(0, touch.at(False, False))
        row, column = touch.rows.index_select(0, touch.row), touch.columns.index_select(0, touch.column)
        starts = torch.searchsorted(row, torch.arange(touch.shape[0] + 1, device=row.device))
        a, b = (kept, left) if self.transposed else (left, kept)
        return sampled_product(starts, column, a.t().contiguous(), b.contiguous())

    def cost(self, num_positions: int, itemsize: int) -> Cost:
        """2NK slow operations, a transposed copy of one factor, and all of `right` kept."""
        return Cost(
            flops=_SAMPLED_SLOWNESS * 2.0 * num_positions * self.touch.row.numel(),
            moved=itemsize * 2.0 * num_positions * self.num_left,
            kept=itemsize * num_positions * self.num_right,
        )


def ways(touch: Touch, *, transposed: bool, sampled: bool) -> list[Way]:
    """Every way open to a touched matrix; `sampled`: its dtype and device have `sampled_addmm`."""
    found: list[Way] = [
        Block(touch, transposed, cut_left=cut_left, cut_right=cut_right)
        for cut_left in (False, True)
        for cut_right in (False, True)
    ]
    return [*found, Sampled(touch, transposed)] if sampled else found


def cheapest(touch: Touch, right: Tensor, *, transposed: bool = False) -> Way:
    """The way of the lowest predicted price for this touch and this many rows of `right` (..., I).

    The choice depends on shapes, dtype and the selection alone, so it is the same on every rank.
    """
    num_columns = touch.shape[0] if transposed else touch.shape[1]
    num_positions = right.numel() // max(num_columns, 1)
    compiling = torch.compiler.is_compiling()
    key = (num_positions, right.dtype, transposed)
    if not compiling and key in touch.cheapest:
        return touch.cheapest[key]
    sampled = right.dtype in (torch.float32, torch.float64) and not compiling
    found = ways(touch, transposed=transposed, sampled=sampled)
    prices = [way.cost(num_positions, right.element_size()).price for way in found]
    way = found[prices.index(min(prices))]
    if not compiling:
        touch.cheapest[key] = way
    return way
