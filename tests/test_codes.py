"""Bits and 8-bit codes give back what went in, in the order of memory, whatever the shape and layout."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tithe.rules.lean.bitpack import (
    chunks,
    decode,
    encode,
    flat,
    layout,
    num_bits,
    pack,
    pack_words,
    same_layout,
    truncate,
    unpack,
    unpack_words,
)

shapes = st.lists(st.integers(0, 5), min_size=0, max_size=4)


@given(count=st.integers(0, 70), seed=st.integers(0, 9))
def test_bits_come_back(count: int, seed: int) -> None:
    mask = torch.rand(count, generator=torch.Generator().manual_seed(seed)) < 0.5
    bits = pack(mask)
    assert bits.dtype == torch.uint8
    assert bits.numel() == num_bits(count)
    assert torch.equal(unpack(bits, count), mask)


@given(count=st.integers(0, 70), seed=st.integers(0, 9))
def test_bits_are_the_same_by_arithmetic(count: int, seed: int) -> None:
    mask = torch.rand(count, generator=torch.Generator().manual_seed(seed)) < 0.5
    assert torch.equal(pack_words(mask), pack(mask))
    assert torch.equal(unpack_words(pack(mask), count), mask)


def test_the_first_element_is_in_the_lowest_bit() -> None:
    assert pack(torch.tensor([True, False, False, False, False, False, False, False, True])).tolist() == [1, 1]


@given(shape=shapes, order=st.randoms(), step=st.integers(1, 2))
def test_flat_follows_memory(shape: list[int], order: object, step: int) -> None:
    axes = list(range(len(shape)))
    order.shuffle(axes)
    x = torch.arange(float(torch.Size(shape).numel())).reshape(shape).permute(axes)
    x = x[::step] if shape else x
    values = flat(x)
    back = torch.empty_strided(x.shape, layout(x))
    flat(back).copy_(values)
    assert torch.equal(back, x)
    assert same_layout(back, layout(x))
    if step == 1:
        assert torch.equal(values, torch.arange(float(x.numel())))
        assert values.data_ptr() == x.data_ptr() or not x.numel()


def test_channels_last_is_read_as_it_lies() -> None:
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    assert flat(x).data_ptr() == x.data_ptr()
    assert torch.equal(flat(x), x.permute(0, 2, 3, 1).reshape(-1))


def test_chunks_cover_everything_in_whole_blocks() -> None:
    parts = list(chunks(torch.empty(200_000), 24))
    assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])]
    assert parts[-1].stop == 200_000
    assert all((part.stop - part.start) % 24 == 0 for part in parts[:-1])


def test_truncation_drops_the_fraction() -> None:
    whole = torch.arange(256.0)
    for fraction in (0.0, 0.5, 0.999):
        out = torch.empty(256, dtype=torch.uint8)
        truncate(whole + fraction, out)
        assert torch.equal(out, whole.to(torch.uint8))


def test_truncation_of_what_is_not_a_number_is_silent() -> None:
    out = torch.empty(2, dtype=torch.uint8)
    truncate(torch.tensor([math.nan, 7.5]), out)
    assert out[1] == 7


@given(shape=shapes, block=st.sampled_from([1, 3, 8, 64]), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_eight_bits_are_near(shape: list[int], block: int, dtype: torch.dtype) -> None:
    x = torch.randn(shape).to(dtype)
    codes, scales = encode(x, block)
    assert codes.dtype == torch.int8
    assert codes.numel() == x.numel()
    assert scales.numel() == -(-x.numel() // block)
    found = decode(codes, scales, block, x)
    assert found.shape == x.shape
    assert found.dtype == dtype
    assert found.stride() == x.stride()
    if x.numel():
        wide = scales.repeat_interleave(block)[: x.numel()].reshape(shape)
        off = (found.float() - x.float()).abs()
        assert bool((off <= wide * 0.5001 + x.float().abs() * torch.finfo(dtype).eps).all())


@pytest.mark.parametrize("numel", [128, 200_000])
def test_a_block_of_zeros_and_a_large_one(numel: int) -> None:
    x = torch.zeros(numel)
    x[5] = 1e30
    found = decode(*encode(x, 64), 64, x)
    assert torch.equal(found[64:], x[64:])
    assert abs(float(found[5]) / 1e30 - 1) < 1e-6
