"""Optimizer state across a new choice: stayers keep theirs, leavers drop it, entrants start at zero."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tithe.selection import Selection, carried


def carry_state(state: dict[str, Any], old: Selection, new: Selection) -> None:
    """Rearrange one parameter's optimizer state, in place, from the old selection to the new.

    A state tensor of one value per selected weight (a moment, a momentum buffer) is rearranged; anything else (a step
    count) stays. An entrant beside stayers therefore starts with zero moments and the tensor's step count, so that
    Adam's bias correction takes its moments for settled: its first steps are small, never large.

    Args:
        state: `optimizer.state[theta]`.
        old: what was selected before.
        new: what is selected now; a selection of another kind or layout keeps no state.

    Example:
        >>> import torch
        >>> from tithe import Coordinates
        >>> before, after = (Coordinates((9,), torch.tensor(at)) for at in ([3, 5], [5, 7]))
        >>> state = {"momentum_buffer": torch.tensor([1.0, 2.0])}
        >>> carry_state(state, before, after)
        >>> state["momentum_buffer"]
        tensor([2., 0.])
    """
    for key, value in state.items():
        if isinstance(value, Tensor) and value.dim() > 0 and value.shape == old.theta_shape:
            state[key] = carried(old, new, value, value.new_zeros(new.theta_shape))
