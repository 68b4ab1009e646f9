"""Activations that keep one bit an element where stock keeps a tensor of the input's size."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from tithe.rules.catch import Leanness, catch
from tithe.rules.codes import pack_bits, unpack_bits


class _Gate(torch.autograd.Function):
    """ReLU: backward passes where the output is positive."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = torch.relu(x)
        ctx.shape = y.shape
        ctx.save_for_backward(pack_bits(y > 0))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (bits,) = ctx.saved_tensors
        return gy * unpack_bits(bits, gy.numel()).view(gy.shape)


@catch(F.relu, torch.relu, Tensor.relu)
def relu(leanness: Leanness, input: Tensor, inplace: bool = False) -> Any:
    """`relu`."""
    if inplace or not input.requires_grad or not input.is_contiguous():
        return NotImplemented
    return _Gate.apply(input)
