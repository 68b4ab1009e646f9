"""Frozen weights: the structure alone is learned, from forward passes; and what the probabilities start from."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tithe
from models import CASES, Case
from narrow_plans import FAMILIES, attach, bound, plain, step
from oracles import adamw, bits, equal_bits
from tithe import VRPGE, NarrowPlan, TitheError
from tithe.narrow import unit_metric

FROZEN = VRPGE(0.5, weights="frozen", structure_lr=0.2)


def search(plan: NarrowPlan, case: Case, first: int = 0, stop: int = 6) -> list[float]:
    """The loop without an optimizer, steps numbered over the run; an epoch has three."""
    losses: list[float] = []
    for number in range(first, stop):
        torch.manual_seed(number)
        batch = case.batch(6, seed=number, dtype=next(plan.model.parameters()).dtype)
        losses.append(float(plan.backward(lambda batch=batch: case.loss(plan.model, batch))))
        plan.step()
        if number % 3 == 2:
            plan.end_epoch()
    return losses


@pytest.mark.parametrize("name", ["vgg", "residual", "inverted", "bert_dropout", "vit", "grouped_query"])
def test_nothing_trains_but_the_probabilities(name: str) -> None:
    """Weights, statistics and flags are as before; what is left after a drop is a part of what was there."""
    case = FAMILIES.get(name) or CASES[name]
    model = case.model().train()
    flags, before = [p.requires_grad for p in model.parameters()], bits(model)
    plan = attach(case, model, FROZEN)
    assert all(theta.grad is None for theta in plan.parameters())
    s = plan.structure.s.clone()
    search(plan, case, stop=2)
    assert equal_bits(before, bits(model)) == []
    assert not torch.equal(plan.structure.s, s)
    assert plan.num_steps == 2
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    plan.release()
    assert [p.requires_grad for p in model.parameters()] == flags
    assert equal_bits(before, bits(model)) == []


def test_random_draws_of_the_model_go_on() -> None:
    """As in any forward pass: dropout is another in each step, and the same for both draws."""
    case = CASES["bert_dropout"]
    plan = attach(case, case.model().train(), VRPGE(1.0, weights="frozen"))  # one network: all of it
    batch = case.batch(4)
    torch.manual_seed(0)
    losses = [float(plan.backward(lambda: case.loss(plan.model, batch))) for _ in range(2)]
    reference = plain(plan, case).train()
    torch.manual_seed(0)
    with torch.no_grad():
        assert losses == [pytest.approx(float(case.loss(reference, batch)), rel=1e-6) for _ in range(2)]
    assert losses[0] != losses[1]


@pytest.mark.parametrize("name", ["vgg", "bert"])
def test_a_step_needs_what_inference_needs(name: str) -> None:
    """And a copy of the drawn weights: nothing is kept for backward, and the bytes are those predicted."""
    case = FAMILIES[name]
    plan, batch = attach(case, method=FROZEN), case.batch(16)
    search(plan, case, stop=1)
    predicted = plan.predict(batch)
    narrow, drawn = attach(case, keep=0.5), plan._fit
    measured = tithe.measure(lambda: plan.backward(lambda: case.loss(plan.model, batch)), model=plan.model)
    assert measured.kept == predicted.kept == 0
    assert measured.peak == predicted.peak
    assert predicted.gradients == predicted.optimizer == predicted.theta == 0
    whole = copy.deepcopy(plain(plan, case))
    with torch.no_grad():
        inference = tithe.measure(lambda: case.loss(whole, batch), model=whole)
    copies = sum(t.nbytes for t in plan.stage.filled(drawn).values())
    buffers = sum(t.nbytes for t in plan.model.buffers())
    assert measured.peak <= inference.peak + copies + 2 * buffers + 4096
    assert measured.peak < narrow.predict(batch).peak


def test_a_head_is_trained_and_nothing_else() -> None:
    case = FAMILIES["bert"]
    model = case.model().train()
    plan = attach(case, model, FROZEN, head=case.head)
    opt = bound(plan, adamw)
    before = bits(model)
    for batch in case.batches(3):
        step(plan, opt, case, batch)
    changed = {key.split(":")[0].split(" ")[0] for key in equal_bits(before, bits(model))}
    assert changed == set(plan.head)
    assert plan.num_steps == 3
    heads = [p for name, p in model.named_parameters() if name in plan.head]
    assert plan.predict(case.batch()).gradients == sum(p.nbytes for p in heads)


def test_frozen_weights_may_require_no_gradient_from_the_start() -> None:
    case = FAMILIES["vgg"]
    model = case.model().requires_grad_(False)
    plan = attach(case, model, FROZEN)
    search(plan, case)
    narrow = plan.export(case.batch())
    assert not any(p.requires_grad for p in narrow.parameters())
    plan.release()


@pytest.mark.parametrize("name", ["vgg", "residual", "bert", "grouped_query"])
def test_search_then_fine_tune_the_narrow_network(name: str, tmp_path: Path) -> None:
    """Search, settle, export; the copy is trained plainly, and a method attaches to it."""
    case = FAMILIES[name]
    plan = attach(case, method=VRPGE(0.6, weights="frozen", init="taylor", structure_lr=0.05))
    search(plan, case)
    plan.settle(case.batches(2), draws=3)
    narrow = plan.export(case.batch())
    assert all(p.requires_grad for p in narrow.parameters())
    assert sum(p.numel() for p in narrow.parameters()) < sum(p.numel() for p in case.model().parameters())
    plan.save(tmp_path / "narrow.safetensors")
    plan.release()
    opt = torch.optim.AdamW(narrow.parameters(), lr=1e-2)
    batch = case.batch(8)
    losses: list[float] = []
    for _ in range(8):
        loss = case.loss(narrow, batch)
        loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    again = tithe.attach(narrow, tithe.FISH(density=0.1), loss=case.loss, data=case.batches(2))
    again.release()
    tithe.apply(case.model(), tmp_path / "narrow.safetensors")


@pytest.mark.parametrize("init", ["taylor", "wanda", "taylor+wanda"])
def test_without_a_search_the_metric_alone_cuts(init: Any) -> None:
    """The likeliest network is taken where none is drawn, and costs no more than is kept."""
    case = FAMILIES["residual"]
    plan = attach(case, method=VRPGE(0.6, cost="flops", weights="frozen", init=init))
    likely, groups = plan.structure.likely(0), plan.stage.coupling.groups
    plan.settle(draws=0)
    assert [g.num_units for g in plan.stage.coupling.groups] == [int(likely[g.start : g.stop].sum()) for g in groups]
    assert plan.narrowing().spent <= 0.6 + 1e-9


@pytest.mark.parametrize("name", ["vgg", "bert", "grouped_query_tied"])
def test_the_same_loop_searches_and_then_trains_what_was_found(name: str) -> None:
    """One optimizer from the start: its steps move nothing before `settle`, and are ordinary training after it."""
    case = FAMILIES[name]
    model = case.model(dtype=torch.float64).train()
    plan = attach(case, model, FROZEN)
    assert "frozen until plan.settle()" in str(plan)
    opt = bound(plan, adamw)
    before = bits(model)
    for number in range(3):
        step(plan, opt, case, case.batch(6, seed=number, dtype=torch.float64))
    assert equal_bits(before, bits(model)) == []
    assert opt.state == {}
    assert plan.num_steps == 3
    plan.settle(case.batches(2, dtype=torch.float64), draws=2)
    assert "frozen until" not in str(plan)
    narrow = plan.export().train()
    plainly = adamw(narrow.parameters())
    for number in range(3):
        batch = case.batch(6, seed=number, dtype=torch.float64)
        expected = case.loss(narrow, batch)
        expected.backward()
        plainly.step()
        plainly.zero_grad()
        assert step(plan, opt, case, batch) == pytest.approx(float(expected.detach()), rel=1e-9)
    for (key, one), other in zip(narrow.state_dict().items(), model.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-10, msg=key)


@pytest.mark.parametrize("stop", [1, 3, 4])
@pytest.mark.parametrize("method", [FROZEN, VRPGE(0.5, weights="frozen", init="wanda", structure_lr=0.2, hold=2)])
def test_a_search_that_is_stopped_goes_on(method: VRPGE, stop: int, tmp_path: Path) -> None:
    case = FAMILIES["vgg"]
    straight, stopped = (attach(case, method=method, seed=3) for _ in range(2))
    search(straight, case, stop=7)
    search(stopped, case, stop=stop)
    torch.save(stopped.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed = attach(case, case.model(seed=9), method, seed=3, state=state)
    search(resumed, case, stop, 7)
    assert torch.equal(straight.structure.s, resumed.structure.s)
    assert equal_bits(bits(straight.model), bits(resumed.model)) == []


@pytest.mark.parametrize("control", [True, False])
def test_a_search_moves_towards_the_units_that_matter(control: bool) -> None:
    """Of a layer whose other half is silent, on frozen weights, from forward passes alone."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 1))
    with torch.no_grad():
        model[0].bias.fill_(0.5)
        model[2].weight.copy_(torch.tensor([1.0, -1.0]).repeat(8))
        model[2].weight[:, 8:] = 0
    x = torch.randn(64, 4)
    with torch.no_grad():
        y = model(x)

    def loss(given: nn.Module, batch: Tensor) -> Tensor:
        return (given(batch) - y).square().mean()

    method = VRPGE(0.5, weights="frozen", structure_lr=0.01, control_variate=control)
    plan = tithe.attach(model, method, loss=loss, data=[x])
    for _ in range(120):
        plan.backward(lambda: loss(model, x))
        plan.step()
    s = plan.structure.s
    assert float(s[:8].sum()) > 1.3 * float(s[8:].sum())
    plan.settle([x])
    with torch.no_grad():
        assert float(loss(plan.export(x), x)) < float(y.var())


