"""Codes of blocks are near what went in, and are projected on and combined as what they decode to would be."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tithe.averages import quantize
from tithe.averages.quantize import (
    BLOCK,
    block_bytes,
    code_bytes,
    combine,
    decode,
    encode,
    packed_by_arithmetic,
    project,
    unpacked_by_arithmetic,
)
from tithe.errors import TitheError

BITS = (8, 4, 1)
every = pytest.mark.parametrize("bits", BITS)
sizes = pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e30])


def drawn(blocks: int, n: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(blocks, n, BLOCK, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def wide(codes: Tensor, scales: Tensor | None, bits: int | None) -> Tensor:
    """What the codes decode to, in float64."""
    return decode(codes, scales, bits).double()


def check_products(codes: Tensor, scales: Tensor | None, bits: int | None) -> None:
    """Projecting and combining are the dense sums: float32 of codes, float64 of what is kept as it is."""
    blocks, n = codes.shape[:2]
    values = wide(codes, scales, bits)
    gradient, weights = torch.randn(blocks, BLOCK), torch.randn(n, dtype=torch.float64)
    if bits is None:
        gradient = gradient.double()
    eps = 1e-13 if bits is None else 2e-6
    found = project(codes, scales, bits, gradient)
    assert found.dtype == torch.float64
    assert found.shape == (n,)
    expected = torch.einsum("bnc,bc->n", values, gradient.double())
    bound = values.transpose(0, 1).reshape(n, -1).norm(dim=1) * gradient.double().norm()
    assert bool(((found - expected).abs() <= eps * bound).all())
    combined = combine(codes, scales, bits, weights)
    kept = codes.dtype if bits is None else torch.float32
    assert combined.dtype == kept
    assert combined.shape == (blocks, BLOCK)
    expected = torch.einsum("bnc,n->bc", values, weights)
    bound = torch.einsum("bnc,n->bc", values.abs(), weights.abs()).amax(1, keepdim=True)
    assert bool(((combined.double() - expected).abs() <= max(eps, torch.finfo(kept).eps) * bound + 1e-45).all())


@every
def test_codes_are_of_the_size_that_their_bits_say(bits: int) -> None:
    codes, scales = encode(drawn(3, 2), bits)
    assert codes.dtype == torch.uint8
    assert codes.shape == (3, 2, 32 * bits)
    assert codes.is_contiguous()
    assert codes[0, 0].numel() == code_bytes(bits)
    assert scales is not None
    assert scales.dtype == torch.bfloat16
    assert scales.shape == (3, 2)
    assert block_bytes(bits) == code_bytes(bits) + scales[0, :1].nbytes


def test_what_is_kept_as_it_is() -> None:
    for dtype in (torch.float32, torch.float64):
        values = drawn(2, 3, dtype=dtype)
        codes, scales = encode(values, None)
        assert codes is values
        assert scales is None
        assert decode(codes, scales, None) is values
        assert block_bytes(None, dtype) == values[0, 0].nbytes


def test_bits_that_no_code_has() -> None:
    with pytest.raises(TitheError, match="8, 4 or 1"):
        code_bytes(2)
    with pytest.raises(TitheError, match="8, 4 or 1"):
        encode(drawn(1, 1), 16)
    with pytest.raises(TitheError, match="8, 4 or 1"):
        block_bytes(3)


@given(
    bits=st.sampled_from([8, 4]),
    blocks=st.integers(0, 4),
    n=st.integers(1, 5),
    power=st.integers(-36, 35),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 9),
)
def test_codes_are_near(bits: int, blocks: int, n: int, power: int, dtype: torch.dtype, seed: int) -> None:
    values = drawn(blocks, n, seed, dtype) * 10.0**power
    codes, scales = encode(values, bits)
    assert scales is not None
    top, largest = values.abs().amax(-1).double(), 2 ** (bits - 1) - 1
    assert bool((scales.double() * largest >= top).all())
    small = torch.finfo(torch.bfloat16).tiny
    assert bool((scales.double() <= (top / largest * (1 + 2**-7)).clamp_min(small)).all())
    found = decode(codes, scales, bits)
    assert found.dtype == torch.float32
    off = (found.double() - values.double()).abs()
    assert bool((off <= scales.double()[..., None] * 0.50001).all())


@given(n=st.integers(1, 5), power=st.integers(-36, 35), seed=st.integers(0, 9))
def test_one_bit_is_the_sign_and_the_mean(n: int, power: int, seed: int) -> None:
    values = drawn(2, n, seed) * 10.0**power
    found = decode(*encode(values, 1), 1)
    assert torch.equal(found < 0, values < 0)
    mean = values.abs().mean(-1, dtype=torch.float64, keepdim=True).expand_as(values)
    assert torch.allclose(found.abs().double(), mean, rtol=2**-8, atol=1e-40)


@every
def test_codes_use_their_whole_range(bits: int) -> None:
    largest = 2 ** max(bits - 1, 1) - 1  # so large that the scale is 1, which is not rounded
    values = torch.linspace(-largest, largest, BLOCK).view(1, 1, BLOCK)
    assert decode(*encode(values, bits), bits).unique().numel() == {8: 255, 4: 15, 1: 2}[bits]


@every
def test_zeros_are_zeros(bits: int) -> None:
    values = drawn(3, 4)
    values[1] = 0
    values[:, 2] = 0
    codes, scales = encode(values, bits)
    found = decode(codes, scales, bits)
    assert torch.count_nonzero(found[1]) == torch.count_nonzero(found[:, 2]) == 0
    assert torch.count_nonzero(found[0, 0]) > 0
    check_products(codes, scales, bits)
    assert project(codes, scales, bits, torch.randn(3, BLOCK))[2] == 0
    assert torch.count_nonzero(combine(codes, scales, bits, torch.randn(4).double())[1]) == 0


@given(
    bits=st.sampled_from([8, 4, 1, None]),
    blocks=st.integers(0, 12),
    n=st.integers(1, 9),
    chunk=st.integers(0, 4),
    span=st.integers(1, 8),
    seed=st.integers(0, 9),
)
def test_products_are_those_of_what_they_decode_to(
    bits: int | None, blocks: int, n: int, chunk: int, span: int, seed: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:  # so little at a time that few blocks are many chunks
        patch.setattr(quantize, "_CPU_CHUNK", chunk * n * BLOCK * 4)
        patch.setattr(quantize, "_SPAN", span)
        check_products(*encode(drawn(blocks, n, seed), bits), bits)


@pytest.mark.parametrize("bits", [*BITS, None])
@pytest.mark.parametrize(("blocks", "n"), [(1, 1), (1100, 1), (20, 300)])
def test_few_and_many_rows(bits: int | None, blocks: int, n: int) -> None:
    check_products(*encode(drawn(blocks, n), bits), bits)


@sizes
@every
def test_tiny_and_huge(bits: int, size: float) -> None:
    codes, scales = encode(drawn(3, 4) * size, bits)
    assert bool(decode(codes, scales, bits).isfinite().all())
    check_products(codes, scales, bits)


@every
def test_rows_of_very_different_sizes(bits: int) -> None:
    values = drawn(3, 4) * torch.tensor([1e-30, 1.0, 0.0, 1e30])[:, None]
    codes, scales = encode(values, bits)
    check_products(codes, scales, bits)


@every
def test_what_float32_has_hardly_any_numbers_for(bits: int) -> None:
    values = torch.full((1, 1, BLOCK), 1e-44)
    found = decode(*encode(values, bits), bits)
    assert bool(found.isfinite().all())
    assert float(found.abs().max()) < 1e-37


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exact_sums_cancel_what_is_common(dtype: torch.dtype) -> None:
    values = (drawn(4, 6, dtype=torch.float64) * 1e-3 + 100).to(dtype)
    weights = torch.tensor([1.0, -1, 2, -2, 0.5, -0.5], dtype=torch.float64)
    found = combine(values, None, None, weights)
    expected = torch.einsum("bnc,n->bc", values.double(), weights).to(dtype)
    assert torch.allclose(found, expected, rtol=1e-6 if dtype == torch.float32 else 1e-9, atol=1e-12)
    gradient = torch.randn(4, BLOCK, dtype=torch.float64)
    expected = torch.einsum("bnc,bc->n", values.double(), gradient)
    assert torch.allclose(project(values, None, None, gradient), expected, rtol=1e-11, atol=0)


@every
def test_a_gradient_all_of_one_sign(bits: int) -> None:
    """The number that is added to a code has the largest sum then."""
    values = drawn(2, 3)
    codes, scales = encode(values, bits)
    gradient = torch.rand(2, BLOCK) + 1
    expected = torch.einsum("bnc,bc->n", wide(codes, scales, bits), gradient.double())
    found = project(codes, scales, bits, gradient)
    assert bool(((found - expected).abs() <= 2e-6 * values.norm() * gradient.norm()).all())


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_gradient_of_another_dtype_that_wants_no_graph(bits: int, dtype: torch.dtype) -> None:
    codes, scales = encode(drawn(2, 3), bits)
    gradient = torch.randn(2, BLOCK).to(dtype)
    found = project(codes, scales, bits, gradient.requires_grad_())
    assert not found.requires_grad
    assert torch.allclose(found, project(codes, scales, bits, gradient.float()), rtol=1e-5, atol=1e-4)
    weights = torch.randn(3, dtype=torch.float64, requires_grad=True)
    assert not combine(codes, scales, bits, weights).requires_grad


@pytest.mark.parametrize("bits", [*BITS, None])
def test_memory_that_must_not_be_written(tmp_path: Path, bits: int | None) -> None:
    codes, scales = encode(drawn(5, 3), bits)
    lead = codes.element_size()  # as far aligned as its dtype must be, and no further
    path = tmp_path / "codes"
    path.write_bytes(bytes(lead) + codes.numpy().tobytes())
    held = np.memmap(path, dtype=codes.numpy().dtype, mode="r", offset=lead, shape=tuple(codes.shape))
    assert not held.flags.writeable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns whoever makes the tensor
        kept = torch.from_numpy(held)
    check_products(kept, scales, bits)
    assert torch.equal(decode(kept, scales, bits), decode(codes, scales, bits))
    check_products(kept[1:4], None if scales is None else scales[1:4], bits)


@given(seed=st.integers(0, 9))
def test_bits_are_the_same_by_arithmetic(seed: int) -> None:
    values = drawn(2, 3, seed)
    codes, _ = encode(values, 1)
    assert torch.equal(packed_by_arithmetic(values < 0), codes)
    assert torch.equal(unpacked_by_arithmetic(codes) != 0, values < 0)


@pytest.mark.parametrize("bits", [*BITS, None])
def test_what_lies_on_another_device_stays_there(bits: int | None) -> None:
    codes, scales = encode(drawn(5, 3).to("meta"), bits)
    found = decode(codes, scales, bits)
    assert (found.device.type, found.shape) == ("meta", (5, 3, BLOCK))
    products = project(codes, scales, bits, torch.empty(5, BLOCK, device="meta"))
    assert (products.device.type, products.shape, products.dtype) == ("meta", (3,), torch.float64)
    combined = combine(codes, scales, bits, torch.empty(3, dtype=torch.float64, device="meta"))
    assert (combined.device.type, combined.shape, combined.dtype) == ("meta", (5, BLOCK), torch.float32)


@pytest.mark.parametrize("bits", [*BITS, None])
def test_blocks_of_several_weights(bits: int | None) -> None:
    """Blocks that belong to several weights: products of each, and rows that are mixed otherwise for each."""
    codes, scales = encode(drawn(1100, 2), bits)
    values, gradient = wide(codes, scales, bits), torch.randn(1100, BLOCK)
    owners = torch.arange(1100) // 7 % 5
    found = quantize.products(codes, scales, bits, gradient, owners, 5)
    assert found.dtype == torch.float64
    by_block = torch.einsum("bnc,bc->bn", values, gradient.double())
    expected = torch.zeros(5, 2, dtype=torch.float64).index_add_(0, owners, by_block)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-2)
    weights = torch.randn(5, 2, dtype=torch.float64)
    combined = combine(codes, scales, bits, weights, owners)
    assert torch.allclose(combined.double(), torch.einsum("bnc,bn->bc", values, weights[owners]), rtol=1e-5, atol=1e-5)
    none = None if scales is None else scales[:0]
    assert not quantize.products(codes[:0], none, bits, gradient[:0], owners[:0], 5).any()
