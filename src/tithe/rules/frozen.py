"""Convolutions whose kernel is frozen keep the kernel, where stock keeps their input (pytorch/pytorch issue 133566).

Shapes: x (N, I, ...), gy (N, O, ...), w (O, I / G, ...), transposed (I, O / G, ...); G groups.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from tithe.rules.carrier import Carrier, asking, autocast, fits, raw
from tithe.rules.catch import Leanness, catch, ordinary
from tithe.rules.codes import layout

# pyright: reportIncompatibleMethodOverride=false


class Settings(NamedTuple):
    """The settings of a convolution, in the order of `torch.convolution`."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    transposed: bool
    output_padding: list[int]
    groups: int


def input_grad(gy: Tensor, weight: Tensor, shape: Sequence[int], strides: Sequence[int], settings: Settings) -> Tensor:
    """The gradient of a convolution's input of this shape and strides, as stock computes it, without the input.

    Stock's kernel wants an input to read its shape and layout from. It gets the memory of gy under another shape where
    that is large enough; an input expanded from one element would be written out in full, in another layout.
    """
    options = gy.dtype, gy.device
    num_elements, element = torch.Size(shape).numel(), gy.element_size()
    if not torch.compiler.is_compiling() and gy.untyped_storage().nbytes() >= num_elements * element:
        like = gy.as_strided(shape, strides, 0)
    elif _turns(gy, weight, shape, strides, settings):
        return _turned(gy, weight, shape, settings)
    else:
        like = torch.empty_strided(shape, strides, dtype=options[0], device=options[1])
    mask = [True, False, False]
    return torch.ops.aten.convolution_backward.default(gy, like, weight, None, *settings, mask)[0]


def _turns(gy: Tensor, weight: Tensor, shape: Sequence[int], strides: Sequence[int], settings: Settings) -> bool:
    """Whether the transposed convolution gives stock's bits at its speed; tried for these on torch 2.13."""
    if gy.device.type != "cpu" or gy.dtype not in (torch.float32, torch.float64) or settings.transposed:
        return False
    if settings.groups != 1 and not settings.groups == shape[1] == weight.shape[0]:
        return False
    flat_kernel = weight.shape[2:].numel() == 1  # its backward is up to three times faster than its transpose
    row_major = gy.is_contiguous() and torch.empty(shape, device="meta").stride() == tuple(strides)
    last = gy.dim() == 4 and gy.is_contiguous(memory_format=torch.channels_last) and strides[1] == 1
    return not flat_kernel and (row_major or last)


def _turned(gy: Tensor, weight: Tensor, shape: Sequence[int], settings: Settings) -> Tensor:
    stride, padding, dilation, _, _, groups = settings
    left = [
        size - (out - 1) * s + 2 * p - d * (k - 1) - 1
        for size, out, s, p, d, k in zip(
            shape[2:], gy.shape[2:], stride, padding, dilation, weight.shape[2:], strict=True
        )
    ]
    return torch.convolution(gy, weight, None, stride, padding, dilation, True, left, groups)


class FrozenConv(torch.autograd.Function):
    """A convolution with a frozen kernel: `apply(x, weight, bias, settings)`; keeps the kernel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, settings: Settings) -> Tensor:
        """The stock operation, kernel and bias cast to x's dtype under autocast."""
        ctx.settings, ctx.shape, ctx.strides = settings, x.shape, layout(x)
        ctx.save_for_backward(weight)
        return torch.convolution(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), *settings)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        """The input gradient of the stock kernel; Σ gy for a bias that is trained."""
        (weight,), gy = ctx.saved_tensors, grads[0]
        gx = gb = None
        if ctx.needs_input_grad[0]:
            gx = input_grad(gy, weight.to(gy.dtype), ctx.shape, ctx.strides, ctx.settings)
        if ctx.needs_input_grad[2]:
            gb = gy.sum([axis for axis in range(gy.dim()) if axis != 1])
        return gx, None, gb, None


def _per_axis(value: Any, axes: int) -> list[int]:
    if isinstance(value, int):
        return [value] * axes
    return list(value) * axes if len(value) == 1 else list(value)


def _same(padding: str, weight: Tensor, dilation: list[int]) -> list[int] | None:
    """Padding by name as numbers, or None where stock pads one side more."""
    total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
    if padding != "same":
        return [0] * len(dilation)
    return None if any(t % 2 for t in total) else [t // 2 for t in total]


def _frozen(weight: Tensor) -> bool:
    """Whether no gradient is asked of a kernel, carried or not."""
    return asking(weight) is None and not raw(weight).requires_grad


def _conv(x: Any, weight: Any, bias: Any, axes: int, settings: Callable[[], Settings | None]) -> Any:
    if not ordinary(x) or not isinstance(weight, Tensor) or not _frozen(weight) or not fits(x, weight):
        return NotImplemented
    if isinstance(bias, Carrier) and asking(bias) is not None:
        return NotImplemented
    bias = None if bias is None else raw(bias)
    if not x.requires_grad and (bias is None or not bias.requires_grad):
        return NotImplemented
    found = settings()
    if found is None or x.dim() not in (axes + 1, axes + 2):
        return NotImplemented
    x = autocast(x)
    y = FrozenConv.apply(x if x.dim() == axes + 2 else x.unsqueeze(0), raw(weight), bias, found)
    return y if x.dim() == axes + 2 else y.squeeze(0)


def _register(operation: Callable[..., Tensor], transpose: Callable[..., Tensor], axes: int) -> None:
    @catch(operation)
    def conv(
        leanness: Leanness,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: str | int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
    ) -> Any:
        def settings() -> Settings | None:
            dilations = _per_axis(dilation, axes)
            paddings = _same(padding, weight, dilations) if isinstance(padding, str) else _per_axis(padding, axes)
            if paddings is None:
                return None
            return Settings(_per_axis(stride, axes), paddings, dilations, False, [0] * axes, groups)

        return _conv(input, weight, bias, axes, settings)

    @catch(transpose)
    def conv_transpose(
        leanness: Leanness,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        output_padding: int | Sequence[int] = 0,
        groups: int = 1,
        dilation: int | Sequence[int] = 1,
    ) -> Any:
        def settings() -> Settings:
            values = (_per_axis(value, axes) for value in (stride, padding, dilation, output_padding))
            strides, paddings, dilations, more = values
            return Settings(strides, paddings, dilations, True, more, groups)

        return _conv(input, weight, bias, axes, settings)


_register(F.conv1d, F.conv_transpose1d, 1)
_register(F.conv2d, F.conv_transpose2d, 2)
_register(F.conv3d, F.conv_transpose3d, 3)
