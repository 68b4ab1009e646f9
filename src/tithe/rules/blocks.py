"""Loops over equal blocks, which on tensors without data run a few blocks for all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

_Block = TypeVar("_Block")

_standing: list[int] = []


def blocks(series: Sequence[_Block], size: Callable[[_Block], object], like: Tensor) -> Iterator[_Block]:
    """Yield the blocks that a loop goes through, none of which needs another's result.

    A loop of ten operators over a thousand blocks takes minutes on shapes alone, and tells nothing new after the second
    of one size: what is in memory while it runs is the same in each. There the second stands for all of its size but
    the first, and says so to whoever counts operations (`repeats`).

    Args:
        series: the blocks, in order.
        size: of a block; where more than the last one differ, all are gone through.
        like: a tensor that the loop works on.
    """
    if not isinstance(like, FakeTensor) or len(series) < 4 or len({size(block) for block in series[:-1]}) > 1:
        yield from series
        return
    rest = series[-1:] if size(series[-1]) != size(series[1]) else series[:0]
    yield series[0]
    _standing.append(len(series) - 1 - len(rest))
    try:
        yield series[1]
    finally:
        _standing.pop()
    yield from rest


def repeats() -> int:
    """Return how many blocks the one that runs now stands for."""
    count = 1
    for number in _standing:
        count *= number
    return count
