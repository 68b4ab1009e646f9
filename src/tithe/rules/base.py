"""The frame every rule runs in: one `autograd.Function`, one abstract `Rule`, one `Cost`.

What is kept for backward is decided inside an `autograd.Function`; hooks come too late.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from tithe.errors import TitheError
from tithe.rules.double_backward import differentiated, instead, mark, marked, missing, refusal, stand_in
from tithe.rules.transforms import each_row

_FLOPS_PER_BYTE = 16.0
"""Dense multiply-adds that take as long as moving one byte; 10 to 30 on the CPUs and GPUs we measured."""


@dataclass(frozen=True)
class Cost:
    """What one call of a rule takes beyond the forward pass and the input gradient.

    Args:
        flops: floating-point operations of the weight gradient, scaled by how slow their kernel is.
        moved: bytes copied besides.
        kept: bytes kept for backward that would not live otherwise.
    """

    flops: float
    moved: float
    kept: int

    @property
    def price(self) -> float:
        """One comparable number, in FLOPs: a saved byte is written once and read once."""
        return self.flops + _FLOPS_PER_BYTE * (self.moved + 2 * self.kept)


class Rule(ABC):
    """One call of one operation: its forward, what it keeps, and its gradients.

    A rule is built for a call and knows the operation's settings and what is asked of its weight and its bias.

    Attributes:
        held: x outlives the forward pass whatever the rule keeps, so that a copy of a part of it would be kept besides.
        watch: is told in backward whether x, of which the rule kept a copy at most, was still alive; None where nobody
            asks.
        twice: its backward may be differentiated: it is made of operations that autograd differentiates, and `keep`
            returns either x itself, from which a backward that is recorded computes what else it needs of x anew, or
            tensors that are affine in x, as a part of x is. Else a second derivative is refused.
        copies: whether what it keeps depends on x, where that is not x itself.
        place: what an error names: the weight, or the operation.
        keeps: what an error says that it keeps.
        remedy: what to do about a second derivative that is refused.
        carried: the weight as a function of its θ, once that is asked for; None for a frozen weight.
    """

    held: bool = False
    watch: Callable[[bool], None] | None = None
    twice: bool = False
    copies: bool = True
    place: str = ""
    keeps: str = "less than its input"
    remedy: str = (
        "where the rule's backward is made of operations that autograd differentiates, set `twice = True` on its class;"
        " else release the plan for this loss"
    )
    carried: Callable[[Tensor], Tensor] | None = None

    @abstractmethod
    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The operation's output, and tensors it computed on the way that `keep` may want."""

    @abstractmethod
    def keep(self, x: Tensor, extra: tuple[Tensor, ...], need_x: bool) -> tuple[Tensor, ...]:
        """The tensors kept for backward besides the weight; `need_x`: the input gradient will be asked for."""

    @abstractmethod
    def backward(
        self, gy: Tensor, weight: Tensor, kept: tuple[Tensor, ...], need_x: bool, need_bias: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of (x, dense bias, selected weight values, selected bias values); None where not asked for."""


@each_row
class Ruled(torch.autograd.Function):
    """A rule as autograd runs it: `apply(rule, x, weight, bias, theta_weight, theta_bias)`."""

    @staticmethod
    def forward(
        ctx: Any,
        rule: Rule,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        theta_weight: Tensor | None,
        theta_bias: Tensor | None,
    ) -> Tensor:
        """The operation's own output, bit for bit: the stock kernel makes it."""
        y, extra = rule.forward(x, weight, bias)
        ctx.rule = rule
        need_x = ctx.needs_input_grad[1]
        kept = rule.keep(x, extra, need_x)
        whole = any(tensor is x for tensor in kept)
        if rule.watch is not None:
            ctx.alive = None if whole else StorageWeakRef(x.untyped_storage())
        lost = need_x and not whole and rule.copies and (bool(kept) or not rule.twice)
        ctx.x = stand_in(x) if lost else None
        ctx.mark = mark(x) if need_x and not (lost or whole) else None
        ctx.others = () if rule.twice else (bias, theta_weight, theta_bias)
        ctx.save_for_backward(weight, *kept)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Sᵀ of the weight's gradient, and the input's gradient where one is asked for."""
        weight, *kept = saved_tensors(ctx)
        needs = ctx.needs_input_grad
        if ctx.rule.watch is not None and ctx.alive is not None:
            ctx.rule.watch(not ctx.alive.expired())
        backward = partial(_recorded, ctx) if differentiated() else ctx.rule.backward
        gx, gb, gtw, gtb = backward(grads[0], weight, tuple(kept), needs[1], needs[3])
        return None, gx, None, gb, gtw, gtb


def _recorded(
    ctx: Any, gy: Tensor, weight: Tensor, kept: tuple[Tensor, ...], need_x: bool, need_bias: bool
) -> Sequence[Tensor | None]:
    """The rule's backward as a function of gy, of the weight's θ and of x, or as one that is refused a derivative."""
    rule = cast(Rule, ctx.rule)

    def refused() -> TitheError:
        return refusal(rule.place or type(rule).__name__, rule.keeps, rule.remedy)

    if rule.twice:
        weight = weight if rule.carried is None else rule.carried(weight)
        if ctx.x is not None:
            kept = tuple(map(instead, kept, rule.keep(ctx.x, (), need_x)))
        gx, *others = rule.backward(gy, weight, kept, need_x, need_bias)
        return None if gx is None else marked(gx, ctx.mark), *others
    with torch.no_grad():
        found = rule.backward(gy, weight, kept, need_x, need_bias)
    return missing(found, (gy, ctx.x, weight, *kept, *ctx.others), refused)


def stale() -> TitheError:
    """Make the error for a graph that is older than the weights."""
    return TitheError(
        "backward",
        found="a graph recorded before the weights were last updated",
        expected="backward of a loss computed since the last optimizer step",
        remedy="call backward before optimizer.step(), or compute the loss again after it",
    )


def saved_tensors(ctx: Any, stale: Callable[[], TitheError] = stale) -> tuple[Any, ...]:
    """`ctx.saved_tensors`, with the clear error `stale()` where one of them was changed in place since forward."""
    if torch.compiler.is_compiling():
        return ctx.saved_tensors
    try:
        return ctx.saved_tensors
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        raise stale() from error
