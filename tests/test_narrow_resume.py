"""Stopping and going on equals never having stopped, at any place of a run; a state of something else is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tithe
from models import CASES, Case
from narrow_plans import FAMILIES, Optimizer, attach, bound, drawn, step
from oracles import adamw, bits, equal_bits, sgd
from tithe import VRPGE, NarrowPlan, TitheError
from tithe.testing import check_method

METHOD = VRPGE(0.5, structure_lr=0.4, gradual=(1, 5))


class Run:
    """A run that can be stopped after any of its steps and taken up in a model of other values."""

    def __init__(self, case: Case, optimizer: Optimizer, *, seed: int = 0, saved: dict[str, Any] | None = None) -> None:
        self.case = case
        self.model = case.model(seed=0 if saved is None else 9)
        self.plan = attach(case, self.model, METHOD, seed=seed, **({} if saved is None else {"state": saved["plan"]}))
        self.opt = bound(self.plan, optimizer)
        self.fall = torch.optim.lr_scheduler.StepLR(self.opt, 2, 0.7)
        if saved is not None:
            self.opt.load_state_dict(saved["opt"])
            self.fall.load_state_dict(saved["fall"])

    def go(self, first: int, stop: int) -> None:
        """Steps, numbered over the run: an epoch has three, the structure is settled after the ninth."""
        for number in range(first, stop):
            torch.manual_seed(number)
            step(self.plan, self.opt, self.case, self.case.batch(6, seed=number))
            self.fall.step()
            if number % 3 == 2:
                self.plan.end_epoch()
            if number == 8:
                self.plan.settle(self.case.batches(2, 6), draws=3)

    def saved(self, path: Path) -> dict[str, Any]:
        """Everything, by way of a file without pickled objects."""
        state = {"plan": self.plan.state_dict(), "opt": self.opt.state_dict(), "fall": self.fall.state_dict()}
        torch.save(state, path)
        return torch.load(path, weights_only=True)

    def everything(self) -> dict[str, Any]:
        """All tensors: of the model, the optimizer, the probabilities."""
        found = bits(self.model) | {f"s {key}": value for key, value in self.plan.structure.state().items()}
        for name, theta in self.plan.named_parameters():
            found |= {f"{name} {key}": value for key, value in self.opt.state[theta].items() if value is not None}
        return found


RUNS = (("vgg", sgd), ("residual", adamw), ("bert_dropout", adamw), ("grouped_query_tied", sgd), ("inverted", adamw))
QUICK = (("vgg", 4), ("vgg", 8), ("residual", 9), ("bert_dropout", 4), ("grouped_query_tied", 10))


@pytest.mark.parametrize(
    ("name", "optimizer", "stop"),
    [
        pytest.param(name, kind, stop, marks=() if (name, stop) in QUICK else pytest.mark.slow, id=f"{name}-{stop}")
        for name, kind in RUNS
        for stop in (1, 4, 6, 8, 9, 10)
    ],
)
def test_resuming_equals_never_stopping(name: str, optimizer: Optimizer, stop: int, tmp_path: Path) -> None:
    """In the middle of an epoch, after channels were dropped, and after settling."""
    case = FAMILIES.get(name) or CASES[name]
    straight, stopped = Run(case, optimizer, seed=4), Run(case, optimizer, seed=4)
    straight.go(0, 11)
    stopped.go(0, stop)
    resumed = Run(case, optimizer, seed=4, saved=stopped.saved(tmp_path / "state.pt"))
    assert (resumed.plan.num_steps, resumed.plan.num_epochs) == (stop, stop // 3)
    assert equal_bits(stopped.everything(), resumed.everything()) == []
    resumed.go(stop, 11)
    assert equal_bits(straight.everything(), resumed.everything()) == []
    narrow = sum(p.numel() for p in straight.model.parameters())
    assert narrow < sum(p.numel() for p in case.model().parameters())


def test_some_stop_lies_behind_a_drop() -> None:
    """So that the test above is one of that as well."""
    run = Run(FAMILIES["vgg"], sgd, seed=4)
    whole = run.plan.stage.coupling.num_units
    run.go(0, 8)
    assert run.plan.stage.coupling.num_units < whole
    assert not bool((run.plan.structure.s == 1).all())


def test_an_earlier_state_is_taken_up_in_the_same_plan() -> None:
    """As long as it has no unit that was dropped since."""
    case = FAMILIES["residual"]
    plan = attach(case, seed=2)
    opt = bound(plan, sgd)
    step(plan, opt, case, case.batch())
    saved, then = plan.state_dict(), drawn(plan)
    before = bits(plan.model)
    for batch in case.batches(2):
        step(plan, opt, case, batch)
    assert equal_bits(before, bits(plan.model))
    plan.load_state_dict(saved)
    assert equal_bits(before, bits(plan.model)) == []
    assert all(torch.equal(*pair) for pair in zip(drawn(plan), then, strict=True))
    plan.structure.s.detach()[1] = 0.0
    plan.end_epoch()
    with pytest.raises(TitheError, match="dropped for good"):
        plan.load_state_dict(saved)


def _other_keep(plan: NarrowPlan) -> NarrowPlan:
    return attach(FAMILIES["vgg"], keep=0.6)


def _other_cost(plan: NarrowPlan) -> NarrowPlan:
    return attach(FAMILIES["vgg"], method=VRPGE(0.5, cost="params"))


def _other_model(plan: NarrowPlan) -> NarrowPlan:
    return attach(FAMILIES["residual"])


def _other_width(plan: NarrowPlan) -> NarrowPlan:
    model = FAMILIES["vgg"].model()
    model[10], model[12] = nn.Linear(24, 12), nn.Linear(12, 3)
    return attach(FAMILIES["vgg"], model)


def _fewer_may_be_absent(plan: NarrowPlan) -> NarrowPlan:
    return attach(FAMILIES["vgg"], where="!12.*")


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (_other_keep, "keep: found a state saved with keep=0.5.*expected keep=0.6"),
        (_other_cost, "cost: found a state saved with cost='channels'.*expected cost='params'"),
        (_other_model, "tensors"),
        (_other_width, "units"),
        (_fewer_may_be_absent, "units"),
    ],
    ids=lambda value: getattr(value, "__name__", "")[1:],
)
def test_a_state_of_something_else_is_refused_and_the_plan_left_alone(make: Any, told: str) -> None:
    plan = attach(FAMILIES["vgg"])
    step(plan, bound(plan, sgd), plan_case := FAMILIES["vgg"], plan_case.batch())
    other = make(plan)
    before, s = bits(other.model), other.structure.s.clone()
    with pytest.raises(TitheError, match=told):
        other.load_state_dict(plan.state_dict())
    assert equal_bits(before, bits(other.model)) == []
    assert torch.equal(other.structure.s, s)
    assert other.num_steps == 0


def test_a_state_of_a_model_of_the_same_names_and_other_widths_is_refused() -> None:
    """As many units, in layers between which one that is always whole has another size."""
    case = CASES["mlp"]
    plan = attach(case)
    model = case.model()
    model[0] = nn.Linear(12, 16)

    def loss(given: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return nn.functional.cross_entropy(given(nn.functional.pad(batch["x"], (0, 2))), batch["y"])

    other = attach(case, model, loss=loss)
    before = bits(model)
    with pytest.raises(TitheError, match=r"0.weight"):
        other.load_state_dict(plan.state_dict())
    assert equal_bits(before, bits(model)) == []


def test_a_state_that_is_none_is_refused() -> None:
    plan = attach(FAMILIES["vgg"])
    frozen = tithe.attach(FAMILIES["vgg"].model(), tithe.FISH(k=5, score="magnitude"))
    for state in ({}, {**plan.state_dict(), "format": 99}, frozen.state_dict()):
        with pytest.raises(TitheError, match="plan state"):
            plan.load_state_dict(state)
    model = FAMILIES["vgg"].model()
    with pytest.raises(TitheError, match="plan state"):
        attach(FAMILIES["vgg"], model, state={})
    attach(FAMILIES["vgg"], model)  # what was refused has left no trace


METHODS = {"plain": VRPGE(0.5), "flops": VRPGE(0.7, alpha=1.0, cost="flops"), "gradual": METHOD}
CHECKED = (("mlp", "plain"), ("vgg", "flops"), ("residual", "gradual"), ("bert", "plain"))


@pytest.mark.parametrize(
    ("name", "method"),
    [
        pytest.param(name, method, marks=() if (name, method) in CHECKED else pytest.mark.slow)
        for name in ("mlp", "vgg", "residual", "bert", "gpt2", "grouped_query")
        for method in METHODS
    ],
)
def test_the_contract_of_methods_holds(name: str, method: str) -> None:
    case = FAMILIES[name]
    check_method(METHODS[method], case.model, case.loss, case.batches(2), head=case.head)
