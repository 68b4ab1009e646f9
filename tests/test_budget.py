"""Budgets and schedules: plain values that refuse what they cannot mean."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tithe
from tithe import Budget, TitheError
from tithe.schedule import Schedule


@pytest.mark.parametrize(
    ("text", "size"),
    [("64MB", 64_000_000), ("64 mb", 64_000_000), ("1.5GiB", 3 << 29), ("2kB", 2000), ("10 B", 10), (".5KiB", 512)],
)
def test_bytes_are_read_with_their_unit(text: str, size: int) -> None:
    assert Budget(text).bytes == size
    assert Budget(text).of(1) == size


@pytest.mark.parametrize("text", ["64", "MB", "-1MB", "1e3MB", "64 MBit", ""])
def test_text_without_a_known_unit_is_refused(text: str) -> None:
    with pytest.raises(TitheError, match="Budget"):
        Budget(text)


def test_exactly_one_measure() -> None:
    with pytest.raises(TitheError, match="exactly one"):
        Budget()
    with pytest.raises(TitheError, match="exactly one"):
        Budget("1MB", elements=3)


@pytest.mark.parametrize(
    "measure",
    [{"elements": 0}, {"elements": -1}, {"fraction": 0.0}, {"fraction": 1.5}, {"fraction": float("nan")}, {"flops": 0}],
)
def test_a_limit_that_leaves_nothing_is_refused(measure: dict[str, float]) -> None:
    with pytest.raises(TitheError, match="Budget"):
        Budget(**measure)


@given(st.integers(1, 10**6), st.integers(1, 100))
def test_a_fraction_of_whole_percents_is_exact(total: int, percent: int) -> None:
    assert Budget(fraction=percent / 100).of(total) == total * percent // 100


@given(st.integers(1, 20), st.integers(1, 200))
def test_every_is_due_at_the_multiples_and_only_in_its_unit(period: int, at: int) -> None:
    assert tithe.every(period).due(step=at) == (at % period == 0)
    assert tithe.every(period, "epochs").due(epoch=at) == (at % period == 0)
    assert not tithe.every(period).due(epoch=at)
    assert not tithe.once().due(step=at)
    assert not tithe.every(period).due(step=0)


@pytest.mark.parametrize("arguments", [(0, "steps"), (-1, "epochs"), (2, "batches")])
def test_a_schedule_that_means_nothing_is_refused(arguments: tuple[int, str]) -> None:
    with pytest.raises(TitheError, match="Schedule"):
        Schedule(*arguments)
