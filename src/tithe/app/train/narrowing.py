"""What a run does and says about a network that gets narrower as it trains."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

import tithe
from tithe.app.train.data import Batch, Samples, even_chunks, to_device


@dataclass(frozen=True)
class Narrowing:
    """How narrow a network has become.

    Args:
        cost: what is counted: "channels", "flops" or "params".
        spent: the expected cost, as a share of the whole network's.
        units: that may still exist; one is a channel, a hidden unit or a head with all that belongs to it.
        weights: that are left.
        widths: group of units → how many of them exist, as an expectation.
    """

    cost: str
    spent: float
    units: int
    weights: int
    widths: Mapping[str, float]

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        return f"{self.spent:.3f} of the {self.cost}  {self.units:,} units  {self.weights:,} weights left"


def narrowing(plan: tithe.NarrowPlan) -> Narrowing:
    """How narrow a plan's network is now."""
    groups = plan.structure_parameters()
    names = [group.name for group in plan.stage.coupling.groups]
    return Narrowing(
        cost=plan.method.cost,
        spent=plan.probabilities.spent(),
        units=sum(int((s > 0).sum()) for s in groups),
        weights=sum(parameter.numel() for parameter in plan.model.parameters()),
        widths={name: round(float(s.sum()), 2) for name, s in zip(names, groups, strict=True)},
    )


def settling_batches(samples: Samples, batch_size: int, device: torch.device) -> list[Batch]:
    """All of a split in batches of about one size."""
    rows = even_chunks(range(len(samples)), batch_size)
    return [to_device(batch, device) for batch in samples.batches(rows)]
