"""Rules for the scale and shift of norms, and for a vector that multiplies the last axis.

Shapes: N positions, D normalised entries, C channels; x and gy (..., D) or (N, C, ...); scale and shift (D,) or (C,).
The normalised value is written x̂.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from tithe.rules.base import Rule
from tithe.rules.dispatch import Call, asking, register
from tithe.rules.double_backward import differentiated
from tithe.rules.sparse.reductions import selected_sum
from tithe.rules.theta import Binding

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class LayerNormRule(Rule):
    """Layer norm: keeps what stock keeps while the input needs a gradient, else only the selected entries of x̂.

    Args:
        shape: the normalised axes.
        eps: added to the variance.
        weight: the scale's binding, or None when it is frozen.
        bias: the shift's binding, or None when it is frozen, absent or trained whole.
    """

    twice = True

    def __init__(self, shape: list[int], eps: float, weight: Binding | None, bias: Binding | None) -> None:
        self.shape, self.eps, self.weight, self.bias = shape, eps, weight, bias
        self.width = math.prod(shape)

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The output of the stock operation; its mean and 1/σ."""
        y, mean, rstd = torch.native_layer_norm(x, self.shape, weight, bias, self.eps)
        return y, (mean, rstd)

    def keep(self, x: Tensor, extra: tuple[Tensor, ...], need_x: bool) -> tuple[Tensor, ...]:
        """(x, mean, 1/σ) for an input gradient; otherwise x̂ at the selected entries, or nothing."""
        if need_x or (self.weight is not None and self.weight.probe is not None):
            return (x, *extra)
        if self.weight is None:
            return ()
        mean, rstd = (t.reshape(-1, 1) for t in extra)
        x_NK = x.reshape(-1, self.width).index_select(1, self.weight.indices)
        return ((x_NK - mean) * rstd,)

    def backward(
        self, gy: Tensor, weight: Tensor, kept: tuple[Tensor, ...], need_x: bool, need_bias: bool
    ) -> Gradients:
        """The input gradient of the stock kernel; Σ gy x̂ and Σ gy at the selected entries."""
        gx = gtw = gtb = None
        gy_ND = gy.reshape(-1, self.width)
        if len(kept) == 3:
            x, mean, rstd = kept
            probed = self.weight is not None and self.weight.probe is not None
            wants_scale = self.weight is not None and not probed
            gx, gw, _ = torch.ops.aten.native_layer_norm_backward.default(
                gy, x, self.shape, mean, rstd, weight, weight, [need_x, wants_scale, False]
            )
            if self.weight is not None and wants_scale:
                gtw = gw.reshape(-1).index_select(0, self.weight.indices)
            elif self.weight is not None:
                xhat = (x.reshape(-1, self.width) - mean.reshape(-1, 1)) * rstd.reshape(-1, 1)
                gtw = selected_sum(self.weight, gy_ND, xhat)
        elif self.weight is not None:
            gtw = (gy_ND.index_select(1, self.weight.indices) * kept[0]).sum(0)
        if self.bias is not None:
            gtb = selected_sum(self.bias, gy_ND)
        gb = gy_ND.sum(0).reshape(self.shape) if need_bias else None
        return gx, gb, gtw, gtb


