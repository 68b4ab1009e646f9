"""Convolutions whose kernel is frozen keep the kernel, where stock keeps their input (pytorch/pytorch issue 133566).

Shapes: x (N, I, ...), gy (N, O, ...), w (O, I / G, ...), transposed (I, O / G, ...); G groups.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from tithe.rules.dispatch import apply_rule, asking, autocast, fits, raw
from tithe.rules.lean.dispatch import Leanness, catch, ordinary
from tithe.rules.sparse.conv import ConvRule
from tithe.rules.sparse.conv_kernels import Convolution


def _serves(x: Any, weight: Any, bias: Any) -> bool:
    """Whether x is ordinary, and nothing is asked of the kernel, carried or not, nor by a plan of the bias."""
    if not ordinary(x) or not isinstance(weight, Tensor) or not fits(x, weight):
        return False
    return asking(weight) is None and not raw(weight).requires_grad and asking(bias) is None


def _run(found: Convolution | None) -> Any:
    """The convolution by the rule that keeps its kernel; NotImplemented where no gradient is asked."""
    if found is None:
        return NotImplemented
    x, weight, bias = found.x, found.weight, None if found.bias is None else raw(found.bias)
    if not x.requires_grad and (bias is None or not bias.requires_grad):
        return NotImplemented
    x = autocast(x)
    return found.finish(apply_rule(ConvRule(x, None, None, found.geometry), x, weight, bias))


@catch(
    *(F.conv1d, F.conv2d, F.conv3d),
    keeps="nothing besides the kernel",
    stock="4 n",
    family="convolution with a frozen kernel",
    note="=; a bias that is trained sums in another order",
)
def conv(leanness: Leanness, input: Any, weight: Any, bias: Any = None, *settings: Any, **more: Any) -> Any:
    """The convolution y = w ∗ x + b; gx = wᵀ ∗ gy needs the kernel alone."""
    serves = _serves(input, weight, bias)
    return _run(Convolution.straight(input, weight, bias, *settings, **more)) if serves else NotImplemented


@catch(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d, like=conv)
def conv_transpose(leanness: Leanness, input: Any, weight: Any, bias: Any = None, *settings: Any, **more: Any) -> Any:
    """The transposed convolution y = wᵀ ∗ x + b; gx = w ∗ gy needs the kernel alone."""
    serves = _serves(input, weight, bias)
    return _run(Convolution.transpose(input, weight, bias, *settings, **more)) if serves else NotImplemented
