"""Budgets and schedules: plain values that refuse what they cannot mean."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

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


@pytest.mark.parametrize(
    ("make", "remedy"),
    [
        (lambda: Budget(0.01), "Budget(fraction=0.01)"),
        (lambda: Budget("1%"), "Budget(fraction=0.01)"),
        (lambda: Budget(elements=0.05), "Budget(fraction=0.05)"),
        (lambda: Budget(fraction=5), "fraction=0.05"),
        (lambda: tithe.FISH(density=5), "density=0.05"),
        (lambda: tithe.FISH(density=0.5 * 100), "density=0.5"),
        (lambda: tithe.FISH(k=0.005), "density=0.005"),
        (lambda: tithe.FISH(k=100.0), "k=100"),
        (lambda: tithe.TraDy(Budget("1MB"), coverage=97), "coverage=0.97"),
        (lambda: tithe.VRPGE(keep=50), "keep=0.5"),
    ],
)
def test_the_remedy_is_what_was_meant(make: Callable[[], object], remedy: str) -> None:
    with pytest.raises(TitheError) as refused:
        make()
    assert remedy in refused.value.remedy
    found = re.search(r"(\w+)=([\d.]+)", remedy)
    assert found is not None
    what = Budget if "Budget" in remedy or found[1] == "fraction" else {"keep": tithe.VRPGE}.get(found[1], tithe.FISH)
    if found[1] == "coverage":
        tithe.TraDy(Budget("1MB"), coverage=float(found[2]))
    else:  # what the remedy says is taken
        what(**{found[1]: int(found[2]) if found[1] == "k" else float(found[2])})


@pytest.mark.parametrize(
    "measure", [{"size": True}, {"size": 1.5}, {"elements": "3"}, {"flops": 0.2}, {"fraction": "1"}]
)
def test_what_is_no_count_is_refused(measure: dict[str, Any]) -> None:
    with pytest.raises(TitheError, match="Budget"):
        Budget(**measure)


@pytest.mark.parametrize("measure", [{"size": 10.0}, {"elements": 1e6}, {"flops": 2e9}])
def test_whole_numbers_may_be_written_as_floats(measure: dict[str, Any]) -> None:
    assert Budget(**measure).of(1) == next(iter(measure.values()))


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
