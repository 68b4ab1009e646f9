"""The derivative of an activation in few bits: one where it has two values, eight where it is smooth.

    forward    x ──> stock's output
                └──> stock's own backward of ones, chunk by chunk ──> code       in the order of x's memory
    backward   gx = gy · derivative(code)

A *gate* (ReLU and its kin) has two derivatives, told apart by a bit. gx is stock's bit for bit: stock's own backward
makes it, from an input that has this derivative.

A *slope* (GELU and its kin) has derivatives in a known range. The code of d is round(N d) + a, with N steps to a
derivative of 1, so that 0 and 1 are met exactly and, but for rounding, |gx − stock's| ≤ |gy| / (2 N).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tithe.rules.lean.bitpack import chunks, flat, longest, num_bits, pack, same_layout, truncate, unpack

# pyright: reportUntypedFunctionDecorator=false

_aten = torch.ops.aten
_INF = math.inf
_WORDS = {
    torch.float32: torch.int32,
    torch.float64: torch.int64,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}
_WIDE = torch.float32, torch.float64


@dataclass(frozen=True)
class Gate:
    """An activation with two derivatives; `low` and `high` are its settings.

    Args:
        forward: (x, low, high) → output.
        forward_: the same in place.
        backward: (gy, x, low, high) → gx, as stock computes it.
        shut: (low, high) → an x with the first derivative, whose bit is 1.
        open: (low, high) → an x with the other, whose bit is 0.
        bounds: (low, high) → the interval in which the bit is 0.
        ends: "out" of the interval, "in", or "nan": out, but what is not a number has bit 0.
        slope: low → the first derivative; the other is `top`.
        top: the derivative inside the interval.
    """

    forward: Callable[[Tensor, float, float], Tensor]
    forward_: Callable[[Tensor, float, float], Tensor]
    backward: Callable[[Tensor, Tensor, float, float], Tensor]
    shut: Callable[[float, float], float]
    open: Callable[[float, float], float]
    bounds: Callable[[float, float], tuple[float, float]]
    ends: str
    slope: Callable[[float], float] = lambda low: 0.0
    top: float = 1.0

    def quick(self, x: Tensor, low: float, high: float) -> bool:
        """Whether numpy, which compares several times faster than torch on a CPU, finds the same bits and gradient."""
        if x.device.type != "cpu" or x.dtype not in _WORDS:
            return False
        if x.dtype in _WIDE:
            return True
        if self.slope(low) or self.top != 1.0:
            return False
        bounds = torch.tensor([b for b in self.bounds(low, high) if math.isfinite(b)], dtype=torch.float64)
        return bool((bounds.to(x.dtype) == bounds).all())


def _limits(low: float, high: float) -> tuple[float | None, float | None]:
    return None if low == -_INF else low, None if high == _INF else high


def _clamp_backward(gy: Tensor, x: Tensor, low: float, high: float) -> Tensor:
    least, most = _limits(low, high)
    if least is None or most is None:
        inside = x <= high if least is None else x >= low
    else:
        inside = (x >= low).logical_and_(x <= high)
    return torch.where(inside, gy, gy.new_zeros(()))


GATES: dict[str, Gate] = {
    "relu": Gate(  # low 0, high inf
        lambda x, low, high: torch.relu(x),
        lambda x, low, high: torch.relu_(x),
        lambda gy, x, low, high: _aten.threshold_backward.default(gy, x, low),
        lambda low, high: -_INF,
        lambda low, high: _INF,
        lambda low, high: (low, high),
        "nan",
    ),
    "hardtanh": Gate(  # stock passes or drops what is not a number by its place in memory
        lambda x, low, high: _aten.hardtanh.default(x, low, high),
        lambda x, low, high: _aten.hardtanh_.default(x, low, high),
        lambda gy, x, low, high: _aten.hardtanh_backward.default(gy, x, low, high),
        lambda low, high: -_INF,
        lambda low, high: low / 2 + high / 2,
        lambda low, high: (low, high),
        "out",
    ),
    "clamp": Gate(  # an infinite bound stands for none
        lambda x, low, high: torch.clamp(x, *_limits(low, high)),
        lambda x, low, high: torch.clamp_(x, *_limits(low, high)),
        _clamp_backward,
        lambda low, high: math.nan,
        lambda low, high: high if low == -_INF else low,
        lambda low, high: (low, high),
        "in",
    ),
    "leaky_relu": Gate(  # low is the slope below zero
        lambda x, low, high: _aten.leaky_relu.default(x, low),
        lambda x, low, high: _aten.leaky_relu_.default(x, low),
        lambda gy, x, low, high: _aten.leaky_relu_backward.default(gy, x, low, False),
        lambda low, high: -1.0,
        lambda low, high: 1.0,
        lambda low, high: (0.0, _INF),
        "out",
        lambda low: low,
    ),
    "hardsigmoid": Gate(
        lambda x, low, high: _aten.hardsigmoid.default(x),
        lambda x, low, high: _aten.hardsigmoid_.default(x),
        lambda gy, x, low, high: _aten.hardsigmoid_backward.default(gy, x),
        lambda low, high: 4.0,
        lambda low, high: 0.0,
        lambda low, high: (-3.0, 3.0),
        "out",
        top=float(np.float32(1 / 6)),
    ),
}


@dataclass(frozen=True)
class Slope:
    """A smooth activation, coded in 8 bits; `alpha` is its setting.

    Args:
        forward: (x, alpha) → output.
        forward_: the same in place.
        backward: (gy, x, alpha) → gx, as stock computes it.
        least: alpha → a lower bound of the derivative.
        most: alpha → an upper bound.
    """

    forward: Callable[[Tensor, float], Tensor]
    forward_: Callable[[Tensor, float], Tensor] | None
    backward: Callable[[Tensor, Tensor, float], Tensor]
    least: Callable[[float], float]
    most: Callable[[float], float]

    def steps(self, alpha: float) -> tuple[int, int]:
        """(N, a): codes to a derivative of 1, and the code of 0."""
        least, most = self.least(alpha), self.most(alpha)
        steps = int(253 / (most - least))
        return steps, math.ceil(-least * steps)

    def bound(self, alpha: float = 1.0) -> float:
        """The largest |gx − stock's| / |gy|, rounding apart: half a step."""
        return 0.5 / self.steps(alpha)[0]


