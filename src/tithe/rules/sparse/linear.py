"""Rules for y = x wᵀ + b (`F.linear`) and y = b + x w (`torch.addmm`, as in Hugging Face's `Conv1D`).

Shapes: N positions, I inputs, O outputs; x (..., I), gy (..., O); w (O, I), or (I, O) when transposed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tithe.rules.base import Rule
from tithe.rules.dispatch import apply_rule, asking, autocast, fits, needs_no_rule, register
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

    def __init__(self, x: Tensor, weight: Binding | None, bias: Binding | None, *, transposed: bool) -> None:
        self.transposed = transposed
        self.probe: Probe | None = weight.probe if weight is not None else None
        self.way: Way | Columns | None = None
        if self.probe is not None:
            self.probe.used(Usage.matrix(x, transposed=transposed))
        if weight is not None and weight.probe is None:
            if isinstance(weight.selection, Channels):
                self.way = Columns(weight.selection)
                weight.check_positions(x.numel() // max(x.shape[-1], 1))
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
        """What the way keeps of x; all of it for a probe; nothing for a frozen weight."""
        if self.way is not None:
            return (self.way.keep(x),)
        return () if self.probe is None else (x,)

    def backward(
        self, gy: Tensor, weight: Tensor, kept: tuple[Tensor, ...], need_x: bool, need_bias: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Gx = gy w; the selected entries of gyᵀ x; the selected sums of gy."""
        gx = gtw = None
        if need_x:
            weight = weight.to(gy.dtype)
            gx = gy @ (weight.t() if self.transposed else weight)
        gy_NO = gy.reshape(-1, gy.shape[-1])
        if self.probe is not None:
            left, right = (kept[0], gy) if self.transposed else (gy, kept[0])
            self.probe.matrix(left, right)
        elif self.way is not None:
            gtw = self.way.grad(gy_NO, kept[0])
        gb = gy_NO.sum(0) if need_bias else None
        gtb = None if self.bias is None else selected_sum(self.bias, gy)
        return gx, gb, gtw, gtb


@register(F.linear)
def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` by rule."""
    return linear_rule(input, weight, bias, transposed=False)


@register(torch.addmm, Tensor.addmm)
def addmm(input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """`torch.addmm(bias, x, weight)` by rule, for a vector bias and unit factors."""
    if beta != 1 or alpha != 1 or input.dim() != 1:
        return NotImplemented
    return linear_rule(mat1, mat2, input, transposed=True)


@register(torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm)
def matmul(input: Tensor, other: Tensor) -> Tensor:
    """`x @ weight` by rule, for a matrix weight."""
    return linear_rule(input, other, None, transposed=True) if other.dim() == 2 else NotImplemented


def linear_rule(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, transposed: bool, kind: type[LinearRule] = LinearRule
) -> Tensor:
    """The map by a rule of this kind; NotImplemented where stock keeps as little, or no rule serves."""
    if needs_no_rule(weight, bias) or not fits(x, weight) or x.dim() == 0 or weight.dim() != 2:
        return NotImplemented
    asked_weight, asked_bias = asking(weight), asking(bias)
    if asked_weight is None and asked_bias is None:
        return NotImplemented  # frozen: stock keeps nothing but the weight already
    if asked_weight is not None and not asked_weight.fits(1, transposed=transposed):
        return NotImplemented
    x = autocast(x)
    rule = kind(x, asked_weight, asked_bias, transposed=transposed)
    return apply_rule(rule, x, weight, bias)
