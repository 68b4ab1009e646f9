"""Binding: which optimizers a plan takes, and that it commits what they do."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

import tithe
from models import CASES, Batch, Case
from oracles import adamw, bits, equal_bits
from tithe import FISH, TitheError

MLP = CASES["mlp"]


def _attach(case: Case, model: nn.Module, method: FISH, **settings: object) -> tithe.Plan:
    return tithe.attach(model, method, loss=case.loss, data=case.batches(2), **settings)


def _step(plan: tithe.Plan, opt: torch.optim.Optimizer, case: Case, batch: Batch) -> bool:
    opt.zero_grad()
    plan.backward(lambda: case.loss(plan.model, batch))
    opt.step()
    return plan.step()


# --- optimizers


class Lion(torch.optim.Optimizer):
    """A stranger's elementwise optimizer: the sign of an average of gradients."""

    def __init__(self, params: object, lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: object = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    average = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                    p.sub_(group["lr"] * average.lerp(p.grad, 0.1).sign())
                    average.lerp_(p.grad, 0.01)


class LARS(Lion):
    """Scales each tensor's step by a ratio of norms: on a flat list of coordinates it would mean something else."""

    @torch.no_grad()
    def step(self, closure: object = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(group["lr"] * p.norm() / p.grad.norm() * p.grad)


class Muon(Lion):
    """Takes the orthogonal factor of each gradient, of matrices only."""

    @torch.no_grad()
    def step(self, closure: object = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    u, _, v = torch.linalg.svd(p.grad, full_matrices=False)
                    p.sub_(group["lr"] * u @ v)


class Old(Lion):
    """Elementwise, in the style of old: it writes through `.data`, which no version counter sees."""

    def step(self, closure: object = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data.add_(p.grad.data, alpha=-group["lr"])


ELEMENTWISE: dict[str, Callable[[object], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "Adam": torch.optim.Adam,
    "AdamW amsgrad": lambda p: torch.optim.AdamW(p, amsgrad=True),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, fused=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, momentum=0.9, centered=True),
    "Adagrad": torch.optim.Adagrad,
    "Adadelta": torch.optim.Adadelta,
    "Adamax": torch.optim.Adamax,
    "NAdam": torch.optim.NAdam,
    "RAdam": torch.optim.RAdam,
}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise_optimizers_are_bound_and_equal_their_dense_selves(name: str) -> None:
    model = MLP.model()
    dense = copy.deepcopy(model)
    plan = _attach(MLP, model, FISH(density=1.0, score="magnitude"))
    opt, other = ELEMENTWISE[name](plan.parameters()), ELEMENTWISE[name](dense.parameters())
    plan.bind(opt)
    for batch in MLP.batches(3):
        _step(plan, opt, MLP, batch)
        other.zero_grad()
        MLP.loss(dense, batch).backward()
        other.step()
    assert equal_bits(bits(model), bits(dense)) == []


@pytest.mark.parametrize("make", [torch.optim.Adafactor, torch.optim.LBFGS, LARS, Muon], ids=lambda c: c.__name__)
def test_optimizers_that_are_not_elementwise_are_refused(make: Callable[[object], torch.optim.Optimizer]) -> None:
    plan = _attach(MLP, MLP.model(), FISH(density=0.3))
    opt = make(plan.parameters())
    with pytest.raises(TitheError) as error:
        plan.bind(opt)
    assert type(opt).__name__ in str(error.value)
    assert "elementwise" in error.value.remedy
    assert error.value.found
    assert error.value.expected


def test_what_is_not_elementwise_may_still_be_forced() -> None:
    plan = _attach(MLP, MLP.model(), FISH(density=0.3))
    opt = LARS(plan.parameters())
    plan.bind(opt, elementwise=True)
    _step(plan, opt, MLP, MLP.batch())


@pytest.mark.parametrize("kind", [Lion, Old])
def test_elementwise_strangers_are_found_out_and_committed(kind: type[Lion]) -> None:
    plan = _attach(MLP, MLP.model(), FISH(density=0.3))
    opt = kind(plan.parameters(), lr=0.1)
    plan.bind(opt)
    before = bits(plan.model)
    plan.backward(lambda: MLP.loss(plan.model, MLP.batch()))
    opt.step()
    changed = equal_bits(before, bits(plan.model))
    assert set(changed) == set(plan.selections)
    for name, theta in plan.named_parameters():
        assert torch.equal(plan.model.get_parameter(name).detach().flatten()[plan.selected(name)], theta.detach())


def test_binding_an_optimizer_of_the_models_own_parameters_is_refused() -> None:
    model = MLP.model()
    opt = adamw(list(model.parameters()))
    plan = _attach(MLP, model, FISH(density=0.3))
    with pytest.raises(TitheError, match=r"plan\.parameters"):
        plan.bind(opt)


def test_parameter_groups_and_schedulers_work_unmodified() -> None:
    plan = _attach(MLP, MLP.model(), FISH(density=0.3), head="4.*")
    named = list(plan.named_parameters())
    groups = [
        {"params": [p for name, p in named if name in plan.head], "lr": 1e-2},
        {"params": [p for name, p in named if name not in plan.head], "weight_decay": 0.0},
    ]
    opt = torch.optim.AdamW(groups, lr=1e-3)
    plan.bind(opt)
    scheduler = torch.optim.lr_scheduler.LinearLR(opt)
    torch.nn.utils.clip_grad_norm_(plan.parameters(), 1.0)
    _step(plan, opt, MLP, MLP.batch())
    scheduler.step()
