"""Small codes of what backward needs: one bit an element, or eight.

A code follows the elements in the order of their memory, so that a channels-last tensor is read as it lies and the code
itself has no shape. Large tensors are coded in chunks that stay in cache: nothing of their size is made on the way.

Lengths: n elements, m = ⌈n / 8⌉ bytes of bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

# pyright: reportUntypedFunctionDecorator=false

BLOCK = 128
"""Elements that share a scale in what attention, norms and gated units keep."""

_CPU_CHUNK = 1 << 17
_CHUNK = 1 << 24
"""Elements at a time: what a CPU's second cache holds; on other devices few launches, and temporaries of 16 MB."""


def longest(x: Tensor) -> int:
    """Elements of the longest chunk of x."""
    return min(x.numel(), _CPU_CHUNK if x.device.type == "cpu" else _CHUNK)


def chunks(x: Tensor, block: int = 8) -> Iterator[slice]:
    """Slices over the elements of x, each but the last a multiple of `block` elements long."""
    size = max(longest(x) // block, 1) * block
    for start in range(0, x.numel(), size):
        yield slice(start, min(start + size, x.numel()))


def layout(x: Tensor) -> list[int]:
    """The strides of x, or those that a copy of it without gaps would have."""
    return list(x.stride() if _fills(x) else torch.empty_like(x, device="meta").stride())


def same_layout(x: Tensor, strides: Sequence[int]) -> bool:
    """Whether x lies in memory as a tensor of its shape and these strides would."""
    return all(a == b for a, b, n in zip(x.stride(), strides, x.shape, strict=True) if n != 1)


def flat(x: Tensor) -> Tensor:
    """The elements of x in the order of their memory, (n,): a view, or of a copy where x has gaps."""
    if not _fills(x):
        x = torch.empty_like(x).copy_(x)
    return x.as_strided((x.numel(),), (1,))


def _fills(x: Tensor) -> bool:
    if x.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def num_bits(count: int) -> int:
    """Bytes that `count` bits take."""
    return (count + 7) // 8


def pack(mask: Tensor) -> Tensor:
    """One bit for each element of a bool vector (n,), the first in the lowest bit: uint8 (m,)."""
    if mask.device.type != "cpu":
        return pack_words(mask)
    return torch.from_numpy(np.packbits(mask.numpy(), bitorder="little"))


def unpack(bits: Tensor, count: int) -> Tensor:
    """The first `count` elements of what was packed, bool (count,)."""
    if bits.device.type != "cpu":
        return unpack_words(bits, count)
    return torch.from_numpy(np.unpackbits(bits.numpy(), count=count, bitorder="little").view(np.bool_))


def truncate(values: Tensor, out: Tensor) -> None:
    """Write float32 values from 0 to 255 to uint8 `out`, (n,) each, without what is behind the point."""
    if values.device.type != "cpu":
        out.copy_(values)
        return
    with np.errstate(invalid="ignore"):  # what is not a number has no code, and gets any
        np.copyto(out.numpy(), values.numpy(), casting="unsafe")  # three times as fast as torch


def pack_words(mask: Tensor) -> Tensor:
    """`pack` by elementwise arithmetic, for devices that numpy does not reach."""
    words = torch.nn.functional.pad(mask.view(torch.uint8), (0, -mask.numel() % 8)).view(torch.int64)
    return ((words * 0x0102040810204080) >> 56).to(torch.uint8)  # the top byte collects the lowest bit of every byte


def unpack_words(bits: Tensor, count: int) -> Tensor:
    """`unpack` by elementwise arithmetic, for devices that numpy does not reach."""
    place = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=bits.device)
    return torch.bitwise_and(bits[:, None], place).reshape(-1)[:count] != 0


def encode(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """8-bit codes of x with one scale for each `block` elements in order of memory.

        code = round(x / s),  s = max |x| over the block / 127          |x − decode| ≤ s / 2

    Args:
        x: any shape, floating; finite.
        block: elements that share a scale; the last block may be shorter.

    Returns:
        codes, int8 (n,); scales, float32 (⌈n / block⌉,).

    Example:
        >>> codes, scales = encode(torch.tensor([127.0, -1.0, 0.5]), 2)
        >>> codes.tolist(), scales.tolist()
        ([127, -1, 127], [1.0, 0.003937007859349251])
    """
    codes, scales = torch.ops.tithe.block_codes.default(x, block)
    return codes, scales


def decode(codes: Tensor, scales: Tensor, block: int, like: Tensor) -> Tensor:
    """The values again, in the shape, memory order and dtype of `like` (its data is not read; a meta tensor will do).

    Example:
        >>> x = torch.tensor([[127.0, -1.0], [0.5, 0.25]])
        >>> decode(*encode(x, 2), 2, x).tolist()
        [[127.0, -1.0], [0.5, 0.25196850299835205]]
    """
    out = torch.ops.tithe.block_values.default(codes, scales, block, like.dtype)
    return out.as_strided(like.shape, layout(like))


torch.library.define("tithe::block_codes", "(Tensor x, int block) -> (Tensor, Tensor)")
torch.library.define("tithe::block_values", "(Tensor codes, Tensor scales, int block, ScalarType dtype) -> Tensor")


@torch.library.impl("tithe::block_codes", "default")
def _block_codes(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    values = flat(x)
    codes = torch.empty(values.numel(), dtype=torch.int8, device=x.device)
    scales = torch.empty(-(-values.numel() // block), dtype=torch.float32, device=x.device)
    for part in chunks(values, block):
        chunk = values[part].float()
        full = chunk.numel() // block * block
        if full:
            rows = chunk[:full].view(-1, block)
            scale = rows.abs().amax(1, True).div_(127)  # on a CPU 15 times as fast as the norm of order infinity
            scales[part.start // block : (part.start + full) // block] = scale[:, 0]
            codes[part.start : part.start + full].view(-1, block).copy_(_rounded(rows, scale))
        if full < chunk.numel():
            rest = chunk[full:]
            scale = rest.abs().max().div_(127)
            scales[-1] = scale
            codes[part.start + full :].copy_(_rounded(rest, scale))
    return codes, scales


def _rounded(rows: Tensor, scale: Tensor) -> Tensor:
    return (rows / scale.clamp_min(torch.finfo(torch.float32).tiny)).round_()


@torch.library.register_fake("tithe::block_codes")
def _(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    count = x.numel()
    return x.new_empty(count, dtype=torch.int8), x.new_empty(-(-count // block), dtype=torch.float32)


@torch.library.impl("tithe::block_values", "default")
def _block_values(codes: Tensor, scales: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    values = torch.empty(codes.numel(), dtype=dtype, device=codes.device)
    full = codes.numel() // block * block
    for part in chunks(codes[:full], block):
        scale = scales[part.start // block : part.stop // block, None]
        torch.mul(codes[part].view(-1, block).float(), scale, out=values[part].view(-1, block))
    if full < codes.numel():
        values[full:].copy_(codes[full:] * scales[-1])
    return values


@torch.library.register_fake("tithe::block_values")
def _(codes: Tensor, scales: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    return codes.new_empty(codes.numel(), dtype=dtype)
