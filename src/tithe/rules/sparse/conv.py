"""The rule for `F.conv1d`, `F.conv2d`, `F.conv3d`, grouped and depthwise ones included.

Shapes: x (N, I, ...), gy (N, O, ...), w (O, I / G, ...), transposed (I, O / G, ...); G groups.
A frozen convolution keeps only its weight (stock PyTorch keeps its input: pytorch/pytorch issue 133566).
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tithe.rules.base import Cost, Rule
from tithe.rules.dispatch import Call, asking, register
from tithe.rules.lean.bitpack import layout
from tithe.rules.sparse.channels import ChannelCut, Usage, members
from tithe.rules.sparse.conv_kernels import Convolution, Geometry, input_grad
from tithe.rules.sparse.reductions import selected_sum
from tithe.rules.sparse.sparse_gradient import Touch
from tithe.rules.theta import Binding
from tithe.selection import Channels


class Cut:
    """The part of a convolution's weight gradient that is computed, and the channels of x it needs.

    With one group the cut is to touched input channels, touched output channels or both; with several it is to the
    groups that hold a selected weight, all of whose channels are kept.

    Args:
        touch: where the weight is touched: rows along its axis 0, columns along its axis 1.
        groups: G.
        cut_out: compute only the touched output channels (one group).
        cut_in: keep only the touched input channels (one group), or only the touched groups.
        transposed: the weight's axis 0 meets x and its axis 1 the output, not the other way round.
    """

    def __init__(self, touch: Touch, groups: int, *, cut_out: bool, cut_in: bool, transposed: bool = False) -> None:
        self.touch, self.groups = touch, groups
        self.by_group = groups > 1 and cut_in
        cut_rows, cut_columns = (cut_in, cut_out) if transposed else (cut_out, cut_in)
        rows = columns = None
        if self.by_group:
            each = touch.shape[0] // groups
            touched = torch.div(touch.rows, each, rounding_mode="floor").unique()
            self.groups = touched.numel()
            rows, columns = members(touched, each), members(touched, touch.shape[1])
        elif groups == 1:
            rows = touch.rows if cut_rows else None
            columns = touch.columns if cut_columns else None
        self.rows, self.columns = rows, columns
        self.num_rows = touch.shape[0] if rows is None else rows.numel()
        self.num_columns = touch.shape[1] * groups if columns is None else columns.numel()
        self.ins, self.outs = (rows, columns) if transposed else (columns, rows)
        self.num_in, self.num_out = (
            (self.num_rows, self.num_columns) if transposed else (self.num_columns, self.num_rows)
        )
        self.transposed = transposed

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
        shape = (self.num_rows, self.num_columns // self.groups, *weight.shape[2:])
        return self.gather(geometry.weight_gradient(gy, kept, shape, self.groups))

    def gather(self, grad: Tensor) -> Tensor:
        """The selected entries of the gradient of the cut weight."""
        if not self.by_group or self.rows is None:
            at = self.touch.at(self.rows is not None, self.columns is not None)
        else:
            row = torch.searchsorted(self.rows, self.touch.rows).index_select(0, self.touch.row)
            column = self.touch.columns.index_select(0, self.touch.column)
            at = row * self.touch.shape[1] + column
            if self.touch.inner is not None:
                at = at * grad[0, 0].numel() + self.touch.inner
        return grad.reshape(-1).index_select(0, at)

    def cost(self, num_in_positions: int, num_out_positions: int, kernel: int, itemsize: int) -> Cost:
        """2 · positions · I O / G · kernel operations, the copied channels, and the kept ones.

        Each weight meets every position of the output, or of the input where the convolution is transposed.
        """
        copied = (self.ins is not None) * num_in_positions * self.num_in
        copied += (self.outs is not None) * num_out_positions * self.num_out
        met = num_in_positions if self.transposed else num_out_positions
        return Cost(
            flops=2.0 * met * self.num_out * self.num_in // self.groups * kernel,
            moved=itemsize * 2.0 * copied,
            kept=itemsize * num_in_positions * self.num_in,
        )


def cuts(touch: Touch, groups: int, *, transposed: bool = False) -> list[Cut]:
    """Every way to compute a touched convolution's gradient."""
    out = (False, True) if groups == 1 else (False,)
    return [Cut(touch, groups, cut_out=o, cut_in=i, transposed=transposed) for o in out for i in (False, True)]