# --- what the probabilities start from


@pytest.mark.parametrize("init", ["taylor", "wanda", "taylor+wanda"])
@pytest.mark.parametrize("cost", ["channels", "flops", "params"])
@pytest.mark.parametrize("name", ["vgg", "inverted", "bert", "gpt2", "grouped_query"])
def test_the_start_spends_what_is_kept_in_the_order_of_the_metric(name: str, cost: Any, init: Any) -> None:
    case = FAMILIES[name]
    model = case.model()
    before = bits(model)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    plan = attach(case, model, VRPGE(0.6, cost=cost, init=init))
    assert torch.equal(torch.rand(3), expected)
    assert equal_bits(before, bits(model)) == []
    assert all(p.grad is None for p in model.parameters())
    assert plan.structure.spent() == pytest.approx(0.6, rel=1e-6)
    plan._inference.unhook()
    metric = unit_metric(init, plan.stage, case.loss, case.batches(2))
    assert bool((metric >= 0).all())
    s = plan.structure.s.detach()
    for group in plan.stage.coupling.groups:
        inside = slice(group.start, group.stop)
        order = metric[inside].argsort()
        assert bool((s[inside][order].diff() >= -1e-12).all())
    assert float(s.min()) > 0
    assert float((4 * s * (1 - s)).mean()) < 0.6


