"""Follow labels through a network: they say which positions of a tensor are absent together.

Every position of every axis of a weight is an *atom*. Classes of atoms live and die together. A *label* of a tensor is
an int64 array of atoms that is broadcastable to it: size 1 along the dimensions on which it does not depend. An entry
of the tensor exists iff the class of every label there is alive; labels of one tensor depend on different dimensions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ALWAYS = 0
"""The atom of positions that always exist: padding, constants, what the model returns."""

Label = Tensor
Labels = tuple[Tensor, ...]


def varying(label: Label) -> frozenset[int]:
    """Return the dimensions on which a label depends."""
    return frozenset(dim for dim, size in enumerate(label.shape) if size > 1)


class Classes:
    """Classes of atoms that live and die together, and the reasons why some of them never die."""

    def __init__(self) -> None:
        self._parent = np.zeros(1, dtype=np.int64)
        self._pinned = np.ones(1, dtype=np.bool_)  # of each class, at its root
        self._pins: list[tuple[NDArray[np.int64], str]] = []
        self._ties: list[tuple[NDArray[np.int64], str]] = []
        self._grids: list[tuple[Label, frozenset[int], str]] = []
        self._cuts: list[tuple[Label, int, tuple[int, ...], str]] = []

    def add(self, count: int) -> Label:
        """Make new atoms, (count,), each in a class of its own."""
        start = len(self._parent)
        self._parent = np.concatenate([self._parent, np.arange(start, start + count)])
        self._pinned = np.concatenate([self._pinned, np.zeros(count, dtype=np.bool_)])
        return torch.arange(start, start + count)

    def roots(self, atoms: Label) -> NDArray[np.int64]:
        """Return the class of each atom, named by its lowest atom; in the shape of `atoms`."""
        return self._find(atoms.numpy())

    def canonical(self, atoms: Label) -> Label:
        """Return the class of each atom, `ALWAYS` for every class that never dies."""
        roots = self.roots(atoms)
        return torch.from_numpy(np.where(self._pinned[roots], ALWAYS, roots))

    def dies(self, label: Label) -> bool:
        """Return whether an atom of this label can be absent."""
        return not bool(self._pinned[self._find(np.unique(label.numpy()))].all())

    def join(self, one: Label, other: Label, why: str) -> None:
        """Unite the atoms at the same place, after broadcasting: they live and die together."""
        left, right = np.broadcast_arrays(self.roots(one), self.roots(other))
        apart = left != right
        left, right = left[apart], right[apart]
        self._pin(np.concatenate([right[left == ALWAYS], left[right == ALWAYS]]), why)
        inside = (left != ALWAYS) & (right != ALWAYS)
        self._unite(left[inside], right[inside])

    def tie(self, label: Label, dims: Iterable[int], why: str) -> Label | None:
        """Unite all atoms along `dims`; a label that depends on nothing else never dies.

        Returns:
            The label without these dimensions, or None when nothing of it is left.
        """
        dims = [dim for dim in dims if label.shape[dim] > 1]
        if not dims:
            return label
        first = label
        for dim in dims:
            first = first.narrow(dim, 0, 1)
        self.join(label, first, why)
        if not varying(first):
            self.pin(first, why)
            return None
        self._ties.append((np.unique(self.roots(first)), why))
        return first

    def pin(self, label: Label, why: str) -> None:
        """Keep every atom of this label from ever being absent."""
        self._pin(self.roots(label), why)

    def compress(self, label: Label) -> Label:
        """Return the same label, of size 1 along every dimension on which it does not depend."""
        for dim in varying(label):
            if label.stride(dim) == 0:  # an expanded label: no need to look at it
                label = label.narrow(dim, 0, 1)
        roots = self.canonical(label) if varying(label) else label
        for dim in varying(label):
            if torch.equal(roots, roots.narrow(dim, 0, 1).expand_as(roots)):
                label, roots = label.narrow(dim, 0, 1), roots.narrow(dim, 0, 1)
        return label

    def merge(self, labels: Iterable[Label], why: str) -> Labels:
        """Make the labels of one tensor depend on different dimensions.

        Two that depend on the same dimensions live and die together, entry for entry. Of two that share some dimensions
        only, what is left has to be a rectangle: they become one that depends on what they share, or, where one of them
        never dies, the other is whole along what they share. Thus the scores of heads meet values (heads, width).
        """
        apart: list[Label] = []
        waiting = list(labels)
        while waiting:
            label = waiting.pop()
            dims = varying(label)
            if not dims:
                continue
            clash = next((k for k, other in enumerate(apart) if dims & varying(other)), None)
            if clash is None:
                apart.append(label)
                continue
            other = apart[clash]
            if dims == varying(other):
                self.join(label, other, why)
                # the one that names a weight's own atoms says more
                apart[clash] = label if not self._only_always(label) else other
            else:
                shared = dims & varying(other)
                del apart[clash]
                both = self.dies(label) and self.dies(other)
                for one in (label, other):
                    tied = self.tie(one, varying(one) - shared if both else shared, why)
                    waiting += [] if tied is None else [tied]
        return tuple(apart)

    def remember_grid(self, label: Label, whole: Iterable[int], why: str) -> None:
        """Note a label that depends on several dimensions, and which of them have to stay whole in the end.

        `settle` sees to it that a rectangle is left.
        """
        self._grids.append((label, frozenset(whole), why))

    def remember_cuts(self, label: Label, dim: int, cuts: Iterable[int], why: str) -> None:
        """Note that a tensor is taken apart at `cuts` along `dim`; `settle` sees to it that all parts shrink alike."""
        self._cuts.append((label, dim, tuple(cuts), why))

    def settle(self) -> None:
        """Pin, once all is known, what would leave no rectangle and what would move the place of a cut."""
        before = -1
        while before != (before := int(self._pinned.sum())):
            for label, whole, why in self._grids:
                dims = varying(self.compress(label))
                if len(dims) > 1 or dims & whole:
                    self.pin(label, why)
            for label, dim, cuts, why in self._cuts:
                line = self.compress(label)
                if varying(line) == frozenset({dim}):
                    self._pin(_uneven(self.canonical(line).flatten().numpy(), cuts), why)

    def reasons(self) -> dict[int, str]:
        """Return class → the first reason why it never dies, or why it is larger than one atom."""
        found: dict[int, str] = {}
        for roots, why in (*self._pins, *self._ties):
            for root in np.unique(self._find(roots)).tolist():
                found.setdefault(root, why)
        return found

    @staticmethod
    def _only_always(label: Label) -> bool:
        return not bool(label.any())

    def _find(self, atoms: NDArray[np.int64]) -> NDArray[np.int64]:
        roots = self._parent[atoms]
        while not np.array_equal(above := self._parent[roots], roots):
            roots = above
        self._parent[atoms] = roots
        return roots

    def _unite(self, left: NDArray[np.int64], right: NDArray[np.int64]) -> None:
        touched = np.unique(np.concatenate([left, right]))
        was = self._pinned[touched]
        while True:
            left, right = self._find(left), self._find(right)
            apart = left != right
            if not apart.any():
                break
            left, right = left[apart], right[apart]
            np.minimum.at(self._parent, np.maximum(left, right), np.minimum(left, right))
        np.logical_or.at(self._pinned, self._find(touched), was)

    def _pin(self, roots: NDArray[np.int64], why: str) -> None:
        fresh = np.unique(roots)
        fresh = fresh[~self._pinned[fresh]]
        if fresh.size:
            self._pinned[fresh] = True
            self._pins.append((fresh, why))


def _uneven(roots: NDArray[np.int64], cuts: Sequence[int]) -> NDArray[np.int64]:
    """The classes that do not hold the same share of every part: without one of them a part would end elsewhere."""
    parts = np.searchsorted(np.array(sorted(set(cuts) - {0, len(roots)})), np.arange(len(roots)), side="right")
    names, at = np.unique(roots, return_inverse=True)
    held = np.zeros((len(names), int(parts[-1]) + 1), dtype=np.int64)
    np.add.at(held, (at, parts), 1)
    even = held * len(roots) == held.sum(1, keepdims=True) * np.bincount(parts)
    return names[~even.all(1)]


def aligned(label: Label, num_dims: int) -> Label:
    """Return the label of a tensor that is broadcast to more dimensions: new ones come first."""
    return label.reshape((1,) * (num_dims - label.dim()) + tuple(label.shape))


def always(dim: int, size: int, num_dims: int) -> Label:
    """Return a label by which every position along this dimension always exists."""
    shape = [1] * num_dims
    shape[dim] = size
    return torch.full((1,) * num_dims, ALWAYS, dtype=torch.int64).expand(shape)


def moved(label: Label, order: Sequence[int | None]) -> Label:
    """Return the label with its dimensions in another order; None is a new one of size 1; size 1 may be dropped."""
    kept = [dim for dim in order if dim is not None]
    dropped = [dim for dim in range(label.dim()) if dim not in kept]
    label = label.permute(*kept, *dropped)
    shape = iter(label.shape)
    return label.reshape([1 if dim is None else next(shape) for dim in order])
