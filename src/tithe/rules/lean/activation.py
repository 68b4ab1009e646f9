"""Activations that keep a code of their derivative where stock keeps a tensor of the input's size.

Kept for an input of n elements: ⌈n / 8⌉ bytes for ReLU, ReLU6, Hardtanh, LeakyReLU, clamp, threshold and Hardsigmoid;
n bytes for GELU, SiLU, Hardswish, Mish and ELU.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tithe.rules.double_backward import differentiated, entrywise, mark, marked, missing, refusal, stand_in
from tithe.rules.lean.bitpack import layout
from tithe.rules.lean.derivative_codes import GATES, SLOPES
from tithe.rules.lean.dispatch import IN_FULL, Leanness, catch
from tithe.rules.transforms import each_row

# pyright: reportIncompatibleMethodOverride=false


@each_row
class Gated(torch.autograd.Function):
    """An activation with two derivatives: `apply(x, kind, low, high, inplace)`; a bit an element says which."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kind: str, low: float, high: float, inplace: bool) -> Tensor:
        """Stock's output, in place where asked for."""
        ctx.settings, ctx.mark = (kind, low, high, layout(x)), mark(x)
        ctx.save_for_backward(torch.ops.tithe.gate_bits.default(x, kind, low, high))
        if inplace:
            ctx.mark_dirty(x)
            return GATES[kind].forward_(x, low, high)
        return GATES[kind].forward(x, low, high)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        """Stock's gradient, bit for bit: gx = gy d with d the derivative that the bit names."""
        (bits,), settings = ctx.saved_tensors, ctx.settings
        gx = entrywise(grads[0], lambda gy: torch.ops.tithe.gate_grad.default(gy, bits, *settings))
        return marked(gx, ctx.mark), None, None, None, None


@each_row
class Sloped(torch.autograd.Function):
    """A smooth activation: `apply(x, kind, alpha, inplace)`; keeps an 8-bit code of its derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kind: str, alpha: float, inplace: bool) -> Tensor:
        """Stock's output, in place where asked for."""
        slope = SLOPES[kind]
        ctx.settings, ctx.x = (kind, alpha, layout(x)), stand_in(x)
        ctx.save_for_backward(torch.ops.tithe.slope_codes.default(x, kind, alpha))
        if inplace and slope.forward_ is not None:
            ctx.mark_dirty(x)
            return slope.forward_(x, alpha)
        return slope.forward(x, alpha)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        """The gradient gx = gy d̂ by the coded derivative: |gx − stock's| ≤ |gy| / (2 N), rounding apart."""
        (codes,), settings = ctx.saved_tensors, ctx.settings
        gx = entrywise(grads[0], lambda gy: torch.ops.tithe.slope_grad.default(gy, codes, *settings))
        if differentiated():
            error = partial(refusal, f"{settings[0]} in a lean model", "a code of its derivative", IN_FULL)
            (gx,) = missing((gx,), (ctx.x,), error)
        return gx, None, None, None


def _gate(x: Any, kind: str, low: float, high: float, inplace: bool) -> Any:
    if inplace and torch.compiler.is_compiling():  # a captured graph has no dirty inputs
        return NotImplemented
    return Gated.apply(x, kind, low, high, inplace)


def _slope(x: Any, kind: str, alpha: float = 1.0, inplace: bool = False) -> Any:
    if inplace and torch.compiler.is_compiling():
        return NotImplemented
    return Sloped.apply(x, kind, alpha, inplace)


@catch(
    *(F.relu, torch.relu, Tensor.relu),
    keeps="n / 8: a bit an element",
    stock="4 n",
    family="two derivatives, in place too",
    note="=",
    asked=True,
)
def relu(leanness: Leanness, input: Tensor, inplace: bool = False) -> Any:
    """The map y = max(x, 0); the bit says x > 0, and gx = gy there, bit for bit stock's."""
    return _gate(input, "relu", 0.0, math.inf, inplace)


@catch(F.relu_, torch.relu_, Tensor.relu_, like=relu)
def relu_(leanness: Leanness, input: Tensor) -> Any:
    """ReLU in place: the same bits, and the output in the memory of x."""
    return _gate(input, "relu", 0.0, math.inf, True)


@catch(F.relu6, like=relu)
def relu6(leanness: Leanness, input: Tensor, inplace: bool = False) -> Any:
    """The map y = min(max(x, 0), 6); gx = gy where 0 < x < 6, bit for bit stock's."""
    return _gate(input, "hardtanh", 0.0, 6.0, inplace)


@catch(F.hardtanh, like=relu)
def hardtanh(
    leanness: Leanness, input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False
) -> Any:
    """The map y = min(max(x, low), high); gx = gy where low < x < high, bit for bit stock's."""
    if not _numbers(min_val, max_val) or not -math.inf < min_val <= max_val < math.inf:
        return NotImplemented
    return _gate(input, "hardtanh", float(min_val), float(max_val), inplace)


@catch(F.hardtanh_, like=relu)
def hardtanh_(leanness: Leanness, input: Tensor, min_val: float = -1.0, max_val: float = 1.0) -> Any:
    """Hardtanh in place: the same bits, and the output in the memory of x."""
    return hardtanh(leanness, input, min_val, max_val, True)


@catch(torch.clamp, Tensor.clamp, torch.clip, Tensor.clip, like=relu)
def clamp(leanness: Leanness, input: Tensor, min: Any = None, max: Any = None, *, out: Any = None) -> Any:
    """The map y = min(max(x, low), high) between numbers; gx = gy where low ≤ x ≤ high, bit for bit stock's."""
    return NotImplemented if out is not None else _clamp(input, min, max, False)


