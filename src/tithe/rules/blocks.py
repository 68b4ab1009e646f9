"""Eight bits a value and one scale a block: x ≈ s q with q in −127 … 127 and s = max|x| / 127 over 128 values.

    |x − s q| ≤ max|x| / 254 within the block, and a rounding of x's own precision

Blocks follow each other in the order of the tensor's own memory; the last one may be shorter.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Self

import torch
from torch import Tensor

BLOCK = 128
_AT_ONCE = 1024  # blocks: half a megabyte stays in a core's cache from one pass over it to the next


@dataclass(frozen=True)
class Layout:
    """How a dense tensor lies in memory: its shape with the axes in the order of their strides, and the way back.

    Args:
        shape: sizes, outermost axis first.
        back: the permutation that gives the tensor its own axes again.
    """

    shape: tuple[int, ...]
    back: tuple[int, ...]

    @classmethod
    def of(cls, x: Tensor) -> Self:
        """The layout of `x`, or that of a contiguous copy where `x` has gaps or overlaps."""
        axes = list(range(x.dim()))
        order = sorted(axes, key=lambda axis: (-x.stride(axis), axis))
        if not x.permute(order).is_contiguous():
            order = axes
        return cls(tuple(x.shape[axis] for axis in order), tuple(order.index(axis) for axis in axes))

    def flat(self, x: Tensor) -> Tensor:
        """All values of `x` in the order of its memory: (n,)."""
        order = [self.back.index(axis) for axis in range(len(self.back))]
        return x.permute(order).reshape(-1)

    def restore(self, flat: Tensor) -> Tensor:
        """The tensor whose values in memory these are."""
        return flat.view(self.shape).permute(self.back)


def encode(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes q, int8 (n,), and scales s, (⌈n / 128⌉,), of x (n,); s in float64 for float64, else in float32."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    codes = x.new_empty(x.numel(), dtype=torch.int8)
    scales = x.new_empty((x.numel() + BLOCK - 1) // BLOCK, dtype=wide)
    step, whole = _AT_ONCE * BLOCK, x.numel() // BLOCK * BLOCK
    cuts = [*range(0, whole, step), whole, *([x.numel()] if x.numel() > whole else [])]
    for start, stop in pairwise(cuts):
        width = BLOCK if start < whole else stop - start
        blocks = x[start:stop].view(-1, width).to(wide)
        largest = blocks.abs().amax(1, keepdim=True).clamp_min_(torch.finfo(wide).tiny * 128)
        scales[start // BLOCK : start // BLOCK + len(blocks)] = largest.squeeze(1) / 127
        codes[start:stop].view(-1, width).copy_((blocks * (127 / largest)).round_())
    return codes, scales


def decode(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The values s q, (n,) in `dtype`."""
    whole = codes.numel() // BLOCK * BLOCK
    if whole == codes.numel():
        return (codes.view(-1, BLOCK) * scales.unsqueeze(1)).view(-1).to(dtype)
    out = scales.new_empty(codes.numel())
    torch.mul(codes[:whole].view(-1, BLOCK), scales[:-1].unsqueeze(1), out=out[:whole].view(-1, BLOCK))
    torch.mul(codes[whole:], scales[-1:], out=out[whole:])
    return out.to(dtype)
