"""Linear maps in a lean model: the touched columns of x are kept in codes.

That is with `bits=8`, and where x comes from a smooth activation that is coded itself: each value is off by at most
1/254 of the largest in its block of 128, and an entry of gyᵀ x by Σ |gy| times as much. What x itself outlives the
forward pass in full, as the output of a lean norm, is not coded besides.

Shapes: x (..., I), gy (..., O); w (O, I), or (I, O) when transposed.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tithe.rules.dispatch import Served, asking, autocast, outlives
from tithe.rules.lean.bitpack import BLOCK, decode, encode
from tithe.rules.lean.dispatch import IN_FULL, Leanness, catch
from tithe.rules.lean.glu import coded
from tithe.rules.sparse.linear import LinearRule, linear_call


class _Coded(LinearRule):
    """Keeps codes of what the way keeps."""

    twice = False
    keeps = "codes of the columns of its input"
    remedy = IN_FULL

    def keep(self, x: Tensor, extra: tuple[Tensor, ...], need_x: bool) -> tuple[Tensor, ...]:
        """Codes and scales of what the way keeps."""
        if self.way is None:
            return ()
        kept = self.way.keep(x)
        self.like = torch.empty_like(kept, device="meta")
        return encode(kept, BLOCK)

    def backward(
        self, gy: Tensor, weight: Tensor, kept: tuple[Tensor, ...], need_x: bool, need_bias: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """The gradients of the plain rule, from what the codes say: ∇w off by Σ |gy| times the bound of x̂."""
        kept = () if self.way is None else (decode(kept[0], kept[1], BLOCK, self.like),)
        return super().backward(gy, weight, kept, need_x, need_bias)


def _lean(leanness: Leanness, x: Tensor, weight: Tensor, bias: Tensor | None, *, transposed: bool) -> Tensor:
    binding = asking(weight)
    if binding is None:
        return NotImplemented
    made: Tensor = x if x._base is None else x._base
    held = autocast(x) is x and outlives(x, binding)
    if held or not (leanness.bits is not None or (not leanness.exact and coded(made))):
        return NotImplemented
    call: Any = linear_call(x, weight, bias, transposed=transposed, kind=_Coded)
    return call if call is NotImplemented else Served(channels=True).run(call)


@catch(
    F.linear,
    keeps="a byte an entry of those columns",
    stock="those columns",
    family="linear map with a plan's columns of an input in codes",
    note="columns of the input off by at most 1/254 of the largest in their block of 128; = with `exact=True`",
    captured=False,
)
def linear(leanness: Leanness, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The map y = x wᵀ + b with a plan's weight; ∇w = gyᵀ x̂, off by Σ |gy| times the bound of x̂."""
    return _lean(leanness, input, weight, bias, transposed=False)


@catch(torch.addmm, Tensor.addmm, like=linear)
def addmm(
    leanness: Leanness, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1
) -> Tensor:
    """The map y = b + x w with a plan's weight; ∇w = x̂ᵀ gy, off by Σ |gy| times the bound of x̂."""
    if beta != 1 or alpha != 1 or input.dim() != 1:
        return NotImplemented
    return _lean(leanness, mat1, mat2, input, transposed=True)


@catch(torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm, like=linear)
def matmul(leanness: Leanness, input: Tensor, other: Tensor) -> Tensor:
    """The map y = x w with a plan's weight; ∇w = x̂ᵀ gy, off by Σ |gy| times the bound of x̂."""
    return _lean(leanness, input, other, None, transposed=True) if other.dim() == 2 else NotImplemented
