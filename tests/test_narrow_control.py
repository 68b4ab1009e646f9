"""What earlier steps foretell of a difference of losses, and draws that are held."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import tithe
from models import Case
from narrow_plans import FAMILIES, Masked, attach, bound, plain, step
from oracles import adamw, bits, equal_bits, sgd
from ranks import play
from tithe import VRPGE, NarrowPlan
from tithe.narrow.control import ControlVariate

LONG = 25
"""Steps after which there is a forecast: of a few differences chance alone could have it."""


def masks(seed: int, n: int = 9) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    first, second = (torch.rand(2, n, generator=draw) < 0.5).unbind(0)
    return first, second


@given(seed=st.integers(0, 20), factor=st.floats(0.1, 10), noise=st.floats(0, 0.1))
def test_a_forecast_that_is_right_up_to_a_factor_is_scaled_to_be_right(seed: int, factor: float, noise: float) -> None:
    torch.manual_seed(seed)
    worth = torch.randn(9, dtype=torch.float64)
    control = ControlVariate(9)
    control.take(worth, torch.ones(9, dtype=torch.bool))
    for number in range(80):
        first, second = masks(100 * seed + number)
        exact = float(factor * worth @ (first.double() - second.double()))
        control.see(first, second, exact * (1 + noise * float(torch.randn(()))))
    torch.testing.assert_close(control.vector, factor * worth, rtol=0.15, atol=0)


@given(seed=st.integers(0, 50))
def test_a_forecast_that_is_none_is_shrunk_away(seed: int) -> None:
    """Of differences that have nothing to do with it, hardly anything is taken out."""
    torch.manual_seed(seed)
    control, plain, left = ControlVariate(9), 0.0, 0.0
    control.take(torch.randn(9, dtype=torch.float64), torch.ones(9, dtype=torch.bool))
    for number in range(200):
        first, second = masks(1000 * seed + number)
        difference = float(torch.randn(()))
        plain += difference**2
        left += (difference - float(control.vector @ (first.double() - second.double()))) ** 2
        control.see(first, second, difference)
    assert left < 1.1 * plain


def test_a_unit_counts_the_steps_in_which_it_was_drawn() -> None:
    control = ControlVariate(3)
    control.take(torch.tensor([1.0, 5.0, 0.0]), torch.tensor([True, True, False]))
    control.take(torch.tensor([3.0, 0.0, 0.0]), torch.tensor([True, False, False]))
    assert control.units.tolist() == pytest.approx([(0.98 * 1 + 3) / 1.98, 5.0, 0.0])
    assert control.scale == 0.0
    assert control.vector.tolist() == [0.0, 0.0, 0.0]


def test_differences_alone_are_fitted() -> None:
    """Normalised least mean squares come to the exact vector of differences that are linear."""
    worth = torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0, -1.0, 0.2, 0.7, -0.4], dtype=torch.float64)
    control = ControlVariate(9)
    for number in range(300):
        first, second = masks(number)
        difference = float(worth @ (first.double() - second.double()))
        control.see(first, second, difference)
        control.fit(first, second, difference)
    torch.testing.assert_close(control.vector, worth, rtol=0.01, atol=1e-3)


@pytest.mark.parametrize("name", ["mlp", "residual"])
def test_a_long_run_is_that_of_masks_on_dense_tensors(name: str) -> None:
    """Long enough for a forecast, which the reference makes from the whole history."""
    case = FAMILIES[name]
    plan = attach(case, case.model(dtype=torch.float64).train())
    opt = bound(plan, sgd)
    reference = Masked(plan, plain(plan, case).train(), case, sgd)
    used = False
    for number in range(LONG):
        batch = case.batch(6, seed=number, dtype=torch.float64)
        step(plan, opt, case, batch)
        reference.step([batch])
        used |= plan.structure.control.scale > 0
    assert used
    torch.testing.assert_close(plan.structure.s.detach(), reference.s, rtol=1e-6, atol=1e-8)


def test_this_step_is_not_in_its_own_forecast() -> None:
    """The vector that a step uses is complete before its draws: the loss of the step does not move it."""
    case = FAMILIES["vgg"]
    used: list[Tensor] = []
    plans = [attach(case, case.model(dtype=torch.float64)) for _ in range(2)]
    for plan, factor in zip(plans, (1.0, 3.0), strict=True):
        opt = bound(plan, sgd)
        for batch in case.batches(LONG, dtype=torch.float64):
            step(plan, opt, case, batch)
        used.append(plan.structure.control.vector.clone())
        batch = case.batch(dtype=torch.float64)
        plan.backward(lambda plan=plan, batch=batch, factor=factor: factor * case.loss(plan.model, batch))
        torch.testing.assert_close(plan.structure.control.vector, used[-1], rtol=0, atol=0)
    torch.testing.assert_close(used[0], used[1], rtol=0, atol=0)
    assert bool(used[0].any())


@pytest.mark.parametrize("name", ["vgg", "bert"])
def test_units_that_are_dropped_are_forgotten(name: str) -> None:
    case = FAMILIES[name]
    plan = attach(case)
    opt = bound(plan, adamw)
    for batch in case.batches(4):
        step(plan, opt, case, batch)
    before = plan.structure.control.units
    alive = torch.ones(len(before), dtype=torch.bool)
    for group in plan.stage.coupling.groups:
        alive[group.start + 1 : group.stop : 2] = False
        plan.structure.s.detach()[group.start + 1 : group.stop : 2] = 0.0
    assert plan.end_epoch()
    assert torch.equal(plan.structure.control.units, before[alive])
    for batch in case.batches(2):
        step(plan, opt, case, batch)


def test_without_it_the_estimate_is_the_papers_and_old_states_are_read() -> None:
    """A state of the first format has no draws: they are a function of the probabilities, the seed and the step."""
    case, method = FAMILIES["vgg"], VRPGE(0.5, control_variate=False)
    plan = attach(case, method=method)
    opt = bound(plan, sgd)
    assert plan.structure.control is None
    for batch in case.batches(3):
        step(plan, opt, case, batch)
    state = plan.state_dict()
    old = {key: value for key, value in state.items() if key not in ("masks", "age", "control", "weights")}
    other = attach(case, case.model(seed=4), method)
    other.load_state_dict({**old, "format": 1})
    assert all(torch.equal(*pair) for pair in zip(plan._masks, other._masks, strict=True))
    assert equal_bits(bits(plan.model), bits(other.model)) == []


@dataclass(frozen=True)
class Own(tithe.NarrowMethod):
    """A stranger's method: what it does not override is as before, or what it asks for."""

    keep: float = 0.5
    control_variate: bool = False


