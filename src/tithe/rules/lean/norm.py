"""Norms that keep their output instead of their input: the next layer keeps the output anyway, so it is shared.

    x̂ = (y − b) / w        gx = (h − mean h − x̂ mean(h x̂)) / σ,  h = gy w        (RMS norm: without mean h, b = 0)

The error of x̂ against stock's is at most 8 u (|x̂| + |b / w|), u the unit roundoff of y's dtype; where that could pass
256 u (8 u for 16-bit dtypes) the entry is *rough*, and its x̂ is kept besides. With `bits=8` x̂ itself is kept in codes,
off by at most 1/254 of the largest in its block of 128.

Shapes: R rows (positions, or groups of samples), M normalised entries; x, y, gy (..., D) or (N, C, ...).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes  # pyright: ignore[reportPrivateUsage]
from torch.utils.weak import WeakTensorKeyDictionary

from tithe.errors import TitheError
from tithe.rules.base import saved_tensors
from tithe.rules.blocks import blocks
from tithe.rules.dispatch import Carrier, Graft, another, asking, raw
from tithe.rules.double_backward import differentiated, instead, missing, refusal, stand_in, uncaught
from tithe.rules.lean.bitpack import BLOCK, decode, encode
from tithe.rules.lean.dispatch import IN_FULL, Leanness, asks, catch, ordinary
from tithe.rules.theta import Binding
from tithe.rules.transforms import each_row

_AT_ONCE = 1 << 18
"""Values that backward works on at a time: they stay in a core's cache, and so do its temporaries."""

_Checked = tuple[tuple[int, ...], "Tensor | None"]
_CHECKED: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def rough(weight: Tensor, bias: Tensor | None, dtype: torch.dtype, offset: float = 0.0) -> Tensor | None:
    """Positions where the output tells too little about x̂ (|b / w| large, or w next to zero); None where it tells all.

    Looked at once for each version of the weights, because on a GPU a look waits for all that was asked before.

    Args:
        weight: scale (D,).
        bias: shift (D,), or None.
        dtype: of the output.
        offset: what is added to the scale.
    """
    if isinstance(weight, FakeTensor) or isinstance(bias, FakeTensor) or weight.is_meta:
        return None  # no values to look at
    most = 256.0 if dtype in (torch.float32, torch.float64) else 8.0
    state = (int(most), weight._version, weight.data_ptr())
    if bias is not None:
        state += (bias._version, bias.data_ptr())
    known = cast(_Checked | None, _CHECKED.get(weight))
    if known is None or known[0] != state:
        with _disable_current_modes(), torch.no_grad():
            scale = (weight.detach().flatten() + offset).abs()
            fine = scale > torch.finfo(weight.dtype).tiny * 2**20
            if bias is not None:
                fine &= bias.detach().flatten().abs() <= most * scale
            where = (~fine).nonzero().squeeze(1)
        known = (state, where if where.numel() else None)
        _CHECKED[weight] = known
    return known[1]


