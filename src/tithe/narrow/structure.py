"""The contract of what decides which units of a network exist.

probabilities   each step draws two networks, and learns from their losses    units go as their probability reaches 0
cuts            every unit that is left exists in every step                  units go in a few steps, by their scores
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from tithe.coupling import Coupling
from tithe.narrow.control import ControlVariate


class Structure(ABC):
    """Decides which units exist, from what a plan tells it; it never sees a module."""

    draws: ClassVar[bool]
    """Whether each step has networks of its own, of which two are compared; or all that is left exists in each."""

    keys: ClassVar[frozenset[str]]
    """What its state holds in any case."""
    control: ControlVariate | None = None
    """What earlier steps foretell of a difference between two losses, where that is used."""

    @property
    def hold(self) -> int:
        """Return for how many steps a network is held before another one is drawn."""
        return 1

    @property
    def init(self) -> str:
        """Return the name of the metric that it starts from, as `tithe.narrow.metrics` knows it, or "uniform"."""
        return "uniform"

    @property
    def fresh(self) -> bool:
        """Return whether weights that lose inputs for good have to keep the norm with which they read."""
        return False

    @property
    def fixed(self) -> bool:
        """Return whether nothing will change any more."""
        return False

    @abstractmethod
    def spent(self) -> float:
        """Return the expected cost, as a share of the whole network's."""

    @abstractmethod
    def widths(self) -> dict[str, float]:
        """Return the expected number of units of each group, by its name."""

    @abstractmethod
    def watched(self) -> Iterator[tuple[str, Tensor]]:
        """Iterate over what has to be the same on every rank, by what it is called there."""

    @property
    @abstractmethod
    def num_units(self) -> int:
        """Return how many units may still exist."""

    def possible(self) -> Tensor:
        """Return which units may still exist, bool (n,), one of each group at least; an epoch's end drops the rest."""
        return torch.ones(self.num_units, dtype=torch.bool)

    def by_group(self) -> list[nn.Parameter]:
        """Return the probabilities of each group, where there are any."""
        return []

    @abstractmethod
    def draw(self, seed: int, step: int) -> tuple[Tensor, Tensor]:
        """Return the networks of the step after `step` finished ones, bool (n,); the second is compared with."""

    @abstractmethod
    def likely(self, step: int) -> Tensor:
        """Return the likeliest network after `step` finished steps that costs no more than is kept, bool (n,)."""

    def exported(self, step: int) -> Tensor:
        """Return the network that is exported after `step` finished steps, before it is fixed, bool (n,)."""
        return self.likely(step)

    @abstractmethod
    def candidates(self, seed: int, step: int, draws: int) -> list[Tensor]:
        """Return the networks that may be the last one, of which the best on data is taken, bool (n,) each."""

    def learn(  # noqa: B027 - only what draws has two losses to learn from
        self, mask_0: Tensor, mask_1: Tensor, difference: float, *, step: int, pace: float
    ) -> None:
        """Learn from the losses of the two networks of a step."""

    def tighten(self, step: int) -> None:  # noqa: B027 - what is cut follows its schedule by itself
        """Follow a share that falls by schedule, in a step without two losses."""

    def start_from(self, metric: Tensor, *, between: bool) -> None:  # noqa: B027
        """Start from a metric of the units, (n,): the larger it is, the likelier a unit exists.

        Args:
            metric: float (n,), not negative.
            between: whether values of different groups can be compared.
        """

    def remember(  # noqa: B027
        self, mask_0: Tensor, mask_1: Tensor, difference: float | None, gates: Tensor | None
    ) -> None:
        """Keep of a finished step what tells something about later ones, once it has been learned from.

        Args:
            mask_0: the network that the weights were trained in.
            mask_1: the other one.
            difference: of their losses, or None where there was no second loss.
            gates: c_i = ∂L/∂m_i of a gate on each unit's output in the first, (n,), or None where nothing tells.
        """

    def agree(self, first: Callable[[Tensor], Tensor]) -> None:  # noqa: B027
        """Take over, before units go, what `first` returns for a tensor: its values on the first rank."""

    def due(self, step: int) -> bool:
        """Return whether units go for good after `step` finished steps."""
        return False

    def stay(self, step: int) -> Tensor:
        """Return which units stay then, bool (n,).

        Raises:
            TitheError: when there is nothing to tell them by.
        """
        return self.likely(step)

    @abstractmethod
    def shrink(self, coupling: Coupling, alive: Tensor) -> None:
        """Follow a coupling that some units have left for good; bool (n,) says which are alive."""

    @abstractmethod
    def fix(self) -> None:
        """Make every remaining unit exist from now on."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Return copies of everything that is needed to go on."""

    @abstractmethod
    def load(self, state: Mapping[str, Tensor], control: Mapping[str, Tensor] | None) -> None:
        """Take over the result of `state`, for as many units, and of the control variate's."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Return the bytes that it keeps between steps."""


def whole(coupling: Coupling) -> Tensor:
    """Return the network of all units, bool (n,)."""
    return torch.ones(coupling.num_units, dtype=torch.bool)
