"""Let a parameter that an optimizer and a loop hold become its smaller part, for good.

The Parameter stays the same object. What remembers its shape follows: the optimizer's state, the gradient that a loop
has not cleared yet, and autograd, which a loss that is still held would make it expect the old shape.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tithe.batch import leaves
from tithe.errors import TitheError
from tithe.selection import Grid


@torch.no_grad()
def smaller(tensor: Tensor, grid: Grid) -> Tensor:
    """Return a copy of the part of a tensor, in the same order of memory: kernels for channels-last images want it."""
    part = grid.gather(tensor)
    for order in (torch.channels_last, torch.channels_last_3d):
        dims = 4 if order == torch.channels_last else 5
        if tensor.dim() == dims and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=order):
            return part.contiguous(memory_format=order)
    return part


@torch.no_grad()
def norm_ratio(weight: Tensor, part: Tensor, grid: Grid, inputs: Sequence[int]) -> float:
    """Return how much of its norm a weight loses with the inputs that go, as the ratio of before to after.

        ‖W[outputs that stay, all inputs]‖ / ‖W[outputs that stay, inputs that stay]‖

    Of weights that were drawn at random a sum over fewer inputs is smaller by the root of their number. A norm behind
    it makes up for that in its output, but not in how fast an optimizer turns the weight.

    Args:
        weight: before it is cut.
        part: what stays of it.
        grid: where that lies.
        inputs: axes over which its products sum.

    Returns:
        At least 1, which it is when no input goes, and when what stays is zero.
    """
    if not any(axis in grid.axes for axis in inputs):
        return 1.0
    read = weight
    for axis, positions in grid.axes.items():
        if axis not in inputs:
            read = read.index_select(axis, positions.to(read.device))
    whole, left = (float(torch.linalg.vector_norm(w.double())) for w in (read, part))
    return max(whole / left, 1.0) if left > 0 else 1.0


@torch.no_grad()
def shrink_parameter(
    parameter: nn.Parameter, small: Tensor, grid: Grid, optimizers: Sequence[torch.optim.Optimizer]
) -> None:
    """Make the parameter its part in `grid`, with its gradient and its optimizers' state.

    Args:
        parameter: what optimizers hold; its memory may be the smaller one already.
        small: its part, which becomes its memory.
        grid: which part, of the shape that it had.
        optimizers: whose state follows.
    """
    for optimizer in optimizers:
        state: dict[str, Any] = optimizer.state.get(parameter, {})
        for key, value in state.items():
            if isinstance(value, Tensor) and value.dim():
                state[key] = _part(value, grid)
    grad, parameter.grad = parameter.grad, None
    # A loss of an earlier step that is still held keeps the node alive that adds up this parameter's gradient, and
    # that would refuse another shape: autograd makes a new one for another dtype alone.
    other = torch.float32 if parameter.dtype == torch.float64 else torch.float64
    parameter.data = torch.empty(0, dtype=other, device=parameter.device)
    parameter.data = small
    if grad is not None:
        parameter.grad = smaller(grad.to_dense() if grad.is_sparse else grad, grid)


def _part(value: Tensor, grid: Grid) -> Tensor:
    """Of a tensor with an axis for each of the parameter's, or one of length 1 in its place, what belongs to the part.

    A factored second moment (Adafactor's) has the mean over an axis as one entry.
    """
    if tuple(value.shape) == grid.shape:
        return smaller(value, grid)
    for axis, positions in grid.axes.items():
        if value.dim() == len(grid.shape) and value.shape[axis] == grid.shape[axis]:
            value = value.index_select(axis, positions.to(value.device))
    return value


def check_state_shapes(named: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """Check that what an optimizer keeps for parameters can follow when they become smaller.

    Raises:
        TitheError: when a tensor of its state does not have the parameter's axes, is coded (torchao's optimizers of 8
            bits), or lies inside a list or another container.
    """
    kept = [(name, p, key, value) for name, p in named.items() for key, value in optimizer.state.get(p, {}).items()]
    for name, parameter, key, value in kept:
        unfit = _unfit(value, parameter)
        if unfit is not None:
            raise TitheError(
                name,
                found=f"{type(optimizer).__name__}'s state {key!r}{unfit} for a weight of shape"
                f" {list(parameter.shape)}",
                expected="state with an entry for each value of the weight, which can get smaller with it",
                remedy="use SGD, Adam, AdamW, RMSprop, Adagrad or another optimizer with such a state",
            )


def _unfit(value: Any, parameter: Tensor) -> str | None:
    """What keeps a piece of state from getting smaller, or None."""
    if not isinstance(value, Tensor):
        return f", a {type(value).__name__} of tensors," if any(t.dim() for t in leaves([value])) else None
    if not value.dim():
        return None
    if type(value) not in (Tensor, nn.Parameter):
        return f", a {type(value).__name__},"
    fits = value.dim() == parameter.dim() and all(
        length in (1, whole) for length, whole in zip(value.shape, parameter.shape, strict=True)
    )
    return None if fits else f" of shape {list(value.shape)}"
