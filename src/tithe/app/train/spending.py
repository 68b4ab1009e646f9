"""What a run says about its budget: what was drawn, what that costs, and what a step will hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import tithe
from tithe.app.terminal import human
from tithe.app.train.data import Batch
from tithe.app.train.trainee import Trainee


@dataclass(frozen=True)
class Spending:
    """One draw of channels under a budget.

    Args:
        measure: "bytes", "elements" or "flops"; a fraction is one of elements.
        spent: what the draw costs.
        limit: what it may cost.
        channels: drawn.
        of_channels: there are.
        layers: with a channel drawn.
        of_layers: with channels.
        weights: trained, the head apart.
        peak: bytes beyond the model that a step on the largest batch will hold at its highest moment, the optimizer's
            state and θ included.
    """

    measure: str
    spent: float
    limit: float
    channels: int
    of_channels: int
    layers: int
    of_layers: int
    weights: int
    peak: int

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        return f"{self.bill}  {self.drawn}"

    @property
    def bill(self) -> str:
        """What it costs, of what it may."""
        if self.measure == "bytes":
            return f"{human(int(self.spent))} of {human(int(self.limit))}"
        return f"{self.spent:,.0f} of {self.limit:,.0f} {self.measure}"

    @property
    def drawn(self) -> str:
        """What it is."""
        return f"{self.channels:,} of {self.of_channels:,} channels  {self.layers} of {self.of_layers} layers"


def spending(trainee: Trainee, batches: Iterable[Batch]) -> Spending | None:
    """What the present choice costs, or None where nothing is drawn under a budget.

    Args:
        trainee: what is trained.
        batches: as it was attached with; the first is the one that prices were made for.
    """
    if not isinstance(trainee, tithe.Plan) or (found := trainee.spending()) is None:
        return None
    predicted = trainee.predict(next(iter(batches)))
    named = dict(trainee.named_parameters())
    theta = predicted.theta - sum(named[name].nbytes for name in trainee.head)
    return Spending(
        measure=found.measure,
        spent=found.spent,
        limit=found.limit,
        channels=found.channels,
        of_channels=found.of_channels,
        layers=found.layers,
        of_layers=found.of_layers,
        weights=sum(selection.size for selection in trainee.selections.values()),
        peak=predicted.peak + theta + predicted.optimizer + predicted.index,
    )
