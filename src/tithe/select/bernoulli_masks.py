"""Learn structure as probabilities: draw a sub-network, estimate which units lower the loss, stay within a budget.

    min over s ∈ [0, 1]ⁿ of  F(s) = E L(m),  m_i ~ Bernoulli(s_i) independent,  subject to  Σ cost_i s_i ≤ total

One s_i a unit: what is there or not there as a whole, a channel or several that belong together. Two draws and their
losses say where s should go; no loss is differentiated. Nothing here waits for the device: no branch and no number on
the host depends on a tensor's values.

References:
    X. Zhou, W. Zhang, Z. Chen, S. Diao, T. Zhang. Efficient Neural Network Training via Forward and Backward
    Propagation Sparsification. NeurIPS 2021, arXiv 2111.05685: the problem, the estimator, the projection.
    S. Gu, S. Levine, I. Sutskever, A. Mnih. MuProp: Unbiased Backpropagation for Stochastic Neural Networks. ICLR 2016,
    arXiv 1511.05176, section 4: a first-order Taylor term as control variate, whose mean is put back.
    X. Zhou, W. Zhang, H. Xu, T. Zhang. Effective Sparsification of Neural Networks with Global Sparsity Constraint.
    CVPR 2021, arXiv 2105.01571: the gradual schedule.

Departures from the papers:
    - A draw keeps one unit of every group, however small its probabilities. Where Π (1 - s_i) over a group is not
      negligible, the law of the draw differs by that much from independent Bernoulli draws, and the estimator's mean
      is the covariance of the loss and z under the law of the draw.
    - The projection is exact, where the authors halve an interval 20 times, and units may differ in cost.
"""

from __future__ import annotations

import torch
from torch import Tensor

_SLACK = 2.0**-40
"""What the projection leaves unspent, as a part of Σ cost_i max(z_i, 0): above the rounding of its float64 sums."""


@torch.no_grad()
def draw(s: Tensor, group: Tensor, generator: torch.Generator) -> Tensor:
    """Draw m_i = [u_i < s_i], u uniform in [0, 1); a group without a drawn unit keeps that of largest s_i - u_i.

    That unit is the one closest to being drawn, ties by index, and has s_i > 0 unless the whole group is at 0. u comes
    from the CPU in float32: one state of the generator draws the same on every device.

    Args:
        s: probabilities (n,).
        group: of each unit, int64 (n,), numbers from 0 below n, on the device of `s`.
        generator: of the CPU.

    Returns:
        bool (n,), true in every group at least once.

    Example:
        >>> draw(torch.tensor([1.0, 0.0, 0.0, 0.0]), torch.tensor([0, 0, 1, 1]), torch.Generator().manual_seed(0))
        tensor([ True, False,  True, False])
    """
    # From pageable memory a copy is staged before the call returns, so not to block is safe.
    u = torch.rand(s.shape, generator=generator, dtype=torch.float32).to(s, non_blocking=True)
    # Where s > 0 the margin is above -1. In a group with units drawn the largest margin is one of theirs.
    margin = torch.where(s > 0, s - u, -1 - u)
    return (u < s) | _leaders(margin, group)