def _wide(x: Tensor) -> Tensor:
    """At least float32: squares and means of shorter numbers lose what they are to tell apart."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


class RMSNormRule(Rule):
    """Root-mean-square norm: keeps x and 1/σ, where stock's composition on a CPU keeps several tensors of x's size.

    Args:
        shape: the normalised axes.
        eps: added to the mean square.
        weight: the scale's binding, or None when it is frozen.
    """

    twice = True

    def __init__(self, shape: list[int], eps: float, weight: Binding | None) -> None:
        self.shape, self.eps, self.weight = shape, eps, weight
        self.width = math.prod(shape)

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The output of the stock operation; 1/σ of each position."""
        return F.rms_norm(x, self.shape, weight, self.eps), (self._root(x),)

    def _root(self, x: Tensor) -> Tensor:
        return torch.rsqrt(_wide(x).reshape(-1, self.width).square().mean(1, keepdim=True) + self.eps)

    def keep(self, x: Tensor, extra: tuple[Tensor, ...], need_x: bool) -> tuple[Tensor, ...]:
        """(x, 1/σ) for an input gradient; otherwise x̂ at the selected entries, or nothing."""
        if need_x or (self.weight is not None and self.weight.probe is not None):
            return (x, *extra)
        if self.weight is None:
            return ()
        return ((x.reshape(-1, self.width).index_select(1, self.weight.indices) * extra[0]).to(x.dtype),)

    def backward(
        self, gy: Tensor, weight: Tensor, kept: tuple[Tensor, ...], need_x: bool, need_bias: bool
    ) -> Gradients:
        """Input gradient (gy w − x̂ mean(gy w x̂)) / σ; Σ gy x̂ at the selected entries."""
        gx = gtw = None
        gy_ND = gy.reshape(-1, self.width)
        if len(kept) == 1 and self.weight is not None:
            gtw = (gy_ND.index_select(1, self.weight.indices) * kept[0]).sum(0)
        elif kept:
            x, rstd = kept[0], self._root(kept[0]) if differentiated() else kept[-1]
            xhat, gy_ND = _wide(x).reshape(-1, self.width) * rstd, _wide(gy_ND)
            if need_x:
                scaled = gy_ND * weight.reshape(-1)
                mean = (scaled * xhat).mean(1, keepdim=True)
                gx = ((scaled - xhat * mean) * rstd).reshape(x.shape).to(x.dtype)
            if self.weight is not None:
                gtw = selected_sum(self.weight, gy_ND, xhat)
                gtw = None if gtw is None else gtw.to(weight.dtype)
        return gx, None, gtw, None


class BatchNormRule(Rule):
    """Batch norm in evaluation mode: an affine map of each channel; keeps the selected channels of x and nothing else.

    Args:
        mean: running mean (C,).
        variance: running variance (C,).
        eps: added to the variance.
        weight: the scale's binding, or None when it is frozen.
        bias: the shift's binding, or None when it is frozen, absent or trained whole.
    """

    twice = True

    def __init__(
        self, mean: Tensor, variance: Tensor, eps: float, weight: Binding | None, bias: Binding | None
    ) -> None:
        self.mean, self.variance, self.eps, self.weight, self.bias = mean, variance, eps, weight, bias
        self.copies = weight is not None

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The output of the stock operation, with running statistics."""
        return F.batch_norm(x, self.mean, self.variance, weight, bias, False, 0.0, self.eps), ()

    def keep(self, x: Tensor, extra: tuple[Tensor, ...], need_x: bool) -> tuple[Tensor, ...]:
        """1/σ, and x̂ of the selected channels (of all for a probe)."""
        rstd = torch.rsqrt(self.variance + self.eps)
        if self.weight is None:
            return (rstd,)
        mean = self.mean
        if self.weight.probe is None:
            idx = self.weight.indices
            x, mean, scale = x.index_select(1, idx), mean.index_select(0, idx), rstd.index_select(0, idx)
        else:
            scale = rstd
        view = [1, -1] + [1] * (x.dim() - 2)
        return rstd, ((x - mean.view(view)) * scale.view(view)).to(x.dtype)

    def backward(
        self, gy: Tensor, weight: Tensor, kept: tuple[Tensor, ...], need_x: bool, need_bias: bool
    ) -> Gradients:
        """Gradients gx = gy w / σ, and Σ gy x̂ and Σ gy at the selected channels."""
        gx = gtw = gtb = None
        if need_x:
            gx = (gy * (weight * kept[0]).view([1, -1] + [1] * (gy.dim() - 2))).to(gy.dtype)
        if self.weight is not None and self.weight.probe is not None:
            gtw = selected_sum(self.weight, gy.movedim(1, -1), kept[1].movedim(1, -1))
        elif self.weight is not None:
            product = gy.index_select(1, self.weight.indices) * kept[1]
            gtw = product.sum([axis for axis in range(product.dim()) if axis != 1])
        last = gy.movedim(1, -1)
        if self.bias is not None:
            gtb = selected_sum(self.bias, last)
        gb = last.sum(tuple(range(last.dim() - 1))) if need_bias else None
        return gx, gb, gtw, gtb


class ScaleRule(Rule):
    """y = w x along the last axis, as in models that write their own RMS norm; keeps the selected columns of x.

    Args:
        weight: the vector's binding.
    """

    twice = True

    def __init__(self, weight: Binding) -> None:
        self.weight = weight

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The product w x."""
        return weight * x, ()

    def keep(self, x: Tensor, extra: tuple[Tensor, ...], need_x: bool) -> tuple[Tensor, ...]:
        """The selected columns, or all of x for a probe."""
        return (x if self.weight.probe is not None else x.index_select(-1, self.weight.indices),)

    def backward(
        self, gy: Tensor, weight: Tensor, kept: tuple[Tensor, ...], need_x: bool, need_bias: bool
    ) -> Gradients:
        """Gradients gx = gy w, and Σ gy x at the selected entries."""
        gx = gy * weight if need_x else None
        if self.weight.probe is not None:
            return gx, None, selected_sum(self.weight, gy, kept[0]), None
        product = gy.index_select(-1, self.weight.indices) * kept[0]
        return gx, None, product.reshape(-1, self.weight.indices.numel()).sum(0), None


