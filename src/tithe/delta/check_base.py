"""Refuse a base that a delta was not made from: another shape or dtype, or other bits where nothing is changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from tithe.delta.fingerprint import digest
from tithe.delta.format import Entry
from tithe.errors import TitheError


@dataclass(frozen=True, eq=False)
class Match:
    """A tensor of the base that belongs to an entry of the delta."""

    name: str
    entry: Entry
    target: Tensor


def check_base(place: str, matches: Iterable[Match], indices: Callable[[str], Tensor | None]) -> None:
    """Compare the part of each tensor that the delta does not change with the fingerprint.

    Args:
        place: the delta, for the message.
        matches: the base's tensors; one is looked at at a time.
        indices: leading name → flat indices that the delta writes, None for all of them.

    Raises:
        TitheError: when a digest differs; it says how many do, and the first.
    """
    num_checked = 0
    wrong: list[str] = []
    for match in matches:
        written = indices(match.name)
        if match.entry.kind != "dense":
            num_checked += 1
            if digest(match.name, match.target, written) != match.entry.base:
                wrong.append(match.name)
    if wrong:
        module = wrong[0].rpartition(".")[0] or "the root module"
        raise TitheError(
            place,
            found=f"another base: {len(wrong)} of {num_checked} tensors differ, first '{wrong[0]}' in {module}",
            expected="the model that this delta was made from",
            remedy="load that base before applying, with nothing trained or applied in between",
        )


def check_form(name: str, entry: Entry, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Compare the shape and dtype of a base tensor with the delta's.

    Raises:
        TitheError: when either differs.
    """
    if shape != entry.shape:
        raise TitheError(
            name,
            found=f"shape {list(shape)}",
            expected=f"shape {list(entry.shape)}, as in the delta",
            remedy="build the base with the configuration that the delta was made with",
        )
    if dtype != entry.dtype:
        raise TitheError(
            name,
            found=f"dtype {dtype}",
            expected=f"dtype {entry.dtype}, as in the delta",
            remedy=f"load the base in {entry.dtype}",
        )
