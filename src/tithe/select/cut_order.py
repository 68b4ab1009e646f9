"""Say in which order units go that are cut for good: pure functions of what each is worth and of what it does."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def cut_order(worth: Tensor, group: Tensor, least: Tensor) -> Tensor:
    """Return the units that may go, the one of least worth first; ties go by index, the last one first.

    Of each group the units of most worth stay, as many as it needs at least.

    Args:
        worth: of each unit, (n,); what is not a number counts as nothing.
        group: of each unit, int64 (n,), rising from 0.
        least: units that each group keeps, int64 (groups,).

    Returns:
        int64 (m,), m ≤ n.

    Example:
        >>> cut_order(torch.tensor([3.0, 1.0, 2.0, 9.0, 0.5]), torch.tensor([0, 0, 0, 1, 1]), torch.tensor([1, 2]))
        tensor([1, 2])
    """
    best_first = worth.nan_to_num(0.0).argsort(descending=True, stable=True)
    within = best_first[group[best_first].argsort(stable=True)]  # group after group, the best of each first
    sizes = torch.bincount(group, minlength=len(least))
    rank = torch.arange(len(group), device=group.device) - (sizes.cumsum(0) - sizes)[group[within]]
    spare = torch.zeros_like(group, dtype=torch.bool).scatter(0, within, rank >= least[group[within]])
    return best_first[spare[best_first]].flip(0)


@torch.no_grad()
def unlike_first(traces: Tensor, noise: float = 1e-3) -> Tensor:
    """Return columns in an order in which each does what those before it do least.

        pick argmax_i t̂_iᵀ A t̂_i,   A = (ε I + Σ_picked t̂ t̂ᵀ)⁻¹,   t̂_i = t_i / ‖t_i‖

    The greedy choice of a D-optimal design (V. V. Fedorov, *Theory of Optimal Experiments*, 1972): the next column is
    the one that raises log det A⁻¹ most. It goes on beyond the rank of the traces: then each direction is covered once
    more. The first column comes first, since all are equally long; a column of zeros comes last.

    Args:
        traces: what each column's unit did in T steps, (T, n).
        noise: ε; the smaller, the more a direction counts that no column before has at all.

    Returns:
        int64 (n,), each column once. O(T n) a pick.

    Example:
        >>> unlike_first(torch.tensor([[1.0, 5.0, 0.0, 0.0, 1.0], [0.0, 0.1, 0.0, 3.0, 1.0]]))
        tensor([0, 3, 4, 1, 2])
    """
    unit = torch.nn.functional.normalize(traces.double(), dim=0, eps=1e-60)  # gradients may be tiny
    inverse = torch.eye(len(unit), dtype=unit.dtype) / noise
    news = unit.square().sum(0) / noise
    order = torch.zeros(unit.shape[1], dtype=torch.int64)
    for place in range(len(order)):
        picked = int(news.argmax()) if place else 0
        order[place] = picked
        column = inverse @ unit[:, picked]
        scale = 1 + unit[:, picked] @ column
        news -= (column @ unit).square() / scale
        news[picked] = -torch.inf
        inverse -= torch.outer(column, column) / scale
    return order
