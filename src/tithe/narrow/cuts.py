"""Decide which units exist: all that are left do, and in a few steps those of least worth go for good.

    step after step      a ← accumulate(a, c),  c_i = ∂L/∂m_i of a gate on unit i's output
    at a cut             units go by worth(a, price), least first, until Σ cost ≤ share · total
                         no group gets below `floor` of the width that it would have if all were equally narrow
    of fresh weights     worth says how many of each group go; which, the gate gradients of the last steps: units stay
                         in an order in which each does what those before it do least

Nothing is drawn. Scores live on the CPU, where the widths of the next kernels have to be known.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from tithe.coupling import Coupling
from tithe.errors import TitheError, TitheWarning
from tithe.method import CutMethod
from tithe.narrow.costs import SLACK, Costs
from tithe.narrow.structure import Structure, whole
from tithe.select.cut_order import cut_order, unlike_first

WINDOW = 32
"""Steps whose gate gradients say which units of fresh weights are alike. Of 16, 32 and 128 it left the lowest training
loss (VGG-7 on CIFAR-10 at 10 % of the FLOPs, three seeds; ResNet-20 was not tried)."""


class Cuts(Structure):
    """The scores of units that may still go.

    Args:
        coupling: the units and their costs.
        method: what is kept, when, and how scores arise.

    Raises:
        TitheError: when one unit of every group already costs more than is kept.
    """

    draws: ClassVar[bool] = False
    keys: ClassVar[frozenset[str]] = frozenset({"scores", "traces", "heard", "share"})

    def __init__(self, coupling: Coupling, method: CutMethod) -> None:
        self.method = method
        self.costs = Costs(coupling, method.cost)
        self.costs.check_keep(method.keep)
        self.total = self.costs.total
        self._sizes = [group.num_units for group in coupling.groups]
        self.scores = torch.zeros(coupling.num_units, dtype=torch.float64)
        self._traces = torch.zeros(0, coupling.num_units)
        self._heard = 0
        self._share = 1.0

    @property
    def _coupling(self) -> Coupling:
        return self.costs.coupling

    @property
    def fresh(self) -> bool:
        """Return whether training started from fresh weights."""
        return self.method.fresh

    @property
    def fixed(self) -> bool:
        """Return whether the last cut is made: no smaller share is kept."""
        return self._share <= self.method.keep

    @property
    def num_units(self) -> int:
        """Return how many units are left."""
        return self._coupling.num_units

    def spent(self) -> float:
        """Return the cost of the present network, as a share of the whole one's."""
        return self.costs.of(whole(self._coupling).double()) / self.total

    def widths(self) -> dict[str, float]:
        """Return the number of units that each group has left, by its name."""
        return {group.name: float(group.num_units) for group in self._coupling.groups}

    def watched(self) -> Iterator[tuple[str, Tensor]]:
        """Iterate over the scores, which have to be the same on every rank."""
        yield "scores", self.scores

    def draw(self, seed: int, step: int) -> tuple[Tensor, Tensor]:
        """Return the network of all units that are left, twice."""
        return whole(self._coupling), whole(self._coupling)

    def likely(self, step: int) -> Tensor:
        """Return the network of all units that are left."""
        return whole(self._coupling)

    def exported(self, step: int) -> Tensor:
        """Return the network of all units that are left, and warn where it costs more than is kept in the end."""
        if self.spent() > self.method.keep * SLACK:
            warnings.warn(
                f"the network that is exported has {self.spent():.0%} of the cost: after {step} steps the cuts down to"
                f" {self.method.keep:.0%} are not made yet. plan.settle(batches) makes them at once; a step is an"
                " optimizer's, however many micro-batches it has",
                TitheWarning,
                stacklevel=4,
            )
        return self.likely(step)

    def candidates(self, seed: int, step: int, draws: int) -> list[Tensor]:
        """Return the one network that the last cut would leave now."""
        return [whole(self._coupling) if self.fixed else self._cut(self.method.keep)]

    def remember(self, mask_0: Tensor, mask_1: Tensor, difference: float | None, gates: Tensor | None) -> None:
        """Take in the gate gradients of a step; those of a step that overflowed tell nothing."""
        if not self.fixed and gates is not None and bool(gates.isfinite().all()):
            self.scores = self.method.accumulate(self.scores, gates.double())
            if self.fresh:
                self._traces = torch.cat([self._traces[1 - WINDOW :], gates.float()[None]])
            self._heard += 1

    def agree(self, first: Callable[[Tensor], Tensor]) -> None:
        """Take over what the first rank has heard: rounding may differ from processor to processor."""
        self.scores, self._traces = first(self.scores), first(self._traces)

    def due(self, step: int) -> bool:
        """Return whether the share that is kept falls after `step` finished steps."""
        return not self.fixed and self.method.share(step) < self._share

    def stay(self, step: int) -> Tensor:
        """Return which units stay after `step` finished steps, bool (n,).

        Raises:
            TitheError: when no step was heard, or no gradient has reached any unit.
        """
        alive = self._cut(self.method.share(step))
        self._share = self.method.share(step)
        return alive

    def _cut(self, share: float) -> Tensor:
        """The network of that share of the cost that has the units of most worth."""
        self._check_heard()
        limit = self.total * share * SLACK
        everything, group = whole(self._coupling).double(), self._group()
        worth, least = self.method.worth(self.scores, self.costs.prices(everything)), self._least(limit)
        if len(self._traces):
            worth = self._spread(worth.nan_to_num(0.0))
        for floor in (least, torch.ones_like(least)):  # of a narrow group the floor may be a unit, which is too much
            order = cut_order(worth, group, floor)
            if self.costs.of(_without(everything, order)) <= limit:
                break
        low, high = 0, len(order)  # how many have to go? costs fall with each
        while low < high:
            middle = (low + high) // 2
            fits = self.costs.of(_without(everything, order[:middle])) <= limit
            low, high = (low, middle) if fits else (middle + 1, high)
        return _without(everything, order[:low]) > 0

    def _spread(self, worth: Tensor) -> Tensor:
        """What each group's units are worth, handed to them in the order in which each does what is new."""
        spread = worth.clone()
        for group in self._coupling.groups:
            of = slice(group.start, group.stop)
            values, best_first = worth[of].sort(descending=True, stable=True)
            spread[of][best_first[unlike_first(self._traces[:, of][:, best_first])]] = values
        return spread

    def _group(self) -> Tensor:
        sizes = torch.tensor([group.num_units for group in self._coupling.groups], dtype=torch.int64)
        return torch.arange(len(sizes)).repeat_interleave(sizes)

    def _least(self, limit: float) -> Tensor:
        """How many units each group keeps, int64 (groups,): `floor` of its width in the evenly narrow network."""
        groups = self._coupling.groups
        full = torch.ones(self._coupling.num_units, dtype=torch.float64)
        for group, size in zip(groups, self._sizes, strict=True):
            full[group.start : group.stop] = size / group.num_units
        even = self.costs.spending(limit, lambda t: full * t)
        widths = [float(even[group.start : group.stop].sum()) for group in groups]
        least = [max(1, int(self.method.floor * width)) for width in widths]
        return torch.tensor([min(n, group.num_units) for n, group in zip(least, groups, strict=True)])

    def _check_heard(self) -> None:
        if self._heard and bool((self.scores != 0).any()):
            return
        raise TitheError(
            "cut",
            found="scores that are all zero" if self._heard else "no step of an optimizer that told its gradients",
            expected="gradients of the weights that read the units, at each optimizer.step()",
            remedy="step an optimizer over plan.parameters() that is not compiled, before the first cut",
        )

    def shrink(self, coupling: Coupling, alive: Tensor) -> None:
        """Follow a coupling that some units have left for good; bool (n,) says which are alive."""
        self.costs = Costs(coupling, self.method.cost)
        self.scores, self._traces = self.scores[alive], self._traces[: 0 if self.fixed else WINDOW, alive]

    def fix(self) -> None:
        """Take every remaining unit as one that stays: nothing is cut any more."""
        self._share, self._traces = min(self._share, self.method.keep), self._traces[:0]

    def state(self) -> dict[str, Tensor]:
        """Return copies of what was heard, and how far cuts have come."""
        return {
            "scores": self.scores.clone(),
            "traces": self._traces.clone(),
            "heard": torch.tensor(self._heard),
            "share": torch.tensor(self._share, dtype=torch.float64),
        }

    def load(self, state: Mapping[str, Tensor], control: Mapping[str, Tensor] | None) -> None:
        """Take over the result of `state`, for as many units."""
        self.scores, self._traces = state["scores"].clone(), state["traces"].clone()
        self._heard, self._share = int(state["heard"]), float(state["share"])

    @property
    def nbytes(self) -> int:
        """Return the bytes of the scores, and of the gate gradients that are kept."""
        return self.scores.nbytes + self._traces.nbytes


def _without(mask: Tensor, units: Tensor) -> Tensor:
    """A copy of `mask`, float64 (n,), with zeros for some units."""
    left = mask.clone()
    left[units] = 0.0
    return left
