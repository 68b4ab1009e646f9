"""Rules for y = x wᵀ + b (`F.linear`) and y = b + x w (`torch.addmm`, as in Hugging Face's `Conv1D`).

Shapes: N positions, I inputs, O outputs; x (..., I), gy (..., O); w (O, I), or (I, O) when transposed.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from tithe.rules.base import Rule
from tithe.rules.dispatch import Call, register
from tithe.rules.sparse.channels import Columns, Usage
from tithe.rules.sparse.probes import Probe
from tithe.rules.sparse.reductions import selected_sum
from tithe.rules.sparse.sparse_gradient import Way, cheapest
from tithe.rules.theta import Binding
from tithe.selection import Channels


class LinearRule(Rule):
    """A linear map of which single weights and biases are selected.

    Keeps for backward: nothing but the weight when no weight is selected; the selected columns of x for whole
    channels; otherwise what the cheapest way keeps, which for a Fisher mask is the few touched columns of x.

    Args:
        x: the input; its shape decides the way.
        weight: the weight's binding, or None when it is frozen.
        bias: the bias's binding, or None when it is frozen, absent or trained whole.
        transposed: the weight is stored as (I, O).
    """

    twice = True

    def __init__(self, x: Tensor, weight: Binding | None, bias: Binding | None, *, transposed: bool) -> None:
        self.transposed = transposed
        self.probe: Probe | None = weight.probe if weight is not None else None
        self.way: Way | Columns | None = None
        if self.probe is not None:
            self.probe.used(Usage.matrix(x, transposed=transposed))
        if weight is not None and weight.probe is None:
            if isinstance(weight.selection, Channels):
                self.way = Columns(weight.selection)
            elif weight.touch is not None:
                self.way = cheapest(weight.touch, x, transposed=transposed)
        self.bias = bias

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The stock operation, the weight cast to x's dtype under autocast."""
        weight = weight.to(x.dtype)
        bias = None if bias is None else bias.to(x.dtype)
        if not self.transposed:
            return F.linear(x, weight, bias), ()
        return (x @ weight if bias is None else torch.addmm(bias, x, weight)), ()

    def keep(self, x: Tensor, extra: tuple[Tensor, ...], need_x: bool) -> tuple[Tensor, ...]:
        """What the way keeps of x; all of it for a probe or where it is held anyway; nothing for a frozen weight."""
        if self.way is not None:
            return (x if self.held else self.way.keep(x),)
        return () if self.probe is None else (x,)

    def backward(
        self, gy: Tensor, weight: Tensor, kept: tuple[Tensor, ...], need_x: bool, need_bias: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Gradients gx = gy w, the selected entries of ∇w = gyᵀ x, and the selected sums of gy."""
        gx = gtw = None
        if need_x:
            weight = weight.to(gy.dtype)
            gx = gy @ (weight.t() if self.transposed else weight)
        gy_NO = gy.reshape(-1, gy.shape[-1])
        if self.probe is not None:
            left, right = (kept[0], gy) if self.transposed else (gy, kept[0])
            if self.probe.hears:
                self.probe.matrix(left, right)
        elif self.way is not None:
            gtw = self.way.grad(gy_NO, self.way.keep(kept[0]) if self.held else kept[0])
        gb = gy_NO.sum(0) if need_bias else None
        gtb = None if self.bias is None else selected_sum(self.bias, gy)
        return gx, gb, gtw, gtb


@register(
    F.linear,
    keeps="x[..., touched columns] or x, whichever costs less; nothing for biases alone",
    channels="x[..., channels]",
    stock="x",
    family="linear map",
    probes=True,
)
def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Call:
    """The map y = x wᵀ + b; ∇w = gyᵀ x at the selected entries."""
    return linear_call(input, weight, bias, transposed=False)


@register(torch.addmm, Tensor.addmm, like=linear)
def addmm(input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> Call:
    """The map y = b + x w for a vector b and unit factors; ∇w = xᵀ gy at the selected entries."""
    if beta != 1 or alpha != 1 or input.dim() != 1:
        return NotImplemented
    return linear_call(mat1, mat2, input, transposed=True)


@register(torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm, like=linear)
def matmul(input: Tensor, other: Tensor) -> Call:
    """The map y = x w for a matrix w; ∇w = xᵀ gy at the selected entries."""
    return linear_call(input, other, None, transposed=True) if other.dim() == 2 else NotImplemented


def linear_call(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, transposed: bool, kind: type[LinearRule] = LinearRule
) -> Call:
    """The call of a linear map by a rule of this kind; NotImplemented where x or the weight has too few axes."""
    if x.dim() == 0 or weight.dim() != 2:
        return NotImplemented
    return Call(partial(kind, transposed=transposed), x, weight, bias, transposed=transposed)
