"""Cross-entropy that keeps its logits and two numbers a row, where stock keeps their log-softmax.

    ℓ_n = S_n log Σ_c exp z_nc − Σ_c u_nc z_nc        ∂ℓ_n/∂z_nc = S_n p_nc − u_nc,  p = softmax z,  S_n = Σ_c u_nc

with u the target: u_nc = (1 − ε) w_y [c = y] + ε w_c / C for a class y and a smoothing ε, w_c q_nc for probabilities q.
It is computed a few rows at a time in float32, or in float64 for logits that are. Logits that were cast to float32
from half precision are kept in the precision that they came from, in which they are the same numbers.

Shapes: N rows, C classes, K further axes; M rows of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from tithe.rules.base import saved_tensors
from tithe.rules.blocks import blocks
from tithe.rules.dispatch import autocast
from tithe.rules.double_backward import differentiated, instead, stand_in
from tithe.rules.lean.dispatch import Leanness, catch, ordinary
from tithe.rules.transforms import each_row

_LEAST = 1 << 12
"""Logits below which stock's kernels are left alone: their log-softmax takes no memory that matters."""
_CACHED, _LAUNCHED = 1 << 19, 1 << 24
"""Logits to a block: on a CPU what stays in a core's cache, elsewhere what is worth the launch of a dozen kernels."""
_SAME_VALUES = frozenset(
    f"{name}Backward0" for name in ("View", "UnsafeView", "ReshapeAlias", "Slice", "Select", "Clone", "Transpose", "T")
)
_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Terms:
    """What a row's loss is besides its logits.

    Args:
        weight: of each class, (C,), or None.
        ignored: the class that does not count.
        smoothing: ε, in [0, 1].
    """

    weight: Tensor | None = None
    ignored: int = -100
    smoothing: float = 0.0

    def target(self, target_M: Tensor, z_MC: Tensor) -> _Target:
        """The target of some rows: classes (M,), or probabilities (M, C)."""
        if target_M.is_floating_point():
            u_MC = target_M.to(z_MC.dtype)
            if self.smoothing:
                u_MC = u_MC * (1 - self.smoothing) + self.smoothing / z_MC.shape[1]
            return _Target(u_MC=u_MC if self.weight is None else u_MC * self.weight.to(z_MC.dtype))
        ignored_M = target_M == self.ignored
        class_M1 = target_M.masked_fill(ignored_M, 0)[:, None]
        counts_M1 = (~ignored_M).to(z_MC.dtype)[:, None]
        weight = None if self.weight is None else self.weight.to(z_MC.dtype)
        of_class_M1 = counts_M1 if weight is None else counts_M1 * weight[class_M1]
        others_M1 = counts_M1 * (self.smoothing / z_MC.shape[1]) if self.smoothing else None
        return _Target(class_M1, of_class_M1 * (1 - self.smoothing), others_M1, weight)


@dataclass(frozen=True)
class _Target:
    """u of some rows: by the class and what the others share, or in full.

    Args:
        class_M1: the class, int64.
        at_class_M1: what u has there besides the others' share; 0 for a row that is ignored.
        others_M1: what every class has, before its weight; None for nothing.
        weight: of each class, (C,), or None.
        u_MC: all of it, for probabilities.
    """

    class_M1: Tensor | None = None
    at_class_M1: Tensor | None = None
    others_M1: Tensor | None = None
    weight: Tensor | None = None
    u_MC: Tensor | None = None

    def total(self, num_classes: int) -> Tensor:
        """S = Σ_c u_c, (M, 1)."""
        if self.u_MC is not None:
            return self.u_MC.sum(1, keepdim=True)
        total = cast(Tensor, self.at_class_M1)
        if self.others_M1 is None:
            return total
        return total + self.others_M1 * (num_classes if self.weight is None else self.weight.sum())

    def dot(self, z_MC: Tensor) -> Tensor:
        """Σ_c u_c z_c, (M, 1); a class of weight zero adds nothing, whatever its logit."""
        if self.u_MC is not None:
            return (self.u_MC * z_MC).sum(1, keepdim=True)
        at_class_M1 = cast(Tensor, self.at_class_M1)
        picked = z_MC.gather(1, cast(Tensor, self.class_M1))
        dot = torch.where(at_class_M1 == 0, at_class_M1, at_class_M1 * picked)
        if self.others_M1 is None:
            return dot
        z_M1 = z_MC.sum(1, keepdim=True) if self.weight is None else (z_MC @ self.weight)[:, None]
        return dot + torch.where(self.others_M1 == 0, self.others_M1, self.others_M1 * z_M1)

    def subtract_(self, p_MC: Tensor, by_M1: Tensor) -> None:
        """Subtract u times a number a row from a gradient."""
        if self.u_MC is not None:
            p_MC.sub_(self.u_MC * by_M1)
            return
        if self.others_M1 is not None:
            share = self.others_M1 * by_M1
            p_MC.sub_(share if self.weight is None else share * self.weight)
        p_MC.scatter_add_(1, cast(Tensor, self.class_M1), -cast(Tensor, self.at_class_M1) * by_M1)