def test_a_method_of_ones_own_has_it_when_it_asks() -> None:
    case = FAMILIES["vgg"]
    plans = [attach(case, method=method) for method in (Own(), VRPGE(0.5, control_variate=False))]
    asked = [attach(case, method=method) for method in (Own(control_variate=True), VRPGE(0.5))]
    for pair in (plans, asked):
        for plan in pair:
            opt = bound(plan, sgd)
            for batch in case.batches(LONG):
                step(plan, opt, case, batch)
        assert torch.equal(pair[0].structure.s, pair[1].structure.s)
    assert not torch.equal(plans[0].structure.s, asked[0].structure.s)


# --- draws that are held


HELD = VRPGE(0.5, structure_lr=0.3, hold=3)


def run(plan: NarrowPlan, opt: torch.optim.Optimizer, case: Case, first: int, stop: int) -> list[tuple[Tensor, Tensor]]:
    """Steps, numbered over the run: an epoch has four; returns the draws of each."""
    found: list[tuple[Tensor, Tensor]] = []
    for number in range(first, stop):
        found.append(plan._masks)
        torch.manual_seed(number)
        step(plan, opt, case, case.batch(6, seed=number))
        if number % 4 == 3:
            plan.end_epoch()
    return found


def test_a_draw_is_held_and_the_second_loss_is_evaluated_once() -> None:
    case = FAMILIES["vgg"]
    plan = attach(case, method=VRPGE(0.5, structure_lr=1e-4, hold=3))
    opt = bound(plan, sgd)
    calls: list[int] = []
    learned: list[bool] = []
    for number in range(7):
        before, count = plan.structure.s.clone(), 0
        drawn = plan._masks

        batch = case.batch(6, seed=number)

        def closure(batch: Any = batch) -> Tensor:
            nonlocal count
            count += 1
            return case.loss(plan.model, batch)

        plan.backward(closure)
        opt.step()
        opt.zero_grad()
        changed = plan.step()
        calls.append(count)
        learned.append(not torch.equal(before, plan.structure.s))
        assert (plan._masks is drawn) == (number % 3 != 2)
        assert changed == (number % 3 == 2)
    assert calls == [3, 1, 1, 2, 1, 1, 2]  # the very first is run twice, to see that the loss is the same
    assert learned == [True, False, False, True, False, False, True]


