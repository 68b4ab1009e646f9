"""Training that leaves checkpoints behind, and what becomes of them: ResNet-20 on CIFAR at 16².

A stretch of a run trains with SGD (momentum 0.9, weight decay 5e-4, batch 64) at a learning rate that is a function of
the part of the stretch that is behind. The clock counts the CPU seconds of the one thread that trains: passes,
optimizers, recording, attaching, statistics; not the preparation of batches, nor evaluation.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import tithe
from benchmarks.course import evaluate
from benchmarks.images import Images, Split
from benchmarks.narrow_networks import loss_of, resnet
from benchmarks.records import Record
from benchmarks.small_images import BATCH, SIDE, Batch, load, training_batches

NUM_STATISTICS = 50  # batches that running statistics are estimated over
MOMENTUM, DECAY = 0.9, 5e-4

Rate = Callable[[float], float]


@dataclass
class Stretch:
    """Training of one network on one set of images.

    Args:
        data: folder of the images.
        name: "cifar10" or "cifar100".
        seed: of the weights and of the order of the images.
        seconds, epochs: that are behind.
        num_images: for training; None for all that there are.
    """

    data: Path
    name: str
    seed: int
    seconds: float = 0.0
    epochs: float = 0.0
    num_images: int | None = None
    parts: dict[str, float] = field(default_factory=dict)  # seconds by what they were spent on
    model: nn.Module = field(init=False)

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)
        self.model = resnet(3, SIDE).full()
        if self.name == "cifar100":
            self.model.classifier = nn.Linear(64, 100)
        self.model.to(memory_format=torch.channels_last)

    @property
    def split(self) -> Split:
        """The images."""
        whole = load(self.data, self.name)
        some = Images(whole.train.x[: self.num_images], whole.train.y[: self.num_images])
        return Split(some, whole.validation, whole.test)

    @property
    def steps_per_epoch(self) -> int:
        """Steps of a pass over the training images."""
        return len(self.split.train.y) // BATCH

    @contextmanager
    def clock(self, part: str = "steps") -> Iterator[None]:
        """Count what is done within."""
        start = time.process_time()
        yield
        spent = time.process_time() - start
        self.seconds += spent
        self.parts[part] = self.parts.get(part, 0.0) + spent

    def batches(self, epochs: float) -> Iterator[Batch]:
        """Training batches; those of a later stretch are others."""
        stream = training_batches(self.split.train, seed=1 + 100 * self.seed + round(self.epochs))
        return islice(stream, round(epochs * self.steps_per_epoch))

    def train(
        self,
        epochs: float,
        rate: Rate,
        *,
        history: tithe.History | None = None,
        each: float = 0.5,
        tracks: tithe.History | None = None,
    ) -> None:
        """Train all weights; record a checkpoint after each part of an epoch.

        Args:
            epochs: how long.
            rate: learning rate at a part of the stretch.
            history: where checkpoints go.
            each: epochs between them.
            tracks: where moving averages go, which follow every step; recorded once an epoch.
        """
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=MOMENTUM, weight_decay=DECAY)
        total, every = round(epochs * self.steps_per_epoch), round(each * self.steps_per_epoch)
        for step, batch in enumerate(self.batches(epochs)):
            for group in optimizer.param_groups:
                group["lr"] = rate(step / total)
            with self.clock():
                loss_of(self.model, batch).backward()
                optimizer.step()
                optimizer.zero_grad()
            if history is not None and (step + 1) % every == 0:
                with self.clock("recording"):
                    history.record(self.model, step + 1)
            if tracks is not None:
                with self.clock("following"):
                    tracks.update(self.model, step + 1)
                    if (step + 1) % self.steps_per_epoch == 0:
                        tracks.record(self.model, step + 1)
        self.epochs += epochs

    def twa(
        self, history: tithe.History, epochs: float, rate: Rate, *, decay: float, start: str, bits: int | None = None
    ) -> None:
        """Train the coefficients of the checkpoints by SGD, and estimate the statistics of what comes out."""
        with self.clock():
            plan = tithe.attach(self.model, tithe.TWA(history, bits=bits, start=start), loss=loss_of, seed=self.seed)
            optimizer = torch.optim.SGD(plan.parameters(), lr=1.0, momentum=MOMENTUM, weight_decay=decay)
            plan.bind(optimizer)
        total = round(epochs * self.steps_per_epoch)
        for step, batch in enumerate(self.batches(epochs)):
            for group in optimizer.param_groups:
                group["lr"] = rate(step / total)
            with self.clock():
                plan.backward(lambda batch=batch: cross_entropy(self.model(batch[0]), batch[1]))
                optimizer.step()
                optimizer.zero_grad()
                plan.step()
        self.epochs += epochs
        batches = list(self.batches(NUM_STATISTICS / self.steps_per_epoch))
        with self.clock():
            plan.refresh_statistics(batches)
            plan.release()

    def average(self, history: tithe.History, weights: Sequence[float]) -> None:
        """Take a fixed average of the checkpoints, and estimate its statistics."""
        batches = list(self.batches(NUM_STATISTICS / self.steps_per_epoch))
        with self.clock("averaging"):
            self.model.load_state_dict(history.average(weights))
            torch.optim.swa_utils.update_bn(batches, self.model)

    def record(self) -> Record:
        """What is reached, in percent and in seconds."""
        (validation, validation_loss), (test, _) = (
            evaluate(self.model, images) for images in (self.split.validation, self.split.test)
        )
        return {"validation": validation, "validation_loss": validation_loss, "test": test, "seconds": self.seconds}


def constant(rate: float, warm: float = 0.0) -> Rate:
    """One learning rate, reached after a part of the stretch."""
    return lambda part: rate * min(1.0, max(part, 0.01) / warm) if warm else rate


def milestones(rate: float) -> Rate:
    """A tenth of it from one half on, a hundredth from four fifths on, as in the paper."""
    return lambda part: rate * (0.01 if part >= 0.8 else 0.1 if part >= 0.5 else 1.0)