@torch.no_grad()
def policy_gradient(
    s: Tensor,
    mask_0: Tensor,
    mask_1: Tensor,
    loss_0: Tensor | float,
    loss_1: Tensor | float,
    alpha: float = 0.5,
    *,
    control: Tensor | None = None,
) -> Tensor:
    """Estimate H^α ∇F(s), H = diag(s (1 - s)), from two independent draws and their losses on one batch.

        g = (L_0 - L_1) / 2 · (z_0 - z_1)        z_j = (m_j - s) / (s (1 - s))^(1 - α)

    Each draw is the other's baseline. Unbiased: E g = Cov(L, z) = H^(α - 1) E[L (m - s)], and the derivative of the
    probability p of a mask is p (m_i - s_i) / (s_i (1 - s_i)). As (m_0 - m_1)² has mean 2 s (1 - s),

        E g_i² ≤ (max L - min L)² / 2 · (s_i (1 - s_i))^(2α - 1):

    bounded as s_i goes to 0 or 1 for α ≥ ½, which the estimator without preconditioning (α = 0) is not.

    With a control variate c, a guess of what each unit adds to the loss, what it foretells is taken out of the sampled
    difference, and its mean is put back exactly:

        g_i = [(L_0 - L_1 - cᵀ (m_0 - m_1)) / 2 · (m_0 - m_1)_i / (s_i (1 - s_i)) + c_i] · (s_i (1 - s_i))^α

    Unbiased for every c that was fixed before the draws, since E (cᵀ Δm) Δm_i = 2 s_i (1 - s_i) c_i; the variance is
    that of an estimate for the loss L - cᵀ m. Whatever c depends on must not depend on these draws or losses.

    Args:
        s: probabilities (n,), float.
        mask_0: the first draw, bool or 0 and 1, (n,).
        mask_1: the second.
        loss_0: with the first draw, a scalar.
        loss_1: with the second.
        alpha: exponent of the preconditioner H.
        control: c, (n,), or None for none.

    Returns:
        (n,) in the dtype of `s`; exactly 0 where s is 0 or 1. Rows of masks (B, n) and losses (B, 1) give rows.

    Example:
        >>> s = torch.tensor([0.5, 0.2, 1.0])
        >>> policy_gradient(s, torch.tensor([1, 0, 1]), torch.tensor([0, 1, 1]), 3.0, 1.0)
        tensor([ 2.0000, -2.5000,  0.0000])
    """
    h = s * (1 - s)
    apart = mask_0.to(s.dtype) - mask_1.to(s.dtype)  # of z_0 - z_1 all else cancels
    difference = loss_0 - loss_1
    if control is None:
        return torch.where(h > 0, difference / 2 * apart / h.pow(1 - alpha), 0)
    control = control.to(s)
    left = difference - (control * apart).sum(-1, keepdim=apart.dim() > 1)
    return torch.where(h > 0, left / 2 * apart / h.pow(1 - alpha) + control * h.pow(alpha), 0)


@torch.no_grad()
def project(z: Tensor, total: Tensor | float, cost: Tensor | None = None, *, weighted: bool = False) -> Tensor:
    """Return the point of {0 ≤ s ≤ 1, Σ cost_i s_i ≤ total} that is nearest to z.

        s = clamp(z - v cost, 0, 1)        one v ≥ 0: zero, or so that Σ cost_i s_i = total
        s = clamp(z - v, 0, 1)             weighted: nearest in Σ cost_i (s_i - z_i)²

    Σ cost_i s_i falls with v in straight pieces between the 2n values of v at which a unit leaves 1 or reaches 0. They
    are sorted, sums over them find the piece, and v is solved for on it. Computed in float64 and rounded towards 0: the
    sum in float64 is never above the total, and what has been projected is not changed by projecting again.

    Args:
        z: (n,), n ≥ 1, finite, float.
        total: what may be spent, in units of the cost; a number or a scalar. Below 0 is as 0.
        cost: of each unit, (n,), finite, not negative; None for 1. A unit that costs nothing is only clamped.
        weighted: give way in probability, the same for every unit that costs something, and not in proportion to cost,
            where an attention head would have to go before a hundred hidden units.

    Returns:
        (n,) in the dtype of `z`.

    Example:
        >>> project(torch.tensor([0.75, 0.5, 0.0, 2.0]), 2.0)
        tensor([0.6250, 0.3750, 0.0000, 1.0000])
        >>> project(torch.tensor([1.0, 1.0]), 2.5, cost=torch.tensor([1.0, 2.0]))
        tensor([0.9000, 0.8000])
    """
    exact = z.double()
    price = torch.ones_like(exact) if cost is None else cost.double()
    toward = (price > 0).to(price) if weighted else price
    over = (price * exact.clamp(0, 1)).sum() > total
    v = torch.where(over, _multiplier(exact, price, toward, total), 0)
    s = (exact - v * toward).clamp(0, 1)
    rounded = s.to(z.dtype)
    return torch.where(rounded > s, torch.nextafter(rounded, torch.zeros_like(rounded)), rounded)