class ConvRule(Rule):
    """A convolution of which single weights and biases are selected.

    Args:
        x: the input, batched.
        weight: the weight's binding, or None when it is frozen.
        bias: the bias's binding, or None when it is frozen, absent or trained whole.
        geometry: the convolution's settings.
    """

    twice = True

    def __init__(self, x: Tensor, weight: Binding | None, bias: Binding | None, geometry: Geometry) -> None:
        self.geometry, self.bias = geometry, bias
        self.shape, self.strides = x.shape, layout(x)
        self.probe = weight.probe if weight is not None else None
        self.cut: Cut | ChannelCut | None = None
        if weight is not None and self.probe is None and isinstance(weight.selection, Channels):
            self.cut = ChannelCut(weight.selection)
        elif weight is not None and self.probe is None and weight.touch is not None:
            kernel = weight.weight[0, 0].numel()
            positions = x[:, 0].numel()
            step = math.prod(geometry.stride)
            out_positions = positions * step if geometry.transposed else max(positions // step, 1)
            found = cuts(weight.touch, geometry.groups, transposed=geometry.transposed)
            prices = [cut.cost(positions, out_positions, kernel, x.element_size()).price for cut in found]
            self.cut = found[prices.index(min(prices))]

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The stock operation, the weight cast to x's dtype under autocast."""
        y = self.geometry.forward(x, weight, bias)
        if self.probe is not None:
            self.probe.used(Usage.convolution(x, y, self.geometry.groups, transposed=self.geometry.transposed))
        return y, ()

    def keep(self, x: Tensor, extra: tuple[Tensor, ...], need_x: bool) -> tuple[Tensor, ...]:
        """The channels that the cut needs; all of x for a probe or where it is held; nothing for a frozen weight."""
        if self.cut is not None:
            return (x if self.held else self.cut.keep(x),)
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
            if self.held and self.cut is not None:
                kept = (self.cut.keep(kept[0]),)
            if need_x:
                gx = input_grad(gy, weight, self.shape, self.strides, geometry)
            if isinstance(self.cut, ChannelCut):
                gtw = self.cut.grad(geometry.weight_gradient, gy, kept[0])
            elif self.cut is not None:
                gtw = self.cut.grad(geometry, gy, kept[0], weight)
            elif self.probe is not None and self.probe.hears:
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


def conv_call(found: Convolution | None) -> Call:
    """The call of a convolution, transposed or not; NotImplemented where none was read, or a capture has no shapes."""
    if found is None:
        return NotImplemented
    x, weight, bias, geometry, _ = found
    if torch.compiler.is_compiling() and (_varies(asking(weight), geometry) or not x.is_contiguous()):
        return NotImplemented  # a captured graph has no shapes that depend on data, and one layout for gradients
    return Call(
        partial(ConvRule, geometry=geometry),
        *(x, weight, bias),
        groups=geometry.groups,
        transposed=geometry.transposed,
        axis=1,
        finish=found.finish,
    )


def _varies(bound: Binding | None, geometry: Geometry) -> bool:
    """Whether shapes in backward follow from which groups are selected."""
    if bound is None or geometry.groups == 1:
        return False
    shape = bound.weight.shape
    one_each = shape[0] == geometry.groups if geometry.transposed else shape[1] == 1
    return not (one_each and isinstance(bound.selection, Channels))


@register(
    *(F.conv1d, F.conv2d, F.conv3d),
    keeps="x[:, touched channels], of several groups all in the touched; nothing for biases alone or a frozen weight",
    channels="x[:, channels]",
    stock="x, also for a frozen weight",
    family="convolution",
    probes=True,
    frozen=True,
)
def conv(*args: Any, **kwargs: Any) -> Call:
    """The convolution y = w ∗ x + b; ∇w[o, i] = gy[:, o] ⋆ x[:, i] at the touched channels alone."""
    return conv_call(Convolution.straight(*args, **kwargs))
