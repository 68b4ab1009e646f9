"""Say in which order units go that are cut for good: pure functions of what each is worth."""

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
