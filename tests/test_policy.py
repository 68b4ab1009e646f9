"""The structure step: draws keep their law, the estimator its mean and bound; the projection is the nearest point."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import tithe
from tithe.select.bernoulli_masks import draw, likely, policy_gradient, project, ratio

ALPHAS = [0.0, 0.25, 0.5, 0.75, 1.0]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_names_are_where_they_are_called() -> None:
    assert tithe.select.bernoulli_masks.policy_gradient is policy_gradient
    assert tithe.select.bernoulli_masks.project is project


# The limits.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_keep_everything(dtype: torch.dtype) -> None:
    s, group = torch.ones(5, dtype=dtype), torch.tensor([0, 0, 0, 1, 1])
    masks = [draw(s, group, seeded(seed)) for seed in (0, 1)]
    assert all(mask.all() for mask in masks)
    assert torch.equal(policy_gradient(s, *masks, 2.0, 1.0), torch.zeros(5, dtype=dtype))
    assert torch.equal(project(s, 5), s)
    assert likely(s, group, torch.ones(5), 5).all()
    assert ratio(3, 1.0, None) == ratio(3, 1.0, (2, 8)) == 1.0


@pytest.mark.parametrize("cost", [None, torch.tensor([1.0, 3.0, 0.5, 2.0])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_may_be_spent(cost: Tensor | None, dtype: torch.dtype) -> None:
    z = torch.tensor([0.3, 7.0, -1.0, 0.1], dtype=dtype)
    assert torch.equal(project(z, 0, cost), torch.zeros(4, dtype=dtype))
    assert torch.equal(project(z, -1.0, cost), torch.zeros(4, dtype=dtype))
    group = torch.tensor([0, 0, 1, 1])
    assert likely(z, group, torch.ones(4), 0).tolist() == [False, True, False, True]
    assert draw(torch.zeros(4), group, seeded()).view(2, 2).sum(1).tolist() == [1, 1]


def test_what_is_certain_does_not_move() -> None:
    s = torch.tensor([0.0, 1.0, 0.5, 0.0, 1.0])
    found = policy_gradient(s, torch.tensor([1, 0, 1, 0, 1]), torch.tensor([0, 1, 0, 0, 1]), 9.0, 1.0)
    assert found.tolist() == [0.0, 0.0, 8.0, 0.0, 0.0]


# The estimator, against all masks of a small network.


class Small(nn.Module):
    """Two layers of three channels that may be absent."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 3), nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = torch.tanh(self.first(x)) * mask[:3]
        return self.head(torch.tanh(self.second(x)) * mask[3:])


def enumerated() -> tuple[Tensor, Tensor]:
    """All 64 masks, and the loss of each."""
    net = Small().double()
    x, y = torch.randn(8, 4, dtype=torch.float64), torch.randint(2, (8,))
    masks = torch.tensor(list(itertools.product([0.0, 1.0], repeat=6)), dtype=torch.float64)
    with torch.no_grad():
        return masks, torch.stack([4 * F.cross_entropy(net(x, mask), y) for mask in masks])


def probability(masks: Tensor, s: Tensor) -> Tensor:
    return (masks * s + (1 - masks) * (1 - s)).prod(-1)