@catch(torch.clamp_, Tensor.clamp_, torch.clip_, Tensor.clip_, like=relu)
def clamp_(leanness: Leanness, input: Tensor, min: Any = None, max: Any = None) -> Any:
    """Clamp in place: the same bits, and the output in the memory of x."""
    return _clamp(input, min, max, True)


@catch(torch.clamp_min, Tensor.clamp_min, like=relu)
def clamp_min(leanness: Leanness, input: Tensor, min: Any, *, out: Any = None) -> Any:
    """The map y = max(x, low) of a number low; gx = gy where x ≥ low."""
    return NotImplemented if out is not None else _clamp(input, min, None, False)


@catch(torch.clamp_max, Tensor.clamp_max, like=relu)
def clamp_max(leanness: Leanness, input: Tensor, max: Any, *, out: Any = None) -> Any:
    """The map y = min(x, high) of a number high; gx = gy where x ≤ high."""
    return NotImplemented if out is not None else _clamp(input, None, max, False)


@catch(torch.clamp_min_, Tensor.clamp_min_, like=relu)
def clamp_min_(leanness: Leanness, input: Tensor, min: Any) -> Any:
    """The lower bound in place: y = max(x, low), in the memory of x."""
    return _clamp(input, min, None, True)


@catch(torch.clamp_max_, Tensor.clamp_max_, like=relu)
def clamp_max_(leanness: Leanness, input: Tensor, max: Any) -> Any:
    """The upper bound in place: y = min(x, high), in the memory of x."""
    return _clamp(input, None, max, True)


def _clamp(input: Tensor, low: Any, high: Any, inplace: bool) -> Any:
    bounds = [bound for bound in (low, high) if bound is not None]
    if not bounds or not _numbers(*bounds) or not all(math.isfinite(bound) for bound in bounds):
        return NotImplemented
    lowest, highest = -math.inf if low is None else float(low), math.inf if high is None else float(high)
    return NotImplemented if lowest > highest else _gate(input, "clamp", lowest, highest, inplace)


@catch(F.leaky_relu, like=relu)
def leaky_relu(leanness: Leanness, input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Any:
    """The map y = x where x > 0, else s x; gx = gy or s gy by the bit, bit for bit stock's."""
    if inplace and negative_slope < 0:  # stock refuses
        return NotImplemented
    return _gate(input, "leaky_relu", float(negative_slope), 0.0, inplace)


@catch(F.leaky_relu_, like=relu)
def leaky_relu_(leanness: Leanness, input: Tensor, negative_slope: float = 0.01) -> Any:
    """Leaky ReLU in place, for a slope that stock accepts there."""
    return leaky_relu(leanness, input, negative_slope, True)


@catch(F.hardsigmoid, like=relu)
def hardsigmoid(leanness: Leanness, input: Tensor, inplace: bool = False) -> Any:
    """The map y = min(max(x / 6 + 1/2, 0), 1); gx = gy / 6 where |x| < 3, bit for bit stock's."""
    return _gate(input, "hardsigmoid", 0.0, 0.0, inplace)


@catch(
    F.gelu,
    keeps="n: a code of the derivative",
    stock="4 n",
    family="smooth activation, in place too",
    note="off by at most a bound, below; with `exact=True` 4 n, =",
    asked=True,
    approximate=True,
)
def gelu(leanness: Leanness, input: Tensor, *, approximate: str = "none") -> Any:
    """The map y = x Φ(x), or its tanh form; |gx − stock's| ≤ 0.0025 |gy| from a code of the derivative."""
    return _slope(input, "gelu_tanh" if approximate == "tanh" else "gelu")


@catch(F.silu, like=gelu)
def silu(leanness: Leanness, input: Tensor, inplace: bool = False) -> Any:
    """The map y = x σ(x); |gx − stock's| ≤ 0.0024 |gy| from a code of the derivative."""
    return _slope(input, "silu", inplace=inplace)


@catch(F.hardswish, like=gelu)
def hardswish(leanness: Leanness, input: Tensor, inplace: bool = False) -> Any:
    """The map y = x min(max(x + 3, 0), 6) / 6; |gx − stock's| ≤ 0.0040 |gy| from a code of the derivative."""
    return _slope(input, "hardswish", inplace=inplace)


@catch(F.mish, like=gelu)
def mish(leanness: Leanness, input: Tensor, inplace: bool = False) -> Any:
    """The map y = x tanh(log(1 + eˣ)); |gx − stock's| ≤ 0.0024 |gy| from a code of the derivative."""
    return _slope(input, "mish", inplace=inplace)


@catch(F.elu, like=gelu)
def elu(leanness: Leanness, input: Tensor, alpha: float = 1.0, inplace: bool = False) -> Any:
    """The map y = x where x > 0, else α (eˣ − 1); |gx − stock's| ≤ 0.0020 |gy| for α ≤ 1, from a code."""
    if inplace and alpha < 0:  # stock refuses
        return NotImplemented
    return _slope(input, "elu", float(alpha), inplace)


@catch(F.elu_, like=gelu)
def elu_(leanness: Leanness, input: Tensor, alpha: float = 1.0) -> Any:
    """ELU in place, for an α that stock accepts there."""
    return elu(leanness, input, alpha, True)


def _numbers(*values: object) -> bool:
    return all(isinstance(value, int | float) for value in values)
