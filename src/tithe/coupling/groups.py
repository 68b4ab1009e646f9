"""Say which positions of which tensors exist or are absent together, and what they cost.

    width_a(s) = Σ_p s_unit(p)          cost(s) = Σ_t c_t Π_{a ∈ t} width_a(s)

A coupling knows positions and numbers. It never sees a module or an operator.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from tithe.errors import TitheError


@dataclass(frozen=True)
class Group:
    """Units of one kind: the channels of some layers, the heads of an attention, the hidden units of an FFN.

    Args:
        name: module path of the first layer that makes them, unique.
        start: first unit.
        stop: one past the last unit.
        members: (tensor name, axis) of every place in which its units have positions.
    """

    name: str
    start: int
    stop: int
    members: tuple[tuple[str, int], ...]

    @property
    def num_units(self) -> int:
        """Return the number of units in the group."""
        return self.stop - self.start


@dataclass(frozen=True)
class Term:
    """A piece of a cost, linear in the width of each of its axes: coefficient · Π_a width(a).

    Args:
        coefficient: cost for each combination of positions.
        axes: indices into `Coupling.axes`, one for each factor; none for a fixed cost.
    """

    coefficient: float
    axes: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Coupling:
    """The units of a model: the smallest sets of positions that can be absent while the rest still fits together.

    Units are numbered from 0, group after group.

    Args:
        groups: in the model's order; together they hold every unit once.
        axes: distinct maps from the positions of an axis to units, int64 (length,); -1 for a position that always
            exists.
        places: tensor name → axis of the tensor → index into `axes`, for tensors with a position that may be absent.
        flops: the forward pass of one sample, in operations (a multiply-add counts two).
        params: entries of the model's parameters.
        whole: what could have been units but stays whole: module path → reason.
        reads: (tensor name, axis) of weights that a product sums over: where the units of that axis are read, after
            which they are gone. A unit whose columns there are zero is absent, whatever its other positions hold.

    Example:
        >>> hidden = Group("0", 0, 3, (("0.weight", 0), ("0.bias", 0), ("2.weight", 1)))
        >>> places = {"0.weight": {0: 0}, "0.bias": {0: 0}, "2.weight": {1: 0}}
        >>> coupling = Coupling((hidden,), (torch.arange(3),), places, (), (Term(7.0, (0,)), Term(2.0, ())), {})
        >>> coupling.cost(coupling.params, torch.tensor([1.0, 0.5, 0.5]))
        tensor(16.)
        >>> coupling.kept(torch.tensor([True, False, True]))
        [tensor([0, 2])]
    """

    groups: tuple[Group, ...]
    axes: tuple[Tensor, ...]
    places: Mapping[str, Mapping[int, int]]
    flops: tuple[Term, ...]
    params: tuple[Term, ...]
    whole: Mapping[str, str]
    reads: frozenset[tuple[str, int]] = frozenset()

    @property
    def num_units(self) -> int:
        """Return n, the number of units."""
        return self.groups[-1].stop if self.groups else 0

    def kept(self, mask: Tensor) -> list[Tensor]:
        """Return the positions that exist when the units of `mask` do.

        Args:
            mask: bool (n,).

        Returns:
            For each axis its live positions, sorted, int64, on the mask's device.
        """
        at = self._values(mask).nonzero().flatten()
        counts = torch.bincount(self._axis_of.to(at.device)[at], minlength=len(self.axes))
        return list(self._position.to(at.device)[at].split(counts.tolist()))

    def nested(self, mask: Tensor, wider: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        """Compare the positions that exist when the units of `mask` do with those when more units do.

        Args:
            mask: bool (n,).
            wider: bool (n,), true where `mask` is.

        Returns:
            Four lists of numbers for each axis, sorted, int64, on the mask's device: its live positions under `mask`;
            under `wider`; where among these the former are; and where the others are.
        """
        at = self._values(wider).nonzero().flatten()
        inside = self._values(mask)[at]
        axis_of, position = self._axis_of.to(at.device)[at], self._position.to(at.device)[at]
        lengths, fewer = (torch.bincount(axis, minlength=len(self.axes)) for axis in (axis_of, axis_of[inside]))
        place = torch.arange(len(at), device=at.device) - (lengths.cumsum(0) - lengths)[axis_of]
        wide, narrow = lengths.tolist(), fewer.tolist()
        others = [a - b for a, b in zip(wide, narrow, strict=True)]
        parts = (position[inside], narrow), (position, wide), (place[inside], narrow), (place[~inside], others)
        kept, existing, within, added = (list(values.split(each)) for values, each in parts)
        return kept, existing, within, added

    def widths(self, s: Tensor) -> Tensor:
        """Return the expected number of live positions of each axis, (num_axes,) in the dtype of `s`.

        Args:
            s: probability of each unit to exist, float (n,).
        """
        return torch.stack([part.sum() for part in self._spread(s)]) if self.axes else s.new_empty(0)

    def cost(self, terms: tuple[Term, ...], s: Tensor) -> Tensor:
        """Return Σ_t c_t Π_a width_a(s), a scalar: the cost when every axis has its expected width.

        Args:
            terms: `flops`, `params`, or others over the same axes.
            s: probability of each unit to exist, float (n,).
        """
        coefficients, factors = self._factors(terms, s)
        return (coefficients * factors.prod(1)).sum()

    def shares(self, terms: tuple[Term, ...], s: Tensor) -> Tensor:
        """Return the cost of each unit at `s`, (n,): Σ_i shares_i s_i is the units' part of `cost(terms, s)`.

        A term is split evenly between those of its axes that have units, and there between the positions; what falls
        to positions that always exist is no unit's.

            shares_i = Σ_t c_t / k_t Σ_{a ∈ t} #{p of a: unit(p) = i} Π_{b ∈ t, b ≠ a} width_b(s)

        Args:
            terms: `flops`, `params`, or others over the same axes.
            s: probability of each unit to exist, float (n,).
        """
        coefficients, factors = self._factors(terms, s)
        index = _table(terms, len(self.axes))[1].to(s.device)
        has_units = self._has_units.to(s.device)[index]
        each = coefficients / has_units.sum(1).clamp(min=1)
        of_axis = s.new_zeros(len(self.axes) + 1)
        for column in range(index.shape[1]):
            others = torch.cat([factors[:, :column], factors[:, column + 1 :]], 1).prod(1)
            of_axis.index_add_(0, index[:, column], each * others)
        flat = self._flat.to(s.device)
        of_position = of_axis[self._axis_of.to(s.device)]
        return s.new_zeros(len(s) + 1).index_add_(0, flat % (len(s) + 1), of_position)[:-1]

    def shrink(self, alive: Tensor) -> Coupling:
        """Return the coupling without the dead units: groups keep their names, units get new numbers.

        Args:
            alive: bool (n,).

        Raises:
            TitheError: when no unit of a group is alive.
        """
        alive = alive.cpu()
        before = [0, *alive.cumsum(0).tolist()]
        groups = tuple(Group(g.name, before[g.start], before[g.stop], g.members) for g in self.groups)
        for group in groups:
            if not group.num_units:
                raise TitheError(
                    group.name,
                    found="no unit left",
                    expected="at least one",
                    remedy="keep the most probable unit of each group",
                )
        renumbered = torch.where(alive, alive.cumsum(0) - 1, -1)
        axes = tuple(_extended(renumbered, -1)[axis[live]] for axis, live in self._live(alive))
        return Coupling(groups, axes, self.places, self.flops, self.params, self.whole, self.reads)

    def _live(self, alive: Tensor) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.axes, self._spread(alive), strict=True))

    def _spread(self, values: Tensor) -> tuple[Tensor, ...]:
        """For each axis the value of each of its positions; a position that always exists has one."""
        return self._values(values).split([len(axis) for axis in self.axes])

    def _values(self, values: Tensor) -> Tensor:
        """The same of all axes, one after the other."""
        return _extended(values, 1)[self._flat.to(values.device)]

    def _factors(self, terms: tuple[Term, ...], s: Tensor) -> tuple[Tensor, Tensor]:
        """Coefficients (T,) and widths (T, F); terms of fewer factors are filled up with ones."""
        coefficients, index = _table(terms, len(self.axes))
        return coefficients.to(s), _extended(self.widths(s), 1)[index.to(s.device)]

    @cached_property
    def _flat(self) -> Tensor:
        """All axes, one after the other."""
        return torch.cat([*self.axes, torch.empty(0, dtype=torch.int64)])

    @cached_property
    def _axis_of(self) -> Tensor:
        """For each position of `_flat` the index of its axis."""
        lengths = torch.tensor([len(axis) for axis in self.axes], dtype=torch.int64)
        return torch.arange(len(self.axes)).repeat_interleave(lengths)

    @cached_property
    def _position(self) -> Tensor:
        """For each place in `_flat` the position along its axis."""
        return torch.cat([*(torch.arange(len(axis)) for axis in self.axes), torch.empty(0, dtype=torch.int64)])

    @cached_property
    def _has_units(self) -> Tensor:
        """Whether a position of each axis may be absent; no, behind the last one."""
        return torch.tensor([*(bool((axis >= 0).any()) for axis in self.axes), False])


def _extended(values: Tensor, last: int) -> Tensor:
    """`values` with `last` behind them, where the index -1 finds it."""
    return torch.cat([values, values.new_full((1,), last)])


@lru_cache(maxsize=8)  # a structure step asks for the same few tuples again and again
def _table(terms: tuple[Term, ...], num_axes: int) -> tuple[Tensor, Tensor]:
    """Coefficients (T,) and the axes of each term (T, F), filled up with `num_axes`."""
    most = max((len(term.axes) for term in terms), default=0)
    rows = [[*term.axes, *[num_axes] * (most - len(term.axes))] for term in terms]
    index = torch.tensor(rows, dtype=torch.int64).view(len(terms), most)
    return torch.tensor([term.coefficient for term in terms], dtype=torch.float64), index
