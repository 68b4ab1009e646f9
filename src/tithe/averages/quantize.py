"""Code n vectors in blocks of columns, 8, 4 or 1 bits per number, and project or combine them without decoding.

A part of the basis is B blocks of n rows of 256 columns. Each row of a block has its own scale, so that a sum over
columns or rows is taken of the codes as small whole numbers, and the scale enters once for all 256.

    x = s · q        values (B, n, 256)        codes (B, n, 32 · bits) uint8        scales (B, n) bfloat16

bits  q           s             byte j of the codes of a row
8     −127 … 127  max|x| / 127  column j, in two's complement
4     −7 … 7      max|x| / 7    q + 8 of column j in the low half, of column j + 128 in the high half
1     −1, 1       mean|x|       columns 8j … 8j + 7, the first in the lowest bit; a bit that is set is −1
None                            none: codes are the values, in their own dtype, and scales are None

Codes are turned into floating numbers a few blocks at a time, in a buffer that stays in the second cache, where the
matrix products find them: memory sees the codes once, and nothing of the size of a part is made. What is simplest to
read off a byte is multiplied, not q itself: with 4 bits the low half l and the whole byte, 16 h + l. The rest is linear
and is done to the 256 columns of the gradient or of the result, not to n times as many codes.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from tithe.errors import TitheError

BLOCK = 256
"""Columns that share a scale."""

_HALF = BLOCK // 2
_LARGEST = {8: 127, 4: 7}
CARRIED = {8: 0.0, 4: 0.0, 1: 0.75}
"""How much of what one code has rounded the next in a run takes up: then sums of neighbours, which averages are, are
nearer to what they stand for, and single ones further. What eight bits and four round is too little to be worth it."""

_OFFSET = {8: 0, 4: -8, 1: 1}
"""What is added to a number read off the codes to make it q."""

_CPU_CHUNK = 1 << 20
_CHUNK = 1 << 26
"""Bytes decoded at a time: half of the second cache of each CPU that takes part; on other devices few launches."""

_SPAN = 512
"""Blocks whose sums are scaled together: few enough that their gradient stays in cache."""


def code_bytes(bits: int) -> int:
    """Return the bytes of the codes of one row of a block.

    Args:
        bits: 8, 4 or 1.

    Raises:
        TitheError: when there is no such code.

    Example:
        >>> code_bytes(8), code_bytes(4), code_bytes(1)
        (256, 128, 32)
    """
    if bits not in _OFFSET:
        raise TitheError("bits", found=repr(bits), expected="8, 4 or 1", remedy="choose one of them")
    return BLOCK * bits // 8


def block_bytes(bits: int | None, dtype: torch.dtype = torch.float32) -> int:
    """Return the bytes that one row of a block takes, its scale included.

    Args:
        bits: 8, 4 or 1; None for the numbers themselves.
        dtype: of the numbers, when they are kept as they are.

    Raises:
        TitheError: when there is no such code.

    Example:
        >>> block_bytes(8), block_bytes(None)
        (258, 1024)
    """
    return BLOCK * dtype.itemsize if bits is None else code_bytes(bits) + torch.bfloat16.itemsize


def encode(values: Tensor, bits: int | None) -> tuple[Tensor, Tensor | None]:
    """Return the codes and scales of blocks.

        q = round(x / s)        |x − s q| ≤ s / 2        (8 and 4 bits)

    The scale is rounded to bfloat16 before the codes are made with it: up, so that none is too large. A block of zeros
    has the scale 0.

    Args:
        values: (B, n, 256), float32 or float64; finite, below 1e36 in size.
        bits: 8, 4 or 1; None keeps the values themselves.

    Returns:
        codes, uint8 (B, n, 32 · bits), and scales, bfloat16 (B, n); or the values and None.

    Raises:
        TitheError: when there is no such code.

    Example:
        >>> codes, scales = encode(torch.linspace(-127, 127, 256).view(1, 1, 256), 8)
        >>> codes.view(torch.int8)[0, 0, [0, 127, 128, 255]].tolist(), scales.tolist()
        ([-127, 0, 0, 127], [[1.0]])
    """
    if bits is None:
        return values, None
    codes = values.new_empty(*values.shape[:2], code_bytes(bits), dtype=torch.uint8)
    scales = values.new_empty(values.shape[:2], dtype=torch.bfloat16)
    for at in _chunks(values, values.dtype):
        x = values[at]
        if bits == 1:
            scales[at] = x.abs().mean(-1, dtype=torch.float64)
            codes[at] = _packed(x < 0)
            continue
        scales[at] = _scale(x.abs().amax(-1), _LARGEST[bits])
        # A scale of zero has nothing but zeros to divide, which any divisor leaves.
        divisor = scales[at].to(x.dtype).clamp_min_(torch.finfo(torch.bfloat16).tiny)
        q = (x / divisor[..., None]).round_()
        if bits == 4:
            low, high = q.add_(8).to(torch.int8).split(_HALF, -1)
            codes[at] = (high << 4 | low).view(torch.uint8)
        else:
            codes[at] = q.to(torch.int8).view(torch.uint8)
    return codes, scales


def decode(codes: Tensor, scales: Tensor | None, bits: int | None) -> Tensor:
    """Return the values of codes and scales.

        x = s · q

    Args:
        codes: (B, n, 32 · bits) uint8; or the values themselves.
        scales: (B, n) bfloat16, or None.
        bits: 8, 4, 1 or None.

    Returns:
        float32 (B, n, 256); the values themselves when they were kept as they are.

    Example:
        >>> values = torch.tensor([0.5, -2.0]).repeat(128).view(1, 1, 256)
        >>> decode(*encode(values, 1), 1)[0, 0, :4].tolist()
        [1.25, -1.25, 1.25, -1.25]
    """
    if bits is None or scales is None:
        return codes
    values = torch.empty(*codes.shape[:2], BLOCK, dtype=torch.float32, device=codes.device)
    for at in _chunks(codes, values.dtype):
        part = values[at]
        _read(codes[at], bits, part)
        _finish_(part, bits, 1.0)
        part.mul_(scales[at][..., None])
    return values


def project(codes: Tensor, scales: Tensor | None, bits: int | None, gradient: Tensor) -> Tensor:
    """Return the products of each row with a gradient.

        out_i = Σ_b s_bi Σ_c q_bic g_bc

    Codes are multiplied in float32 and added up over blocks in float64; exact values are taken in float64 throughout.

    Args:
        codes: (B, n, 32 · bits) uint8, which is only read; or the values themselves.
        scales: (B, n) bfloat16, or None.
        bits: 8, 4, 1 or None.
        gradient: (B, 256), floating, on the device of the codes.

    Returns:
        (n,) float64.

    Example:
        >>> rows = torch.stack([torch.ones(256), torch.arange(256.0)])[None]
        >>> project(rows, None, None, torch.ones(1, 256)).tolist()
        [256.0, 32640.0]
    """
    total = torch.zeros(codes.shape[1], dtype=torch.float64, device=codes.device)
    for part in _products(codes, scales, bits, gradient):
        total += part.sum(0)
    return total


def products(
    codes: Tensor, scales: Tensor | None, bits: int | None, gradient: Tensor, owners: Tensor, count: int
) -> Tensor:
    """Sum the results of `project` over all blocks, for each of several owners of blocks: (count, n) float64.

    The owners of blocks are (B,) int64, below `count`; the rest is as for `project`.

    Example:
        >>> rows = torch.stack([torch.ones(256), torch.arange(256.0)])[None]
        >>> products(rows, None, None, torch.ones(1, 256), torch.tensor([1]), 2).tolist()
        [[0.0, 0.0], [256.0, 32640.0]]
    """
    total = torch.zeros(count, codes.shape[1], dtype=torch.float64, device=codes.device)
    start = 0
    for part in _products(codes, scales, bits, gradient):
        total.index_add_(0, owners[start : start + part.shape[0]].to(total.device), part)
        start += part.shape[0]
    return total


def _products(codes: Tensor, scales: Tensor | None, bits: int | None, gradient: Tensor) -> Iterator[Tensor]:
    """Products of a few blocks at a time, (blocks, n) float64."""
    n, dtype = codes.shape[1], _product_dtype(bits)
    buffer = _buffer(codes, dtype)
    for span in _chunks(codes, dtype, _SPAN):
        part, slopes = codes[span], gradient[span].detach().to(dtype)
        # The row to the left of a transposed matrix: three times as fast as the matrix to the left of a column.
        rows = _adjoint(slopes, bits)[:, None]
        sums = rows.new_empty(rows.shape[0], 1, n)
        _multiply(rows, part, bits, buffer, buffer.transpose(1, 2), sums)
        found = sums[:, 0].double()
        if bits is not None and scales is not None:
            if _OFFSET[bits]:
                found += slopes.sum(1, keepdim=True) * _OFFSET[bits]
            found *= scales[span]
        yield found


def gram(codes: Tensor, scales: Tensor | None, bits: int | None) -> Tensor:
    """Return the products of rows with each other.

        out_ij = Σ_b s_bi s_bj Σ_c q_bic q_bjc

    The sums over a block are exact: whole numbers below 2²⁴ in float32. Exact values are multiplied in float64.

    Args:
        codes: (B, n, 32 · bits) uint8, which is only read; or the values themselves.
        scales: (B, n) bfloat16, or None.
        bits: 8, 4, 1 or None.

    Returns:
        (n, n) float64.

    Example:
        >>> rows = torch.stack([torch.ones(256), torch.arange(256.0)])[None]
        >>> gram(rows, None, None).tolist()
        [[256.0, 32640.0], [32640.0, 5559680.0]]
    """
    n = codes.shape[1]
    total = torch.zeros(n, n, dtype=torch.float64, device=codes.device)
    for at in _chunks(codes, _product_dtype(bits)):
        if scales is None:
            rows = codes[at].double()
            total += torch.bmm(rows, rows.transpose(1, 2)).sum(0)
            continue
        rows = decode(codes[at], torch.ones_like(scales[at]), bits)
        factors = scales[at].double()
        products = torch.bmm(rows, rows.transpose(1, 2)).double()
        total += torch.einsum("bij,bi,bj->ij", products, factors, factors)
    return total


def combine(
    codes: Tensor, scales: Tensor | None, bits: int | None, weights: Tensor, owners: Tensor | None = None
) -> Tensor:
    """Return the weighted sum of the rows.

        out_bc = Σ_i w_i s_bi q_bic

    Args:
        codes: (B, n, 32 · bits) uint8, which is only read; or the values themselves.
        scales: (B, n) bfloat16, or None.
        bits: 8, 4, 1 or None.
        weights: (n,) float64 on the device of the codes; with owners, a row for each.
        owners: (B,) int64, the row of each block; None where all have the same weights.

    Returns:
        (B, 256): float32, summed in it; of exact values their dtype, summed in float64.

    Example:
        >>> rows = torch.stack([torch.ones(256), torch.arange(256.0)])[None]
        >>> combine(rows, None, None, torch.tensor([10.0, 2.0]).double())[0, :3].tolist()
        [10.0, 12.0, 14.0]
    """
    dtype = _product_dtype(bits)
    out = torch.empty(codes.shape[0], BLOCK, dtype=codes.dtype if bits is None else dtype, device=codes.device)
    buffer, weights = _buffer(codes, dtype), weights.detach()
    for span in _chunks(codes, dtype, _SPAN):
        part = codes[span]
        each = (weights if owners is None else weights[owners[span].to(weights.device)]).expand(part.shape[:2])
        each = each if scales is None else each * scales[span]
        coefficients = each.to(dtype)[:, None]
        kept = out[span][:, None]
        sums = kept if kept.dtype == dtype else torch.empty_like(kept, dtype=dtype)
        _multiply(coefficients, part, bits, buffer, buffer, sums)
        if bits is not None:
            _finish_(sums, bits, coefficients.sum(-1, keepdim=True))
        if sums is not kept:
            kept.copy_(sums)
    return out


def _product_dtype(bits: int | None) -> torch.dtype:
    return torch.float64 if bits is None else torch.float32


def _blocks(part: Tensor, dtype: torch.dtype) -> int:
    """Blocks at a time, decoded to `dtype`."""
    size = _CPU_CHUNK * torch.get_num_threads() if part.device.type == "cpu" else _CHUNK
    return max(size // (max(part.shape[1], 1) * BLOCK * dtype.itemsize), 1)


def _chunks(part: Tensor, dtype: torch.dtype, least: int = 1) -> Iterator[slice]:
    """Slices over the blocks of a part: as many at a time as the buffer holds, or several times that, up to `least`."""
    step = _blocks(part, dtype)
    step *= max(least // step, 1)
    for start in range(0, part.shape[0], step):
        yield slice(start, min(start + step, part.shape[0]))


def _buffer(codes: Tensor, dtype: torch.dtype) -> Tensor:
    blocks = min(_blocks(codes, dtype), codes.shape[0])
    return torch.empty(blocks, codes.shape[1], BLOCK, dtype=dtype, device=codes.device)


def _multiply(rows: Tensor, codes: Tensor, bits: int | None, buffer: Tensor, matrix: Tensor, out: Tensor) -> None:
    """Each row (B, 1, ·) times what is read off its block: `matrix`, which is the buffer or a view of it."""
    step = buffer.shape[0]
    # Views are made all at once: one by one they cost a tenth of the products.
    for row, part, to in zip(rows.split(step), codes.split(step), out.split(step), strict=True):
        if part.shape[0] < step:
            buffer, matrix = buffer[: part.shape[0]], matrix[: part.shape[0]]
        _read(part, bits, buffer)
        torch.bmm(row, matrix, out=to)


def _read(codes: Tensor, bits: int | None, out: Tensor) -> None:
    """The numbers that are simplest to read off the codes, (blocks, n, 256)."""
    if bits == 8:
        out.copy_(codes.view(torch.int8))
    elif bits == 4:
        out[..., :_HALF].copy_(codes & 15)
        out[..., _HALF:].copy_(codes)
    elif bits == 1:
        out.copy_(_unpacked(codes))
    else:
        out.copy_(codes)


def _finish_(sums: Tensor, bits: int, ones: Tensor | float) -> None:
    """Make sums of what was read, (…, 256), those of the codes q, in place; `ones` is what the sum of ones would be."""
    if bits == 4:
        low, high = sums.split(_HALF, -1)
        high.sub_(low).mul_(1 / 16)
        sums.sub_(ones * 8)
    elif bits == 1:
        sums.mul_(-2).add_(ones)


def _adjoint(gradient: Tensor, bits: int | None) -> Tensor:
    """What to multiply the numbers that were read with, (B, 256), so that the sum is that of q less _OFFSET."""
    if bits == 4:
        low, high = gradient.split(_HALF, -1)
        high = high / 16
        return torch.cat([low - high, high], -1)
    return gradient * -2 if bits == 1 else gradient


def _scale(top: Tensor, largest: int) -> Tensor:
    """`top / largest` in bfloat16, not less; zero only of zero, and never so small that it might be flushed."""
    exact = top.double() / largest
    near = exact.to(torch.bfloat16)
    up = (near.view(torch.int16) + (near.double() < exact)).view(torch.bfloat16)  # the next number has the next bits
    return up.clamp_min_(torch.finfo(torch.bfloat16).tiny) * (top > 0)


def _packed(mask: Tensor) -> Tensor:
    """One bit for each bool, the first in the lowest bit: uint8 (B, n, 32)."""
    if mask.device.type != "cpu":
        return packed_by_arithmetic(mask)
    return torch.from_numpy(np.packbits(mask.numpy(), axis=-1, bitorder="little"))


def _unpacked(codes: Tensor) -> Tensor:
    """Zeros and ones again, uint8 (B, n, 256)."""
    if codes.device.type != "cpu":
        return unpacked_by_arithmetic(codes)
    return torch.from_numpy(np.unpackbits(codes.numpy(), axis=-1, bitorder="little"))


def packed_by_arithmetic(mask: Tensor) -> Tensor:
    """Pack bools (B, n, 256) into bits, uint8 (B, n, 32), on devices that numpy does not reach."""
    shifts = torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (mask.unflatten(-1, (-1, 8)).to(torch.uint8) << shifts).sum(-1, dtype=torch.uint8)


def unpacked_by_arithmetic(codes: Tensor) -> Tensor:
    """Return the zeros and ones of bits (B, n, 32) as uint8 (B, n, 256)."""
    shifts = torch.arange(8, dtype=torch.uint8, device=codes.device)
    return (codes[..., None] >> shifts & 1).flatten(-2)
