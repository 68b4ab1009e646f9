"""Ordinary training that ends early and trains an average of what it recorded: the row of TWA."""

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
from tithe.app.demo.trainee import BATCH_SIZE, Course, Plain

AVERAGE_RATE = 0.1
"""Learning rate of SGD on the coefficients, which falls to zero; chosen on validation images, as the lengths were."""

EVERY = 2
"""Steps from one recorded checkpoint to the next."""

BITS = 8


def opening_steps(num_steps: int) -> int:
    """Steps of ordinary training: the first half of a run."""
    return max(num_steps // 2, 1)


def averaging_steps(num_steps: int) -> int:
    """Steps that train the average: a tenth of a run."""
    return max(num_steps // 10, 1)


def num_checkpoints(num_steps: int) -> int:
    """How many checkpoints are recorded: from the opening's last step backwards, but for a first tenth of a run."""
    return -(-(opening_steps(num_steps) - num_steps // 10) // EVERY)


@final
class Averaged:
    """Half a run of ordinary training, recorded; then a tenth of one that trains the average of what was recorded.

    Args:
        model: the network, trained in place.
        course: the first part follows the learning rate of a whole run.
    """

    def __init__(self, model: nn.Module, course: Course) -> None:
        self.model, self.besides, self._course = model, 0.0, course
        self._opening, self._plan = Plain(model), None
        self._sgd: torch.optim.Optimizer | None = None
        self._num_steps = 0
        folder = Path(tempfile.mkdtemp(prefix="tithe-demo-"))
        self._forget = weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self._history = tithe.History(folder, BITS)
        if course.measured:
            epochs = course.task.epochs(BATCH_SIZE, course.seed)
            while self._plan is None:
                for batch in next(epochs):
                    if self._plan is None:
                        self.step(batch)

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """AdamW on the weights, then SGD on the coefficients."""
        return self._opening.optimizer if self._sgd is None else self._sgd

    def step(self, batch: Batch) -> None:
        """A step of either part; after the last of the first the average takes the place of the weights."""
        if self._plan is None or self._sgd is None:
            self._opening.step(batch)
        else:
            done = self._num_steps - opening_steps(self._course.num_steps)
            left = 1.0 - done / averaging_steps(self._course.num_steps)
            for group in self._sgd.param_groups:  # the race's rate is meant for AdamW on weights
                group["lr"] = AVERAGE_RATE * max(left, 0.0)
            self._plan.backward(lambda: classification_loss(self.model, batch))
            self._sgd.step()
            self._sgd.zero_grad()
            self._plan.step()
        self._num_steps += 1
        if self._plan is None:
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
            self._opening.release()
            self._plan = tithe.attach(self.model, tithe.TWA(self._history), loss=classification_loss)
            self._sgd = torch.optim.SGD(self._plan.parameters(), lr=AVERAGE_RATE)
            self._plan.bind(self._sgd)
            self._forget()

    def end_epoch(self) -> None:
        """Tell the plan, if there is one yet."""
        if self._plan is not None:
            self._plan.end_epoch()

    def attached_bytes(self, batch: Batch) -> int:
        """Bytes of the coefficients, and of the gradients of small weights, which wait to be projected together."""
        if self._plan is None:
            return 0
        theta = sum(parameter.nbytes for parameter in self._plan.parameters())
        return theta + sum(-(-s.num_weights // 256) * 256 * 4 for s in self._plan.selections.values())

    def mapped_bytes(self) -> int:
        """Bytes of the coded differences of the checkpoints."""
        return 0 if self._plan is None else self._plan.index_bytes

    def save(self, path: Path) -> None:
        """Write all weights."""
        if self._plan is None:
            self._opening.save(path)
        else:
            self._plan.save(path)

    def release(self) -> None:
        """Give the model back."""
        if self._plan is not None:
            self._plan.release()
        self._opening.release()
        self._forget()
