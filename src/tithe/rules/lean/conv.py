"""Convolutions whose kernel is frozen keep the kernel, where stock keeps their input (pytorch/pytorch issue 133566).

Shapes: x (N, I, ...), gy (N, O, ...), w (O, I / G, ...), transposed (I, O / G, ...); G groups.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from tithe.rules.dispatch import Carrier, apply_rule, asking, autocast, fits, raw
from tithe.rules.lean.dispatch import Leanness, catch, ordinary
from tithe.rules.sparse.conv import ConvRule
from tithe.rules.sparse.conv_kernels import Geometry, per_axis


def _frozen(weight: Tensor) -> bool:
    """Whether no gradient is asked of a kernel, carried or not."""
    return asking(weight) is None and not raw(weight).requires_grad


def _conv(x: Any, weight: Any, bias: Any, axes: int, geometry: Callable[[], Geometry | None]) -> Any:
    if not ordinary(x) or not isinstance(weight, Tensor) or not _frozen(weight) or not fits(x, weight):
        return NotImplemented
    if isinstance(bias, Carrier) and asking(bias) is not None:
        return NotImplemented
    bias = None if bias is None else raw(bias)
    if not x.requires_grad and (bias is None or not bias.requires_grad):
        return NotImplemented
    found = geometry()
    if found is None or x.dim() not in (axes + 1, axes + 2):
        return NotImplemented
    x = autocast(x)
    batched = x if x.dim() == axes + 2 else x.unsqueeze(0)
    y = apply_rule(ConvRule(batched, None, None, found), batched, weight, bias)
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
        def geometry() -> Geometry | None:
            return Geometry.of(weight, axes, stride, padding, dilation, groups)

        return _conv(input, weight, bias, axes, geometry)

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
        def geometry() -> Geometry:
            values = (per_axis(value, axes) for value in (stride, padding, dilation, output_padding))
            strides, paddings, dilations, more = values
            return Geometry(strides, paddings, dilations, True, more, groups)

        return _conv(input, weight, bias, axes, geometry)


_register(F.conv1d, F.conv_transpose1d, 1)
_register(F.conv2d, F.conv_transpose2d, 2)
_register(F.conv3d, F.conv_transpose3d, 3)
