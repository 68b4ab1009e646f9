"""Ordinary training that ends early and trains an average of what it recorded."""

from __future__ import annotations

import shutil
import tempfile
import time
import weakref
from pathlib import Path
from typing import final

import torch
from torch import nn

import tithe
from tithe.app.demo.digits import Batch
from tithe.app.demo.network import classification_loss
from tithe.app.demo.trainee import BATCH_SIZE, Course, Trainee
from tithe.app.dense import Dense

AVERAGE_RATE = 0.1
"""Learning rate of SGD on the coefficients, which falls to zero; chosen on validation images, as the lengths were."""

EVERY = 2
"""Steps from one recorded checkpoint to the next."""

BITS = 8


def opening_steps(num_steps: int) -> int:
    """Count the steps of ordinary training: the first half of a run."""
    return max(num_steps // 2, 1)


def averaging_steps(num_steps: int) -> int:
    """Count the steps that train the average: a tenth of a run."""
    return max(num_steps // 10, 1)


def num_checkpoints(num_steps: int) -> int:
    """Count what is recorded: from the opening's last step backwards, but for a first tenth of a run."""
    return -(-(opening_steps(num_steps) - num_steps // 10) // EVERY)


@final
class Averaged:
    """Half a run of ordinary training, recorded; then a tenth of one that trains the average of what was recorded.

    Args:
        model: the network, trained in place.
        course: the first part follows the learning rate of a whole run.
    """

    def __init__(self, model: nn.Module, course: Course) -> None:
        self.model, self._course = model, course
        self.part = Trainee(model, lambda: Dense(model, [name for name, _ in model.named_parameters()]))
        self._average: tithe.SubspacePlan | None = None
        self._num_steps, self.besides = 0, self.part.besides
        folder = Path(tempfile.mkdtemp(prefix="tithe-demo-"))
        self._forget = weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self._history = tithe.History(folder, BITS)
        if course.measured:
            epochs = course.task.epochs(BATCH_SIZE, course.seed)
            while self._average is None:
                for batch in next(epochs):
                    if self._average is None:
                        self.step(batch)

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """AdamW on the weights, then SGD on the coefficients."""
        return self.part.optimizer

    def step(self, batch: Batch) -> None:
        """Make a step of either part; after the last of the first the average takes the place of the weights."""
        if self._average is not None:
            done = self._num_steps - opening_steps(self._course.num_steps)
            left = 1.0 - done / averaging_steps(self._course.num_steps)
            for group in self.optimizer.param_groups:  # the race's rate is meant for AdamW on weights
                group["lr"] = AVERAGE_RATE * max(left, 0.0)
        self.part.step(batch)
        self._num_steps += 1
        if self._average is None:
            start = time.perf_counter()
            self._record()
            self.besides += time.perf_counter() - start

    def _record(self) -> None:
        """Record the step where one is due, and begin the second part after the last."""
        total = self._course.num_steps
        left = opening_steps(total) - self._num_steps
        if left % EVERY == 0 and left // EVERY < num_checkpoints(total):
            self._history.record(self.model, self._num_steps)
        if left == 0:
            self.part.release()
            plan = tithe.attach(self.model, tithe.TWA(self._history), loss=classification_loss)
            self._average = plan
            self.part = Trainee(self.model, lambda: plan, make_optimizer=lambda p: torch.optim.SGD(p, lr=AVERAGE_RATE))
            self._forget()

    def end_epoch(self) -> None:
        """Tell the plan that an epoch has ended."""
        self.part.end_epoch()

    @property
    def attached_bytes(self) -> int:
        """Bytes of the coefficients, and of the gradients of small weights, which wait to be projected together."""
        return self.part.attached_bytes

    @property
    def mapped_bytes(self) -> int:
        """Bytes of the coded differences of the checkpoints."""
        return self.part.mapped_bytes

    def save(self, path: Path) -> None:
        """Write all weights to a file."""
        self.part.save(path)

    def release(self) -> None:
        """Give the model back."""
        self.part.release()
        self._forget()
