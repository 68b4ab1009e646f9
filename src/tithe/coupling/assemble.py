"""Make a coupling from a trace: classes become units, and units of one kind become a group."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tithe.coupling.call import Work
from tithe.coupling.groups import Coupling, Group, Term
from tithe.coupling.labels import ALWAYS, Classes, Label

Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Atoms:
    """The positions of one axis of one tensor, as atoms (length,)."""

    tensor: str
    axis: int
    atoms: Label


def assemble(
    classes: Classes,
    atoms: Sequence[Atoms],
    work: Sequence[Work],
    made: Sequence[Label],
    read: Sequence[Label],
    parameters: Mapping[str, Tensor],
    whole: Mapping[str, str],
    samples: int,
) -> Coupling:
    """Number the units that can be absent, and say what they cost.

    Args:
        classes: after the trace.
        atoms: of every axis, in the model's order.
        work: of every product.
        made: labels of what products returned; they say which axis of a weight makes a unit.
        read: labels of weights along what products sum over; they say which axis of a weight reads a unit.
        parameters: every parameter of the model, for their number.
        whole: modules that were left out, and why.
        samples: in the traced batch.
    """
    classes.settle()
    places = [classes.canonical(one.atoms).numpy() for one in atoms]
    makes = _axes_of(atoms, made)
    kinds = _kinds(places)
    groups, units = _number(atoms, places, makes, kinds)
    axes = _Axes(units)
    by_tensor: dict[str, dict[int, int]] = {}
    for one, roots in zip(atoms, places, strict=True):
        if (index := axes.exact(roots)) is not None:
            by_tensor.setdefault(one.tensor, {})[one.axis] = index
    params = _merged(_param_terms(parameters, by_tensor, axes))
    flops = _merged(axes.term(one.total / samples, map(classes.canonical, one.labels)) for one in work)
    left = dict(whole)
    reasons = classes.reasons()
    for index in sorted(makes):
        one = atoms[index]
        if one.axis not in by_tensor.get(one.tensor, {}):
            roots = classes.roots(one.atoms).tolist()
            alone = all(len(kinds.get(root, ())) == 1 for root in roots)
            otherwise = "nothing else lives and dies with it" if alone else "all of it lives and dies together"
            left.setdefault(_owner(one.tensor), next((why for r in roots if (why := reasons.get(r))), otherwise))
    readers = ((atoms[index].tensor, atoms[index].axis) for index in _axes_of(atoms, read))
    reads = frozenset((tensor, axis) for tensor, axis in readers if axis in by_tensor.get(tensor, {}))
    return Coupling(groups, tuple(axes.maps), by_tensor, flops, params, left, reads)


def _axes_of(atoms: Sequence[Atoms], labels: Sequence[Label]) -> set[int]:
    """Indices of the axes of weights that labels name."""
    starts = np.array([int(one.atoms[0]) for one in atoms], dtype=np.int64)
    found = np.unique(np.concatenate([np.unique(label.numpy()) for label in labels] or [np.empty(0, np.int64)]))
    return set((np.searchsorted(starts, found[found != ALWAYS], side="right") - 1).tolist())


def _kinds(places: Sequence[Ints]) -> dict[int, tuple[int, ...]]:
    """Class → indices of the axes on which it has positions."""
    found: dict[int, list[int]] = {}
    for index, roots in enumerate(places):
        for root in np.unique(roots[roots != ALWAYS]).tolist():
            found.setdefault(root, []).append(index)
    return {root: tuple(indices) for root, indices in found.items()}


def _number(
    atoms: Sequence[Atoms], places: Sequence[Ints], makes: set[int], kinds: Mapping[int, tuple[int, ...]]
) -> tuple[tuple[Group, ...], dict[int, int]]:
    """The groups, and class → unit."""
    members: dict[tuple[int, ...], list[int]] = {}
    for root, kind in kinds.items():
        members.setdefault(kind, []).append(root)
    # What has positions in one place only is used by nothing else: rows of a table that this input was too short for.
    members = {kind: roots for kind, roots in members.items() if len(roots) > 1 and len(kind) > 1}
    maker = {kind: next((index for index in kind if index in makes), kind[0]) for kind in members}
    groups: list[Group] = []
    units: dict[int, int] = {}
    names: dict[str, int] = {}
    for kind in sorted(members, key=lambda kind: (maker[kind], kind)):
        first = {root: k for k, root in reversed(list(enumerate(places[kind[0]].tolist())))}
        start = len(units)
        for root in sorted(members[kind], key=first.__getitem__):
            units[root] = len(units)
        name = _owner(atoms[maker[kind]].tensor)
        again = names[name] = names.get(name, -1) + 1
        listed = tuple((atoms[index].tensor, atoms[index].axis) for index in kind)
        groups.append(Group(f"{name}.{again}" if again else name, start, len(units), listed))
    return tuple(groups), units


def _owner(tensor: str) -> str:
    """Path of the module that a tensor belongs to; the tensor's own name where that is the model itself."""
    return tensor.rpartition(".")[0] or tensor


class _Axes:
    """The distinct maps from positions to units."""

    def __init__(self, units: Mapping[int, int]) -> None:
        self.maps: list[Tensor] = []
        self._units = units
        self._exact: dict[bytes, int] = {}
        self._alike: dict[bytes, tuple[int, int]] = {}

    def exact(self, roots: Ints) -> int | None:
        """The index of this map, or None where every position always exists."""
        mapped = self._mapped(roots)
        return None if not (mapped >= 0).any() else self._index(mapped)

    def term(self, total: float, labels: Iterable[Label]) -> Term:
        """A cost of `total` with nothing cut, in proportion to the width of each label."""
        axes: list[int] = []
        for label in labels:
            mapped = self._mapped(label.numpy().reshape(-1))
            if not (mapped >= 0).any():
                continue
            key, count = _proportions(mapped)
            index, others = self._alike.get(key) or (self._index(mapped), count)
            # Positions of this label for each one of that axis; the number of both is known.
            total *= count / others / len(mapped)
            axes.append(index)
        return Term(total, tuple(sorted(axes)))

    def _mapped(self, roots: Ints) -> Ints:
        return np.array([self._units.get(root, -1) for root in roots.tolist()], dtype=np.int64)

    def _index(self, mapped: Ints) -> int:
        index = self._exact.setdefault(mapped.tobytes(), len(self.maps))
        if index == len(self.maps):
            self.maps.append(torch.from_numpy(mapped))
            key, count = _proportions(mapped)
            self._alike.setdefault(key, (index, count))
        return index


def _proportions(mapped: Ints) -> tuple[bytes, int]:
    """How many positions each unit has, up to a common factor, and that factor."""
    units, counts = np.unique(mapped, return_counts=True)
    factor = math.gcd(*counts.tolist())
    return np.concatenate([units, counts // factor]).tobytes(), factor


def _param_terms(
    parameters: Mapping[str, Tensor], by_tensor: Mapping[str, Mapping[int, int]], axes: _Axes
) -> Iterable[Term]:
    for name, parameter in parameters.items():
        if parameter.is_floating_point():
            found = tuple(sorted(by_tensor.get(name, {}).values()))
            yield Term(parameter.numel() / math.prod(len(axes.maps[index]) for index in found), found)


def _merged(terms: Iterable[Term]) -> tuple[Term, ...]:
    total: dict[tuple[int, ...], float] = {}
    for term in terms:
        total[term.axes] = total.get(term.axes, 0.0) + term.coefficient
    return tuple(Term(coefficient, axes) for axes, coefficient in total.items())
