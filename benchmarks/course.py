"""The course of a run: its batches, its learning rate, its clock, and the validation accuracy along the way."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from benchmarks.images import Images, Split
from benchmarks.records import Record
from benchmarks.small_images import BATCH, Batch, evaluation_batches, training_batches

WARM_UP = 0.05  # of the course
POINTS = 8  # of the curve
MOMENTUM, DECAY = 0.9, 5e-4  # of every method's SGD


@dataclass
class Course:
    """One run, whose end is a number of epochs or of seconds.

    The clock counts the CPU seconds of the one thread that trains: forward and backward passes, optimizers, choices of
    channels; not the preparation of batches, which is the same for all, nor evaluation.

    Args:
        split: the images.
        rate: highest learning rate; it rises over the first 5 % and falls to zero along a cosine.
        seed: of the order of the images, of the weights and of every draw.
        epochs: passes over all training images at which the course ends, or None.
        limit: seconds at which it ends, or None.
    """

    split: Split
    rate: float
    seed: int
    epochs: int | None = None
    limit: float | None = None
    seconds: float = 0.0
    steps: int = 0
    curve: list[tuple[float, float]] = field(default_factory=list)  # seconds, validation accuracy

    @property
    def steps_per_epoch(self) -> int:
        """Steps that a pass over all training images takes."""
        return len(self.split.train.y) // BATCH

    @property
    def progress(self) -> float:
        """Part of the course that is behind: of its steps, or of its seconds."""
        if self.limit is not None:
            return self.seconds / self.limit
        assert self.epochs is not None
        return self.steps / (self.epochs * self.steps_per_epoch)

    @property
    def factor(self) -> float:
        """Of the learning rate, here."""
        return min(1.0, max(self.progress, 0.01) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * min(self.progress, 1)))

    @contextmanager
    def clock(self) -> Iterator[None]:
        """Count what is done within."""
        start = time.process_time()
        yield
        self.seconds += time.process_time() - start

    def batches(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, *, until: float = 1.0, images: Images | None = None
    ) -> Iterator[Batch]:
        """Batches until that part of the course is behind; what the caller does with each is counted.

        Args:
            model: what is scored on the validation images from time to time.
            optimizer: whose rate is set before each batch.
            until: part of the course.
            images: to train on; all training images unless told.
        """
        stream = training_batches(images or self.split.train, seed=self.seed + self.steps)
        while self.progress < until:
            batch = next(stream)
            for group in optimizer.param_groups:
                group["lr"] = self.rate * self.factor
            with self.clock():
                yield batch
            self.steps += 1
            if self.progress * POINTS >= len(self.curve) + 1:
                self.curve.append((round(self.seconds, 2), evaluate(model, self.split.validation)[0]))

    def sgd(self, parameters: Iterator[nn.Parameter]) -> torch.optim.SGD:
        """The optimizer of every method's weights."""
        optimizer = torch.optim.SGD(parameters, lr=self.rate, momentum=MOMENTUM, weight_decay=DECAY)
        for group in optimizer.param_groups:
            group["initial_lr"] = self.rate  # tells how far down its course a rate is
        return optimizer

    def train(self, model: nn.Module, *, until: float = 1.0) -> None:
        """Train all weights of a model in the ordinary way."""
        optimizer = self.sgd(model.parameters())
        for x, y in self.batches(model, optimizer, until=until):
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()

    def record(self, model: nn.Module) -> Record:
        """What the run used and what it reached, on validation and on test images."""
        (validation, validation_loss), (test, test_loss) = (
            evaluate(model, images) for images in (self.split.validation, self.split.test)
        )
        return {
            "validation": validation,
            "validation_loss": validation_loss,
            "test": test,
            "test_loss": test_loss,
            "seconds": self.seconds,
            "steps": self.steps,
            "curve": self.curve,
        }


@torch.no_grad()
def evaluate(model: nn.Module, images: Images) -> tuple[float, float]:
    """Accuracy in percent and the mean cross-entropy; the model is left in training mode."""
    model.eval()
    pairs = [(model(x), y) for x, y in evaluation_batches(images)]
    model.train()
    logits, labels = torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])
    accuracy = 100 * float((logits.argmax(-1) == labels).double().mean())
    return accuracy, float(nn.functional.cross_entropy(logits, labels))