SLOPES: dict[str, Slope] = {
    "gelu": Slope(
        lambda x, alpha: _aten.gelu.default(x),
        None,
        lambda gy, x, alpha: _aten.gelu_backward.default(gy, x),
        lambda alpha: -0.1290,
        lambda alpha: 1.1290,
    ),
    "gelu_tanh": Slope(
        lambda x, alpha: _aten.gelu.default(x, approximate="tanh"),
        None,
        lambda gy, x, alpha: _aten.gelu_backward.default(gy, x, approximate="tanh"),
        lambda alpha: -0.1290,
        lambda alpha: 1.1290,
    ),
    "silu": Slope(
        lambda x, alpha: _aten.silu.default(x),
        lambda x, alpha: _aten.silu_.default(x),
        lambda gy, x, alpha: _aten.silu_backward.default(gy, x),
        lambda alpha: -0.0999,
        lambda alpha: 1.0999,
    ),
    "hardswish": Slope(
        lambda x, alpha: _aten.hardswish.default(x),
        lambda x, alpha: _aten.hardswish_.default(x),
        lambda gy, x, alpha: _aten.hardswish_backward.default(gy, x),
        lambda alpha: -0.5,
        lambda alpha: 1.5,
    ),
    "mish": Slope(
        lambda x, alpha: _aten.mish.default(x),
        lambda x, alpha: _aten.mish_.default(x),
        lambda gy, x, alpha: _aten.mish_backward.default(gy, x),
        lambda alpha: -0.1131,
        lambda alpha: 1.0885,
    ),
    "elu": Slope(  # exp below zero, times alpha
        lambda x, alpha: _aten.elu.default(x, alpha),
        lambda x, alpha: _aten.elu_.default(x, alpha),
        lambda gy, x, alpha: _aten.elu_backward.default(gy, alpha, 1, 1, False, x),
        lambda alpha: min(alpha, 0.0),
        lambda alpha: max(alpha, 1.0),
    ),
}

for _schema in (
    "gate_bits(Tensor x, str kind, float low, float high) -> Tensor",
    "gate_grad(Tensor gy, Tensor bits, str kind, float low, float high, SymInt[] strides) -> Tensor",
    "slope_codes(Tensor x, str kind, float alpha) -> Tensor",
    "slope_grad(Tensor gy, Tensor codes, str kind, float alpha, SymInt[] strides) -> Tensor",
):
    torch.library.define(f"tithe::{_schema.partition('(')[0]}", _schema[_schema.index("(") :])


