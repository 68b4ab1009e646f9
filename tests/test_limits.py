"""The two limits: everything selected is ordinary training, nothing selected leaves the model alone."""

from __future__ import annotations

import copy

import pytest
import torch

import tithe
from models import CASES, LARGE, Case
from oracles import Optimizer, adamw, bits, equal_bits, sgd, train

STEPS = 4
EVERY = [pytest.param(case, id=name, marks=[pytest.mark.slow] if case in LARGE else []) for name, case in CASES.items()]


def _train_plan(
    plan: tithe.Plan, case: Case, optimizer: Optimizer, batches: list[dict[str, torch.Tensor]]
) -> list[float]:
    opt = optimizer(plan.parameters())
    plan.bind(opt)
    losses: list[float] = []
    torch.manual_seed(7)
    for batch in batches:
        opt.zero_grad()
        loss = plan.backward(lambda batch=batch: case.loss(plan.model, batch))
        opt.step()
        plan.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("optimizer", [sgd, adamw])
@pytest.mark.parametrize("case", EVERY)
def test_everything_selected_is_ordinary_training_bit_for_bit(case: Case, optimizer: Optimizer) -> None:
    model, batches = case.model(), case.batches(STEPS)
    ordinary = copy.deepcopy(model)
    expected = train(ordinary, case, optimizer, batches)
    plan = tithe.attach(model, tithe.FISH(density=1.0, score="magnitude"))
    assert _train_plan(plan, case, optimizer, batches) == expected
    assert equal_bits(bits(model), bits(ordinary)) == []
    plan.release()
    assert equal_bits(bits(model), bits(ordinary)) == []


@pytest.mark.parametrize("case", EVERY)
def test_everything_selected_but_a_dense_head_is_ordinary_training_too(case: Case) -> None:
    if not case.head:
        pytest.skip("no head")
    model, batches = case.model(), case.batches(STEPS)
    ordinary = copy.deepcopy(model)
    expected = train(ordinary, case, adamw, batches)
    plan = tithe.attach(model, tithe.FISH(density=1.0, score="magnitude"), head=case.head)
    assert _train_plan(plan, case, adamw, batches) == expected
    assert equal_bits(bits(model), bits(ordinary)) == []


@pytest.mark.parametrize("case", EVERY)
def test_head_only_leaves_all_else_bit_identical(case: Case) -> None:
    """A warm-up that never ends trains the head alone: nothing else moves, not even a running statistic."""
    if not case.head:
        pytest.skip("no head")
    model = case.model()
    before = bits(model)
    method = tithe.FISH(density=1.0, score="magnitude", warmup=1000)
    plan = tithe.attach(model, method, head=case.head)
    _train_plan(plan, case, adamw, case.batches(STEPS))
    changed = equal_bits(before, bits(model))
    assert changed == [name for name in before if name in plan.head]
    assert plan.head


@pytest.mark.parametrize("optimizer", [sgd, adamw])
@pytest.mark.parametrize("case", EVERY)
def test_unselected_weights_keep_their_bits_under_decay_and_momentum(case: Case, optimizer: Optimizer) -> None:
    model = case.model()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    plan = tithe.attach(model, tithe.FISH(density=0.5, score="random"), head=case.head, seed=3)
    _train_plan(plan, case, optimizer, case.batches(STEPS))
    moved = 0
    for name, selection in plan.selections.items():
        after = dict(model.named_parameters(remove_duplicate=False))[name].detach()
        differs = (after != weights[name]).flatten()
        unselected = torch.ones(after.numel(), dtype=torch.bool)
        unselected[plan.selected(name)] = False
        assert not differs[unselected].any(), name
        assert selection.size == len(plan.selected(name))
        moved += int(differs.sum())
    assert moved > 0


def test_selected_weights_follow_the_same_path_as_masked_training() -> None:
    """θ holds values, so decay and momentum act on it exactly as in dense training that undoes every other change."""
    case = CASES["mlp"]
    model, batches = case.model(dtype=torch.float64), case.batches(STEPS, dtype=torch.float64)
    masked = copy.deepcopy(model)
    plan = tithe.attach(model, tithe.FISH(density=0.3, score="random"))
    _train_plan(plan, case, adamw, batches)
    initial = {name: p.detach().clone() for name, p in masked.named_parameters()}
    masks = {name: torch.zeros(p.numel(), dtype=torch.float64) for name, p in masked.named_parameters()}
    for name in plan.selections:
        masks[name][plan.selected(name)] = 1
    opt = adamw(masked.parameters())
    for batch in batches:
        opt.zero_grad()
        case.loss(masked, batch).backward()
        opt.step()
        with torch.no_grad():
            for name, p in masked.named_parameters():
                p.copy_(torch.where(masks[name].view_as(p) > 0, p, initial[name]))
    for name, p in masked.named_parameters():
        torch.testing.assert_close(model.get_parameter(name).detach(), p.detach(), rtol=1e-12, atol=1e-14)


def test_frozen_batch_norm_stays_in_evaluation_mode_when_the_user_trains() -> None:
    case = CASES["depthwise"]
    model = case.model()
    plan = tithe.attach(model, tithe.FISH(k=5, score="magnitude"), where="classifier.weight")
    model.train()
    before = bits(model)
    case.loss(model, case.batch())
    assert equal_bits(before, bits(model)) == []
    plan.release()
    assert all(module.training for module in model.modules())
    case.loss(model, case.batch())
    assert "stem.1.running_mean" in equal_bits(before, bits(model))