def _multiplier(z: Tensor, cost: Tensor, toward: Tensor, total: Tensor | float) -> Tensor:
    """The v with Σ cost_i clamp(z_i - v d_i, 0, 1) = total, d = `toward`, of those above 0: one piece, solved exactly.

    As hinges, Σ cost_i [max(z_i - v d_i, 0) - max(z_i - 1 - v d_i, 0)]: a sum over the breakpoints above v.
    """
    paid = toward > 0
    dead = torch.where(paid, z / toward, 0)  # the v at which a unit reaches 0
    full = torch.where(paid, (z - 1) / toward, 0)  # the v at which it leaves 1
    at, order = torch.cat([dead, full]).sort(stable=True)
    level = torch.cat([cost * z, cost * (1 - z)])[order]
    slope = torch.cat([cost * toward, -cost * toward])[order]
    target = (total - _SLACK * (cost * z.clamp(min=0)).sum()).clamp(min=0)
    # Summed from the last: an expensive unit is dead early, and leaves no rounding error to the sums of cheap ones.
    spent = level.flip(0).cumsum(0).flip(0) - at * slope.flip(0).cumsum(0).flip(0)
    count = (spent > target).sum(0, keepdim=True)
    low = at.gather(0, (count - 1).clamp(min=0)).clamp(min=0)
    high = at.gather(0, count.clamp(max=at.numel() - 1))
    # On the piece itself the sums are taken afresh: the running ones carry the rounding of all that came before.
    ones, between = full > low, (dead > low) & (full <= low)
    excess = (cost * torch.where(between, z, ones.to(z.dtype))).sum() - target
    v = excess / (cost * toward * between).sum().clamp(min=torch.finfo(z.dtype).tiny)
    # A few units in the last place more, so that the last unit to reach 0 does reach it.
    return v.clamp(low, high) * (1 + 2.0**-44)


@torch.no_grad()
def likely(s: Tensor, group: Tensor, cost: Tensor, total: Tensor | float) -> Tensor:
    """Return the likeliest sub-network: the unit of largest s in each group, then others by s while Σ cost ≤ total.

    Ties go by index. The first unit that does not fit ends the list. The units that stand for their groups are taken
    even where they alone cost more than the total.

    Args:
        s: probabilities (n,).
        group: of each unit, int64 (n,), numbers from 0 below n.
        cost: of each unit, (n,), not negative.
        total: what may be spent, in units of the cost.

    Returns:
        bool (n,).

    Example:
        >>> likely(torch.tensor([0.9, 0.8, 0.1, 0.3]), torch.tensor([0, 0, 1, 1]), torch.ones(4), 3)
        tensor([ True,  True, False,  True])
    """
    leaders = _leaders(s, group)
    order = torch.where(leaders, torch.inf, s).argsort(descending=True, stable=True)
    fits = cost.double()[order].cumsum(0) <= total
    return leaders.scatter(0, order, fits) | leaders


def ratio(step: int, keep: float, gradual: tuple[int, int] | None) -> float:
    """Return the share that is kept at `step`: `keep`, or a value between 1 and `keep` on a cubic decay.

        keep + (1 - keep) (1 - (step - start) / (stop - start))³        start ≤ step < stop

    Args:
        step: steps finished.
        keep: the share at the end.
        gradual: start and stop, in steps: 1 before the start, `keep` from the stop on. None: `keep` at every step.

    Example:
        >>> [round(ratio(step, 0.2, (2, 4)), 3) for step in range(6)]
        [1.0, 1.0, 1.0, 0.3, 0.2, 0.2]
    """
    if gradual is None:
        return keep
    start, stop = gradual
    if step < start:
        return 1.0
    return keep + (1 - keep) * (1 - (step - start) / (stop - start)) ** 3 if step < stop else keep


def _leaders(values: Tensor, group: Tensor) -> Tensor:
    """Which values are the largest of their group, the first of equals: bool (n,)."""
    position = torch.arange(values.numel(), device=values.device)
    # There are at most n groups, so n places hold them whatever their number, which only the device knows.
    largest = values.scatter_reduce(0, group, values, "amax", include_self=False).gather(0, group)
    candidates = torch.where(values == largest, position, values.numel())
    return position == position.scatter_reduce(0, group, candidates, "amin", include_self=False).gather(0, group)
