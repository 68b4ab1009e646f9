"""What networks of given widths cost, in the measure that a method counts: units, operations or parameters."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tithe.coupling import Coupling
from tithe.errors import TitheError
from tithe.method import Cost

SLACK = 1 + 1e-9
"""What rounding may add to a cost."""

_NOUNS = {"channels": "units", "flops": "operations", "params": "parameters"}


class Costs:
    """The cost of every network that a coupling allows.

    Args:
        coupling: the units and what they take part in.
        cost: what is counted.
    """

    def __init__(self, coupling: Coupling, cost: Cost) -> None:
        self.coupling, self.cost = coupling, cost
        self._terms = coupling.flops if cost == "flops" else coupling.params
        self.total = self.of(torch.ones(coupling.num_units, dtype=torch.float64))
        """The cost of the network of all units."""

    def of(self, s: Tensor) -> float:
        """Return what a network of these expected widths costs; s: float (n,)."""
        return float(s.sum() if self.cost == "channels" else self.coupling.cost(self._terms, s))

    def prices(self, s: Tensor) -> Tensor:
        """Return the price of each unit beside neighbours as wide as `s` says, (n,)."""
        return torch.ones_like(s) if self.cost == "channels" else self.coupling.shares(self._terms, s)

    def spending(self, limit: float, of: Callable[[float], Tensor]) -> Tensor:
        """Return the point of a path, from t = 0 to t = 1, nowhere falling, that spends the limit; its end at most.

        Args:
            limit: what may be spent.
            of: from t to expected units, float64 (n,).
        """
        if self.of(of(1.0)) <= limit:
            return of(1.0)
        low, high = 0.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if self.of(of(middle)) <= limit else (low, middle)
        return of(low)

    def check_keep(self, keep: float) -> None:
        """Check that one unit of each group costs no more than is kept.

        Raises:
            TitheError: when it does.
        """
        first = torch.zeros(self.coupling.num_units, dtype=torch.float64)
        first[[group.start for group in self.coupling.groups]] = 1.0
        least = self.of(first) / self.total
        if least > keep * SLACK:
            raise TitheError(
                "keep",
                found=f"{keep:g} of the {_NOUNS[self.cost]}",
                expected=f"at least {least:.4g}: what cannot be left out, and one unit of each group"
                f" ({len(self.coupling.groups)} groups)",
                remedy="keep more, or leave fewer layers whole (where=, head=)",
            )
