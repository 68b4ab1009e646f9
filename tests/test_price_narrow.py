"""The price of a network that gets narrower is what its plan takes on a real model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import nn

import tithe
from models import CASES, Case
from tithe.app.price import Quote, Subject, Terms, price
from tithe.delta import write_network
from tithe.errors import TitheError
from tithe.ledger import measure

pytest.importorskip("transformers")

FLOAT = 4
SHARE = Terms(budget=tithe.Budget(fraction=0.8))
NARROW = [CASES[name] for name in ("bert", "vit", "gpt2", "resnet_bottleneck", "depthwise")]


def subject(case: Case) -> Subject:
    return Subject(name=case.name, build=case.make, batch=case.batch, loss=case.loss, head=case.head)


def quote(case: Case, batch: int = 4) -> Quote:
    (row,) = price(subject(case), batch=batch, methods=["vrpge"], terms=SHARE).rows
    return row


def attach(case: Case, model: nn.Module) -> tithe.NarrowPlan:
    method = tithe.VRPGE(keep=0.8, cost="flops", structure_lr=0.0)
    return tithe.attach(model, method, loss=case.loss, data=[case.batch(4)], head=case.head)


@pytest.mark.parametrize("case", NARROW, ids=lambda case: case.name)
def test_a_first_step_takes_what_was_said(case: Case, tmp_path: Path) -> None:
    row, model, batch = quote(case), case.model(), case.batch(4)
    plan, whole = attach(case, model), sum(p.numel() for p in model.parameters())
    drawn = sum(selection.size for selection in plan.selections.values())
    head = sum(model.get_parameter(name).numel() for name in plan.head)
    narrow, shapes = copy.deepcopy(model), plan.stage.grids(plan.structure.draw(plan.seed, 0)[0])
    ledger = measure(lambda: plan.backward(lambda: case.loss(model, batch)), model=model)
    assert row.kept == ledger.kept
    assert row.layers == ledger.kept_by_module
    assert row.gradients == (drawn + head) * FLOAT
    assert row.trained == whole
    assert row.optimizer == 2 * whole * FLOAT
    assert row.index == plan.index_bytes
    if row.moment == "forward and backward":
        assert sum(row.at_peak.values()) == ledger.peak
    else:
        assert ledger.peak <= sum(row.at_peak.values())
    written = _written(tmp_path, narrow, plan, shapes)
    assert abs(row.file - written) <= max(256, 0.01 * written)
    assert row.flops is not None
    assert row.flops.forward > row.flops.weight_gradient  # two networks run, one is differentiated


def _written(folder: Path, model: nn.Module, plan: tithe.NarrowPlan, shapes: Mapping[str, tithe.Grid]) -> int:
    """Bytes of the file of a copy of the model at these shapes."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name in shapes:
            tensor.data = tensor.data.new_zeros(shapes[name].theta_shape)
    write_network(folder / "narrow.safetensors", model, plan.stage.numbers(model), metadata={})
    return (folder / "narrow.safetensors").stat().st_size


def test_whole_steps_take_about_what_was_said() -> None:
    """Later ones, each of other networks, when the optimizer's state is there."""
    case = CASES["bert"]
    row, model, batch = quote(case), case.model(), case.batch(4)
    plan = attach(case, model)
    opt = torch.optim.AdamW(plan.parameters(), lr=1e-3)
    plan.bind(opt)

    def train() -> None:
        plan.backward(lambda: case.loss(model, batch))
        opt.step()
        opt.zero_grad()
        plan.step()

    train()
    said = sum(row.at_peak.values())
    for _ in range(4):
        assert 0.8 * said < measure(train, model=model).peak < 1.2 * said


def test_a_share_that_cannot_be_kept_is_left_out_and_said() -> None:
    terms = Terms(budget=tithe.Budget(fraction=0.05))
    found = price(subject(CASES["bert"]), methods=["full", "fish", "vrpge"], terms=terms)
    assert [row.method for row in found.rows] == ["full", "FISH"]
    assert "keep: found 0.05 of the operations; expected at least" in found.left_out["VR-PGE"]


def test_an_amount_is_no_share() -> None:
    terms = Terms(budget=tithe.Budget(elements=60))
    with pytest.raises(TitheError, match=r"budget: found an amount; expected a fraction.*--budget 40%"):
        price(subject(CASES["bert"]), methods=["vrpge"], terms=terms)


def test_micro_batches_fit_beside_the_gradients_of_earlier_ones() -> None:
    case = CASES["bert"]
    one, whole = quote(case, 1), quote(case, 8)
    memory = (one.peak + whole.peak) // 2 + one.gradients
    fit = price(subject(case), batch=8, methods=["vrpge"], terms=SHARE, memory=memory).rows[0].fit
    assert fit is not None
    assert fit.peak <= memory
    assert 1 <= fit.micro_batch < 8
    assert fit.steps == -(-8 // fit.micro_batch)
