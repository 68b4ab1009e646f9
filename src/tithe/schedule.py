"""Say when a choice is made again: pure functions of the step and the epoch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tithe.errors import TitheError

Unit = Literal["steps", "epochs"]


@dataclass(frozen=True)
class Schedule:
    """A schedule makes a choice due after every `period` steps or epochs, or never again when `period` is None.

    Args:
        period: a count of `unit`, at least 1, or None.
        unit: "steps" or "epochs".

    Example:
        >>> [step for step in range(7) if Schedule(3, "steps").due(step=step)]
        [3, 6]
    """

    period: int | None
    unit: Unit = "steps"

    def __post_init__(self) -> None:
        if self.period is not None and self.period < 1:
            raise TitheError("Schedule", found=f"period {self.period}", expected="at least 1", remedy="use every(1)")
        if self.unit not in ("steps", "epochs"):
            raise TitheError(
                "Schedule", found=f"unit {self.unit!r}", expected='"steps" or "epochs"', remedy='every(1, "epochs")'
            )

    def due(self, *, step: int | None = None, epoch: int | None = None) -> bool:
        """Return whether the choice is due now that `step` steps (or `epoch` epochs) are finished."""
        count = step if self.unit == "steps" else epoch
        return self.period is not None and count is not None and count > 0 and count % self.period == 0


def once() -> Schedule:
    """Choose once, when attaching."""
    return Schedule(None)


def every(period: int, unit: Unit = "steps") -> Schedule:
    """Choose again after every `period` steps or epochs.

    Example:
        >>> every(2, "epochs").due(epoch=4)
        True
    """
    return Schedule(period, unit)


def each_step() -> Schedule:
    """Choose again after every step."""
    return Schedule(1, "steps")