def of_pairs(masks: Tensor, losses: Tensor, s: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """The estimate from every pair of masks (64, 64, 6), and the probability of the pair (64, 64, 1)."""
    p = probability(masks, s)
    found = policy_gradient(s, masks[:, None], masks, losses[:, None, None], losses[None, :, None], alpha)
    return found, (p[:, None] * p)[..., None]


@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_mean_is_the_preconditioned_gradient(alpha: float) -> None:
    masks, losses = enumerated()
    s = torch.tensor([0.5, 0.02, 0.9, 0.3, 0.999, 0.7], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(probability(masks, s) @ losses, s)
    found, p = of_pairs(masks, losses, s.detach(), alpha)
    h = (s * (1 - s)).detach()
    torch.testing.assert_close((p * found).sum((0, 1)), h**alpha * gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("alpha", ALPHAS)
@given(c=st.lists(st.floats(-5, 5), min_size=6, max_size=6), seed=st.integers(0, 3))
def test_a_control_variate_leaves_the_mean_whatever_it_says(alpha: float, c: list[float], seed: int) -> None:
    """E g = H^α ∇F, exactly, over all pairs of masks of a small net; the variance is that for the loss L - cᵀm."""
    torch.manual_seed(seed)
    masks, losses = enumerated()
    control = torch.tensor(c, dtype=torch.float64)
    s = torch.tensor([0.5, 0.02, 0.9, 0.3, 0.999, 0.7], dtype=torch.float64)
    plain, p = of_pairs(masks, losses, s, alpha)
    pair = (masks[:, None], masks, losses[:, None, None], losses[None, :, None], alpha)
    found = policy_gradient(s, *pair, control=control)
    mean = (p * found).sum((0, 1))
    torch.testing.assert_close(mean, (p * plain).sum((0, 1)), rtol=1e-9, atol=1e-10)
    other, _ = of_pairs(masks, losses - masks @ control, s, alpha)
    variance = (p * other**2).sum((0, 1)) - (p * other).sum((0, 1)) ** 2
    torch.testing.assert_close((p * found**2).sum((0, 1)) - mean**2, variance, rtol=1e-7, atol=1e-8)


def test_a_control_variate_that_is_right_leaves_no_variance() -> None:
    masks, _ = enumerated()
    c = torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0, -1.0], dtype=torch.float64)
    s = torch.tensor([0.5, 0.2, 1.0, 0.3, 0.0, 0.7], dtype=torch.float64)
    losses = masks @ c
    found = policy_gradient(s, masks[:, None], masks, losses[:, None, None], losses[None, :, None], control=c)
    expected = torch.where((s > 0) & (s < 1), (s * (1 - s)).sqrt() * c, 0.0)  # of what is certain, exactly 0
    certain = (masks[:, 2] == 1) & (masks[:, 4] == 0)  # the masks that can be drawn
    torch.testing.assert_close(found[certain][:, certain], expected.expand(16, 16, 6))


def test_the_mean_of_real_draws() -> None:
    masks, losses = enumerated()
    s = torch.tensor([0.5, 0.2, 0.9, 0.3, 0.95, 0.7], dtype=torch.float64)
    h = s * (1 - s)
    centred = probability(masks, s) * losses @ (masks - s)
    # A seventh unit of each draw is always there, so that the floor has nothing to do.
    count = 20_000
    with_one = torch.cat([s, torch.ones(1, dtype=torch.float64)])
    group = torch.arange(2 * count).repeat_interleave(7)
    drawn = draw(with_one.repeat(2 * count), group, seeded()).view(2, count, 7)[..., :6]
    numbers = (drawn * torch.tensor([32, 16, 8, 4, 2, 1])).sum(-1)
    found = policy_gradient(s, drawn[0], drawn[1], losses[numbers[0], None], losses[numbers[1], None])
    error = (found.mean(0) - centred / h.sqrt()) / (found.std(0) / math.sqrt(count))
    assert error.abs().max() < 4


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("value", [1e-12, 1e-6, 1e-3, 0.5, 1 - 1e-3, 1 - 1e-6, 1 - 1e-12])
def test_the_second_moment_has_its_bound(value: float, alpha: float) -> None:
    masks, losses = enumerated()
    s = torch.tensor([value, 0.2, 0.9, 0.3, value, 0.7], dtype=torch.float64)
    found, p = of_pairs(masks, losses, s, alpha)
    h = s * (1 - s)
    bound = (losses.max() - losses.min()) ** 2 / 2 * h ** (2 * alpha - 1)
    assert ((p * found**2).sum((0, 1)) <= bound * (1 + 1e-9)).all()


def test_without_preconditioning_the_second_moment_has_no_bound() -> None:
    masks, losses = enumerated()
    moments: list[float] = []
    for value in (1e-3, 1e-6):
        found, p = of_pairs(masks, losses, torch.full((6,), 0.5).double().index_fill(0, torch.tensor(0), value), 0.0)
        moments.append(float((p * found**2).sum((0, 1))[0]))
    assert moments[1] == pytest.approx(1000 * moments[0], rel=0.01)


def test_losses_with_a_graph_give_a_plain_tensor() -> None:
    s = nn.Parameter(torch.tensor([0.5, 0.5]))
    loss = (3 * s.sum()).to(torch.bfloat16)
    found = policy_gradient(s, torch.tensor([True, False]), torch.tensor([False, False]), loss, loss.detach() - 2)
    assert not found.requires_grad
    assert found.dtype == torch.float32
    assert found.tolist() == [2.0, 0.0]
    assert not project(s, 0.5).requires_grad


# The projection.

NUMBERS = st.integers(-300, 300).map(lambda value: value / 100)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, float, Tensor]:
    """A point, a total, and costs: all equal, some 0, or far apart; ties are likely."""
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    z = draw(st.lists(NUMBERS, min_size=1, max_size=12))
    costs = draw(st.sampled_from([st.just(1.0), st.integers(0, 3).map(float), st.floats(0.125, 1024, width=32)]))
    cost = torch.tensor(draw(st.lists(costs, min_size=len(z), max_size=len(z))), dtype=dtype)
    share = draw(st.floats(0, 1.1))
    return torch.tensor(z, dtype=dtype), share * float(cost.double().sum()), cost


