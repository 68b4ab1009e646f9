"""Gated units, act(g) · u as in SwiGLU and GeGLU: both factors of the product in codes of eight bits.

    y = a u,  a = act(g)        gu = gy â,  ga = gy û

â and û are off by at most 1/254 of the largest in their block of 128, so gu and ga are off by |gy| times as much. With
the code of act′ that the activation keeps, three bytes an element are kept where stock keeps g, a and u.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from tithe.rules.double_backward import differentiated, entrywise, missing, refusal, stand_in
from tithe.rules.lean.activation import Sloped
from tithe.rules.lean.bitpack import BLOCK, decode, encode
from tithe.rules.lean.dispatch import IN_FULL, Leanness, asks, catch
from tithe.rules.transforms import each_row


@each_row
class Product(torch.autograd.Function):
    """The product of two tensors of one shape: `apply(a, u)`."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, u: Tensor) -> Tensor:
        """Stock's output y = a u."""
        ctx.factors = stand_in(a), stand_in(u)
        ctx.likes = [torch.empty_like(t, device="meta") for t in (a, u)]
        ctx.save_for_backward(*encode(a, BLOCK), *encode(u, BLOCK))
        return a * u

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The gradients ga = gy û and gu = gy â, each off by |gy| times at most 1/254 of the block's largest."""
        codes, (a, u) = ctx.saved_tensors, ctx.likes
        need_a, need_u = ctx.needs_input_grad
        ga = entrywise(grads[0], lambda gy: decode(codes[2], codes[3], BLOCK, u).mul_(gy)) if need_a else None
        gu = entrywise(grads[0], lambda gy: decode(codes[0], codes[1], BLOCK, a).mul_(gy)) if need_u else None
        if differentiated():
            error = partial(refusal, "a product in a lean model", "codes of its factors", IN_FULL)
            (ga,), (gu,) = missing((ga,), ctx.factors[1:], error), missing((gu,), ctx.factors[:1], error)
        return ga, gu


def _activated(x: Any) -> bool:
    """Whether x comes straight from an activation that keeps a code of its derivative."""
    return asks(x) and type(x.grad_fn).__name__ == f"{Sloped.__name__}Backward"


def coded(x: Tensor) -> bool:
    """Whether x comes straight from such an activation or from a product in codes."""
    return _activated(x) or type(x.grad_fn).__name__ == f"{Product.__name__}Backward"


@catch(
    *(torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.multiply, Tensor.multiply),
    keeps="2 n: 8-bit codes of both",
    stock="8 n",
    family="product of such an activation and a tensor (SwiGLU, GeGLU)",
    note="each factor off by at most 1/254 of the largest in its block of 128; with `exact=True` stock's",
    asked=True,
    approximate=True,
    captured=False,
)
def mul(leanness: Leanness, input: Any, other: Any, **kwargs: Any) -> Any:
    """The product y = a u of a smooth activation's output and another tensor of its shape; ga = gy û, gu = gy â."""
    if kwargs or not (_activated(input) or _activated(other)):
        return NotImplemented
    if not asks(other) or input.shape != other.shape or input.dtype != other.dtype:
        return NotImplemented
    return Product.apply(input, other)
