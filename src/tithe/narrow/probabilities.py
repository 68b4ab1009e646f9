"""Decide which units exist: one probability each, drawn in every step, learned and projected.

    s ∈ [0, 1]ⁿ      Σ cost_i s_i ≤ keep · total      one s_i a unit

They live on the CPU whatever the model's device: the widths of the next kernels have to be known there anyway.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tithe.coupling import Coupling
from tithe.method import NarrowMethod
from tithe.narrow.control import ControlVariate
from tithe.narrow.costs import SLACK, Costs
from tithe.narrow.structure import Structure
from tithe.select import bernoulli_masks

_ROUNDS = 8
"""Of projection and pricing: two are enough unless widths halve within one step."""
_UNCERTAIN, _SHARPEST = 0.25, 16.0
"""Of probabilities that start from a metric: how uncertain they are on average, 1 for ½, and the largest exponent."""


class Probabilities(Structure):
    """One probability per unit, learned by Adam and projected onto what may be spent.

    A unit whose probability has reached 0 stays there: no draw will have it, and no gradient brings it back.

    Args:
        coupling: the units and their costs.
        method: what is kept, counted and estimated.

    Raises:
        TitheError: when one unit of every group already costs more than is kept.
    """

    draws: ClassVar[bool] = True
    keys: ClassVar[frozenset[str]] = frozenset({"s"})

    def __init__(self, coupling: Coupling, method: NarrowMethod) -> None:
        self.method = method
        self._costs = Costs(coupling, method.cost)
        self._costs.check_keep(method.keep)
        self.total = self._costs.total
        ones = torch.ones(coupling.num_units, dtype=torch.float64)
        start = self._costs.spending(self.total * method.share(0), lambda t: ones * t)
        self.s = nn.Parameter(start, requires_grad=False)
        self.control = ControlVariate(coupling.num_units) if method.control_variate else None
        self._adam = torch.optim.Adam([self.s], lr=method.structure_lr)

    @property
    def hold(self) -> int:
        """Return for how many steps draws are held."""
        return self.method.hold

    @property
    def init(self) -> str:
        """Return the name of the metric that the probabilities start from."""
        return self.method.init

    @property
    def _coupling(self) -> Coupling:
        return self._costs.coupling

    @property
    def group(self) -> Tensor:
        """Return the group of each unit, int64 (n,)."""
        sizes = torch.tensor([group.num_units for group in self._coupling.groups], dtype=torch.int64)
        return torch.arange(len(sizes)).repeat_interleave(sizes)

    def by_group(self) -> list[nn.Parameter]:
        """Return the probabilities of each group, as views of the same memory."""
        s = self.s.detach()
        return [nn.Parameter(s[g.start : g.stop], requires_grad=False) for g in self._coupling.groups]

    @property
    def num_units(self) -> int:
        """Return the number of units that may still be drawn."""
        return int((self.s > 0).sum())

    def possible(self) -> Tensor:
        """Return the units that may still be drawn, and the most probable one of each group, bool (n,)."""
        return self._first(0) | (self.s.detach() > 0)

    def spent(self) -> float:
        """Return the expected cost, as a share of the whole network's."""
        return self._costs.of(self.s.detach()) / self.total

    def widths(self) -> dict[str, float]:
        """Return the expected number of units of each group, by its name."""
        return {g.name: float(s.sum()) for g, s in zip(self._coupling.groups, self.by_group(), strict=True)}

    def watched(self) -> Iterator[tuple[str, Tensor]]:
        """Iterate over the probabilities, which ranks draw the same networks from."""
        yield "probabilities", self.s

    def draw(self, seed: int, step: int) -> tuple[Tensor, Tensor]:
        """Draw two independent sub-networks, bool (n,), from the probabilities, the seed and the step alone."""
        generator = torch.Generator().manual_seed((seed + 1) * 1_000_003 + step)
        s, group = self.s.detach(), self.group
        return bernoulli_masks.draw(s, group, generator), bernoulli_masks.draw(s, group, generator)

    def likely(self, step: int) -> Tensor:
        """Return the sub-network of the largest probabilities that fits into the share, bool (n,)."""
        limit = self.total * self.method.share(step) * SLACK
        if self.method.cost == "channels":
            return self._first(limit)
        low, high = 0, len(self.s)  # prices depend on the widths chosen: how many units, by s, are within the limit?
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self._costs.of(self._first(middle).double()) <= limit else (low, middle - 1)
        return self._first(low)

    def _first(self, count: float) -> Tensor:
        """The `count` units of the largest probabilities, bool (n,): one of each group, none that is dead beside it."""
        s, ones = self.s.detach(), torch.ones_like(self.s)
        return bernoulli_masks.likely(s, self.group, ones, count) & (
            (s > 0) | bernoulli_masks.likely(s, self.group, ones, 0)
        )

    def candidates(self, seed: int, step: int, draws: int) -> list[Tensor]:
        """Return the likeliest sub-network and some drawn ones, each once; no step uses these draws."""
        found = [self.likely(step)]
        for number in range(draws):
            mask = self.draw(-seed - 2, step + number)[0]
            if not any(torch.equal(mask, other) for other in found):
                found.append(mask)
        return found

    def start_from(self, metric: Tensor, *, between: bool) -> None:
        """Let the probabilities start from a metric of the units: the larger it is, the more probable.

            s_i = σ(γ ln a_i + v),   one v so that Σ cost_i s_i = keep · total
            a_i = metric_i / mean over its group,   or, between groups, metric_i / √price_i over the mean of all
            γ ≥ 1: the least with which Σ 4 s_i (1 − s_i) ≤ n / 4, if one up to 16 has it

        The odds s / (1 − s) are in proportion to a^γ. γ leaves so few units uncertain that draws are near the likeliest
        network: of a pretrained ResNet-20, draws at γ = 1 taught the probabilities to forget the metric. A unit of
        none has a thousandth of the mean, so that data on which it was silent do not rule it out. The price is the
        unit's share of the whole network's cost. If the best units by a are left with half of that network's
        operations, it gets 57 % of 256 training images right at once by gate gradients over √price, 44 % without the
        price, 41 % over the price itself, 43 % over the group's mean.

        Args:
            metric: float (n,), not negative.
            between: whether values of different groups can be compared.
        """
        price, _ = self._prices(torch.ones_like(self.s.detach()), 0.0)
        worth = metric.double() / (price.clamp(min=1e-12).sqrt() if between else 1.0)
        kinds = torch.zeros_like(self.group) if between else self.group
        mean = torch.zeros(int(kinds.max()) + 1, dtype=torch.float64)
        mean.scatter_reduce_(0, kinds, worth, "mean", include_self=False)
        a = torch.where(mean[kinds] > 0, worth / mean[kinds], 1.0).clamp(min=1e-3)
        limit = self.total * self.method.share(0)

        def spread(sharpness: float) -> Tensor:
            logits = sharpness * a.log()
            most = float(logits.abs().max()) + 40  # σ(40) is 1 in float64
            return self._costs.spending(limit, lambda t: (logits + (2 * t - 1) * most).sigmoid())

        low, high = 1.0, 1.0
        while high < _SHARPEST and _uncertain(spread(high)) > _UNCERTAIN:
            low, high = high, 2 * high
        for _ in range(20 if high > low else 0):
            middle = (low + high) / 2
            low, high = (middle, high) if _uncertain(spread(middle)) > _UNCERTAIN else (low, middle)
        self.s.detach().copy_(spread(high))
        if self.control is not None and self.method.weights == "frozen":
            self.control.start(-metric if between else -a)  # a unit that is there lowers the loss

    def learn(self, mask_0: Tensor, mask_1: Tensor, difference: float, *, step: int, pace: float) -> None:
        """Take one step: Adam on the estimated gradient, then the projection.

        Args:
            mask_0: the draw that the weights were trained with.
            mask_1: the other one.
            difference: of their losses.
            step: finished steps, before this one.
            pace: the learning rate as a share of the highest.
        """
        s = self.s.detach()
        dead = s == 0
        if self.control is None:
            self.s.grad = self.method.gradient(s, mask_0, mask_1, difference)
        else:
            self.s.grad = self.method.controlled_gradient(s, mask_0, mask_1, difference, self.control.vector.to(s))
            self.control.see(mask_0, mask_1, difference)
        for group in self._adam.param_groups:
            group["lr"] = self.method.structure_lr * pace
        self._adam.step()
        self.s.grad = None
        self._project(torch.where(dead, 0.0, s), self.total * self.method.share(step + 1))

    def remember(self, mask_0: Tensor, mask_1: Tensor, difference: float | None, gates: Tensor | None) -> None:
        """Keep of a finished step what foretells later ones, once it has been learned from.

        Args:
            mask_0: the draw that the weights were trained with.
            mask_1: the other one.
            difference: of their losses, or None where there was no second loss.
            gates: gate gradients of the first draw, (n,), or None where weights have no gradient.
        """
        if self.control is None:
            return
        if gates is not None and bool(gates.isfinite().all()):
            self.control.take(gates, mask_0)
        elif self.method.init == "uniform" and gates is None and difference is not None and math.isfinite(difference):
            self.control.fit(mask_0, mask_1, difference)

    def _project(self, z: Tensor, limit: float) -> None:
        s = self.s.detach()
        for _ in range(_ROUNDS):
            # The price of a unit depends on how wide its neighbours are, and they change as well.
            price, left = self._prices(s, limit)
            s.copy_(bernoulli_masks.project(z, left, price, weighted=True))
            if self._costs.of(s) <= limit * SLACK:
                break

    def tighten(self, step: int) -> None:
        """Project onto a share that falls by schedule, in a step without an estimate."""
        self._project(self.s.detach().clone(), self.total * self.method.share(step))

    def shrink(self, coupling: Coupling, alive: Tensor) -> None:
        """Follow a coupling that some units have left for good; bool (n,) says which are alive."""
        moments = {key: value[alive] for key, value in self._moments().items()}
        self.s.data = self.s.data[alive]
        if self.control is not None:
            self.control.shrink(alive)
        self._costs = Costs(coupling, self.method.cost)
        if moments:
            self._adam.state[self.s].update(moments)

    def fix(self) -> None:
        """Make every remaining unit exist from now on."""
        self.s.detach().fill_(1.0)

    def state(self) -> dict[str, Tensor]:
        """Return copies of the probabilities, Adam's moments and its count."""
        kept = self._adam.state.get(self.s, {})
        return {"s": self.s.detach().clone(), **{key: value.clone() for key, value in kept.items()}}

    def load(self, state: Mapping[str, Tensor], control: Mapping[str, Tensor] | None) -> None:
        """Take over the result of `state`, for as many units, and of the control variate's."""
        if self.control is not None and control is not None:
            self.control.load(control)
        self.s.detach().copy_(state["s"])
        kept: dict[str, Any] = {key: value.clone() for key, value in state.items() if key != "s"}
        self._adam.state.clear()
        if kept:
            self._adam.state[self.s] = kept

    @property
    def nbytes(self) -> int:
        """Return the bytes of the probabilities."""
        return self.s.nbytes

    def _moments(self) -> dict[str, Tensor]:
        kept = self._adam.state.get(self.s, {})
        return {key: value for key, value in kept.items() if value.shape == self.s.shape}

    def _prices(self, s: Tensor, limit: float) -> tuple[Tensor, float]:
        """The price of each unit at `s`, and what of the limit is left for units."""
        price = self._costs.prices(s)
        return price, limit - (self._costs.of(s) - float((price * s).sum()))


def _uncertain(s: Tensor) -> float:
    return float((4 * s * (1 - s)).mean())
