"""What cannot be done is refused when attaching, or before anything is changed, with a way out."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tithe
from models import CASES, Batch
from narrow_plans import FAMILIES, attach, bound, step
from oracles import bits, equal_bits, sgd
from tithe import VRPGE, TitheError

VGG = FAMILIES["vgg"]


# --- the method


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"keep": 0.0}, r"keep=0.0; expected a number in \(0, 1\]"),
        ({"keep": -0.1}, "keep=-0.1"),
        ({"keep": 1.01}, "keep=1.01"),
        ({"keep": math.nan}, "keep=nan"),
        ({"alpha": -0.1}, r"alpha=-0.1; expected a number in \[0, 1\]"),
        ({"alpha": 1.1}, "alpha=1.1"),
        ({"structure_lr": -1.0}, "structure_lr=-1.0"),
        ({"structure_lr": math.nan}, "structure_lr=nan"),
        ({"gradual": (5, 5)}, r"gradual=\(5, 5\)"),
        ({"gradual": (-1, 5)}, r"gradual=\(-1, 5\)"),
        ({"cost": "bytes"}, "cost='bytes'.*'channels', 'flops', 'params'"),
    ],
    ids=str,
)
def test_settings_out_of_range(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(TitheError, match=told):
        VRPGE(**{"keep": 0.5, **settings})


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_the_ends_of_the_range_are_in_it(alpha: float) -> None:
    plan = attach(VGG, method=VRPGE(1.0, alpha=alpha, structure_lr=0.0, gradual=(0, 1)))
    step(plan, bound(plan, sgd), VGG, VGG.batch())


@pytest.mark.parametrize(("cost", "keep"), [("channels", 0.1), ("flops", 0.02), ("params", 0.05)])
def test_less_than_the_floor(cost: str, keep: float) -> None:
    """One unit of each group, and what cannot be left out at all; the number in the message is enough."""
    model = VGG.model()
    before = bits(model)
    with pytest.raises(TitheError, match=r"keep: found .*expected at least .*3 groups") as error:
        attach(VGG, model, VRPGE(keep, cost=cost))
    assert equal_bits(before, bits(model)) == []
    least = float(error.value.expected.split("at least ")[1].split(":")[0])
    assert keep < least < 1
    plan = attach(VGG, model, VRPGE(least * 1.001, cost=cost))
    opt = bound(plan, sgd)
    for batch in VGG.batches(3):
        step(plan, opt, VGG, batch)
    assert [group.num_units >= 1 for group in plan.stage.coupling.groups] == [True] * 3
    for mask in plan.structure.draw(0, 9):
        assert all(bool(mask[group.start : group.stop].any()) for group in plan.stage.coupling.groups)


# --- attaching


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"loss": None, "data": None}, "no loss and data"),
        ({"loss": None}, "no loss"),
        ({"data": None}, "no data"),
        ({"data": []}, "no batch in data="),
        ({"where": "nothing.*"}, "where='nothing"),
        ({"head": "nothing.*"}, "head='nothing"),
        ({"where": "12.*"}, "nothing that could be absent"),
    ],
    ids=lambda value: "" if isinstance(value, str) else ",".join(value),
)
def test_attaching_without_what_it_needs(given: dict[str, Any], told: str) -> None:
    model = VGG.model()
    before = bits(model)
    with pytest.raises(TitheError, match=told):
        attach(VGG, model, **given)
    assert equal_bits(before, bits(model)) == []
    assert all(p.requires_grad for p in model.parameters())
    step(plan := attach(VGG, model), bound(plan, sgd), VGG, VGG.batch())


def test_data_may_be_an_iterator_of_which_one_batch_is_taken() -> None:
    taken: list[int] = []

    def batches() -> Iterable[Batch]:
        for number in itertools.count():
            taken.append(number)
            yield VGG.batch(4, seed=number)

    plan = attach(VGG, data=batches())
    assert len(taken) == 1
    assert plan.settle(draws=2) > 0


def test_nothing_can_be_absent_and_why() -> None:
    """The only layer's output is the model's; a width that everything is normalised over."""
    with pytest.raises(TitheError, match="nothing that could be absent"):
        tithe.attach(nn.Linear(4, 2), VRPGE(0.5), loss=lambda m, b: m(b).square().mean(), data=[torch.ones(2, 4)])
    with pytest.raises(TitheError, match=r"normalised .*in norm"):
        attach(CASES["tied_mlp"])


def test_a_forward_pass_that_needs_its_full_width_is_named_with_a_way_out() -> None:
    """A module that counts its channels itself, in a number that nobody can see."""

    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.secret, self.two = nn.Linear(4, 6), 6, nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(torch.relu(self.one(x)).view(len(x), self.secret))

    plain = [nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU()]
    model, x = nn.Sequential(*plain, Counts()), torch.randn(4, 4)
    settings = {"loss": lambda m, batch: m(batch).square().mean(), "data": [x]}
    with pytest.raises(TitheError, match=r"^4: found a forward pass that needs its full width") as error:
        tithe.attach(model, VRPGE(0.5), **settings)
    assert 'where="!4.*"' in error.value.remedy
    plan = tithe.attach(model, VRPGE(0.5), where="!4.*", **settings)
    plan.backward(lambda: settings["loss"](model, x))


@pytest.mark.parametrize("second", ["absent", "frozen"])
@pytest.mark.parametrize("first", ["absent", "frozen"])
def test_a_second_plan_on_the_same_model(first: str, second: str) -> None:
    def on(kind: str, model: nn.Module) -> tithe.Plan:
        if kind == "absent":
            return attach(VGG, model)
        return tithe.attach(model, tithe.FISH(k=5, score="magnitude"))

    model = VGG.model()
    plan = on(first, model)
    with pytest.raises(TitheError, match="attached"):
        on(second, model)
    with pytest.raises(TitheError, match="attached"):
        on(second, nn.Sequential(model))
    plan.release()
    on(second, model).release()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


# --- a step


def test_a_loss_that_differs_between_two_identical_forwards() -> None:
    counter = itertools.count()

    def moody(model: nn.Module, batch: Batch) -> Tensor:
        return VGG.loss(model, batch) + next(counter)

    plan = attach(VGG)
    before = bits(plan.model)
    with pytest.raises(TitheError, match=r"loss: found .* and then .* from two identical forward passes"):
        plan.backward(lambda: moody(plan.model, VGG.batch()))
    assert equal_bits(before, bits(plan.model)) == []
    step(plan, bound(plan, sgd), VGG, VGG.batch())


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda loss: loss.detach(), "no gradient flows through"),
        (lambda loss: loss.repeat(2), r"a tensor of shape \(2,\)"),
        (lambda loss: loss.item(), "a float"),
    ],
    ids=["detached", "two numbers", "a number"],
)
def test_a_loss_that_no_gradient_flows_through(spoil: Any, told: str) -> None:
    plan = attach(VGG)
    with pytest.raises(TitheError, match=told):
        plan.backward(lambda: spoil(VGG.loss(plan.model, VGG.batch())))
    step(plan, bound(plan, sgd), VGG, VGG.batch())


class _Whole(torch.optim.SGD):
    """Normalises the gradient of each tensor."""

    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad /= parameter.grad.norm() + 1e-12
        super().step()


@pytest.mark.parametrize(
    ("optimizer", "told"),
    [
        (lambda plan: _Whole(plan.parameters(), lr=0.1), "_Whole: found an update that depends on the other values"),
        (lambda plan: torch.optim.LBFGS(plan.parameters()), "LBFGS"),
        (lambda plan: torch.optim.SGD(list(plan.parameters())[1:], lr=0.1), "without 1 of the plan's parameters"),
        (lambda plan: torch.optim.SGD(plan.model.parameters(), lr=0.1), "of the plan's parameters"),
    ],
    ids=["whole tensors", "lbfgs", "one missing", "the model's"],
)
def test_an_optimizer_that_does_not_fit(optimizer: Any, told: str) -> None:
    plan = attach(VGG)
    with pytest.raises(TitheError, match=told):
        plan.bind(optimizer(plan))


def test_an_optimizer_that_one_knows_better() -> None:
    plan = attach(VGG)
    plan.bind(_Whole(plan.parameters(), lr=0.1), elementwise=True)


# --- afterwards


def test_settling_without_a_batch() -> None:
    plan = attach(VGG)
    with pytest.raises(TitheError, match="settle: found no batch"):
        plan.settle([])
    step(plan, bound(plan, sgd), VGG, VGG.batch())


@pytest.mark.parametrize("call", ["step", "end_epoch", "export", "state_dict", "settle", "reselect"])
def test_a_released_plan(call: str) -> None:
    plan = attach(VGG)
    plan.release()
    with pytest.raises(TitheError, match="released"):
        getattr(plan, call)()
    with pytest.raises(TitheError, match="released"):
        plan.backward(lambda: VGG.loss(plan.model, VGG.batch()))


def test_names_that_are_none() -> None:
    plan = attach(VGG, head="12.*")
    for name in ("12.weight", "1.running_mean", "nothing"):
        with pytest.raises(TitheError, match=r"no such parameter|the head"):
            plan.selected(name)


def test_a_step_whose_gradients_are_none_of_a_drawn_network() -> None:
    """`loss.backward()` alone; the remedy is to let the plan run the loss."""
    plan = attach(VGG)
    optimizer = torch.optim.Adam(plan.parameters())
    VGG.loss(plan.model, VGG.batch()).backward()
    with pytest.raises(TitheError, match=r"plan\.backward\(lambda") as error:
        optimizer.step()
    assert "loss_fn(model, batch)" in error.value.remedy
    optimizer.zero_grad()
    plan.backward(lambda: VGG.loss(plan.model, VGG.batch()))
    optimizer.step()
    assert plan.num_steps == 1