@register(
    F.layer_norm,
    keeps="x, mean, 1/σ while x needs a gradient; else x̂[:, entries]",
    stock="x, mean, 1/σ",
    probes=True,
    cast="float32",
)
def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Call:
    """The norm y = w x̂ + b; ∇w = Σ gy x̂ and ∇b = Σ gy at the selected entries."""
    if weight is None:
        return NotImplemented
    shape = list(normalized_shape)
    return Call(lambda x, *of: LayerNormRule(shape, eps, *of), input, weight, bias)


@register(
    F.rms_norm,
    keeps="x, 1/σ while x needs a gradient; else x̂[:, entries]",
    stock="on a CPU, several of x's size",
    family="RMS norm",
    probes=True,
    cast="",
)
def rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Call:
    """The norm y = w x / √(mean x² + ε); ∇w = Σ gy x̂ at the selected entries."""
    if weight is None:
        return NotImplemented
    if eps is None:  # stock takes that of the dtype it computes in
        eps = torch.finfo(torch.float64 if input.dtype == torch.float64 else torch.float32).eps
    shape, epsilon = list(normalized_shape), eps
    return Call(lambda x, of_weight, _: RMSNormRule(shape, epsilon, of_weight), input, weight)


class Evaluated(NamedTuple):
    """One call of a batch norm with running statistics, read off its arguments."""

    x: Tensor
    mean: Tensor
    variance: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    @classmethod
    def of(
        cls,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Evaluated | None:
        """From the arguments of `F.batch_norm`; None with batch statistics, for which all of x is needed anyway."""
        if training or running_mean is None or running_var is None:
            return None
        return cls(input, running_mean, running_var, weight, bias, eps)

    def rule(self, x: Tensor, weight: Binding | None, bias: Binding | None) -> BatchNormRule:
        """The rule of the call."""
        return BatchNormRule(self.mean, self.variance, self.eps, weight, bias)


@register(
    F.batch_norm,
    keeps="1/σ, and x̂[:, channels]",
    stock="x",
    family="batch norm in evaluation mode",
    probes=True,
    frozen=True,
    cast="",
)
def batch_norm(*args: Any, **kwargs: Any) -> Call:
    """The map y = w (x − μ) / σ + b of running μ and σ; ∇w = Σ gy x̂ and ∇b = Σ gy at the selected channels."""
    found = Evaluated.of(*args, **kwargs)
    if found is None or found.weight is None:
        return NotImplemented
    return Call(found.rule, found.x, found.weight, found.bias)


@register(
    torch.mul,
    Tensor.mul,
    Tensor.__mul__,
    Tensor.__rmul__,
    keeps="x[..., entries]",
    stock="x",
    family="vector along the last axis",
    probes=True,
    cast="",
)
def mul(input: Tensor, other: Tensor) -> Call:
    """The product y = w x for a vector w along the last axis of x; ∇w = Σ gy x at the selected entries."""
    weight, x = (input, other) if asking(input) is not None else (other, input)
    if asking(weight) is None or not isinstance(cast(object, x), Tensor) or weight.dim() != 1:
        return NotImplemented
    if x.dtype != weight.dtype or x.dim() < 1 or x.shape[-1] != weight.shape[0]:
        return NotImplemented
    return Call(lambda x, of_weight, _: ScaleRule(of_weight), x, weight)
