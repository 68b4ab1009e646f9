"""Scaled dot-product attention that keeps q, k and v, and one bit for each dropped probability.

    P = softmax(s q kᵀ + mask)        y = (P ∘ D) v,  D = 0 or 1 / (1 − p)

Without dropout the stock kernel keeps the output and the log-sum-exp besides. On a CPU, up to T S = 2¹⁸, gradients are
computed from P without them, as fast as the kernel does it and within its rounding. Longer ones, and all with
`exact=True`, run the kernel again on the same numbers: gradients are stock's bit for bit. That costs S / (2 H E) of the
forward pass of the four projections around it, and is done up to S = H E.

With dropout stock on a CPU leaves the fused kernel and keeps P, D and more of the same size; here P is computed again
for a few samples at a time, in stock's order of operations: output and gradients are stock's bit for bit, and so is
what is drawn of the random numbers.

"Bit for bit" rests on the same kernels being given the same shapes and strides, on one machine with one number of
threads. Of a product of many matrices a part takes fewer: with more threads than these a library may split a matrix
among them, and its sums are then rounded otherwise than stock's.

With `bits=8` q, k and v are kept in codes, each value off by at most 1/254 of the largest in its block of 128.

Shapes: B samples, H heads, T queries, S keys, E entries; q (B, H, T, E), k and v (B, H or a divisor, S, E).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from tithe.rules.blocks import blocks
from tithe.rules.dispatch import autocast
from tithe.rules.double_backward import differentiated, missing, refusal, stand_in, uncaught
from tithe.rules.lean.bitpack import BLOCK, decode, encode, num_bits, pack, unpack
from tithe.rules.lean.dispatch import IN_FULL, Leanness, asks, catch, ordinary
from tithe.rules.transforms import each_row

_AT_ONCE = 1 << 18
"""Probabilities that are worked on at a time."""

Part = tuple[slice, slice, slice]


@torch.library.custom_op("tithe::pack_mask", mutates_args=())
def pack_mask(mask: Tensor) -> Tensor:
    """One bit for each element of a contiguous bool tensor: uint8 (⌈n / 8⌉,)."""
    return pack(mask.view(-1))


@pack_mask.register_fake
def _(mask: Tensor) -> Tensor:
    return mask.new_empty(num_bits(mask.numel()), dtype=torch.uint8)


@torch.library.custom_op("tithe::unpack_mask", mutates_args=())
def unpack_mask(bits: Tensor, start: int, stop: int) -> Tensor:
    """Elements `start` to `stop` of what was packed, bool (stop − start,)."""
    first = start // 8
    return unpack(bits[first : num_bits(stop)], stop - 8 * first)[start - 8 * first :].clone()


@unpack_mask.register_fake
def _(bits: Tensor, start: int, stop: int) -> Tensor:
    return bits.new_empty(stop - start, dtype=torch.bool)


@dataclass(frozen=True)
class Attention:
    """The settings of one call.

    Args:
        causal: whether a query sees only the keys up to its own position.
        scale: of the scores, or None for 1/√E.
        dropout: p.
        fused: whether gradients are the stock kernel's, bit for bit, rather than those of the steps it fuses.
    """

    causal: bool
    scale: float | None
    dropout: float = 0.0
    fused: bool = True

    def stock(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """The stock operation, without dropout."""
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=self.causal, scale=self.scale, enable_gqa=grouped
        )

    def factors(self, entries: int) -> tuple[float, float]:
        """What q and k are multiplied by: stock gives each the root of the scale, against overflow."""
        scale = 1 / math.sqrt(entries) if self.scale is None else self.scale
        return math.copysign(math.sqrt(abs(scale)), scale), math.sqrt(abs(scale))

    def scaled(self, q: Tensor, k: Tensor, part: Part) -> tuple[Tensor, Tensor]:
        """A part of scaled q and kᵀ, in float32 at least, with each head of keys for each head of queries it serves."""
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        one, two = self.factors(q.shape[-1])
        b, h, g = part
        query, key = _laid(q[b, h].to(wide) * one, q), k[b, g].to(wide) * two
        if q.shape[1] != k.shape[1]:
            return query, _spread(key, query.shape[1]).transpose(-2, -1)
        return query, _laid(key.transpose(-2, -1), k)

    def whole(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bits: Tensor | None) -> Tensor:
        """The operation in steps that autograd differentiates as often as one likes, all of it at once."""
        part = slice(None), slice(None), slice(None)
        with torch.autocast(q.device.type, enabled=False):
            p = probabilities(*self.scaled(q, k, part), self.bias(q, k, mask))
            if bits is not None:
                factor = unpack_mask(bits, 0, p.numel()).view(p.shape).to(p.dtype)
                p = p * factor.div_(1 - self.dropout)
            return torch.matmul(p, _values(v, part, p)).to(q.dtype)

    def bias(self, q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor | None:
        """What is added to the scores, (B or 1, H or 1, T or 1, S or 1), in q's dtype."""
        if self.causal:
            mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
        if mask is None:
            return None
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(mask.logical_not(), -math.inf)
        return mask.view((1,) * (4 - mask.dim()) + mask.shape)