@torch.library.impl("tithe::gate_bits", "default")
def _gate_bits(x: Tensor, kind: str, low: float, high: float) -> Tensor:
    gate, values = GATES[kind], flat(x)
    bits = torch.empty(num_bits(values.numel()), dtype=torch.uint8, device=x.device)
    if gate.quick(x, low, high):
        out = bits.numpy()
        for part in chunks(values):
            chunk = values[part] if x.dtype in _WIDE else values[part].float()
            shut = _shut(chunk.numpy(), *gate.bounds(low, high), gate.ends)
            out[part.start // 8 : num_bits(part.stop)] = np.packbits(shut, bitorder="little")
        return bits
    ones = torch.ones(longest(values), dtype=x.dtype, device=x.device)
    first = gate.backward(ones[:1], torch.full_like(ones[:1], gate.shut(low, high)), low, high)
    for part in chunks(values):
        chunk = values[part]
        shut = gate.backward(ones[: chunk.numel()], chunk, low, high) == first
        bits[part.start // 8 : num_bits(part.stop)] = pack(shut)
    return bits


def _shut(x: Any, low: float, high: float, ends: str) -> Any:
    """Where the bit is 1."""
    least, most, both = {
        "in": (np.greater_equal, np.less_equal, np.logical_and),
        "out": (np.greater, np.less, np.logical_and),
        "nan": (np.less_equal, np.greater_equal, np.logical_or),
    }[ends]
    tests = [test(x, bound) for test, bound in ((least, low), (most, high)) if math.isfinite(bound)]
    found = tests[0] if len(tests) == 1 else both(*tests, out=tests[0])
    return found if ends == "nan" else np.logical_not(found, out=found)


@torch.library.register_fake("tithe::gate_bits")
def _(x: Tensor, kind: str, low: float, high: float) -> Tensor:
    return x.new_empty(num_bits(x.numel()), dtype=torch.uint8)


@torch.library.impl("tithe::gate_grad", "default")
def _gate_grad(gy: Tensor, bits: Tensor, kind: str, low: float, high: float, strides: Sequence[int]) -> Tensor:
    gate, count, alike = GATES[kind], gy.numel(), same_layout(gy, strides)
    gx = torch.empty_like(gy)
    if alike and gate.quick(gy, low, high):
        _select(flat(gy), bits.numpy(), gate.slope(low), gate.top, flat(gx))
        return gx
    shut, opened = gy.new_tensor(gate.shut(low, high)), gy.new_tensor(gate.open(low, high))
    if not alike:
        x = gy.new_empty_strided(gy.shape, strides)
        flat(x).copy_(torch.where(unpack(bits, count), shut, opened))
        return gate.backward(gy, x, low, high)
    source, out = flat(gy), flat(gx)
    for part in chunks(gy):
        code = bits[part.start // 8 : num_bits(part.stop)]
        x = torch.where(unpack(code, part.stop - part.start), shut, opened)
        out[part] = gate.backward(source[part], x, low, high)
    return gx


def _select(gy: Tensor, bits: Any, slope: float, top: float, out: Tensor) -> None:
    """Out = gy · top where the bit is 0, gy · slope where it is 1: on the bits of the numbers, without branches."""
    kind = _WORDS[gy.dtype]
    words, out_words = gy.view(kind).numpy(), out.view(kind).numpy()
    for part in chunks(gy):
        code = bits[part.start // 8 : num_bits(part.stop)]
        mask = np.unpackbits(code, count=part.stop - part.start, bitorder="little").view(np.int8)
        np.subtract(mask, 1, out=mask)  # all ones where the bit is 0
        if not slope:
            np.bitwise_and(words[part], mask, out=out_words[part])
            if top != 1.0:
                out[part].mul_(top)
            continue
        other = (gy[part] * slope).view(kind).numpy()
        np.bitwise_and(words[part] ^ other, mask, out=out_words[part])
        np.bitwise_xor(out_words[part], other, out=out_words[part])


@torch.library.register_fake("tithe::gate_grad")
def _(gy: Tensor, bits: Tensor, kind: str, low: float, high: float, strides: Sequence[int]) -> Tensor:
    return GATES[kind].backward(gy, gy.new_empty_strided(gy.shape, strides), low, high)


@torch.library.impl("tithe::slope_codes", "default")
def _slope_codes(x: Tensor, kind: str, alpha: float) -> Tensor:
    slope, values = SLOPES[kind], flat(x)
    steps, zero = slope.steps(alpha)
    codes = torch.empty(values.numel(), dtype=torch.uint8, device=x.device)
    scale = torch.full((longest(values),), float(steps), device=x.device)
    for part in chunks(values):
        chunk = values[part].float()
        truncate(slope.backward(scale[: chunk.numel()], chunk, alpha).add_(zero + 0.5), codes[part])
    return codes


@torch.library.register_fake("tithe::slope_codes")
def _(x: Tensor, kind: str, alpha: float) -> Tensor:
    return x.new_empty(x.numel(), dtype=torch.uint8)


@torch.library.impl("tithe::slope_grad", "default")
def _slope_grad(gy: Tensor, codes: Tensor, kind: str, alpha: float, strides: Sequence[int]) -> Tensor:
    steps, zero = SLOPES[kind].steps(alpha)
    if not same_layout(gy, strides):
        derivative = gy.new_empty_strided(gy.shape, strides)
        flat(derivative).copy_(codes.float().sub_(zero).div_(steps))
        return gy * derivative
    gx = torch.empty_like(gy)
    source, out = flat(gy), flat(gx)
    for part in chunks(gy):
        torch.mul(source[part], codes[part].float().sub_(zero).div_(steps), out=out[part])
    return gx


@torch.library.register_fake("tithe::slope_grad")
def _(gy: Tensor, codes: Tensor, kind: str, alpha: float, strides: Sequence[int]) -> Tensor:
    return gy * gy.new_empty_strided(gy.shape, strides)
