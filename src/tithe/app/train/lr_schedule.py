"""The learning rate of each step: the schedules of transformers as pure functions of the finished steps."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from tithe.app.train.sections import OptimizerSection


def warmup_steps(section: OptimizerSection, steps_per_epoch: int) -> int:
    """The steps in which the learning rate rises.

    Example:
        >>> warmup_steps(OptimizerSection(lr=1.0, warmup_epochs=0.5), 9)
        4
    """
    if section.warmup_epochs is not None:
        return round(section.warmup_epochs * steps_per_epoch)
    return section.warmup_steps or 0


def highest(section: OptimizerSection, suggested: float | None) -> float:
    """The highest rate of a schedule: the recipe's, or that which was suggested because it names none.

    Example:
        >>> highest(OptimizerSection(lr=1.0), None), highest(OptimizerSection(), 0.5)
        (1.0, 0.5)
    """
    lr = section.lr if section.lr is not None else suggested
    assert lr is not None
    return lr


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
    factor = _factor(section.schedule, warmup, total)
    return lr * factor(step + (step < warmup))  # the first step is the first of the rise: none is lost at a rate of 0


@functools.cache
def _factor(schedule: str, warmup: int, total: int) -> Callable[[int], float]:
    """A schedule of transformers as a function of the finished steps."""
    from transformers import get_scheduler

    name = "constant_with_warmup" if schedule == "constant" else schedule
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)  # nothing is trained by it
    made: Any = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    return made.lr_lambdas[0]