def test_a_metric_foretells_differences_as_soon_as_its_scale_is_known() -> None:
    """Of a frozen network whose loss is linear in what is there, the forecast is exact after a few differences."""
    worth = torch.linspace(1, 3, 12)
    model = nn.Sequential(nn.Linear(1, 12), nn.Linear(12, 1, bias=False)).double()
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.fill_(1.0)
        model[1].weight.copy_(-worth)  # the loss is -Σ m_i worth_i

    def loss(given: nn.Module, batch: Tensor) -> Tensor:
        return given(batch).mean()

    x = torch.zeros(8, 1, dtype=torch.float64)
    plan = tithe.attach(model, VRPGE(0.5, weights="frozen", init="taylor", structure_lr=1e-3), loss=loss, data=[x])
    for _ in range(8):
        plan.backward(lambda: loss(model, x))
        plan.step()
    control = plan.structure.control
    assert control is not None
    torch.testing.assert_close(control.vector, -worth.double(), rtol=1e-9, atol=0)


def test_taylor_is_the_gate_gradient_of_each_part_and_may_take_the_order_of_wanda() -> None:
    """Of 32 samples each, squared, summed, and the root of it; by autograd with explicit gates."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x = torch.randn(70, 5, dtype=torch.float64)

    def loss(given: nn.Module, batch: Tensor) -> Tensor:
        return given(batch).square().mean()

    plan = tithe.attach(model, VRPGE(0.5), loss=loss, data=[x])
    total = torch.zeros(6, dtype=torch.float64)
    for part in x.split(32):
        gate = torch.ones(6, dtype=torch.float64, requires_grad=True)
        out = model[2](model[1](model[0](part)) * gate).square().mean()
        total += torch.autograd.grad(out, gate)[0].square()
    plan._inference.unhook()
    wanda = model[2].weight.detach().abs().mean(0) * model[1](model[0](x)).detach().norm(dim=0)
    torch.testing.assert_close(unit_metric("wanda", plan.stage, loss, [x]), wanda)
    torch.testing.assert_close(unit_metric("taylor", plan.stage, loss, [x]), total.sqrt())
    metric = unit_metric("taylor+wanda", plan.stage, loss, [x])
    torch.testing.assert_close(metric[wanda.argsort()], total.sqrt().sort().values)


class Bilinear(nn.Module):
    """A weight that no linear layer holds reads the hidden units."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(5, 6), nn.Parameter(torch.randn(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x).relu() @ self.two


