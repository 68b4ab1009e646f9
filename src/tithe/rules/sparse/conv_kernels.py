"""One convolution: its settings, its stock kernels, and the gradient of its input without the input.

Shapes: x (N, I, ...), gy (N, O, ...), w (O, I / G, ...), transposed (I, O / G, ...); G groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tithe.rules.double_backward import differentiated


class Geometry(NamedTuple):
    """The settings of a convolution, in the order of `torch.convolution`."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    transposed: bool
    output_padding: list[int]
    groups: int

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The stock convolution, kernel and bias cast to x's dtype."""
        return torch.convolution(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), *self)

    def backward(
        self, gy: Tensor, x: Tensor, weight: Tensor, mask: tuple[bool, bool, bool]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of (x, weight, bias) where `mask` asks for them."""
        sizes = [weight.shape[1] * self.groups if self.transposed else weight.shape[0]] if mask[2] else None
        return torch.ops.aten.convolution_backward.default(gy, x, weight, sizes, *self, list(mask))

    def weight_gradient(self, gy: Tensor, x: Tensor, shape: tuple[int, ...], groups: int) -> Tensor:
        """The gradient of a weight of `shape` in so many groups that has met the channels of x."""
        like = gy.new_empty(shape)  # not expanded: some kernels lay the gradient out alike
        return self._replace(groups=groups).backward(gy, x, like, (False, True, False))[1]


class Convolution(NamedTuple):
    """One call of a convolution, read off its arguments.

    Args:
        x: the input, batched.
        weight: the kernel.
        bias: the bias, or None.
        geometry: the settings.
        batched: whether x was given so.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    geometry: Geometry
    batched: bool

    @classmethod
    def straight(
        cls,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: str | int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
    ) -> Convolution | None:
        """From the arguments of `F.conv1d`, `conv2d`, `conv3d`; None where stock pads one side more, or refuses x."""
        axes = weight.dim() - 2
        dilations = per_axis(dilation, axes)
        if isinstance(padding, str):
            total = [d * (k - 1) for d, k in zip(dilations, weight.shape[2:], strict=True)]
            if padding == "same" and any(t % 2 for t in total):
                return None
            paddings = [t // 2 for t in total] if padding == "same" else [0] * axes
        else:
            paddings = per_axis(padding, axes)
        geometry = Geometry(per_axis(stride, axes), paddings, dilations, False, [0] * axes, groups)
        return cls._of(input, weight, bias, geometry)

    @classmethod
    def transpose(
        cls,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        output_padding: int | Sequence[int] = 0,
        groups: int = 1,
        dilation: int | Sequence[int] = 1,
    ) -> Convolution | None:
        """From the arguments of `F.conv_transpose1d` and its kin; None where stock refuses x."""
        axes = weight.dim() - 2
        strides, paddings, dilations, more = (per_axis(v, axes) for v in (stride, padding, dilation, output_padding))
        return cls._of(input, weight, bias, Geometry(strides, paddings, dilations, True, more, groups))

    @classmethod
    def _of(cls, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Convolution | None:
        if x.dim() not in (weight.dim() - 1, weight.dim()):
            return None
        batched = x.dim() == weight.dim()
        return cls(x if batched else x.unsqueeze(0), weight, bias, geometry, batched)

    def finish(self, y: Tensor) -> Tensor:
        """The output without the axis that x was given."""
        return y if self.batched else y.squeeze(0)


def input_grad(gy: Tensor, weight: Tensor, shape: Sequence[int], strides: Sequence[int], geometry: Geometry) -> Tensor:
    """The gradient of a convolution's input of this shape and strides, as stock computes it, without the input.

    Stock's kernel wants an input to read its shape and layout from. It gets the memory of gy under another shape where
    that is large enough; an input expanded from one element would be written out in full, in another layout.
    """
    options = gy.dtype, gy.device
    num_elements, element = torch.Size(shape).numel(), gy.element_size()
    plain = not (torch.compiler.is_compiling() or differentiated())
    if plain and gy.untyped_storage().nbytes() >= num_elements * element:
        like = gy.as_strided(shape, strides, 0)
    elif _turns(gy, weight, shape, strides, geometry):
        return _turned(gy, weight, shape, geometry)
    else:
        like = torch.empty_strided(shape, strides, dtype=options[0], device=options[1])
    mask = [True, False, False]
    return torch.ops.aten.convolution_backward.default(gy, like, weight, None, *geometry, mask)[0]


def _turns(gy: Tensor, weight: Tensor, shape: Sequence[int], strides: Sequence[int], geometry: Geometry) -> bool:
    """Whether the transposed convolution gives stock's bits at its speed; tried for these on torch 2.13."""
    if gy.device.type != "cpu" or gy.dtype not in (torch.float32, torch.float64) or geometry.transposed:
        return False
    if geometry.groups != 1 and not geometry.groups == shape[1] == weight.shape[0]:
        return False
    flat_kernel = weight.shape[2:].numel() == 1  # its backward is up to three times faster than its transpose
    row_major = gy.is_contiguous() and torch.empty(shape, device="meta").stride() == tuple(strides)
    last = gy.dim() == 4 and gy.is_contiguous(memory_format=torch.channels_last) and strides[1] == 1
    return not flat_kernel and (row_major or last)


def _turned(gy: Tensor, weight: Tensor, shape: Sequence[int], geometry: Geometry) -> Tensor:
    stride, padding, dilation, _, _, groups = geometry
    left = [
        size - (out - 1) * s + 2 * p - d * (k - 1) - 1
        for size, out, s, p, d, k in zip(
            shape[2:], gy.shape[2:], stride, padding, dilation, weight.shape[2:], strict=True
        )
    ]
    return torch.convolution(gy, weight, None, stride, padding, dilation, True, left, groups)


def per_axis(value: int | Sequence[int], axes: int) -> list[int]:
    """One number for each spatial axis."""
    if isinstance(value, int):
        return [value] * axes
    return list(value) * axes if len(value) == 1 else list(value)
