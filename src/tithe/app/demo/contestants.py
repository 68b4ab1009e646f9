"""The rows of the demonstration's table: the baselines, and the rows of `tithe.app.methods`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

from torch import nn

import tithe
from tithe.app.demo.averaged import Averaged, averaging_steps, opening_steps
from tithe.app.demo.network import classification_loss
from tithe.app.demo.trainee import BATCH_SIZE, Course, Trainee
from tithe.app.dense import Dense
from tithe.app.methods import BUDGET, DENSITY, FIXED, KEEP, METHODS, RANDOM, DemoRow

__all__ = ["BUDGET", "CONTESTANTS", "DENSITY", "FIXED", "KEEP", "Contestant"]

_HEAD = ("head.*",)


@final
@dataclass(frozen=True)
class Contestant:
    """One row of the table.

    Args:
        name: of the row, at most 16 characters.
        slug: name of the file it writes, without the suffix.
        start: prepares a copy of the base network.
        note: what to know about the row.
        opening: of so many steps of a whole run, those that it trains as the first row does before it does anything of
            its own; None where there are none.
        closing: of so many steps of a whole run, those that it does of its own; None for all.
    """

    name: str
    slug: str
    start: Callable[[nn.Module, Course], Trainee | Averaged]
    note: str = ""
    opening: Callable[[int], int] | None = None
    closing: Callable[[int], int] | None = None

    def num_steps(self, whole: int) -> tuple[int, int]:
        """How many steps it trains as the first row does, and how many as itself, where others train `whole`."""
        opening = self.opening(whole) if self.opening is not None else 0
        return opening, self.closing(whole) if self.closing is not None else whole


def _contestant(row: DemoRow) -> Contestant:
    def start(model: nn.Module, course: Course) -> Trainee:
        batches = list(zip(*(part.split(BATCH_SIZE) for part in course.task.train), strict=True))
        method = row.make(len(course.task.train[0]))
        return Trainee(
            model,
            lambda: tithe.attach(model, method, loss=classification_loss, data=batches, head=_HEAD, seed=course.seed),
            lean=row.lean,
            fixed_from=0 if course.measured else round(row.fixed * course.num_steps),
        )

    return Contestant(row.name, row.slug, start, row.note)


def _dense(prefix: str) -> Callable[[nn.Module, Course], Trainee]:
    def start(model: nn.Module, course: Course) -> Trainee:
        names = [name for name, _ in model.named_parameters() if name.startswith(prefix)]
        return Trainee(model, lambda: Dense(model, names))

    return start


CONTESTANTS: tuple[Contestant, ...] = (
    Contestant("full fine-tuning", "full", _dense("")),
    Contestant("full, then TWA", "twa", Averaged, opening=opening_steps, closing=averaging_steps),
    *(_contestant(row) for entry in METHODS for row in entry.demos),
    _contestant(RANDOM),
    Contestant("head only", "head", _dense("head.")),
)