class ByHand(nn.Module):
    """The weight of a layer that is never called reads the hidden units."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.one(x).relu(), self.two.weight, self.two.bias)


@pytest.mark.parametrize("init", ["wanda", "taylor+wanda"])
def test_wanda_says_which_layer_it_has_not_seen_called(init: Any) -> None:
    with pytest.raises(TitheError, match=r"two\.weight: found a weight whose module was never called"):
        tithe.attach(ByHand(), VRPGE(0.5, init=init), loss=lambda m, x: m(x).square().mean(), data=[torch.randn(8, 5)])


def test_wanda_sees_every_layer_that_shares_a_weight() -> None:
    class Shared(nn.Module):
        """Two layers of one weight, of which each reads other values of the same units."""

        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.three = nn.Linear(5, 6), nn.Linear(6, 3), nn.Linear(6, 3)
            self.three.weight = self.two.weight

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.one(x).relu()
            return self.two(hidden) + self.three(2 * hidden)

    def loss(given: nn.Module, batch: Tensor) -> Tensor:
        return given(batch).square().mean()

    torch.manual_seed(0)
    model, x = Shared(), torch.randn(8, 5)
    hidden = model.one(x).relu().detach().double()
    plan = tithe.attach(model, VRPGE(0.5), loss=loss, data=[x])
    expected = model.two.weight.detach().double().abs().mean(0) * (5 * hidden.square()).sum(0).sqrt()
    torch.testing.assert_close(unit_metric("wanda", plan.stage, loss, [x]), expected)


def test_wanda_says_where_it_cannot_tell_the_inputs() -> None:
    def loss(given: nn.Module, batch: Tensor) -> Tensor:
        return given(batch).square().mean()

    x = torch.randn(8, 5)
    with pytest.raises(TitheError, match="two: found a Bilinear"):
        tithe.attach(Bilinear(), VRPGE(0.5, init="wanda"), loss=loss, data=[x])
    tithe.attach(Bilinear(), VRPGE(0.5, init="taylor"), loss=loss, data=[x]).release()


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"weights": "fixed"}, "weights='fixed'"),
        ({"init": "magnitude"}, "init='magnitude'"),
        ({"hold": 0}, "hold=0"),
        ({"hold": 1.5}, "hold=1.5"),
        ({"control_variate": "yes"}, "control_variate='yes'"),
        ({"init": "taylor", "gradual": (0, 5)}, "init='taylor'"),
    ],
)
def test_values_that_mean_nothing_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(TitheError, match=told):
        VRPGE(0.5, **settings)
