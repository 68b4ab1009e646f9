"""Tell which of some checkpoints are copies of each other: a `best.ckpt` or `last.ckpt` beside the ones of the run."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final
from zlib import crc32

import torch

from tithe.averages.entry import Entry
from tithe.averages.formats import DeltaEntry

_TENSORS: Final = 32
_SAMPLE: Final = 64
"""Tensors, and entries of each, by which two checkpoints are told apart before they are read whole."""

_AT_ONCE: Final = 1 << 22


def copies(entries: Sequence[Entry]) -> dict[int, int]:
    """Return the places of checkpoints with the same tensors, bit for bit, as another one → the place of that one.

    The other is the first with a number in its name, or else the first. Checkpoints are read whole only when a sample
    of their entries is the same.

    Args:
        entries: of the same tensors; what lies beside those is not looked at.
    """
    alike: dict[int, list[int]] = {}
    for index, entry in enumerate(entries):
        alike.setdefault(_sample(entry), []).append(index)
    found: dict[int, int] = {}
    for places in alike.values():
        kept: list[int] = []
        for index in sorted(places, key=lambda index: not re.search(r"\d", entries[index].path.name)):
            same = next((other for other in kept if _same(entries[other], entries[index])), None)
            if same is None:
                kept.append(index)
            else:
                found[index] = same
    return found


def _sample(entry: Entry) -> int:
    names = sorted(entry.forms)
    code = 0
    for name in names[:: max(len(names) // _TENSORS, 1)]:
        start = entry.forms[name].numel // 2
        values = entry.read(name, start, min(start + _SAMPLE, entry.forms[name].numel))
        code = crc32(values.contiguous().view(torch.uint8).numpy().data, code)
    return code


def _same(one: Entry, two: Entry) -> bool:
    if one.forms != two.forms:
        return False
    if isinstance(one, DeltaEntry) and isinstance(two, DeltaEntry):
        own, others = one.places, two.places
        if own.keys() != others.keys() or any(not torch.equal(own[name], others[name]) for name in own):
            return False
    for name, form in one.forms.items():
        for start in range(0, form.numel, _AT_ONCE):
            stop = min(start + _AT_ONCE, form.numel)
            first, second = (entry.read(name, start, stop).contiguous() for entry in (one, two))
            if not torch.equal(first.view(torch.uint8), second.view(torch.uint8)):
                return False
    return True
