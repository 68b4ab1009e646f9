"""The two limits: all kept is ordinary training, and what takes no part in a step is left alone to the bit."""

from __future__ import annotations

import copy

import pytest
import torch

from models import CASES, Case
from narrow_plans import FAMILIES, KINDS, Optimizer, attach, bound, drawn, live_entries, step
from oracles import adamw, bits, equal_bits, sgd, train

QUICK = [
    *((name, sgd) for name in (*KINDS, "padded_shortcut", "grouped", "twice", "block", "grouped_query_tied", "signal")),
    *((name, adamw) for name in ("residual", "bert", "bert_dropout", "grouped_query_tied")),
]
SLOW = [(name, optimizer) for name in FAMILIES for optimizer in (sgd, adamw) if (name, optimizer) not in QUICK]
RUNS = [
    pytest.param(FAMILIES.get(name) or CASES[name], optimizer, id=f"{name}-{optimizer.__name__}", marks=marks)
    for pairs, marks in ((QUICK, ()), (SLOW, pytest.mark.slow))
    for name, optimizer in pairs
]


@pytest.mark.parametrize(("case", "optimizer"), RUNS)
def test_all_kept_is_ordinary_training_bit_for_bit(case: Case, optimizer: Optimizer) -> None:
    model, batches = case.model(), case.batches(3)
    ordinary = copy.deepcopy(model)
    expected = train(ordinary, case, optimizer, batches)
    plan = attach(case, model, keep=1.0)
    opt = bound(plan, optimizer)
    torch.manual_seed(7)
    assert [step(plan, opt, case, batch) for batch in batches] == expected
    assert equal_bits(bits(model), bits(ordinary)) == []
    assert not plan.end_epoch()
    plan.release()
    assert equal_bits(bits(model), bits(ordinary)) == []


@pytest.mark.parametrize(("case", "optimizer"), RUNS)
def test_a_step_leaves_what_is_absent_alone_under_decay_and_momentum(case: Case, optimizer: Optimizer) -> None:
    plan = attach(case, seed=3)
    opt = bound(plan, optimizer)
    named = dict(plan.named_parameters())
    for batch in case.batches(3):
        before, moments = bits(plan.model), _moments(opt, named)
        live = live_entries(plan, drawn(plan)[0])
        step(plan, opt, case, batch)
        moved = 0
        for name, here in live.items():
            differs = plan.model.state_dict()[name] != before[name]
            assert not differs[~here].any(), name
            moved += int(differs.sum())
            for key, value in _moments(opt, named).get(name, {}).items():
                assert torch.equal(value[~here], moments.get(name, {}).get(key, torch.zeros_like(value))[~here]), key
        assert moved > 0


def _moments(opt: torch.optim.Optimizer, named: dict[str, torch.nn.Parameter]) -> dict[str, dict[str, torch.Tensor]]:
    """Name → a copy of what the optimizer remembers of each entry."""
    return {
        name: {key: value.clone() for key, value in opt.state[parameter].items() if value.dim()}
        for name, parameter in named.items()
        if parameter in opt.state
    }


def test_the_other_forward_pass_of_a_step_moves_no_running_statistic() -> None:
    """Not even one of a norm that is always whole."""
    case = FAMILIES["residual"]
    model, ordinary, batch = case.model(), case.model(), case.batch()
    plan = attach(case, model, where=["one.*", "two.0.weight"])
    assert not torch.equal(*drawn(plan))
    plan.backward(lambda: case.loss(model, batch))
    case.loss(ordinary, batch)
    assert all(torch.equal(model.get_buffer(f"stem.1.{key}"), value) for key, value in ordinary.stem[1].named_buffers())
    assert {int(value) for name, value in model.named_buffers() if name.endswith("tracked")} == {1}
