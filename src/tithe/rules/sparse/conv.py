"""The rule for `F.conv1d`, `F.conv2d`, `F.conv3d`, grouped and depthwise ones included.

Shapes: x (N, I, ...), gy (N, O, ...), w (O, I / G, ...), G groups.
A frozen convolution keeps only its weight (stock PyTorch keeps its input: pytorch/pytorch issue 133566).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tithe.rules.base import Cost, Rule
from tithe.rules.dispatch import apply_rule, asking, autocast, fits, needs_no_rule, register
from tithe.rules.lean.bitpack import layout
from tithe.rules.sparse.channels import ChannelCut, Usage, members
from tithe.rules.sparse.conv_kernels import Geometry, input_grad
from tithe.rules.sparse.reductions import selected_sum
from tithe.rules.sparse.sparse_gradient import Touch
from tithe.rules.theta import Binding
from tithe.selection import Channels


class Cut:
    """The part of a convolution's weight gradient that is computed, and the channels of x it needs.

    With one group the cut is to touched input channels, touched output channels or both; with several it is to the
    groups that hold a selected weight, all of whose channels are kept.

    Args:
        touch: where the weight is touched.
        groups: G.
        cut_out: compute only the touched output channels (one group).
        cut_in: keep only the touched input channels (one group), or only the touched groups.
    """

    def __init__(self, touch: Touch, groups: int, *, cut_out: bool, cut_in: bool) -> None:
        num_out, num_in = touch.shape[0], touch.shape[1]
        self.groups, self.outs, self.ins = groups, None, None
        self.touch, self.cut_out, self.cut_in = touch, cut_out, cut_in
        self.num_out, self.num_in = num_out, num_in * groups
        if groups > 1 and cut_in:
            per_group = num_out // groups
            touched = torch.div(touch.rows, per_group, rounding_mode="floor").unique()
            self.groups = touched.numel()
            self.ins = members(touched, num_in)
            self.outs = members(touched, per_group)
            self.num_out, self.num_in = self.outs.numel(), self.ins.numel()
        elif groups == 1:
            if cut_out:
                self.outs, self.num_out = touch.rows, touch.rows.numel()
            if cut_in:
                self.ins, self.num_in = touch.columns, touch.columns.numel()

    @property
    def whole(self) -> bool:
        """Whether nothing is cut away."""
        return self.outs is None and self.ins is None

    def keep(self, x: Tensor) -> Tensor:
        """The channels of x that backward needs, as a compact copy, or x itself."""
        return x if self.ins is None else x.index_select(1, self.ins)

    def grad(self, geometry: Geometry, gy: Tensor, kept: Tensor, weight: Tensor) -> Tensor:
        """The selected entries of the weight's gradient."""
        if self.outs is not None:
            gy = gy.index_select(1, self.outs)
        if self.whole:
            return self.gather(geometry.backward(gy, kept, weight, (False, True, False))[1])
        shape = (self.num_out, self.num_in // self.groups, *weight.shape[2:])
        return self.gather(geometry.weight_gradient(gy, kept, shape, self.groups))

    def gather(self, grad: Tensor) -> Tensor:
        """The selected entries of the gradient of the cut weight."""
        if self.outs is None or (self.groups == 1 and self.cut_out):
            at = self.touch.at(self.outs is not None, self.ins is not None)
        else:
            row = torch.searchsorted(self.outs, self.touch.rows).index_select(0, self.touch.row)
            column = self.touch.columns.index_select(0, self.touch.column)
            at = row * self.touch.shape[1] + column
            if self.touch.inner is not None:
                at = at * grad[0, 0].numel() + self.touch.inner
        return grad.reshape(-1).index_select(0, at)

    def cost(self, num_in_positions: int, num_out_positions: int, kernel: int, itemsize: int) -> Cost:
        """The product's operations, the copied channels, and what is kept."""
        copied = (self.ins is not None) * num_in_positions * self.num_in
        copied += (self.outs is not None) * num_out_positions * self.num_out
        return Cost(
            flops=2.0 * num_out_positions * self.num_out * self.num_in // self.groups * kernel,
            moved=itemsize * 2.0 * copied,
            saved=itemsize * num_in_positions * self.num_in,
        )


def cuts(touch: Touch, groups: int) -> list[Cut]:
    """Every way to compute a touched convolution's gradient."""
    out = (False, True) if groups == 1 else (False,)
    return [Cut(touch, groups, cut_out=o, cut_in=i) for o in out for i in (False, True)]


class ConvRule(Rule):
    """A convolution of which single weights and biases are selected.

    Args:
        x: the input, batched.
        weight: the weight's binding, or None when it is frozen.
        bias: the bias's binding, or None when it is frozen, absent or trained whole.
        geometry: the convolution's settings.
    """

    def __init__(self, x: Tensor, weight: Binding | None, bias: Binding | None, geometry: Geometry) -> None:
        self.geometry, self.bias = geometry, bias
        self.shape, self.strides = x.shape, layout(x)
        self.probe = weight.probe if weight is not None else None
        self.cut: Cut | ChannelCut | None = None
        if weight is not None and self.probe is None and isinstance(weight.selection, Channels):
            weight.check_positions(x[:, 0].numel())
            self.cut = ChannelCut(weight.selection)
        elif weight is not None and self.probe is None and weight.touch is not None:
            kernel = weight.weight[0, 0].numel()
            positions = x[:, 0].numel()
            out_positions = max(positions // math.prod(geometry.stride), 1)
            found = cuts(weight.touch, geometry.groups)
            prices = [cut.cost(positions, out_positions, kernel, x.element_size()).price for cut in found]
            self.cut = found[prices.index(min(prices))]

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The stock operation, the weight cast to x's dtype under autocast."""
        y = self.geometry.forward(x, weight, bias)
        if self.probe is not None:
            self.probe.used(Usage.convolution(x, y, self.geometry.groups))
        return y, ()

    def keep(self, x: Tensor, extra: tuple[Tensor, ...], need_x: bool) -> tuple[Tensor, ...]:
        """The channels that the cut needs; all of x for a probe; nothing for a frozen weight."""
        if self.cut is not None:
            return (self.cut.keep(x),)
        return () if self.probe is None else (x,)

    def backward(
        self, gy: Tensor, weight: Tensor, kept: tuple[Tensor, ...], need_x: bool, need_bias: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """One stock call where nothing is cut; otherwise the input gradient and the cut apart."""
        geometry, weight = self.geometry, weight.to(gy.dtype)
        gx = gtw = gb = None
        asks_bias = need_bias or (self.bias is not None and self.bias.probe is None)
        if isinstance(self.cut, Cut) and self.cut.whole:
            gx, gw, gb = geometry.backward(gy, kept[0], weight, (need_x, True, asks_bias))
            gtw = self.cut.gather(gw)
        else:
            if need_x:
                gx = input_grad(gy, weight, self.shape, self.strides, geometry)
            if isinstance(self.cut, ChannelCut):
                gtw = self.cut.grad(geometry.weight_gradient, gy, kept[0])
            elif self.cut is not None:
                gtw = self.cut.grad(geometry, gy, kept[0], weight)
            elif self.probe is not None:
                x = kept[0]
                self.probe.per_sample(
                    lambda rows: geometry.backward(gy[rows], x[rows], weight, (False, True, False))[1], x.shape[0]
                )
            if need_bias:
                gb = gy.sum([axis for axis in range(gy.dim()) if axis != 1])
        gtb = None
        if self.bias is not None and gb is not None and self.bias.probe is None:
            gtb = gb.index_select(0, self.bias.indices)
        elif self.bias is not None:
            gtb = selected_sum(self.bias, gy.movedim(1, -1))
        return gx, gb if need_bias else None, gtw, gtb


def _conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int],
    padding: str | int | Sequence[int],
    dilation: int | Sequence[int],
    groups: int,
    axes: int,
) -> Tensor:
    if needs_no_rule(weight, bias) or not fits(x, weight) or x.dim() not in (axes + 1, axes + 2):
        return NotImplemented
    geometry = Geometry.of(weight, axes, stride, padding, dilation, groups)
    if geometry is None:
        return NotImplemented
    bound = asking(weight)
    if bound is not None and not bound.fits(groups, transposed=False):
        return NotImplemented
    if torch.compiler.is_compiling() and (_varies(bound, groups) or not x.is_contiguous()):
        return NotImplemented  # a captured graph has no shapes that depend on data, and one layout for gradients
    x = autocast(x)
    batched = x if x.dim() == axes + 2 else x.unsqueeze(0)
    rule = ConvRule(batched, bound, asking(bias), geometry)
    y = apply_rule(rule, batched, weight, bias)
    return y if x.dim() == axes + 2 else y.squeeze(0)


def _varies(bound: Binding | None, groups: int) -> bool:
    """Whether shapes in backward follow from which groups are selected."""
    if bound is None or groups == 1:
        return False
    depthwise = bound.weight.shape[1] == 1 and isinstance(bound.selection, Channels)
    return not depthwise


def _register(operation: Callable[..., Tensor], axes: int) -> None:
    @register(operation)
    def conv(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: str | int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
    ) -> Tensor:
        return _conv(input, weight, bias, stride, padding, dilation, groups, axes)


for _axes, _operation in enumerate((F.conv1d, F.conv2d, F.conv3d), start=1):
    _register(_operation, _axes)
