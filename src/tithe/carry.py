"""Optimizer state across a new choice: stayers keep theirs, leavers drop it, entrants start at zero."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def carry(state: dict[str, Any], old: Tensor, new: Tensor) -> None:
    """Rearrange one parameter's optimizer state, in place, from the old indices to the new.

    A state tensor of one value per selected weight (a moment, a momentum buffer) is rearranged; anything else (a step
    count) stays. An entrant beside stayers therefore starts with zero moments and the tensor's step count, so that
    Adam's bias correction takes its moments for settled: its first steps are small, never large.

    Args:
        state: `optimizer.state[theta]`.
        old: sorted flat indices before, int64 (K,).
        new: sorted flat indices after, int64 (L,).

    Example:
        >>> state = {"momentum_buffer": torch.tensor([1.0, 2.0])}
        >>> carry(state, torch.tensor([3, 5]), torch.tensor([5, 7]))
        >>> state["momentum_buffer"]
        tensor([2., 0.])
    """
    at = torch.searchsorted(old, new).clamp_(max=max(old.numel() - 1, 0))
    stays = old[at] == new if old.numel() else torch.zeros_like(new, dtype=torch.bool)
    for key, value in state.items():
        if isinstance(value, Tensor) and value.dim() == 1 and value.numel() == old.numel():
            moved = value.new_zeros(new.numel())
            moved[stays] = value[at[stays]]
            state[key] = moved