def bisected(z: Tensor, total: float, cost: Tensor, *, weighted: bool = False) -> Tensor:
    """The projection in float64, by halving an interval until it is empty."""
    toward = (cost > 0).double() if weighted else cost
    low, high = 0.0, float(torch.where(cost > 0, z / toward, 0).max().clamp(min=0))
    if float((cost * z.clamp(0, 1)).sum()) <= total:
        return z.clamp(0, 1)
    while low < (middle := (low + high) / 2) < high:
        enough = float((cost * (z - middle * toward).clamp(0, 1)).sum()) <= total
        low, high = (low, middle) if enough else (middle, high)
    return (z - high * toward).clamp(0, 1)


def assert_close(found: Tensor, expected: Tensor, problem: tuple[Tensor, float, Tensor]) -> None:
    """Equal up to one rounding of the dtype, and to the 2⁻⁴⁰ of what the point itself would cost that stay unspent."""
    z, _, cost = problem
    unspent = 2.0**-38 * float((cost * z.clamp(min=0)).double().sum()) / min([1.0, *cost[cost > 0].tolist()])
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=unspent + 2 * torch.finfo(z.dtype).eps)


@given(problems(), st.booleans())
def test_projection_equals_bisection(problem: tuple[Tensor, float, Tensor], weighted: bool) -> None:
    z, total, cost = problem
    found = project(z, total, cost, weighted=weighted)
    assert found.dtype == z.dtype
    assert float((cost.double() * found.double()).sum()) <= max(total, 0.0)
    assert_close(found, bisected(z.double(), total, cost.double(), weighted=weighted), problem)


@given(problems())
def test_projection_is_the_nearest_point(problem: tuple[Tensor, float, Tensor]) -> None:
    z, total, cost = (part.double() if isinstance(part, Tensor) else part for part in problem)
    s = project(z, total, cost)
    # Optimal if and only if (z - s)·(t - s) ≤ 0 for every t allowed: the best t fills up by (z - s) / cost.
    gain, left, reached = z - s, total, 0.0
    for i in sorted(range(len(z)), key=lambda i: -float(gain[i] / cost[i]) if cost[i] > 0 else -math.inf):
        if gain[i] > 0:
            share = min(1.0, left / float(cost[i])) if cost[i] > 0 else 1.0
            left, reached = left - share * float(cost[i]), reached + share * float(gain[i])
    assert reached - float(gain @ s) <= 1e-8 * (1 + float(gain.abs().sum()))


@given(problems())
def test_projection_is_feasible_and_projecting_again_changes_no_bit(problem: tuple[Tensor, float, Tensor]) -> None:
    z, total, cost = problem
    s = project(z, total, cost)
    assert ((s >= 0) & (s <= 1)).all()
    assert float((cost.double() * s.double()).sum()) <= total
    assert torch.equal(project(s, total, cost), s)
    assert torch.equal(project(z, total, cost), s)
    assert torch.equal(project(z, torch.tensor(total, dtype=torch.float64), cost), s)


@given(problems(), st.randoms(use_true_random=False))
def test_projection_knows_no_order(problem: tuple[Tensor, float, Tensor], random: object) -> None:
    z, total, cost = problem
    order = list(range(len(z)))
    random.shuffle(order)  # pyright: ignore[reportAttributeAccessIssue]
    assert_close(project(z[order], total, cost[order]), project(z, total, cost)[order].double(), problem)


def test_projection_of_many_spends_the_whole_total() -> None:
    z, cost = torch.rand(20_000), torch.rand(20_000) + 0.1
    assert float(project(z, 700.0).double().sum()) == pytest.approx(700, rel=1e-6)
    assert float(cost.double() @ project(z, 700.0, cost).double()) == pytest.approx(700, rel=1e-6)


def test_what_costs_nothing_is_only_clamped() -> None:
    z, cost = torch.tensor([0.0, 0.4, 1.0, 3.0, -1.0, 2.0]), torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 1.0])
    torch.testing.assert_close(project(z, 0.25, cost), torch.tensor([0.0, 0.4, 1.0, 1.0, 0.0, 0.25]))


def test_weighted_gives_way_the_same_in_every_unit() -> None:
    z, cost = torch.tensor([0.9, 0.8, 0.7]), torch.tensor([1.0, 10.0, 100.0])
    lowered = z - project(z, 60.0, cost, weighted=True)
    torch.testing.assert_close(lowered, lowered[0].expand(3), rtol=1e-4, atol=0)


