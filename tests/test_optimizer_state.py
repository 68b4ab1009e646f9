"""Optimizer state across a reselect: who stays keeps its state, who leaves drops it, who enters starts at zero."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor

import tithe
from models import CASES
from tithe import FISH

CASE = CASES["mlp"]

OPTIMIZERS: dict[str, Callable[[Iterable[Tensor]], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw_amsgrad": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
}


def _dense(plan: tithe.Plan, opt: torch.optim.Optimizer) -> dict[tuple[str, str], Tensor]:
    """Each elementwise state as a tensor in the weight's flat shape, NaN where nothing is selected."""
    found: dict[tuple[str, str], Tensor] = {}
    for name, theta in plan.named_parameters():
        for key, value in opt.state.get(theta, {}).items():
            if name in plan.selections and isinstance(value, Tensor) and value.shape == theta.shape:
                flat = torch.full((plan.selections[name].num_weights,), float("nan"))
                flat[plan.selected(name)] = value.detach()
                found[name, key] = flat
    return found


def _run(plan: tithe.Plan, opt: torch.optim.Optimizer, count: int) -> None:
    for batch in CASE.batches(count):
        opt.zero_grad()
        plan.backward(lambda batch=batch: CASE.loss(plan.model, batch))
        opt.step()
        plan.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_stayers_keep_leavers_drop_entrants_start_at_zero(name: str) -> None:
    plan = tithe.attach(CASE.model(), FISH(density=0.4, score="random"), head="4.*")
    opt = OPTIMIZERS[name](plan.parameters())
    plan.bind(opt)
    _run(plan, opt, 3)
    before, chosen = _dense(plan, opt), {n: plan.selected(n).clone() for n in plan.selections}
    head = {
        n: [v.clone() for v in opt.state[p].values() if isinstance(v, Tensor)]
        for n, p in plan.named_parameters()
        if n in plan.head
    }
    counters = [state["step"].clone() for state in opt.state.values() if "step" in state]
    plan.reselect()
    after = _dense(plan, opt)
    stayed = entered = 0
    for (parameter, key), state in after.items():
        old = torch.zeros(state.numel(), dtype=torch.bool)
        new = old.clone()
        old[chosen[parameter]] = True
        new[plan.selected(parameter)] = True
        if (parameter, key) in before:
            assert torch.equal(state[old & new], before[parameter, key][old & new]), (parameter, key)
        assert (state[new & ~old] == 0).all(), (parameter, key)
        stayed, entered = stayed + int((old & new).sum()), entered + int((new & ~old).sum())
    assert before
    assert stayed > 0
    assert entered > 0
    for n, p in plan.named_parameters():
        if n in plan.head:
            now = [v for v in opt.state[p].values() if isinstance(v, Tensor)]
            assert all(torch.equal(a, b) for a, b in zip(head[n], now, strict=True))
    assert all(step in counters for step in [state["step"] for state in opt.state.values() if "step" in state])
    assert all(p.grad is None or not p.grad.any() for n, p in plan.named_parameters() if n not in plan.head)
    _run(plan, opt, 2)


def test_values_that_left_stay_where_training_put_them() -> None:
    plan = tithe.attach(CASE.model(), FISH(density=0.3, score="random"))
    opt = OPTIMIZERS["sgd"](plan.parameters())
    plan.bind(opt)
    _run(plan, opt, 2)
    weights = {name: p.detach().clone() for name, p in plan.model.named_parameters() if not name.endswith("@theta")}
    chosen = {name: plan.selected(name).clone() for name in plan.selections}
    plan.reselect()
    for name, before in weights.items():
        assert torch.equal(plan.model.get_parameter(name).detach(), before)
    _run(plan, opt, 2)
    for name, before in weights.items():
        left = torch.ones(before.numel(), dtype=torch.bool)
        left[plan.selected(name)] = False
        assert torch.equal(plan.model.get_parameter(name).detach().flatten()[left], before.flatten()[left])
    assert any(not torch.equal(chosen[name], plan.selected(name)) for name in chosen)


def test_a_reselect_that_keeps_the_choice_changes_nothing() -> None:
    """Everything chosen twice: two runs, one with a reselect between, agree bit for bit."""
    results: list[list[Tensor]] = []
    for again in (False, True):
        plan = tithe.attach(CASE.model(), FISH(density=1.0, score="magnitude"))
        opt = OPTIMIZERS["adam"](plan.parameters())
        plan.bind(opt)
        _run(plan, opt, 2)
        if again:
            plan.reselect()
        _run(plan, opt, 2)
        results.append([p.detach().clone() for p in plan.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_gradients_accumulated_before_a_reselect_do_not_leak_into_the_new_choice() -> None:
    plan = tithe.attach(CASE.model(), FISH(density=0.3, score="random"))
    opt = OPTIMIZERS["sgd"](plan.parameters())
    plan.bind(opt)
    _run(plan, opt, 1)
    plan.backward(lambda: CASE.loss(plan.model, CASE.batch()))
    assert plan.reselect()
    assert all(p.grad is None or not p.grad.any() for p in plan.parameters())
