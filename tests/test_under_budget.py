"""What fits under a budget, against its plain formula: items are taken one by one."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from tithe.select import topk
from tithe.select.topk import under_budget


def one_by_one(
    order: list[int], weights: list[int], kept: list[float], unit: float, limit: float, capacity: int | None
) -> list[int]:
    """Take items while they fit; when not even the first does, the first that does, alone."""

    def fits(items: list[int]) -> bool:
        size, other = sum(weights[i] for i in items), sum(kept[i] for i in items)
        if capacity is None:
            return unit * size + other <= limit
        return size <= capacity and unit * capacity + other <= limit

    taken: list[int] = []
    while len(taken) < len(order) and fits([*taken, order[len(taken)]]):
        taken.append(order[len(taken)])
    return taken or [item for item in order if fits([item])][:1]


# Whole numbers, so that sums are exact in any order.
prices = st.integers(0, 40)


@given(
    items=st.lists(st.tuples(st.integers(1, 40), prices, prices), max_size=40),
    unit=st.integers(0, 5),
    limit=st.integers(-5, 2000),
    capacity=st.none() | st.integers(0, 400),
    head=st.integers(1, 50),
)
def test_items_are_taken_one_by_one(
    items: list[tuple[int, int, int]], unit: int, limit: int, capacity: int | None, head: int
) -> None:
    """Whether the head of the order is all that is looked at, part of what fits, or more than there is."""
    order = sorted(range(len(items)), key=lambda i: (items[i][2], i))
    weights, kept = [item[0] for item in items], [float(item[1]) for item in items]
    before, topk._HEAD = topk._HEAD, head
    try:
        found = under_budget(
            torch.tensor(order, dtype=torch.int64),
            torch.tensor(weights, dtype=torch.int64),
            torch.tensor(kept, dtype=torch.float64),
            float(unit),
            float(limit),
            capacity,
        )
    finally:
        topk._HEAD = before
    assert found.tolist() == one_by_one(order, weights, kept, float(unit), float(limit), capacity)
    assert found.dtype == torch.int64


def test_more_may_fit_than_is_looked_at_first() -> None:
    """Of a long order everything is taken up to the last item that fits, however far that is."""
    count = 3 * topk._HEAD
    order = torch.arange(count).flip(0)
    ones, nothing = torch.ones(count, dtype=torch.int64), torch.zeros(count, dtype=torch.float64)
    for fits in (topk._HEAD - 1, topk._HEAD, topk._HEAD + 1, count - 1, count, count + 1):
        assert torch.equal(under_budget(order, ones, nothing, 1.0, float(fits), None), order[:fits])


def test_the_first_that_fits_may_be_far_down() -> None:
    """It is found beyond the part that is looked at first."""
    count = topk._HEAD + 5
    weights = torch.full((count,), 9, dtype=torch.int64)
    weights[count - 2] = 2
    nothing = torch.zeros(count, dtype=torch.float64)
    assert under_budget(torch.arange(count), weights, nothing, 1.0, 3.0, None).tolist() == [count - 2]