def test_a_unit_that_costs_more_is_lowered_more() -> None:
    found = project(torch.tensor([0.8, 0.8]), 1.0, torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(found, torch.tensor([0.8 - 0.28, 0.8 - 0.56]))


# Draws.


def test_every_unit_is_drawn_as_often_as_its_probability_says() -> None:
    s = torch.tensor([0.001, 0.1, 0.5, 0.9, 0.999]).repeat_interleave(20_000)
    drawn = draw(s, torch.zeros(len(s), dtype=torch.int64), seeded()).view(5, -1).double().mean(1)
    expected = s.view(5, -1)[:, 0].double()
    assert ((drawn - expected).abs() <= 4 * (expected * (1 - expected) / 20_000).sqrt()).all()


def test_the_floor_keeps_the_unit_closest_to_being_drawn() -> None:
    # Of s = (½, ¼), nothing is drawn with probability 3/8; then the first is the closer one with probability ⅔.
    count = 20_000
    drawn = draw(torch.tensor([0.5, 0.25]).repeat(count), torch.arange(count).repeat_interleave(2), seeded())
    kinds = torch.bincount((drawn.view(-1, 2) * torch.tensor([1, 2])).sum(1), minlength=4).double() / count
    expected = torch.tensor([0, 3 / 8 + 2 / 3 * 3 / 8, 1 / 8 + 1 / 3 * 3 / 8, 1 / 8], dtype=torch.float64)
    assert ((kinds - expected).abs() <= 4 * (expected * (1 - expected) / count).sqrt()).all()


@given(st.lists(st.lists(st.sampled_from([0.0, 1e-30, 0.01, 0.5, 1.0]), min_size=1, max_size=4), min_size=1))
def test_draws_one_group_after_the_other(groups: list[list[float]]) -> None:
    s = torch.tensor([value for values in groups for value in values])
    group = torch.tensor([g for g, values in enumerate(groups) for _ in values])
    found = draw(s, group, seeded(3)).tolist()
    u = torch.rand(len(s), generator=seeded(3)).tolist()
    start = 0
    for values in groups:
        here = range(start, start := start + len(values))
        expected = [i for i in here if u[i] < s[i]]
        if not expected:
            alive = [i for i in here if s[i] > 0] or list(here)
            expected = [max(alive, key=lambda i: float(s[i]) - u[i])]
        assert [i for i in here if found[i]] == expected


def test_a_draw_is_a_function_of_the_generator() -> None:
    s, group = torch.rand(100), torch.arange(100) // 7
    one, two = seeded(5), seeded(5)
    first = [draw(s, group, one) for _ in range(3)]
    again = [draw(s, group, two) for _ in range(3)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1])
    assert torch.equal(first[0], draw(s.double(), group, seeded(5)))


# The likeliest sub-network, and the schedule.


@given(st.data())
def test_likely_takes_the_largest_one_by_one(data: st.DataObject) -> None:
    groups = sorted(data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=12)))
    group = torch.unique(torch.tensor(groups), return_inverse=True)[1]
    n = len(groups)
    s = torch.tensor(data.draw(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=n, max_size=n)))
    cost = torch.tensor(data.draw(st.lists(st.integers(0, 5), min_size=n, max_size=n)))
    total = data.draw(st.integers(0, 30))
    order = sorted(range(n), key=lambda i: (-float(s[i]), i))
    taken = [next(i for i in order if group[i] == g) for g in range(int(group[-1]) + 1)]
    spent = sum(int(cost[i]) for i in taken)
    for i in order:
        if i not in taken:
            spent += int(cost[i])
            if spent > total:
                break
            taken.append(i)
    assert likely(s, group, cost, total).nonzero().flatten().tolist() == sorted(taken)


def test_ratio_falls_from_one_to_keep() -> None:
    assert ratio(0, 0.1, None) == 0.1
    path = [ratio(step, 0.1, (10, 30)) for step in range(50)]
    assert path[:11] == [1.0] * 11
    assert path[20] == pytest.approx(0.1 + 0.9 / 8)
    assert path[30:] == [0.1] * 20
    assert all(a > b for a, b in itertools.pairwise(path[10:31]))
    assert ratio(4, 0.1, (5, 5)) == 1.0
    assert ratio(5, 0.1, (5, 5)) == 0.1


def test_nothing_waits_for_the_device() -> None:
    # A meta tensor has no values: reading one on the host is an error.
    def blank(dtype: torch.dtype = torch.float32, size: tuple[int, ...] = (9,)) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    s, group, mask, loss = blank(), blank(torch.int64), blank(torch.bool), blank(size=())
    drawn = draw(s, group, seeded())
    assert (drawn.device.type, drawn.dtype) == ("meta", torch.bool)
    assert policy_gradient(s, drawn, mask, loss, loss).shape == (9,)
    assert project(s, 3.0).dtype == torch.float32
    assert project(s, loss, cost=blank()).device.type == "meta"
    assert likely(s, group, blank(), 3.0).dtype == torch.bool
