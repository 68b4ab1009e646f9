"""How a run goes: which rows each step sees, at what learning rate, and how many steps there are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tithe.train.data import chunks, epoch_order
from tithe.train.method import VrpgeMethod
from tithe.train.recipe import OptimizerSection, Recipe

_SLOWER = 100
"""What the learning rate is divided by for the weights of a network that is fixed, as in the paper."""


@dataclass(frozen=True)
class Course:
    """The steps of a run; everything here is a pure function, so that a resumed run needs no state for it.

    Args:
        recipe: the run.
        num_rows: of the training split.
        share: this process's number, and how many there are.
    """

    recipe: Recipe
    num_rows: int
    share: tuple[int, int]

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the training split; the last may be smaller."""
        whole, rest = divmod(self.num_rows, self._step_size)
        # A rest smaller than the number of processes would leave one of them without a sample.
        return max(1, whole + (rest >= self.share[1]))

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.recipe.run.steps or (self.recipe.run.epochs or 1) * self.steps_per_epoch

    @property
    def fixed_from(self) -> int:
        """The number of finished steps from which on the network's widths are fixed; 0 where they always are."""
        method = self.recipe.method
        if not isinstance(method, VrpgeMethod):
            return 0
        return max(1, self.total_steps - round(method.finetune * self.total_steps))

    @property
    def _step_size(self) -> int:
        run = self.recipe.run
        return run.batch_size * run.accumulate * self.share[1]

    def parts(self, epoch: int) -> list[list[tuple[Sequence[int], float]]]:
        """For each step of an epoch, this process's micro-batches: their rows and what each one's mean counts for.

        The weights make the step's loss the mean over all its samples, on all processes, however uneven the parts are.
        """
        order, (rank, world) = epoch_order(self.num_rows, seed=self.recipe.run.seed, epoch=epoch), self.share
        steps = chunks(order, self._step_size)[: self.steps_per_epoch]
        return [
            [(part, len(part) * world / len(rows)) for part in chunks(rows[rank::world], self.recipe.run.batch_size)]
            for rows in steps
        ]

    def rate(self, step: int) -> float:
        """The learning rate of the step after `step` finished ones; its schedule runs again once widths are fixed."""
        section, method, start = self.recipe.optimizer, self.recipe.method, self.fixed_from
        if isinstance(method, VrpgeMethod) and step >= start:
            lr = method.finetune_lr or section.lr / _SLOWER
            return rate(section, lr, step - start, self.total_steps - start, 0)
        return rate(section, section.lr, step, start or self.total_steps, warmup_steps(section, self.steps_per_epoch))


def warmup_steps(section: OptimizerSection, steps_per_epoch: int) -> int:
    """The steps in which the learning rate rises.

    Example:
        >>> warmup_steps(OptimizerSection(lr=1.0, warmup_epochs=0.5), 9)
        4
    """
    if section.warmup_epochs is not None:
        return round(section.warmup_epochs * steps_per_epoch)
    return section.warmup_steps or 0


def rate(section: OptimizerSection, lr: float, step: int, total: int, warmup: int) -> float:
    """A schedule's learning rate.

    Args:
        section: which schedule.
        lr: at its highest.
        step: finished steps.
        total: that the schedule has.
        warmup: of them, at the start.

    Example:
        >>> [rate(OptimizerSection(lr=1.0), 1.0, step, 6, 2) for step in range(6)]
        [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    if step < warmup:
        return lr * (step + 1) / warmup
    if section.schedule == "constant":
        return lr
    done = (step - warmup) / max(1, total - warmup)
    return lr * (1 - done if section.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2)
