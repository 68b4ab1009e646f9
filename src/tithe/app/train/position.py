"""Where a run is: everything of its state that is not a tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tithe.app.terminal import human


@dataclass
class Position:
    """Where a run is, and what it has found so far.

    Args:
        step: finished, of the whole run.
        epoch: finished.
        step_in_epoch: finished, of the present epoch.
        best_step: of the best checkpoint so far, among those that may be the result.
        best_value: the first metric there, as a number of which more is better.
        stale: evaluations since then.
        stopped: the step after which the run ended for want of better ones; None where it did not.
        seconds: of training.
        ledger: what the first whole step was measured to hold.
        evaluations: on the validation split.
        draws: under a budget.
        widths: of a network that gets narrower.
        recorded: the steps of the history's checkpoints, on the main process.
        logged: lines of the log, on the main process.
        lr: the highest learning rate, where the recipe names none and it was suggested.
        average: None until the run's own steps are done; then their number (`step`) and time (`seconds`), the
            widths they left (`narrow`), what they trained (`own`), how many `checkpoints` are averaged, and the metrics
            of the `last` weights and of the `mean`.
    """

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    best_step: int | None = None
    best_value: float = -math.inf
    stale: int = 0
    stopped: int | None = None
    seconds: float = 0.0
    ledger: dict[str, Any] | None = None
    evaluations: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    draws: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    widths: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    recorded: list[int] = field(default_factory=list[int])
    logged: int = 0
    lr: float | None = None
    average: dict[str, Any] | None = None

    def judge(self, value: float) -> bool:
        """Remember this step where it is the best so far; returns whether it is.

        Of equal ones it is the first, but of averages the last: training one only lowers the learning rate.
        """
        if value < self.best_value or (value == self.best_value and self.average is None):
            self.stale += 1
            return False
        self.best_step, self.best_value, self.stale = self.step, value, 0
        return True


def bill(draw: Mapping[str, Any]) -> str:
    """Say what a draw under a budget costs, of what it may."""
    if draw["measure"] == "bytes":
        return f"{human(int(draw['spent']))} of {human(int(draw['limit']))}"
    return f"{draw['spent']:,.0f} of {draw['limit']:,.0f} {draw['measure']}"


def drawn(draw: Mapping[str, Any]) -> str:
    """Say what was drawn under a budget."""
    channels = f"{draw['channels']:,} of {draw['of_channels']:,} channels"
    return f"{channels}  {draw['layers']} of {draw['of_layers']} layers"
