"""Selections: S is injective and linear, Sᵀ is its transpose, and nothing outside of S is touched."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tithe import TitheError
from tithe.selection import Coordinates
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
