"""Sparse update: the channels of the largest magnitude in given layers, and biases, chosen once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import tithe
from models import CASES
from oracles import adamw, bits, equal_bits, sgd
from tithe import Channels, Coordinates, SparseUpdate, TitheError
from tithe.testing import check_method

DEPTHWISE, GPT2 = CASES["depthwise"], CASES["gpt2"]
SCHEME = {"expand.0.weight": 0.25, "depth.0.weight": 1 / 8, "grouped.0.weight": 1.0}
BIASES = ["expand.1.bias", "project.1.bias"]


def _attach(case: object, model: nn.Module, method: SparseUpdate, **settings: object) -> tithe.Plan:
    return tithe.attach(model, method, **({"loss": case.loss, "data": case.batches(1), "head": case.head} | settings))


def test_the_largest_columns_of_each_layer_are_chosen() -> None:
    model = DEPTHWISE.model()
    plan = _attach(DEPTHWISE, model, SparseUpdate(SCHEME, BIASES))
    groups = {"expand.0.weight": 1, "depth.0.weight": 24, "grouped.0.weight": 4}
    for name, ratio in SCHEME.items():
        selection, weight = plan.selections[name], model.get_parameter(name).detach()
        count = weight.shape[1] * groups[name]
        every = Channels(tuple(weight.shape), torch.arange(count), groups=groups[name])
        sizes = every.by_item(every.gather(weight)).abs().sum(1)
        assert isinstance(selection, Channels)
        assert selection.items.numel() == max(1, round(ratio * count))
        assert set(selection.items.tolist()) == set(sizes.topk(selection.items.numel()).indices.tolist())
    for name in BIASES:
        assert isinstance(plan.selections[name], Coordinates)
        assert plan.selections[name].full
    assert set(plan.selections) == {*SCHEME, *BIASES}


def test_a_transposed_matrix_is_cut_along_its_inputs() -> None:
    """Hugging Face's Conv1D stores its weight input first."""
    model, name = GPT2.model(), "transformer.h.0.mlp.c_fc.weight"
    plan = _attach(GPT2, model, SparseUpdate({name: 0.25}))
    (selection,) = plan.selections.values()
    sizes = model.get_parameter(name).detach().abs().sum(1)
    assert selection.theta_shape == (4, 64)
    assert set(selection.items.tolist()) == set(sizes.topk(4).indices.tolist())


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("name", ["depthwise", "bert"])
def test_the_contract_holds(name: str, lean: bool) -> None:
    case = CASES[name]
    scheme = SCHEME if name == "depthwise" else {"bert.encoder.layer.1.output.dense.weight": 0.5}
    biases = BIASES if name == "depthwise" else ["bert.encoder.layer.0.output.LayerNorm.bias"]
    check_method(SparseUpdate(scheme, biases, lean=lean), case.model, case.loss, case.batches(2), head=case.head)


@pytest.mark.parametrize("optimizer", [sgd, adamw])
def test_it_never_chooses_again_and_nothing_else_moves(optimizer: object) -> None:
    model = DEPTHWISE.model()
    before = bits(model)
    plan = _attach(DEPTHWISE, model, SparseUpdate(SCHEME, BIASES))
    chosen = {name: plan.selected(name).tolist() for name in plan.selections}
    opt = optimizer(plan.parameters())
    plan.bind(opt)
    for batch in DEPTHWISE.batches(3):
        plan.backward(lambda batch=batch: DEPTHWISE.loss(model, batch))
        opt.step()
        opt.zero_grad()
        assert not plan.step()
        assert not plan.end_epoch()
    assert {name: plan.selected(name).tolist() for name in plan.selections} == chosen
    plan.release()
    changed = {name for name in equal_bits(before, bits(model)) if "running" not in name and "tracked" not in name}
    assert changed == {*SCHEME, *BIASES, "classifier.weight", "classifier.bias"}
    for name, ids in chosen.items():
        moved = (model.get_parameter(name).detach() != before[name]).flatten().nonzero().flatten().tolist()
        assert set(moved) <= set(ids)


def test_predicted_bytes_are_the_measured_ones() -> None:
    model, batch = DEPTHWISE.model(), DEPTHWISE.batch()
    plan = _attach(DEPTHWISE, model, SparseUpdate(SCHEME, BIASES))
    predicted = plan.predict(batch)
    measured = tithe.measure(lambda: plan.backward(lambda: DEPTHWISE.loss(model, batch)), model=model)
    assert predicted.kept_by_module == measured.kept_by_module
    assert predicted.peak == measured.peak
    assert measured.kept_by_module["expand.0"] == 4 * 16 * 2 * 4  # samples, positions, channels, float32


@pytest.mark.parametrize(
    ("ratios", "biases", "told"),
    [
        ({"nowhere.weight": 0.5}, [], "nowhere.weight"),
        ({"expand.1.weight": 0.5}, [], "expand.1.weight"),
        ({"expand.0.weight": 0.5}, ["nowhere.bias"], "nowhere.bias"),
        ({"expand.0.weight": 0.5}, ["expand.0.weight"], "expand.0.weight"),
        ({"classifier.weight": 0.5}, [], "classifier.weight"),
    ],
)
def test_names_that_are_no_layer_are_said(ratios: dict[str, float], biases: list[str], told: str) -> None:
    model = DEPTHWISE.model()
    with pytest.raises(TitheError, match=told):
        _attach(DEPTHWISE, model, SparseUpdate(ratios, biases))
    assert all(p.requires_grad for p in model.parameters())
    assert tithe.Lean.of(model) is None


def test_a_budget_in_the_place_of_ratios_is_refused() -> None:
    budget: Any = tithe.Budget(fraction=0.1)
    with pytest.raises(TitheError, match="TraDy"):
        SparseUpdate(budget)


@pytest.mark.parametrize("ratio", [0.0, -0.1, 1.1, float("nan")])
def test_ratios_out_of_range_are_refused(ratio: float) -> None:
    with pytest.raises(TitheError, match="fraction"):
        SparseUpdate({"a": ratio})


def test_what_is_no_scheme_is_refused() -> None:
    """A budget is TraDy's."""
    with pytest.raises(TitheError, match="expected a mapping from names of weights"):
        SparseUpdate(tithe.Budget(elements=60))  # pyright: ignore[reportArgumentType]
