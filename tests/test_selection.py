"""Selections: S is injective and linear, Sᵀ is its transpose, and nothing outside of S is touched."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tithe import TitheError
from tithe.selection import Channels, Coordinates, Grid, restore
from tithe.testing import ContractError, check_selection

SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)


@st.composite
def coordinates(draw: st.DrawFn) -> Coordinates:
    shape = draw(SHAPES)
    picked = draw(st.sets(st.integers(0, math.prod(shape) - 1)))
    return Coordinates(shape, torch.tensor(sorted(picked), dtype=torch.int64))


@given(coordinates())
def test_the_contract_holds_for_coordinates(selection: Coordinates) -> None:
    check_selection(selection)


@given(coordinates(), st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
def test_gather_is_flat_indexing_in_every_dtype(selection: Coordinates, dtype: torch.dtype) -> None:
    weight = torch.randn(selection.shape).to(dtype)
    assert torch.equal(selection.gather(weight), weight.flatten()[selection.indices])
    assert selection.gather(weight).dtype == dtype


@given(coordinates())
def test_scatter_reaches_a_weight_that_is_not_contiguous(selection: Coordinates) -> None:
    weight = torch.randn(selection.shape[::-1]).permute(*reversed(range(len(selection.shape))))
    expected = weight.clone(memory_format=torch.contiguous_format)
    values = torch.randn(selection.size)
    expected.view(-1)[selection.indices] = values
    selection.scatter_(weight, values)
    assert torch.equal(weight, expected)
    assert torch.equal(selection.gather(weight), values)


@st.composite
def grids(draw: st.DrawFn, shapes: st.SearchStrategy[tuple[int, ...]] = SHAPES) -> Grid:
    """Along some axes some positions, none and all of them included."""
    shape = draw(shapes)
    axes = draw(st.sets(st.integers(0, len(shape) - 1)))
    picked = {axis: draw(st.sets(st.integers(0, shape[axis] - 1))) for axis in axes}
    return Grid(shape, {axis: torch.tensor(sorted(at), dtype=torch.int64) for axis, at in picked.items()})


@given(grids(), st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_the_contract_holds_for_grids(grid: Grid, dtype: torch.dtype) -> None:
    check_selection(grid, dtype=dtype)


@given(grids(), st.booleans())
def test_a_grid_is_indexing_axis_by_axis(grid: Grid, contiguous: bool) -> None:
    weight = torch.randn(grid.shape)
    if not contiguous:
        weight = torch.randn(grid.shape[::-1]).permute(*reversed(range(len(grid.shape))))
    expected = weight
    for axis, positions in grid.axes.items():
        expected = expected.index_select(axis, positions)
    values = grid.gather(weight)
    assert torch.equal(values, expected)
    assert tuple(values.shape) == grid.theta_shape
    assert grid.size == expected.numel()
    assert grid.full == (expected.numel() == weight.numel())
    whole, written = weight.clone(), torch.randn(grid.theta_shape)
    grid.scatter_(weight, written)
    flat = whole.flatten()
    flat[grid.indices] = written.flatten()
    assert torch.equal(weight, flat.view(grid.shape))


@given(grids())
def test_a_grid_is_read_back_from_its_state(grid: Grid) -> None:
    again = restore(grid.shape, {key: value.clone() for key, value in grid.state().items()})
    assert torch.equal(again.indices, grid.indices)
    assert again.size == grid.size
    if grid.axes:
        assert isinstance(again, Grid)
        assert list(again.axes) == sorted(grid.axes)


@given(st.data())
def test_what_either_grid_selects(data: st.DataObject) -> None:
    one = data.draw(grids())
    other = data.draw(grids(st.just(one.shape)))
    both = one.union(other)
    expected = set(one.indices.tolist()) | set(other.indices.tolist())
    assert both.indices.tolist() == sorted(expected)
    assert both.size == len(expected)
    check_selection(both)


def test_a_grid_of_one_axis_is_channels() -> None:
    ids = torch.tensor([0, 2])
    weight = torch.randn(4, 3, 2)
    grid, channels = Grid((4, 3, 2), {1: ids}), Channels((4, 3, 2), ids)
    assert torch.equal(grid.indices, channels.indices)
    assert torch.equal(grid.gather(weight), channels.gather(weight))


@pytest.mark.parametrize(
    ("axes", "told"),
    [
        ({2: [0]}, "an axis of shape (3, 4)"),
        ({-1: [0]}, "an axis of shape (3, 4)"),
        ({0: [3]}, "[0, 3)"),
        ({1: [-1]}, "[0, 4)"),
        ({1: [2, 1]}, "strictly increasing"),
        ({1: [1, 1]}, "strictly increasing"),
    ],
)
def test_bad_positions_are_refused(axes: dict[int, list[int]], told: str) -> None:
    with pytest.raises(TitheError) as error:
        Grid((3, 4), {axis: torch.tensor(positions) for axis, positions in axes.items()})
    assert told in error.value.expected
    assert error.value.remedy


def test_gather_copies_even_when_everything_is_selected() -> None:
    weight = torch.randn(3, 4)
    values = Coordinates.everything((3, 4)).gather(weight)
    values.zero_()
    assert not (weight == 0).any()


def test_nothing_and_everything() -> None:
    assert Coordinates.nothing((3, 4)).size == 0
    assert Coordinates.everything((3, 4)).indices.tolist() == list(range(12))
    check_selection(Coordinates.nothing((3, 4)))
    check_selection(Coordinates.everything((3, 4)))


@pytest.mark.parametrize(
    ("indices", "told"),
    [
        (torch.tensor([0, 12]), "indices in [0, 12)"),
        (torch.tensor([-1, 3]), "indices in [0, 12)"),
        (torch.tensor([3, 1]), "strictly increasing"),
        (torch.tensor([1, 1]), "strictly increasing"),
        (torch.tensor([[1, 2]]), "1-D int64"),
        (torch.tensor([1, 2], dtype=torch.int32), "1-D int64"),
        (torch.tensor([1.0]), "1-D int64"),
    ],
)
def test_bad_indices_are_refused(indices: Tensor, told: str) -> None:
    with pytest.raises(TitheError) as error:
        Coordinates((3, 4), indices)
    assert told in error.value.expected
    assert error.value.remedy


class _Leaky(Coordinates):
    def scatter_(self, weight: Tensor, values: Tensor) -> None:
        super().scatter_(weight, values)
        weight.mul_(1 + 1e-6)


class _Scaled(Coordinates):
    def gather(self, weight: Tensor) -> Tensor:
        return 2 * super().gather(weight)


class _View(Coordinates):
    def gather(self, weight: Tensor) -> Tensor:
        return weight.view(-1)[: self.size]


@pytest.mark.parametrize("broken", [_Leaky, _Scaled, _View])
def test_the_contract_refuses_a_broken_selection(broken: type[Coordinates]) -> None:
    with pytest.raises(ContractError, match=broken.__name__):
        check_selection(broken((3, 4), torch.arange(4)))