def parts(q: Tensor, k: Tensor) -> Iterator[Part]:
    """Slices over samples, heads of queries and heads of keys, of some 2¹⁸ probabilities each."""
    samples, heads = q.shape[:2]
    shared = heads // k.shape[1]
    each = q.shape[2] * k.shape[2]
    if heads * each <= _AT_ONCE:
        step = max(1, _AT_ONCE // (heads * each))
        for b in range(0, samples, step):
            yield slice(b, min(b + step, samples)), slice(0, heads), slice(0, k.shape[1])
        return
    step = max(1, _AT_ONCE // (each * shared))
    for b in range(samples):
        for h in range(0, k.shape[1], step):
            last = min(h + step, k.shape[1])
            yield slice(b, b + 1), slice(h * shared, last * shared), slice(h, last)


def _size(part: Part) -> tuple[int, ...]:
    return tuple(piece.stop - piece.start for piece in part)


def _of(bias: Tensor | None, part: Part) -> Tensor | None:
    if bias is None:
        return None
    return bias[part[0] if bias.shape[0] > 1 else slice(None), part[1] if bias.shape[1] > 1 else slice(None)]


def _laid(t: Tensor, whole: Tensor) -> Tensor:
    """A part of `whole`, in memory as stock's product of matrices has it: copied unless heads follow samples there.

    Backward multiplies by transposed views of such copies, and a library need not round that as it rounds a product of
    other strides: MKL does on some processors.
    """
    samples, heads = torch.empty_like(whole, device="meta").stride()[:2]
    follow = whole.shape[0] == 1 or whole.shape[1] == 1 or samples == whole.shape[1] * heads
    return t if follow else t.contiguous()


def _spread(k: Tensor, heads: int) -> Tensor:
    """Heads of keys or values, once for each head of queries."""
    return k if k.shape[1] == heads else k.repeat_interleave(heads // k.shape[1], 1)


def _values(v: Tensor, part: Part, p: Tensor) -> Tensor:
    """A part of v for probabilities p, with each head for each head of queries it serves."""
    return _spread(_laid(v[part[0], part[2]].to(p.dtype), v), p.shape[1])


def _gathered(gk: Tensor, heads: int) -> Tensor:
    """The transpose of `_spread`."""
    return gk if gk.shape[1] == heads else gk.unflatten(1, (heads, -1)).sum(2)


def probabilities(q: Tensor, kt: Tensor, bias: Tensor | None) -> Tensor:
    """P of scaled q and kᵀ; a row that sees nothing is zero."""
    scores = torch.matmul(q, kt)
    if bias is None:
        return torch.softmax(scores, -1)
    return torch.ops.aten._safe_softmax.default(scores.add_(bias), -1)


@each_row
class Fused(torch.autograd.Function):
    """Attention by a stock kernel: `apply(attention, bits, q, k, v, mask)`; backward runs it again, or its steps."""

    @staticmethod
    def forward(
        ctx: Any, attention: Attention, bits: int | None, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Stock's output, by the kernel that stock chooses."""
        ctx.attention = attention
        _keep(ctx, bits, q, k, v, mask)
        return attention.stock(q, k, v, mask)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Gradients of q, k, v: stock's bits where the kernel runs again, else its steps' within its rounding."""
        if differentiated():
            return None, None, *_recorded(ctx, grads[0]), None
        q, k, v, mask = _kept(ctx)
        if not ctx.attention.fused:
            return (
                None,
                None,
                *gradients(ctx.attention, (q, k, v), mask, None, grads[0], ctx.needs_input_grad[2:5]),
                None,
            )
        inputs = [t.detach().requires_grad_(need) for t, need in zip((q, k, v), ctx.needs_input_grad[2:5], strict=True)]
        with torch.enable_grad(), uncaught():
            y = ctx.attention.stock(*inputs, mask)
        asked = [t for t in inputs if t.requires_grad]
        found = iter(torch.autograd.grad(y, asked, grads[0]))
        return None, None, *(next(found) if t.requires_grad else None for t in inputs), None


@each_row
class Composed(torch.autograd.Function):
    """Attention in the order of operations of stock's unfused one: `apply(attention, bits, q, k, v, mask)`."""

    @staticmethod
    def forward(
        ctx: Any, attention: Attention, bits: int | None, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Stock's output, in the memory order of q."""
        ctx.attention = attention
        keeps = None
        if attention.dropout:
            keeps = q.new_empty((*q.shape[:3], k.shape[2]), dtype=torch.bool).bernoulli_(1 - attention.dropout)
            _keep(ctx, bits, q, k, v, mask, pack_mask(keeps))
        else:
            _keep(ctx, bits, q, k, v, mask)
        y = torch.empty_like(q) if v.shape[-1] == q.shape[-1] else q.new_empty((*q.shape[:3], v.shape[-1]))
        bias = attention.bias(q, k, mask)
        with torch.autocast(q.device.type, enabled=False):
            for part in blocks(list(parts(q, k)), _size, q):
                b, h, _ = part
                p = probabilities(*attention.scaled(q, k, part), _of(bias, part))
                if keeps is not None:
                    p = p.mul_(keeps[b, h].to(p.dtype).div_(1 - attention.dropout))
                y[b, h] = torch.matmul(p, _values(v, part, p))
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Stock's gradients of q, k, v, bit for bit, from probabilities that are computed again."""
        if differentiated():
            return None, None, *_recorded(ctx, grads[0]), None
        q, k, v, mask, *packed = _kept(ctx)
        bits = packed[0] if packed else None
        return None, None, *gradients(ctx.attention, (q, k, v), mask, bits, grads[0], ctx.needs_input_grad[2:5]), None


def _recorded(ctx: Any, gy: Tensor) -> list[Tensor | None]:
    """Gradients of q, k and v that may be differentiated in their turn; along codes they may not."""
    q, k, v, mask, *packed = _kept(ctx)
    needs = ctx.needs_input_grad[2:5]
    if ctx.likes is None:
        inputs = [t.view_as(t) for t in (q, k, v)]  # one tensor may be two of them
    else:
        inputs = [t.detach().requires_grad_(need) for t, need in zip((q, k, v), needs, strict=True)]
    with uncaught():
        y = ctx.attention.whole(*inputs, mask, packed[0] if packed else None)
    asked = [t for t, need in zip(inputs, needs, strict=True) if need]
    found: Sequence[Tensor | None] = torch.autograd.grad(y, asked, gy, create_graph=True)
    if ctx.likes is not None:
        found = missing(
            found, ctx.inputs, partial(refusal, "attention in a lean model", "codes of q, k and v", IN_FULL)
        )
    left = iter(found)
    return [next(left) if need else None for need in needs]


def gradients(
    attention: Attention,
    kept: tuple[Tensor, Tensor, Tensor],
    mask: Tensor | None,
    bits: Tensor | None,
    gy: Tensor,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k and v, some 2¹⁸ probabilities at a time.

        ∂P = (gy vᵀ) ∘ D        ∂(scores) = P ∘ (∂P − Σ ∂P ∘ P)

    Args:
        attention: the settings.
        kept: q, k and v.
        mask: as the operation was given it.
        bits: the packed mask of dropout.
        gy: (B, H, T, E).
        needs: which of the three are asked for.
    """
    q, k, _ = kept
    gq, gk, gv = (torch.empty_like(t) if need else None for t, need in zip(kept, needs, strict=True))
    bias = attention.bias(q, k, mask)
    with torch.autocast(q.device.type, enabled=False):
        for part in blocks(list(parts(q, k)), _size, q):
            b, h, g = part
            out = [None if t is None else t[b, heads] for t, heads in ((gq, h), (gk, g), (gv, g))]
            _part(attention, part, kept, _of(bias, part), bits, gy, out)
    return gq, gk, gv


def _part(
    attention: Attention,
    part: Part,
    kept: tuple[Tensor, Tensor, Tensor],
    bias: Tensor | None,
    bits: Tensor | None,
    gy: Tensor,
    out: Sequence[Tensor | None],
) -> None:
    """Fill in the gradients of one part; when it returns, the next finds its memory, and that in the cache."""
    q, k, v = kept
    gq, gk, gv = out
    one, two = attention.factors(q.shape[-1])
    query, kt = attention.scaled(q, k, part)
    p = probabilities(query, kt, bias)
    b, h, g = part
    heads = k[b, g].shape[1]
    gy = _laid(gy[b, h].to(p.dtype), gy)
    gp = None if gq is None and gk is None else torch.matmul(gy, _values(v, part, p).transpose(-2, -1))
    dropped = p
    if bits is not None:
        start = (b.start * q.shape[1] + h.start) * q.shape[2] * k.shape[2]
        factor = unpack_mask(bits, start, start + p.numel()).view(p.shape).to(p.dtype)
        factor = factor.div_(1 - attention.dropout)
        gp = None if gp is None else gp.mul_(factor)
        dropped = factor.mul_(p)
    if gv is not None:
        gv.copy_(_gathered(torch.matmul(dropped.transpose(-2, -1), gy), heads))
    if gp is None:
        return
    gs = torch.ops.aten._softmax_backward_data.default(gp, p, -1, p.dtype)
    if gq is not None:
        gq.copy_(torch.matmul(gs, kt.transpose(-2, -1)).mul_(one))
    if gk is not None and attention.fused:
        gk.copy_(_gathered(torch.matmul(query.transpose(-2, -1), gs).mul_(two).transpose(-2, -1), heads))
    elif gk is not None:  # the same but for rounding, and in the order of k's memory
        gk.copy_(_gathered(torch.matmul(gs.transpose(-2, -1), query).mul_(two), heads))


def _keep(ctx: Any, bits: int | None, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *more: Tensor) -> None:
    ctx.inputs = () if bits is None else [stand_in(t) for t in (q, k, v)]
    ctx.likes = None if bits is None else [torch.empty_like(t, device="meta") for t in (q, k, v)]
    codes = (q, k, v) if bits is None else [part for t in (q, k, v) for part in encode(t, BLOCK)]
    ctx.save_for_backward(*codes, mask, *more)


def _kept(ctx: Any) -> list[Any]:
    kept = list(ctx.saved_tensors)
    if ctx.likes is None:
        return kept
    values = [decode(kept[2 * i], kept[2 * i + 1], BLOCK, like) for i, like in enumerate(ctx.likes)]
    return [*values, *kept[6:]]


@catch(
    F.scaled_dot_product_attention,
    keeps="q, k, v; with dropout a bit a probability",
    stock="q, k, v, output, statistics; with dropout on a CPU the probabilities, several times",
    note="=; short rows without dropout on a CPU within a few rounding errors, = with `exact=True`",
    captured=False,
)
def attention(
    leanness: Leanness,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """The map y = (softmax(s q kᵀ + mask) ∘ D) v; q, k, v are kept, and a bit for each entry of D.

    It is left as it is where a mask is learned, and with dropout on a GPU.
    """
    tensors = (query, key, value)
    if not any(asks(t) for t in tensors) or not _fits(*tensors, attn_mask, enable_gqa):
        return NotImplemented
    q, k, v = (autocast(t) for t in tensors)
    mask = attn_mask if attn_mask is None or attn_mask.dtype == torch.bool else autocast(attn_mask)
    choice = torch._fused_sdp_choice(  # pyright: ignore[reportPrivateImportUsage]
        q, k, v, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )
    settings = Attention(is_causal, scale, dropout_p)
    if choice == SDPBackend.MATH.value and q.device.type == "cpu" and dropout_p < 1:
        return Composed.apply(settings, leanness.bits, q, k, v, mask)
    if dropout_p > 0 or (leanness.bits is None and k.shape[2] > q.shape[1] * q.shape[3]):
        return NotImplemented
    if not leanness.exact and q.device.type == "cpu" and q.shape[2] * k.shape[2] <= _AT_ONCE:
        settings = replace(settings, fused=False)
    return Fused.apply(settings, leanness.bits, q, k, v, mask)


def _fits(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, grouped: bool) -> bool:
    """Whether the shapes are those of the module's docstring, and everything may be computed again."""
    if not q.dim() == k.dim() == v.dim() == 4 or not q.numel() or not k.numel() or not v.numel():
        return False
    if q.shape[0] != k.shape[0] or k.shape[:3] != v.shape[:3] or q.shape[-1] != k.shape[-1]:
        return False
    if q.shape[1] != k.shape[1] and (not grouped or q.shape[1] % k.shape[1]):
        return False
    # A plan's weight is no ordinary tensor: as a learned query or bias it gets its gradient from graft.
    if not ordinary(q) or not ordinary(k) or not ordinary(v):
        return False
    constant = mask is None or mask.dtype == torch.bool or (ordinary(mask) and not mask.requires_grad)
    return constant and (mask is None or mask.dim() <= 4)
