"""Linear maps in a lean model: touched columns of x are kept in codes, and of a quantised weight no float copy.

Codes are kept with `bits=8`, and where x comes from a smooth activation that is coded itself: each value is off by at
most 1/254 of the largest in its block of 128, and an entry of gyᵀ x by Σ |gy| times as much. What x itself outlives the
forward pass in full, as the output of a lean norm, is not coded besides.

A frozen weight of a tensor subclass that is dequantised where it is used has a float copy, which autograd keeps for
gx = gy w. The subclass's own operation makes the same copy again in backward, from a row of zeros.

Shapes: x (..., I), gy (..., O); w (O, I), or (I, O) when transposed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import (
    _disable_current_modes,  # pyright: ignore[reportPrivateUsage]
    is_traceable_wrapper_subclass,
)
from torch.utils.weak import WeakIdKeyDictionary

from tithe.rules.base import stale
from tithe.rules.dispatch import Served, asking, autocast, outlives, plain
from tithe.rules.lean.bitpack import BLOCK, decode, encode
from tithe.rules.lean.dispatch import IN_FULL, Leanness, asks, catch
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


_copies = WeakIdKeyDictionary()
"""Quantised weights → settings of a map → which of the tensors that it saves are float copies of the weight."""


@dataclass(frozen=True)
class _Map:
    """The map by a frozen weight that is dequantised where it is used.

    Args:
        weight: the weight.
        dtype: of x.
        lower: the dtype of autocast; None where that is off.
    """

    weight: Tensor
    dtype: torch.dtype
    lower: torch.dtype | None

    def saved(self, num_rows: int) -> list[Tensor]:
        """What autograd saves of the map of a few rows of zeros: copies of the weight are the same for any x."""
        found: list[Tensor] = []
        weight, device = self.weight, self.weight.device
        cast_ = torch.autocast(device.type, self.lower, enabled=self.lower is not None)
        with torch.enable_grad(), cast_, saved_tensors_hooks(lambda tensor: found.append(tensor.detach()), _unused):
            x = torch.zeros(num_rows, weight.shape[1], dtype=self.dtype, device=device, requires_grad=True)
            F.linear(x, weight)
        return found

    @property
    def copies(self) -> frozenset[int]:
        """Which of the saved tensors two calls make anew with the same values, in the weight's shape."""
        known = cast(dict[Any, frozenset[int]], _copies.setdefault(self.weight, {}))
        key = self.dtype, self.lower
        if key not in known:
            try:
                with _disable_current_modes():
                    pairs = list(zip(self.saved(1), self.saved(2), strict=True))
            except Exception:  # whatever it is: an operation that does not run on so few rows is left as it is
                pairs = []
            known[key] = frozenset(n for n, (one, two) in enumerate(pairs) if self._copied(one, two))
        return known[key]

    def _copied(self, one: Tensor, two: Tensor) -> bool:
        alike = self.fits(one) and self.fits(two) and one.dtype == two.dtype and torch.equal(one, two)
        return alike and one.untyped_storage()._cdata != two.untyped_storage()._cdata

    def fits(self, tensor: Tensor) -> bool:
        """Whether a tensor is in float, and has the weight's shape or that of its transpose."""
        shapes = self.weight.shape, self.weight.shape[::-1]
        return type(tensor) in (Tensor, FakeTensor) and tensor.is_floating_point() and tensor.shape in shapes

    @property
    def version(self) -> int:
        """Rises with every write into the weight that torch counts."""
        names: list[str] = cast(Any, self.weight).__tensor_flatten__()[0]
        return self.weight._version + sum(getattr(self.weight, name)._version for name in names)

    def pack(self, numbers: Iterator[int], tensor: Tensor) -> Tensor | Callable[[], Tensor]:
        """What is kept in the place of a saved tensor."""
        n = next(numbers)
        return partial(self.again, n, self.version) if n in self.copies and self.fits(tensor) else tensor

    def again(self, n: int, version: int) -> Tensor:
        """The copy that was not kept.

        Raises:
            TitheError: the weight was written since.
        """
        if self.version != version:
            raise stale()
        return self.saved(1)[n]


def _unused(packed: None) -> Tensor:
    raise AssertionError("what was only looked at is never asked for")


def _unpack(packed: Tensor | Callable[[], Tensor]) -> Tensor:
    return packed if isinstance(packed, Tensor) else packed()


def _frozen(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The map by the operation of a weight that is a tensor subclass: its float copies are made again in backward."""
    if not is_traceable_wrapper_subclass(weight) or weight.requires_grad or weight.dim() != 2 or not asks(x):
        return NotImplemented
    if x.numel() < 2 * weight.shape[1]:  # as the one row of `_Map.again` has
        return NotImplemented
    kind = x.device.type
    lower = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    map_ = _Map(weight, x.dtype, lower)
    if not map_.copies:
        return NotImplemented
    with saved_tensors_hooks(partial(map_.pack, count()), _unpack):
        return F.linear(x, weight, bias)


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
    if not plain(weight) and asking(weight) is None:
        return _frozen(input, weight, bias)
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
