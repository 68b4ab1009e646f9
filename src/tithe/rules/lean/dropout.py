"""Dropout that keeps one bit an element where stock keeps the noise, a tensor of the input's size and dtype.

The random numbers are drawn as stock draws them, so a seed gives the same outputs and gradients, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tithe.rules.double_backward import entrywise
from tithe.rules.lean.bitpack import chunks, flat, layout, num_bits, pack, same_layout, unpack
from tithe.rules.lean.dispatch import Leanness, catch
from tithe.rules.transforms import each_row

# pyright: reportIncompatibleMethodOverride=false, reportUntypedFunctionDecorator=false

torch.library.define("tithe::kept_bits", "(Tensor noise) -> Tensor")
torch.library.define(
    "tithe::dropout_grad", "(Tensor gy, Tensor bits, float p, bool native, SymInt[] strides) -> Tensor"
)


@torch.library.impl("tithe::kept_bits", "default")
def _kept_bits(noise: Tensor) -> Tensor:
    values = flat(noise)
    bits = torch.empty(num_bits(values.numel()), dtype=torch.uint8, device=noise.device)
    quick = noise.device.type == "cpu" and noise.dtype in (torch.float32, torch.float64)
    for part in chunks(values):  # numpy compares several times faster
        kept = torch.from_numpy(np.not_equal(values[part].numpy(), 0)) if quick else values[part] != 0
        bits[part.start // 8 : num_bits(part.stop)] = pack(kept)
    return bits


@torch.library.register_fake("tithe::kept_bits")
def _(noise: Tensor) -> Tensor:
    return noise.new_empty(num_bits(noise.numel()), dtype=torch.uint8)


def _noise(bits: Tensor, count: int, p: float, like: Tensor) -> Tensor:
    """What stock multiplies by: 0 or 1 / (1 − p), rounded as stock rounds it."""
    scale = like.new_ones(1).div_(1 - p)
    if like.device.type == "cpu" and like.dtype in (torch.float32, torch.float64):
        mask = np.unpackbits(bits.numpy(), count=count, bitorder="little")
        return torch.from_numpy(np.multiply(mask, scale.numpy()[0]))
    return unpack(bits, count).to(like.dtype).mul_(scale)


@torch.library.impl("tithe::dropout_grad", "default")
def _dropout_grad(gy: Tensor, bits: Tensor, p: float, native: bool, strides: Sequence[int]) -> Tensor:
    back = torch.ops.aten.native_dropout_backward.default
    if not same_layout(gy, strides):
        kept = torch.empty_strided(gy.shape, strides, dtype=torch.bool if native else gy.dtype, device=gy.device)
        flat(kept).copy_(unpack(bits, gy.numel()) if native else _noise(bits, gy.numel(), p, gy))
        return back(gy, kept, 1 / (1 - p)) if native else gy * kept
    gx = torch.empty_like(gy)
    source, out = flat(gy), flat(gx)
    for part in chunks(gy):
        code, count = bits[part.start // 8 : num_bits(part.stop)], part.stop - part.start
        if native:
            out[part] = back(source[part], unpack(code, count), 1 / (1 - p))
        else:
            torch.mul(source[part], _noise(code, count, p, gy), out=out[part])
    return gx


@torch.library.register_fake("tithe::dropout_grad")
def _(gy: Tensor, bits: Tensor, p: float, native: bool, strides: Sequence[int]) -> Tensor:
    return gy * gy.new_empty_strided(gy.shape, strides)


@each_row
class Dropped(torch.autograd.Function):
    """Dropout as autograd runs it: `apply(x, p, inplace)`; keeps which elements are left, a bit each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, inplace: bool) -> Tensor:
        """Stock's output y = x D, D = 0 or 1 / (1 − p); the noise is drawn into it."""
        native = x.device.type != "cpu"
        if not native:
            y = torch.empty_like(x).bernoulli_(1 - p)
            bits, strides = torch.ops.tithe.kept_bits.default(y), layout(y)
            y.div_(1 - p)
            y = x.mul_(y) if inplace else y.mul_(x)
        else:
            y, mask = torch.native_dropout(x, p, True)
            bits, strides = torch.ops.tithe.kept_bits.default(mask), layout(mask)
        if inplace:
            ctx.mark_dirty(x)
        ctx.settings = p, native, strides
        ctx.save_for_backward(bits)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        """Stock's gradient, bit for bit: gx = gy D."""
        (bits,), settings = ctx.saved_tensors, ctx.settings
        gx = entrywise(grads[0], lambda gy: torch.ops.tithe.dropout_grad.default(gy, bits, *settings))
        return gx, None, None


@catch(F.dropout, keeps="n / 8", stock="4 n; on a GPU n", note="=, with the same random numbers", asked=True)
def dropout(leanness: Leanness, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    """The map y = x D with D = 0 or 1 / (1 − p); gx = gy D, where stock keeps D and this a bit of each."""
    if not training or not 0 < p < 1 or input.device.type not in ("cpu", "cuda"):
        return NotImplemented
    if not input.numel() or (inplace and (torch.compiler.is_compiling() or input.device.type != "cpu")):
        return NotImplemented
    return Dropped.apply(input, p, inplace)


@catch(torch.dropout, like=dropout)
def functional_dropout(leanness: Leanness, input: Tensor, p: float, train: bool) -> Any:
    """Dropout as torch spells it, by the same rule."""
    return dropout(leanness, input, p, train)
