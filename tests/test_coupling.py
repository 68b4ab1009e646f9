"""A coupling as plain numbers: what is kept, what it costs, whose share that is, what is left without some units."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tithe import TitheError
from tithe.coupling import Coupling, Group, Term


@st.composite
def couplings(draw: st.DrawFn) -> Coupling:
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    stops = torch.tensor(sizes).cumsum(0).tolist()
    starts = [0, *stops[:-1]]
    groups = tuple(Group(f"g{k}", starts[k], stops[k], ((f"g{k}", 0),)) for k in range(len(sizes)))
    units = st.lists(st.integers(-1, stops[-1] - 1), min_size=1, max_size=9)
    axes = tuple(torch.tensor(draw(units)) for _ in range(draw(st.integers(1, 4))))
    factors = st.lists(st.integers(0, len(axes) - 1), max_size=3).map(tuple)
    terms = tuple(Term(draw(st.floats(0.5, 9.0)), draw(factors)) for _ in range(draw(st.integers(0, 5))))
    return Coupling(groups, axes, {}, terms, (), {})


@st.composite
def chances(draw: st.DrawFn) -> tuple[Coupling, Tensor]:
    coupling = draw(couplings())
    values = st.lists(st.floats(0.0, 1.0), min_size=coupling.num_units, max_size=coupling.num_units)
    return coupling, torch.tensor(draw(values), dtype=torch.float64)


@given(chances())
def test_widths_and_cost_are_sums_over_positions(case: tuple[Coupling, Tensor]) -> None:
    coupling, s = case
    widths = [sum(1.0 if unit < 0 else float(s[unit]) for unit in axis.tolist()) for axis in coupling.axes]
    torch.testing.assert_close(coupling.widths(s), torch.tensor(widths, dtype=torch.float64))
    cost = 0.0
    for term in coupling.flops:
        product = term.coefficient
        for axis in term.axes:
            product *= widths[axis]
        cost += product
    assert float(coupling.cost(coupling.flops, s)) == pytest.approx(cost)


@given(couplings())
def test_with_everything_there_a_cost_is_the_whole_cost(coupling: Coupling) -> None:
    ones = torch.ones(coupling.num_units, dtype=torch.float64)
    lengths = torch.tensor([float(len(axis)) for axis in coupling.axes], dtype=torch.float64)
    total = sum(term.coefficient * float(lengths[list(term.axes)].prod()) for term in coupling.flops)
    assert float(coupling.cost(coupling.flops, ones)) == pytest.approx(total)
    assert torch.equal(coupling.widths(ones), lengths)


@given(chances())
def test_shares_add_up_to_what_units_pay(case: tuple[Coupling, Tensor]) -> None:
    coupling, s = case
    shares = coupling.shares(coupling.flops, s)
    everything = float(coupling.cost(coupling.flops, s))
    widths = coupling.widths(s)
    fixed = 0.0  # of a term without units all of it, of another what falls to positions that always exist
    for term in coupling.flops:
        at = [axis for axis in term.axes if bool((coupling.axes[axis] >= 0).any())]
        product = term.coefficient * float(widths[list(term.axes)].prod())
        if not at:
            fixed += product
        for axis in at:
            others = list(term.axes)
            others.remove(axis)
            always = int((coupling.axes[axis] < 0).sum())
            fixed += term.coefficient / len(at) * always * float(widths[others].prod())
    assert float((shares * s).sum()) + fixed == pytest.approx(everything, rel=1e-9, abs=1e-9)
    assert shares.shape == s.shape
    assert bool((shares >= 0).all())


@given(couplings())
def test_a_share_is_what_the_cost_gains_where_axes_are_met_once(coupling: Coupling) -> None:
    once = tuple(Term(term.coefficient, term.axes[:1]) for term in coupling.flops)
    s = torch.full((coupling.num_units,), 0.5, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(coupling.cost(once, s) + 0 * s.sum(), s)
    torch.testing.assert_close(coupling.shares(once, s.detach()), slope)


@given(chances())
def test_kept_are_the_live_positions(case: tuple[Coupling, Tensor]) -> None:
    coupling, s = case
    mask = s > 0.5
    for axis, kept in zip(coupling.axes, coupling.kept(mask), strict=True):
        live = [k for k, unit in enumerate(axis.tolist()) if unit < 0 or bool(mask[unit])]
        assert kept.dtype == torch.int64
        assert kept.tolist() == live
    widths = coupling.widths(mask.double())
    assert widths.tolist() == [float(len(kept)) for kept in coupling.kept(mask)]


@given(chances())
def test_shrinking_keeps_names_costs_and_order(case: tuple[Coupling, Tensor]) -> None:
    coupling, s = case
    alive = s > 0.3
    for group in coupling.groups:
        alive[group.start] = True
    left = coupling.shrink(alive)
    assert [group.name for group in left.groups] == [group.name for group in coupling.groups]
    assert left.num_units == int(alive.sum())
    numbers = alive.nonzero().flatten()
    for before, after, kept in zip(coupling.axes, left.axes, coupling.kept(alive), strict=True):
        assert torch.equal(torch.where(after >= 0, numbers[after.clamp(min=0)], -1), before[kept])
    alone = torch.where(alive, s, 0.0)
    torch.testing.assert_close(left.cost(left.flops, s[alive]), coupling.cost(coupling.flops, alone))
    # A term is split between the axes that have units; where units of a group are all over its places, each keeps one.
    if all(bool((a >= 0).any()) == bool((b >= 0).any()) for a, b in zip(coupling.axes, left.axes, strict=True)):
        torch.testing.assert_close(left.shares(left.flops, s[alive]), coupling.shares(coupling.flops, alone)[alive])
    again = left.shrink(torch.ones(left.num_units, dtype=torch.bool))
    assert all(torch.equal(one, other) for one, other in zip(again.axes, left.axes, strict=True))


def test_shrinking_twice_is_shrinking_once() -> None:
    group = Group("a", 0, 5, (("a", 0),))
    coupling = Coupling((group,), (torch.tensor([0, 1, -1, 2, 3, 4]),), {"a": {0: 0}}, (), (), {})
    first = torch.tensor([True, False, True, True, True])
    second = torch.tensor([True, False, True, True])
    both = torch.tensor([True, False, False, True, True])
    one, two = coupling.shrink(first).shrink(second), coupling.shrink(both)
    assert one.axes[0].tolist() == two.axes[0].tolist() == [0, -1, 1, 2]
    assert one.groups == two.groups


def test_a_group_may_not_vanish() -> None:
    groups = (Group("a", 0, 2, (("a", 0),)), Group("b", 2, 4, (("b", 0),)))
    coupling = Coupling(groups, (torch.arange(4),), {}, (), (), {})
    with pytest.raises(TitheError, match="b: found no unit left") as error:
        coupling.shrink(torch.tensor([True, True, False, False]))
    assert error.value.remedy


def test_a_coupling_without_units() -> None:
    coupling = Coupling((), (), {}, (Term(3.0, ()),), (), {})
    nothing = torch.empty(0)
    assert coupling.num_units == 0
    assert coupling.kept(nothing > 0) == []
    assert float(coupling.cost(coupling.flops, nothing)) == 3.0
    assert coupling.shares(coupling.flops, nothing).shape == (0,)
    assert coupling.widths(nothing).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_results_have_the_dtype_of_the_probabilities(dtype: torch.dtype) -> None:
    group = Group("a", 0, 2, (("a", 0),))
    coupling = Coupling((group,), (torch.arange(2),), {}, (Term(3.0, (0,)),), (), {})
    s = torch.full((2,), 0.5, dtype=dtype)
    assert coupling.widths(s).dtype == coupling.cost(coupling.flops, s).dtype == dtype
    assert coupling.shares(coupling.flops, s).dtype == dtype
