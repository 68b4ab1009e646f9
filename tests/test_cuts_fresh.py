"""Cuts of fresh weights: of units that do the same not all stay, and weights that lose inputs keep their norm."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import tithe
from models import Case
from narrow_plans import FAMILIES, every
from oracles import bits, sgd
from test_cuts import FRESH, attach, step
from tithe import NarrowPlan, TaylorPruning
from tithe.narrow.cuts import WINDOW
from tithe.select.cut_order import unlike_first

ONE_CUT = TaylorPruning(0.5, stop=3, cuts=1, floor=0.0, fresh=True)


@given(st.integers(1, 6), st.integers(1, 7), st.integers(0, 2**32 - 1))
def test_each_pick_raises_the_determinant_most(steps: int, n: int, seed: int) -> None:
    """Against determinants of all candidates, where the best is no tie."""
    traces = torch.randn(steps, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    order = unlike_first(traces, noise=0.1).tolist()
    assert sorted(order) == list(range(n))
    assert order[0] == 0
    unit = traces / traces.norm(dim=0)

    def volume(columns: list[int]) -> float:
        chosen = unit[:, columns]
        return float(torch.logdet(0.1 * torch.eye(steps, dtype=torch.float64) + chosen @ chosen.T))

    for place in range(1, n):
        best = max(volume([*order[:place], i]) for i in range(n) if i not in order[:place])
        assert volume(order[: place + 1]) == pytest.approx(best, rel=1e-6, abs=1e-6)


def test_a_copy_of_a_unit_comes_after_all_others_and_a_silent_one_last() -> None:
    traces = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    traces[:, 3] = 7 * traces[:, 0]
    traces[:, 1] = 0
    assert unlike_first(traces).tolist()[-2:] == [3, 1]
    assert unlike_first(traces * 1e-30).tolist() == unlike_first(traces).tolist()


def heard(plan: NarrowPlan, case: Case, steps: int) -> None:
    opt = sgd(plan.parameters())
    for batch in case.batches(steps):
        step(plan, opt, case, batch)


@pytest.mark.parametrize("case", every(("vgg", "residual", "bert", "grouped_query_tied")))
def test_scores_say_how_many_units_of_a_group_stay_and_gate_gradients_which(case: Case) -> None:
    fresh, scored = (
        attach(case, method=TaylorPruning(0.5, stop=3, cuts=1, floor=0.0, fresh=fresh)) for fresh in (True, False)
    )
    groups, kept = fresh.stage.coupling.groups, {}
    stay = fresh.structure.stay

    def watch(number: int) -> Tensor:
        kept["traces"], kept["scores"] = fresh.structure.state()["traces"], fresh.structure.state()["scores"]
        kept["alive"] = stay(number)
        return kept["alive"]

    fresh.structure.stay = watch  # type: ignore[method-assign]
    heard(fresh, case, 3)
    heard(scored, case, 3)
    assert fresh.structure.widths() == scored.structure.widths()
    assert kept["traces"].shape == (3, groups[-1].stop)
    for group in groups:
        of = slice(group.start, group.stop)
        best_first = kept["scores"][of].argsort(descending=True, stable=True)  # units of a group cost the same here
        order = best_first[unlike_first(kept["traces"][:, of][:, best_first])]
        width = int(kept["alive"][of].sum())
        assert set(order[:width].tolist()) == set(kept["alive"][of].nonzero().flatten().tolist()), group.name


def test_the_window_is_short_and_gone_after_the_last_cut() -> None:
    case = FAMILIES["vgg"]
    plan = attach(case, method=TaylorPruning(0.5, stop=WINDOW + 8, cuts=1, fresh=True))
    before = plan.structure.nbytes
    heard(plan, case, WINDOW + 5)
    units = plan.structure.num_units
    assert plan.structure.nbytes - before == 4 * WINDOW * units
    plan.settle()
    assert plan.structure.nbytes == 8 * plan.structure.num_units


@pytest.mark.parametrize("case", every(("vgg", "residual", "bert", "resnet_bottleneck")))
def test_weights_that_lose_inputs_keep_the_norm_with_which_they_read(case: Case) -> None:
    """What reads what is cut is scaled; everything else keeps its bits."""
    model = case.model()
    plan = attach(case, model, ONE_CUT)
    coupling, before, cut = plan.stage.coupling, {}, []
    stay = plan.structure.stay

    def watch(number: int) -> Tensor:
        before.update(bits(model))
        cut.append(stay(number))
        return cut[0]

    plan.structure.stay = watch  # type: ignore[method-assign]
    heard(plan, case, 3)
    kept, scaled = coupling.kept(cut[0]), 0
    for name, value in bits(model).items():
        places = coupling.places.get(name, {})
        grid = tithe.Grid(tuple(before[name].shape), {axis: kept[at] for axis, at in places.items()})
        part = grid.gather(before[name]) if places else before[name]
        inputs = [axis for axis in places if (name, axis) in coupling.reads]
        if not inputs:
            assert torch.equal(value, part), name
            continue
        whole = before[name]
        for axis, at in places.items():
            if axis not in inputs:
                whole = whole.index_select(axis, kept[at])
        factor = float(whole.double().norm() / part.double().norm())
        torch.testing.assert_close(value, part * factor, rtol=1e-6, atol=0)
        assert math.isclose(float(value.double().norm()), float(whole.double().norm()), rel_tol=1e-6)
        scaled += factor > 1
    assert scaled


def test_a_frozen_weight_keeps_its_bits() -> None:
    """It may be frozen between the last step that is heard and `settle`."""
    case = FAMILIES["vgg"]
    model = case.model()
    plan = attach(case, model, ONE_CUT)
    heard(plan, case, 2)
    name = max(name for name, _ in plan.stage.coupling.reads)
    weight = model.get_parameter(name)
    weight.requires_grad_(False)
    before, coupling = weight.detach().clone(), plan.stage.coupling
    plan.settle()
    kept = coupling.kept(plan._alive)
    grid = tithe.Grid(tuple(before.shape), {axis: kept[at] for axis, at in coupling.places[name].items()})
    assert weight.shape != before.shape
    assert torch.equal(weight, grid.gather(before))


def test_cuts_come_as_scheduled() -> None:
    case = FAMILIES["vgg"]
    plan = attach(case, method=FRESH)
    heard(plan, case, 6)
    assert plan.settled
    assert plan.narrowing().spent <= 0.45
