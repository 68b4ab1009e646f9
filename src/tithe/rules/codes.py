"""Small codes of what backward needs: one bit an element.

A mask is packed in the order of the tensor's own memory, eight elements a byte, so a code has no shape of its own.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


@torch.library.custom_op("tithe::pack_bits", mutates_args=(), device_types="cpu")
def pack_bits(mask: Tensor) -> Tensor:
    """One bit for each element of a contiguous bool tensor, the first in the lowest bit; uint8, ⌈n / 8⌉ of them."""
    return torch.from_numpy(np.packbits(mask.reshape(-1).numpy(), bitorder="little"))


@pack_bits.register_fake
def _(mask: Tensor) -> Tensor:
    return mask.new_empty((mask.numel() + 7) // 8, dtype=torch.uint8)


@torch.library.custom_op("tithe::unpack_bits", mutates_args=(), device_types="cpu")
def unpack_bits(bits: Tensor, count: int) -> Tensor:
    """The first `count` elements again, bool."""
    return torch.from_numpy(np.unpackbits(bits.numpy(), count=count, bitorder="little").view(np.bool_))


@unpack_bits.register_fake
def _(bits: Tensor, count: int) -> Tensor:
    return bits.new_empty(count, dtype=torch.bool)
