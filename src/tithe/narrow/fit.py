"""Lay a narrow network out in memory: cut what exists out of a model's tensors, and pad it with zeros for the kernels.

    whole  ──take──>  padded part  ──strip──>  existing part  ──scatter_──>  whole

A model has many short vectors: biases, norms, statistics, and what an optimizer keeps of them. A call takes longer than
the copy that it makes of one. So vectors are laid one after the other, and cut as one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from tithe.selection import Grid
from tithe.selection.base import beside


def batches(*tensors: Mapping[str, Tensor]) -> list[list[str]]:
    """Return names in batches that are cut in one call: vectors of one dtype and device, each other tensor alone.

    Args:
        tensors: by the same names each; those of a batch agree in every one of these.
    """
    if len(tensors[0]) == 1:
        return [list(tensors[0])]
    alone: list[list[str]] = []
    vectors: dict[object, list[str]] = {}
    for name, first in tensors[0].items():
        if first.dim() == 1:
            vectors.setdefault(tuple((each[name].dtype, each[name].device) for each in tensors), []).append(name)
        else:
            alone.append([name])
    return [*alone, *vectors.values()]


@dataclass(frozen=True)
class Fit:
    """The layout of a narrow network in memory: existing parts, and the tensors that modules read, padded with zeros.

    The libraries of kernels compile a convolution for each new width, which takes longer than a narrow layer runs. So
    widths are rounded up, and what is added is zero: it changes no result, no gradient and no statistic.

    Args:
        grids: what exists of each tensor.
        read: that, and the positions of the zeros.
        inner: what exists within what is read, for the tensors where that is more.
        zeros: for the same tensors, axis → positions of zeros within what is read.
    """

    grids: Mapping[str, Grid]
    read: Mapping[str, Grid]
    inner: Mapping[str, Grid]
    zeros: Mapping[str, Mapping[int, Tensor]]
    _joined: dict[tuple[bool, tuple[str, ...]], _Joined] = field(
        default_factory=dict[tuple[bool, tuple[str, ...]], "_Joined"], init=False, repr=False
    )

    def fresh(self) -> Fit:
        """Return a copy without cached results, for a count of bytes."""
        copies: dict[int, Grid] = {}  # tensors that share a grid share the copy
        grids, read, inner = (
            {name: copies.setdefault(id(grid), copy(grid)) for name, grid in part.items()}
            for part in (self.grids, self.read, self.inner)
        )
        return Fit(grids, read, inner, self.zeros)

    def take(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return copies of the existing parts of whole tensors, padded with zeros."""
        taken: dict[str, Tensor] = {}
        for names in batches(tensors):
            if len(names) > 1:
                taken |= self.pad(self._gather(names, tensors))
                continue
            (name,) = names
            taken[name] = part = self.read[name].gather(tensors[name])  # one pass less than to pad it afterwards
            for axis, positions in self.zeros.get(name, {}).items():
                part.index_fill_(axis, beside(positions, part), 0)
        return taken

    def pad(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Pad values of the existing parts to the shapes that modules read."""
        padded = dict(values)
        for names in batches({name: value for name, value in values.items() if name in self.inner}):
            if len(names) > 1:
                parts = self._join(names, inner=True).spread([values[n] for n in names])
                padded |= dict(zip(names, parts, strict=True))
                continue
            (name,) = names
            padded[name] = values[name].new_zeros(self.inner[name].shape)
            self.inner[name].scatter_(padded[name], values[name])
        return padded

    def strip(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Undo `pad`: remove the zeros again."""
        found = dict(values)
        for names in batches({name: value for name, value in values.items() if name in self.inner}):
            found |= self._gather(names, values, inner=True)
        return found

    def gather(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return copies of the existing parts of tensors, or of what an optimizer keeps of them, without zeros."""
        found: dict[str, Tensor] = {}
        for names in batches(tensors):
            found |= self._gather(names, tensors)
        return found

    def scatter_(self, tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
        """Write values of the existing parts over them in whole tensors, in place."""
        for names in batches(tensors, values):
            if len(names) > 1:
                self._join(names).scatter_([tensors[n] for n in names], [values[n] for n in names])
            else:
                self.grids[names[0]].scatter_(tensors[names[0]], values[names[0]])

    def _gather(self, names: Sequence[str], tensors: Mapping[str, Tensor], *, inner: bool = False) -> dict[str, Tensor]:
        """The parts of one batch."""
        if len(names) > 1:
            return dict(zip(names, self._join(names, inner=inner).gather([tensors[n] for n in names]), strict=True))
        (name,) = names
        return {name: (self.inner if inner else self.grids)[name].gather(tensors[name])}

    def _join(self, names: Sequence[str], *, inner: bool = False) -> _Joined:
        """The grids of some vectors, or what exists within what is read of them, as one."""
        key = inner, tuple(names)
        if key not in self._joined:
            self._joined[key] = _Joined([(self.inner if inner else self.grids)[name] for name in names])
        return self._joined[key]


class _Joined:
    """Grids of vectors that lie one after the other, as one.

    Args:
        grids: of one axis each.
    """

    def __init__(self, grids: Sequence[Grid]) -> None:
        positions = [grid.axes[0] for grid in grids]
        self._lengths, self._widths = [grid.shape[0] for grid in grids], [len(each) for each in positions]
        *starts, total = accumulate(self._lengths, initial=0)
        first = torch.tensor(starts).repeat_interleave(torch.tensor(self._widths))
        self._grid = Grid.trusted((total,), {0: torch.cat(positions).add_(first)})

    def gather(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """Return the part of each."""
        return _apart(self._grid.gather(torch.cat(list(vectors))), self._widths)

    def spread(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Return vectors of zeros with those values in their place."""
        whole = values[0].new_zeros(self._grid.shape)
        self._grid.scatter_(whole, torch.cat(list(values)))
        return _apart(whole, self._lengths)

    def scatter_(self, vectors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """Write the values into the vectors."""
        whole = torch.cat([vector.detach() for vector in vectors])
        self._grid.scatter_(whole, torch.cat(list(values)))
        for vector, part in zip(vectors, whole.split(self._lengths), strict=True):
            vector.detach().copy_(part)


def _apart(whole: Tensor, lengths: Sequence[int]) -> list[Tensor]:
    """Views of one tensor that autograd takes for tensors of their own: what is written into one changes no other."""
    return [part.data for part in whole.split(list(lengths))]
