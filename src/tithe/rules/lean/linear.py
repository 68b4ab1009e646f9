"""Linear maps in a lean model: the touched columns of x are not copied where all of x is kept anyway, or are coded.

A lean norm keeps its output, and that is x: the columns are taken from it in backward. With `bits=8`, and where x comes
from a smooth activation that is coded itself, the copy of the columns is kept in codes: each value is off by at most
1/254 of the largest in its block of 128, and an entry of gyᵀ x by Σ |gy| times as much.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tithe.rules.dispatch import asking, autocast
from tithe.rules.lean.bitpack import BLOCK, decode, encode
from tithe.rules.lean.dispatch import Leanness, catch
from tithe.rules.lean.glu import coded
from tithe.rules.sparse.linear import LinearRule, linear_rule


class _Shared(LinearRule):
    """Keeps x, whose memory somebody else keeps alive."""

    def keep(self, x: Tensor, extra: tuple[Tensor, ...], need_x: bool) -> tuple[Tensor, ...]:
        """All of x."""
        return () if self.way is None else (x,)

    def backward(
        self, gy: Tensor, weight: Tensor, kept: tuple[Tensor, ...], need_x: bool, need_bias: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """As without."""
        kept = () if self.way is None else (self.way.keep(kept[0]),)
        return super().backward(gy, weight, kept, need_x, need_bias)


class _Coded(LinearRule):
    """Keeps codes of what the way keeps."""

    def keep(self, x: Tensor, extra: tuple[Tensor, ...], need_x: bool) -> tuple[Tensor, ...]:
        """Codes and scales."""
        if self.way is None:
            return ()
        kept = self.way.keep(x)
        self.like = torch.empty_like(kept, device="meta")
        return encode(kept, BLOCK)

    def backward(
        self, gy: Tensor, weight: Tensor, kept: tuple[Tensor, ...], need_x: bool, need_bias: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """As without, from the codes."""
        kept = () if self.way is None else (decode(kept[0], kept[1], BLOCK, self.like),)
        return super().backward(gy, weight, kept, need_x, need_bias)


def _lean(leanness: Leanness, x: Tensor, weight: Tensor, bias: Tensor | None, *, transposed: bool) -> Tensor:
    binding = asking(weight)
    if binding is None or binding.probe is not None or torch.compiler.is_compiling():
        return NotImplemented
    whole: Tensor = x if x._base is None else x._base
    shared = getattr(whole.grad_fn, "keeps_output", False) and autocast(x) is x
    if shared:
        return linear_rule(x, weight, bias, transposed=transposed, kind=_Shared)
    if leanness.bits is not None or (not leanness.exact and coded(whole)):
        return linear_rule(x, weight, bias, transposed=transposed, kind=_Coded)
    return NotImplemented


@catch(F.linear)
def linear(leanness: Leanness, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` with a plan's weight."""
    return _lean(leanness, input, weight, bias, transposed=False)


@catch(torch.addmm, Tensor.addmm)
def addmm(
    leanness: Leanness, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1
) -> Tensor:
    """`torch.addmm(bias, x, weight)` with a plan's weight."""
    if beta != 1 or alpha != 1 or input.dim() != 1:
        return NotImplemented
    return _lean(leanness, mat1, mat2, input, transposed=True)


@catch(torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm)
def matmul(leanness: Leanness, input: Tensor, other: Tensor) -> Tensor:
    """`x @ weight` with a plan's weight."""
    return _lean(leanness, input, other, None, transposed=True) if other.dim() == 2 else NotImplemented
