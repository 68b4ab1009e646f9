"""Find two samples of the data that a loss would weight unlike each other, if it weights samples at all.

A loss that is a mean over the tokens of a batch counts a long row more than a short one. Whether it does is found out
by two rows (`passes`), which have to be unlike for it to show.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tithe.batch import leaves, num_samples, slice_batch


def unlike(batches: Sequence[Any], preferred: Any) -> tuple[Any, list[int]]:
    """Return the batch whose samples differ most in how much of them counts, and the least and the most of them.

    Args:
        batches: the data.
        preferred: the batch that is taken where none differs more.
    """
    best: tuple[float, Any, list[int]] = (-1.0, preferred, [])
    for batch in [preferred, *(b for b in batches if b is not preferred)]:
        lengths = _lengths(batch)
        if lengths.numel() < 2:
            continue
        low, high = int(lengths.argmin()), int(lengths.argmax())
        spread = float(lengths[high] - lengths[low])
        if spread > best[0]:
            best = spread, batch, [low, high if high != low else (low + 1) % lengths.numel()]
    return best[1], best[2]


def _lengths(batch: Any) -> Tensor:
    """How much of each sample counts, (N,) float64."""
    size, found = num_samples(batch), list(leaves(batch))
    if not found:
        return torch.zeros(size)
    if all(type(leaf) is Tensor and leaf.layout == torch.strided and leaf.shape[:1] == (size,) for leaf in found):
        return torch.stack([_entries(leaf) for leaf in found]).sum(0)
    return torch.tensor([sum(map(_of_one, leaves(slice_batch(batch, n, n + 1)))) for n in range(size)]).double()


def _of_one(leaf: Tensor) -> float:
    return float((leaf.values() if leaf.is_nested else leaf).count_nonzero())


def _entries(leaf: Tensor) -> Tensor:
    """The entries of each sample that are neither zero, ignored nor padding, (N,) float64.

    Whole numbers below zero are labels that are ignored. A run of one number at either end of a row is padding,
    whichever id pads. A number a sample may be its weight.
    """
    rows = leaf.detach().reshape(leaf.shape[0], -1)
    if rows.is_floating_point() or rows.is_complex():
        if rows.shape[1] != 1 or rows.is_complex():
            return (rows != 0).sum(1).cpu().double()
        values = rows[:, 0].cpu().double()
        return (values / values.abs().max().clamp(min=1e-300)).nan_to_num()
    counted = rows > 0
    if rows.numel() and int(rows.max()) > 1:  # of a mask, ones and zeros, the ones count
        counted &= ~(_run(rows) | _run(rows.flip(1)).flip(1))
    return counted.sum(1).cpu().double()


def _run(rows: Tensor) -> Tensor:
    """Where a row begins with several entries alike."""
    run = (rows == rows[:, :1]).long().cumprod(1).bool()
    return run & (run.sum(1, keepdim=True) > 1)