@dataclass(frozen=True)
class Norm:
    """One kind of norm: the axes it normalises and how its scale and shift lie.

    Args:
        kind: "layer", "rms" or "group".
        shape: of the scale: the normalised axes, or the channels.
        eps: added to the variance or the mean square.
        groups: of channels, for a group norm.
        offset: what is added to the scale (1 in Gemma's norms).
        own: what computes the output of a root-mean-square norm, where that is not `F.rms_norm`.
    """

    kind: str
    shape: tuple[int, ...]
    eps: float
    groups: int = 1
    offset: float = 0.0
    own: Callable[[Tensor], Tensor] | None = None

    def run(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """The output of the stock operation, and 1/σ of each row."""
        if self.kind == "layer":
            y, _, rstd = torch.native_layer_norm(x, self.shape, weight, bias, self.eps)
        elif self.kind == "group":
            n, c = x.shape[:2]
            y, _, rstd = torch.native_group_norm(x, weight, bias, n, c, math.prod(x.shape[2:]), self.groups, self.eps)
        else:
            y = F.rms_norm(x, self.shape, weight, self.eps) if self.own is None else self.own(x)
            rstd = self._root(x)
        return y, rstd.reshape(-1, 1)

    def smooth(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """The output by operations that autograd differentiates as often as one likes, in x's dtype."""
        weight = weight if weight is None or not self.offset else weight + self.offset
        if self.kind == "layer":
            return F.layer_norm(x, self.shape, weight, bias, self.eps)
        if self.kind == "group":
            return F.group_norm(x, self.groups, weight, bias, self.eps)
        return F.rms_norm(x, self.shape, weight, self.eps)

    def _root(self, x: Tensor) -> Tensor:
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        length = torch.linalg.vector_norm(x.reshape(-1, math.prod(self.shape)), dim=1, dtype=wide)
        return torch.rsqrt(length.square_().div_(math.prod(self.shape)).add_(self.eps))

    def plain(self, x: Tensor) -> Tensor:
        """The normalised value x̂ of some samples."""
        if self.kind == "rms":
            return (self.laid(x) * self._root(x).unsqueeze(1)).to(x.dtype)
        return Norm(self.kind, self.shape, self.eps, self.groups).run(x, None, None)[0]

    def laid(self, t: Tensor) -> Tensor:
        """An activation as (samples, entries of the scale), or (samples, channels, positions)."""
        if self.kind == "group":
            return t.reshape(t.shape[0], self.shape[0], -1)
        return t.reshape(-1, math.prod(self.shape))

    def spread(self, vector: Tensor) -> Tensor:
        """A vector such as the scale, so that it broadcasts over what is laid."""
        return vector.reshape(-1, 1) if self.kind == "group" else vector.reshape(-1)

    def rows(self, laid: Tensor) -> Tensor:
        """What is laid, as (R, M)."""
        return laid.reshape(laid.shape[0] * self.groups, -1)


@each_row
class _Lean(torch.autograd.Function):
    """Runs a norm: `apply(norm, bits, x, weight, bias, theta_weight, theta_bias, of_weight, of_bias)`.

    Its node has `keeps_output` where the output is kept: whoever wants part of it need not copy that.
    """

    @staticmethod
    def forward(
        ctx: Any,
        norm: Norm,
        bits: int | None,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        theta_weight: Tensor | None,
        theta_bias: Tensor | None,
        of_weight: Binding | None,
        of_bias: Binding | None,
    ) -> Tensor:
        """The operation's own output, bit for bit: the stock kernel makes it."""
        y, rstd = norm.run(x, weight, bias)
        ctx.norm, ctx.of_weight, ctx.of_bias = norm, of_weight, of_bias
        ctx.shape, ctx.dtype, ctx.normal = x.shape, x.dtype, True
        ctx.x, ctx.thetas = stand_in(x), (theta_weight, theta_bias)
        ctx.coded = bits is not None
        if bits is not None:
            ctx.save_for_backward(rstd, weight, bias, None, *encode(norm.laid(norm.plain(x)), BLOCK))
            return y
        positions = None if weight is None else rough(weight, bias, y.dtype, norm.offset)
        if positions is not None and positions.numel() * 4 > math.prod(norm.shape):
            ctx.save_for_backward(rstd, weight, bias, None, norm.plain(x))
            return y
        ctx.normal, ctx.keeps_output = weight is None, True
        if positions is None:
            ctx.save_for_backward(rstd, weight, bias, None, y)
        else:
            exact = norm.laid(norm.plain(x)).index_select(1, positions)
            ctx.save_for_backward(rstd, weight, bias, positions, y, exact)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Gradients of x, of plain scale and shift, and of the selected entries of bound ones."""
        kept = saved_tensors(ctx, _stale)
        if not differentiated():
            return _once(ctx, kept, grads[0])
        with torch.no_grad():
            values = _once(ctx, kept, grads[0])
        return tuple(map(instead, values, _recorded(ctx, kept, grads[0])))


def _once(ctx: Any, kept: Sequence[Any], given: Tensor) -> tuple[Any, ...]:
    """Gradients in the order of what `apply` is given."""
    norm, needs = cast(Norm, ctx.norm), ctx.needs_input_grad
    gy = norm.laid(given)
    known, rstd, scale, weight, bias = _known(ctx, kept, gy)
    gx = torch.empty(gy.shape, dtype=ctx.dtype, device=gy.device)
    gw, gb = _gradients(norm, gy, known, rstd, scale, gx, any(needs[3:7]))
    out: list[Any] = [None, None, gx.view(ctx.shape), None, None, None, None, None, None]
    for at, value, parameter, binding in ((3, gw, weight, ctx.of_weight), (4, gb, bias, ctx.of_bias)):
        if value is None or parameter is None:
            continue
        value = value.to(parameter.dtype)
        if needs[at]:
            out[at] = value.view(parameter.shape)
        if needs[at + 2]:
            out[at + 2] = value.index_select(0, binding.indices)
    return tuple(out)


@dataclass(frozen=True)
class _Normal:
    """Where x̂ comes from: itself, or the output: x̂ = y · inverse + shift, and kept apart at some positions."""

    source: Tensor
    inverse: Tensor | None
    shift: Tensor | None
    positions: Tensor | None
    exact: Tensor | None

    def of(self, part: slice, dtype: torch.dtype) -> Tensor:
        """x̂ of some samples, laid."""
        xhat = self.source[part].to(dtype)
        if self.inverse is not None:
            xhat = xhat * self.inverse if self.shift is None else torch.addcmul(self.shift, xhat, self.inverse)
        if self.positions is not None and self.exact is not None:
            xhat.index_copy_(1, self.positions, self.exact[part].to(dtype))
        return xhat


def _known(
    ctx: Any, saved: Sequence[Any], gy: Tensor
) -> tuple[_Normal, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Where x̂ comes from, 1/σ, and the scale as it broadcasts, of what `ctx` has kept; scale and shift as they are."""
    norm = cast(Norm, ctx.norm)
    rstd, weight, bias, positions, *kept = saved
    wide = torch.float64 if ctx.dtype == torch.float64 else torch.float32
    scale = None if weight is None else norm.spread(weight.to(wide) + norm.offset)
    if ctx.coded:
        source = decode(kept[0], kept[1], BLOCK, gy.new_empty(gy.shape, dtype=wide, device="meta"))
    else:
        source = norm.laid(kept[0])
    known = _Normal(source, None, None, None, None)
    if scale is not None and not ctx.normal:
        inverse = 1 / scale
        shift = None if bias is None else norm.spread(-bias.to(wide)) * inverse
        known = _Normal(source, inverse, shift, positions, None if positions is None else kept[1])
    return known, rstd.to(wide), scale, weight, bias


def _recorded(ctx: Any, kept: Sequence[Any], gy: Tensor) -> tuple[Any, ...]:
    """Gradients that may be differentiated in their turn; along codes they may not.

    The norm runs on x̂ σ, which is x or, but for its mean, x: all its derivatives are those at x.
    """
    norm, needs = cast(Norm, ctx.norm), ctx.needs_input_grad
    with torch.no_grad():
        known, rstd, _, *parameters = _known(ctx, kept, norm.laid(gy))
        xhat = known.of(slice(None), rstd.dtype)
        source = (norm.rows(xhat) / rstd).view(ctx.shape)
    x = source.detach().requires_grad_() if ctx.coded else instead(source, ctx.x)
    bindings, traced = (ctx.of_weight, ctx.of_bias), list[Tensor | None]()
    for parameter, theta, binding in zip(parameters, ctx.thetas, bindings, strict=True):
        if binding is not None:
            traced.append(cast(Tensor, Graft.apply(parameter, theta, binding.selection)))
        else:
            traced.append(None if parameter is None else parameter.view_as(parameter))
    asked = [x, *(t for t in traced if t is not None and t.requires_grad)]
    with uncaught(), torch.autocast(gy.device.type, enabled=False):
        y = norm.smooth(x, *(None if t is None else t.to(x.dtype) for t in traced))
        found: Sequence[Tensor | None] = torch.autograd.grad(y, asked, gy.to(x.dtype), create_graph=True)
    if ctx.coded:
        error = partial(refusal, "a norm in a lean model", "codes of its normalised input", IN_FULL)
        found = missing(found, (ctx.x, *traced), error)
    gx, *rest = cast("list[Tensor]", found)
    out: list[Any] = [None, None, gx.to(ctx.dtype), None, None, None, None, None, None]
    for at, parameter, binding in zip((3, 4), traced, bindings, strict=True):
        if parameter is None or not parameter.requires_grad:
            continue
        value = rest.pop(0).to(parameter.dtype)
        if needs[at]:
            out[at] = value
        if needs[at + 2]:
            out[at + 2] = value.index_select(0, binding.indices)
    return tuple(out)


def _gradients(
    norm: Norm, gy: Tensor, known: _Normal, rstd: Tensor, scale: Tensor | None, gx: Tensor, sums: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Fill in gx and return Σ gy x̂ and Σ gy, from what is laid; a few samples at a time, so temporaries are small."""
    gw = gb = None
    if sums:
        gw, gb = rstd.new_zeros(math.prod(norm.shape)), rstd.new_zeros(math.prod(norm.shape))
    step = max(1, _AT_ONCE // gy[:1].numel())
    axes = [0, 2] if norm.kind == "group" else [0]
    zero, one = torch.zeros_like(rstd[: step * norm.groups]), torch.ones_like(rstd[: step * norm.groups])
    for start in blocks(range(0, gy.shape[0], step), lambda start: min(step, gy.shape[0] - start), gy):
        part = slice(start, start + step)
        g, xhat = gy[part].to(rstd.dtype), known.of(part, rstd.dtype)
        if norm.kind == "layer":
            # The stock kernel on numbers that are normalised already: mean 0, σ 1.
            r = rstd[part]
            out, dw, db = torch.ops.aten.native_layer_norm_backward.default(
                g, xhat, [g.shape[1]], zero[: len(r)], one[: len(r)], scale, scale, [True, sums, sums]
            )
        else:
            dw, db = ((g * xhat).sum(axes), g.sum(axes)) if sums else (g, g)
            h = norm.rows(g if scale is None else g * scale)
            xhat, r = norm.rows(xhat), rstd[start * norm.groups : (start + g.shape[0]) * norm.groups]
            if norm.kind == "rms":
                out = torch.addcmul(h, xhat, torch.linalg.vecdot(h, xhat).unsqueeze(1).div_(-h.shape[1]))
            else:
                out, _, _ = torch.ops.aten.native_layer_norm_backward.default(
                    h, xhat, [h.shape[1]], zero[: len(r)], one[: len(r)], None, None, [True, False, False]
                )
        if gw is not None and gb is not None:
            gw += dw
            gb += db
        if gx.dtype == out.dtype:
            torch.mul(out, r, out=norm.rows(gx[part]))
        else:
            gx[part] = out.mul_(r).view(g.shape)
    return gw, gb


def _stale() -> TitheError:
    return TitheError(
        "backward of a lean norm",
        found="the norm's output, or its scale or shift, changed in place since forward",
        expected="all three as they were: backward takes the normalised value from them",
        remedy="change a copy of the output, or call tithe.lean(model, exact=True), which keeps the norm's input",
    )


def _probed(*weights: Tensor | None) -> bool:
    return any(isinstance(w, Carrier) and w.binding.probe is not None for w in weights)


def lean_norm(leanness: Leanness, norm: Norm, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Run `norm` leanly, or return NotImplemented where its input has to be kept.

    Args:
        leanness: what may be kept.
        norm: the norm.
        x: its input.
        weight: its scale, a plan's or plain, trained, frozen or absent.
        bias: its shift, likewise.
    """
    if not asks(x) or torch.compiler.is_compiling() or x.numel() == 0 or (leanness.exact and leanness.bits is None):
        return NotImplemented
    if _probed(weight, bias) or another(weight) is not None or another(bias) is not None:  # the plan's own rule knows
        return NotImplemented
    scale, shift = (None if w is None else raw(w) for w in (weight, bias))
    if (scale is not None and not ordinary(scale)) or (shift is not None and (scale is None or not ordinary(shift))):
        return NotImplemented
    of_weight, of_bias = asking(weight), asking(bias)
    return cast(
        Tensor,
        _Lean.apply(
            norm,
            leanness.bits,
            x,
            scale,
            shift,
            None if of_weight is None else of_weight.asked,
            None if of_bias is None else of_bias.asked,
            of_weight,
            of_bias,
        ),
    )


@catch(
    F.layer_norm,
    keeps="4 n of its output, which the next layer keeps too, and 1/σ; with `bits=8` n of codes",
    stock="4 n of its input and statistics",
    family="layer norm, RMS norm (also those that models write themselves)",
    note="within a few rounding errors; = with `exact=True`",
    asked=True,
    captured=False,
)
def layer_norm(
    leanness: Leanness,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """The norm y = w x̂ + b from its output: |x̂ − stock's| ≤ 8 u (|x̂| + |b / w|)."""
    return lean_norm(leanness, Norm("layer", tuple(normalized_shape), eps), input, weight, bias)


@catch(F.rms_norm, like=layer_norm)
def rms_norm(
    leanness: Leanness,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """The norm y = w x / √(mean x² + ε) from its output: |x̂ − stock's| ≤ 8 u |x̂|."""
    if eps is None:  # stock takes that of the dtype it computes in
        eps = torch.finfo(torch.float64 if input.dtype == torch.float64 else torch.float32).eps
    return lean_norm(leanness, Norm("rms", tuple(normalized_shape), eps), input, weight, None)


@catch(
    F.group_norm,
    keeps="with `bits=8` n of codes and 1/σ; else as stock",
    stock="4 n of its input and statistics",
    note="=; with `bits=8` x̂ off by at most 1/254 of the largest in its block of 128",
    asked=True,
    captured=False,
)
def group_norm(
    leanness: Leanness,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """The norm y = w x̂ + b over groups of channels, from codes of x̂ within 1/254 of their block's largest.

    Its output is rarely kept by the next layer and often overwritten by a ReLU, so that without codes stock is as lean.
    """
    if leanness.bits is None or not input.is_contiguous():
        return NotImplemented
    norm = Norm("group", (input.shape[1],), eps, num_groups)
    return lean_norm(leanness, norm, input, weight, bias)