def exponentials_(z_MC: Tensor, target: _Target) -> tuple[Tensor, Tensor, Tensor]:
    """Turn logits into exp(z − max), in place.

    Returns:
        The losses, the largest logits and the sums of the exponentials, each (M, 1).
    """
    largest_M1 = z_MC.amax(1, keepdim=True)
    dot_M1 = target.dot(z_MC.sub_(largest_M1))
    sum_M1 = z_MC.exp_().sum(1, keepdim=True)
    total_M1 = target.total(z_MC.shape[1])
    return torch.where(total_M1 == 0, -dot_M1, total_M1 * sum_M1.log() - dot_M1), largest_M1, sum_M1


def gradient_(e_MC: Tensor, sum_M1: Tensor, target: _Target, by_M1: Tensor) -> Tensor:
    """Turn exp(z − max) into the gradient of Σ_m by_m loss_m, in place."""
    scale_M1 = target.total(e_MC.shape[1]) * by_M1
    e_MC.mul_(torch.where(scale_M1 == 0, scale_M1, scale_M1 / sum_M1))
    target.subtract_(e_MC, by_M1)
    return e_MC


def precise(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a loss of such logits is computed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def sum_and_gradient(z_NC: Tensor, target_N: Tensor, terms: Terms, *, ask: bool) -> tuple[Tensor, Tensor | None]:
    """The sum of the losses of all rows, and where it is asked for its gradient in the dtype of the logits.

    Args:
        z_NC: the logits; they are not changed.
        target_N: classes, int64.
        terms: weights, the ignored class, smoothing.
        ask: whether to compute the gradient.

    Example:
        >>> z, y = torch.randn(5, 7), torch.tensor([0, 3, -100, 6, 6])
        >>> found, gradient = sum_and_gradient(z, y, Terms(), ask=True)
        >>> torch.allclose(found, F.cross_entropy(z, y, reduction="sum"))
        True
        >>> bool((gradient[2] == 0).all())
        True
    """
    dtype = precise(z_NC.dtype)
    sums: list[Tensor] = []
    g_NC = torch.empty_like(z_NC) if ask else None
    step = max(1, _entries(z_NC) // max(z_NC.shape[1], 1))
    starts = range(0, z_NC.shape[0], step)
    for start in blocks(starts, lambda at: min(step, z_NC.shape[0] - at), z_NC):
        z_MC = z_NC[start : start + step].to(dtype, copy=True)
        target = terms.target(target_N[start : start + step], z_MC)
        loss_M1, _, sum_M1 = exponentials_(z_MC, target)
        sums.append(loss_M1.sum())
        if g_NC is not None:
            g_NC[start : start + step] = gradient_(z_MC, sum_M1, target, torch.ones_like(sum_M1))
        del z_MC
    return torch.stack(sums).sum() if sums else z_NC.new_zeros((), dtype=dtype), g_NC


def _entries(z: Tensor) -> int:
    """How many logits to work on at a time: of few no more than an eighth, which then stands in float32."""
    return min(_CACHED if z.device.type == "cpu" else _LAUNCHED, max(z.numel() // 8, _LEAST))


def _slices(z: Tensor) -> Iterator[tuple[Any, Any]]:
    """Where the blocks of rows of logits (N, C) or (N, C, K) lie, and where those of a tensor (N,) or (N, K) do."""
    num_rows, num_classes = z.shape[:2]
    step = max(1, _entries(z) // max(num_classes, 1))
    if z.dim() == 2:
        for start in blocks(range(0, num_rows, step), lambda at: min(step, num_rows - at), z):
            yield slice(start, start + step), slice(start, start + step)
        return
    places = [(n, slice(at, at + step)) for n in range(num_rows) for at in range(0, z.shape[2], step)]
    for n, part in blocks(places, lambda place: min(step, z.shape[2] - place[1].start), z):
        yield (n, slice(None), part), (n, part)


def _rows(z: Tensor, at: Any) -> Tensor:
    """A block of logits as (M, C), a view."""
    return z[at] if z.dim() == 2 else z[at].t()


def _targets(target: Tensor, z: Tensor, at: Any, at_rows: Any) -> Tensor:
    return _rows(target, at) if target.shape == z.shape and target.is_floating_point() else target[at_rows]


@each_row
class CrossEntropy(torch.autograd.Function):
    """The losses of all rows: `apply(z, target, terms, narrow)`, z (N, C) or (N, C, K) → (N,) or (N, K).

    `narrow` is a dtype in which z has the same values, and is kept.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, target: Tensor, terms: Terms, narrow: torch.dtype) -> Tensor:
        """Keep z, or the same numbers in a narrower dtype, and of each row the largest logit and the sum."""
        dtype = precise(z.dtype)
        shape = z.shape[:1] + z.shape[2:]
        loss, largest, sums = (z.new_empty(shape, dtype=dtype) for _ in range(3))
        for at, at_rows in _slices(z):
            z_MC = _rows(z, at).to(dtype, copy=True)
            found = exponentials_(z_MC, terms.target(_targets(target, z, at, at_rows), z_MC))
            del z_MC
            for whole, part in zip((loss, largest, sums), found, strict=True):
                whole[at_rows] = part[:, 0]
        ctx.terms, ctx.dtype = terms, z.dtype
        ctx.x = stand_in(z) if narrow != z.dtype else None
        ctx.save_for_backward(z.to(narrow), target, largest, sums)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The gradient gz = gy (S p − u), a block of rows at a time."""
        z, target, largest, sums = saved_tensors(ctx)
        if differentiated():
            whole = z.to(ctx.dtype)
            x = whole if ctx.x is None else instead(whole, ctx.x)
            found = _stock(x.to(precise(x.dtype)), target, ctx.terms)
            (gz,) = torch.autograd.grad(found, x, grads[0], create_graph=True)
            return gz, None, None, None
        gz = torch.empty_like(z, dtype=ctx.dtype)
        for at, at_rows in _slices(z):
            largest_M1, sum_M1, by_M1 = (t[at_rows][:, None] for t in (largest, sums, grads[0]))
            e_MC = _rows(z, at).to(largest.dtype, copy=True).sub_(largest_M1).exp_()
            part = ctx.terms.target(_targets(target, z, at, at_rows), e_MC)
            if not target.is_floating_point():
                by_M1 = by_M1.masked_fill((target[at_rows] == ctx.terms.ignored)[:, None], 0)
            _rows(gz, at).copy_(gradient_(e_MC, sum_M1, part, by_M1))
            del e_MC
        return gz, None, None, None


def _stock(z: Tensor, target: Tensor, terms: Terms) -> Tensor:
    weight = None if terms.weight is None else terms.weight.to(z.dtype)
    target = target.to(z.dtype) if target.is_floating_point() else target
    settings = {"ignore_index": terms.ignored, "label_smoothing": terms.smoothing}
    return F.cross_entropy(z, target, weight, reduction="none", **cast(Any, settings))


def _narrowest(x: Tensor) -> torch.dtype:
    """The dtype that x was cast from without another change of its values since then; x's own where it was not."""
    node: Any = x.grad_fn
    while node is not None and node.name() in _SAME_VALUES:
        node = node.next_functions[0][0]
    if node is None or node.name() != "ToCopyBackward0" or x.dtype != torch.float32:
        return x.dtype
    source, place = node.next_functions[0]
    if source is None:
        return x.dtype
    dtype = source._input_metadata[place].dtype
    return dtype if dtype in _HALF else x.dtype


@catch(
    F.cross_entropy,
    keeps="4 n, its input; of logits cast from half precision 2 n; and 8 bytes a row",
    stock="4 n more, their log-softmax",
    family="cross entropy",
    note="within a few rounding errors; derivatives of any order",
    asked=True,
    captured=False,
)
def cross_entropy(
    leanness: Leanness,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    """The loss S log Σ exp z − Σ u z of each row, or their mean or sum; gz = gy (S p − u)."""
    if size_average is not None or reduce is not None or reduction not in ("mean", "sum", "none"):
        return NotImplemented
    x = autocast(input, to_float32=True)
    if x.dim() < 2 or x.numel() < _LEAST or not x.is_contiguous() or not 0 <= label_smoothing <= 1:
        return NotImplemented
    rows = x.shape[:1] + x.shape[2:]
    classes = target.dtype == torch.int64 and target.shape == rows
    probabilities = ordinary(target) and target.shape == x.shape and not target.requires_grad
    if not classes and not (probabilities and target.is_contiguous()):
        return NotImplemented  # what stock refuses is left to stock
    if weight is not None and not (ordinary(weight) and weight.shape == x.shape[1:2] and not weight.requires_grad):
        return NotImplemented
    terms = Terms(weight, ignore_index, label_smoothing)
    flat = x if x.dim() == 2 else x.flatten(2)
    target = target if x.dim() == 2 else target.flatten(2 if probabilities and not classes else 1)
    loss = cast(Tensor, CrossEntropy.apply(flat, target, terms, _narrowest(x)))
    dtype = x.dtype
    if reduction == "none":
        return loss.view(rows).to(dtype)
    if reduction == "sum":
        return loss.sum().to(dtype)
    return (loss.sum() / _count(target, terms, loss)).to(dtype)


def _count(target: Tensor, terms: Terms, loss: Tensor) -> Any:
    """What a mean divides by: the rows, or for classes the weights of those that count."""
    if target.is_floating_point():
        return loss.numel()
    counts = target != terms.ignored
    if terms.weight is None:
        return counts.sum()
    return (terms.weight.to(loss.dtype)[target.masked_fill(~counts, 0)] * counts).sum()
