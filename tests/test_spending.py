"""What a choice costs, said by the method, equals the sum over what it selected, in every measure and every epoch."""

from __future__ import annotations

import pytest
import torch

import tithe
from models import CASES
from prices import prices
from tithe import Budget, TraDy

CASE = CASES["depthwise"]
MEASURES = {
    "bytes": (Budget("60kB"), 60_000.0),
    "elements": (Budget(elements=2_000), 2_000.0),
    "fraction": (Budget(fraction=0.2), None),
}


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("measure", MEASURES)
def test_spending_is_the_sum_over_what_is_selected_and_within_the_limit(measure: str, dynamic: bool) -> None:
    budget, limit = MEASURES[measure]
    torch.manual_seed(0)
    model = CASE.make()
    batches = CASE.batches(2, 4)
    priced = prices(model, CASE, batches[0])
    method = TraDy(budget, dynamic=dynamic, layers="all", optimizer_states=1)
    plan = tithe.attach(model, method, loss=CASE.loss, data=batches, head=CASE.head)
    optimizer = torch.optim.SGD(plan.parameters(), lr=0.1, momentum=0.9)
    plan.bind(optimizer)
    head = sum(dict(plan.named_parameters())[name].numel() for name in plan.head)
    for _ in range(3):
        bill = plan.spending()
        assert bill is not None
        spent, allowed = bill.spent, bill.limit
        weights = plan.context().capacity or sum(s.size for s in plan.selections.values())
        if measure == "bytes":
            kept = sum(s.items.numel() * (4 * priced[n].positions + 8) for n, s in plan.selections.items())
            expected = 12 * weights + kept + 8 * head
        else:
            expected = 2 * weights + sum(s.items.numel() * priced[n].positions / 4 for n, s in plan.selections.items())
        assert spent == pytest.approx(expected)
        assert limit is None or allowed == limit
        assert 0.5 * allowed < spent <= allowed
        plan.end_epoch()
