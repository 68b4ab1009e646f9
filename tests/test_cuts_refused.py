"""Cuts that are refused, and what is told instead; and optimizers and steps that only look as if they had to be."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import tithe
from models import Case
from narrow_plans import FAMILIES, every
from oracles import sgd
from test_cuts import METHOD, attach, step
from tithe import TaylorPruning, TitheError, TitheWarning


def test_a_cut_without_a_gradient_that_was_heard_is_refused() -> None:
    """As where an optimizer's step is compiled, or weights are moved by hand."""
    case = FAMILIES["vgg"]
    plan = attach(case, method=TaylorPruning(0.5, stop=1, cuts=1))
    case.loss(plan.model, case.batch()).backward()
    with pytest.raises(TitheError, match="no step of an optimizer that told its gradients"):
        plan.step()


def test_gradients_that_are_all_zero_are_refused() -> None:
    case = FAMILIES["vgg"]
    plan = attach(case, method=TaylorPruning(0.5, stop=1, cuts=1))
    opt = sgd(plan.parameters())
    (case.loss(plan.model, case.batch()) * 0).backward()
    with pytest.raises(TitheError, match="all zero"):
        opt.step()


def test_an_optimizer_whose_state_has_other_axes_is_refused_at_its_first_step() -> None:
    class Flat(torch.optim.SGD):
        """Remembers the last gradient as a vector."""

        def step(self, closure: Any = None) -> Any:
            for parameter in self.param_groups[0]["params"]:
                self.state[parameter]["last"] = parameter.grad.flatten()
            return super().step(closure)

    case = FAMILIES["vgg"]
    plan = attach(case)
    opt = Flat(plan.parameters(), lr=0.1)
    case.loss(plan.model, case.batch()).backward()
    with pytest.raises(TitheError, match="'last' of shape"):
        opt.step()


class Listed(torch.optim.Optimizer):
    """Remembers moments in a list, as optimizers of matrices do."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            moments = self.state[parameter].setdefault("moments", [torch.zeros_like(parameter)])
            moments[0].mul_(0.9).add_(parameter.grad)
            parameter.sub_(0.1 * moments[0])


class Coded(Tensor):
    """Stands for a tensor of codes."""


def test_an_optimizer_whose_state_lies_in_lists_is_refused_at_its_first_step() -> None:
    case = FAMILIES["vgg"]
    for method in (METHOD, tithe.VRPGE(0.5)):
        plan: Any = attach(case, method=method)
        opt = Listed(plan.parameters())
        plan.backward(lambda plan=plan: case.loss(plan.model, case.batch()))
        with pytest.raises(TitheError, match="'moments', a list of tensors,"):
            opt.step()


def test_an_optimizer_whose_state_is_coded_is_refused_at_its_first_step() -> None:
    class Codes(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            for parameter in self.param_groups[0]["params"]:
                self.state[parameter]["codes"] = torch.zeros_like(parameter).as_subclass(Coded)
            return super().step(closure)

    case = FAMILIES["vgg"]
    plan = attach(case)
    opt = Codes(plan.parameters(), lr=0.1)
    case.loss(plan.model, case.batch()).backward()
    with pytest.raises(TitheError, match="'codes', a Coded,"):
        opt.step()


@pytest.mark.parametrize("case", every(("vgg", "bert", "resnet_bottleneck")))
def test_a_weight_that_is_frozen_after_attaching_is_refused_until_the_last_cut(case: Case) -> None:
    """The units that it reads would be told apart by nothing, or by the steps before alone."""
    plan = attach(case)
    opt = sgd(plan.parameters())
    step(plan, opt, case, case.batch())
    name = sorted(name for name, _ in plan.stage.coupling.reads)[0]
    weight = plan.model.get_parameter(name)
    weight.requires_grad_(False)
    case.loss(plan.model, case.batch()).backward()
    with pytest.raises(TitheError, match=f"{name}: found a weight that was frozen after attaching"):
        opt.step()
    opt.zero_grad()
    weight.requires_grad_(True)
    for batch in case.batches(6):
        step(plan, opt, case, batch)
    assert plan.settled
    weight.requires_grad_(False)
    step(plan, opt, case, case.batch())


def test_what_is_exported_before_the_last_cut_says_so() -> None:
    case = FAMILIES["vgg"]
    plan = attach(case)
    with pytest.warns(TitheWarning, match="has 100% of the cost: after 0 steps the cuts down to 45% are not made yet"):
        plan.export()
    opt = sgd(plan.parameters())
    for batch in case.batches(8):
        step(plan, opt, case, batch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan.export()


def test_a_factored_second_moment_follows_a_cut() -> None:
    case = FAMILIES["bert"]
    plan = attach(case)
    opt = torch.optim.Adafactor(plan.parameters(), lr=0.01)
    for batch in case.batches(8):
        step(plan, opt, case, batch)
    assert plan.settled


def test_an_overflow_is_not_heard() -> None:
    case = FAMILIES["vgg"]
    plan = attach(case)
    opt = sgd(plan.parameters())
    step(plan, opt, case, case.batch())
    ((_, scores),) = plan.structure.watched()
    case.loss(plan.model, case.batch()).backward()
    for parameter in plan.parameters():
        parameter.grad = torch.full_like(parameter, float("inf"))
    before = scores.clone()
    plan._hear(opt)
    plan._learn()
    ((_, scores),) = plan.structure.watched()
    assert torch.equal(scores, before)


@pytest.mark.parametrize(
    ("wrong", "found"),
    [
        ({"keep": 0.0}, "keep=0.0"),
        ({"keep": 36}, "keep=36"),
        ({"floor": 1.5}, "floor=1.5"),
        ({"stop": 0}, "stop=0"),
        ({"start": 9, "stop": 9}, "start=9, stop=9"),
        ({"cuts": 0}, "cuts=0"),
        ({"cuts": 11}, "cuts=11 in 10 steps"),
        ({"cost": "bytes"}, "cost='bytes'"),
    ],
)
def test_values_out_of_range_are_refused(wrong: dict[str, Any], found: str) -> None:
    with pytest.raises(TitheError, match=found):
        TaylorPruning(**({"keep": 0.5, "stop": 10} | wrong))


def test_a_state_of_another_kind_of_method_is_refused() -> None:
    case = FAMILIES["vgg"]
    saved = attach(case, method=tithe.VRPGE(0.45, cost="flops")).state_dict()
    with pytest.raises(TitheError, match="the state of another kind of method"):
        attach(case, state=saved)


def test_less_than_one_unit_of_each_group_is_refused_when_attaching() -> None:
    with pytest.raises(TitheError, match="keep"):
        attach(FAMILIES["vgg"], method=TaylorPruning(1e-4, stop=3, cuts=1))