@pytest.mark.parametrize("stop", [1, 2, 4, 5, 7])
@pytest.mark.parametrize("name", ["vgg", "bert_dropout"])
def test_stopping_while_a_draw_is_held_equals_never_stopping(name: str, stop: int, tmp_path: Path) -> None:
    from models import CASES

    case = FAMILIES.get(name) or CASES[name]
    straight, stopped = (attach(case, method=HELD, seed=4) for _ in range(2))
    opts = [bound(plan, adamw) for plan in (straight, stopped)]
    run(straight, opts[0], case, 0, 9)
    run(stopped, opts[1], case, 0, stop)
    torch.save({"plan": stopped.state_dict(), "opt": opts[1].state_dict()}, tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed = attach(case, case.model(seed=9), HELD, seed=4, state=saved["plan"])
    opt = bound(resumed, adamw)
    opt.load_state_dict(saved["opt"])
    run(resumed, opt, case, stop, 9)
    assert equal_bits(bits(straight.model), bits(resumed.model)) == []
    assert torch.equal(straight.structure.s, resumed.structure.s)
    assert torch.equal(straight.structure.control.vector, resumed.structure.control.vector)


# --- two ranks


def _on_two_ranks(rank: int, method: VRPGE) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))
    draw = torch.Generator().manual_seed(rank + 10)
    data = [(torch.randn(4, 6, generator=draw), torch.randint(4, (4,), generator=draw)) for _ in range(5)]

    def loss(given: Any, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(given(batch[0]), batch[1])

    plan = tithe.attach(model, method, loss=loss, data=data)
    opt = None if method.weights == "frozen" else torch.optim.SGD(plan.parameters(), lr=0.1)
    for batch in data:
        plan.backward(lambda batch=batch: loss(model, batch))
        if opt is not None:
            opt.step()
            opt.zero_grad()
        plan.step()
    plan.settle()
    s = plan.structure.s.detach().clone()
    return s, torch.cat([p.detach().flatten() for p in model.parameters()])


def trained(rank: int) -> Any:
    return _on_two_ranks(rank, VRPGE(0.6, structure_lr=0.1))


def frozen_taylor(rank: int) -> Any:
    return _on_two_ranks(rank, VRPGE(0.6, structure_lr=0.1, weights="frozen", init="taylor"))


def held_wanda(rank: int) -> Any:
    return _on_two_ranks(rank, VRPGE(0.6, structure_lr=0.1, init="wanda", hold=2))


def test_ranks_with_other_data_agree(tmp_path: Path) -> None:
    for name, (one, other) in play(tmp_path, trained, frozen_taylor, held_wanda).items():
        assert not isinstance(one, Exception), (name, one)
        assert all(torch.equal(*pair) for pair in zip(one, other, strict=True)), name
