"""Pretrain the base, fine-tune it by every contestant, and measure all of them in the same run."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch
from torch import Tensor, nn

import tithe
from tithe.app.demo.averaged import Averaged
from tithe.app.demo.contestants import Contestant
from tithe.app.demo.digits import NUM_CLASSES, Batch, Task, tasks
from tithe.app.demo.network import WIDTH, Digits
from tithe.app.demo.trainee import BATCH_SIZE, Course, Trainee, optimizer_bytes, trained_weights
from tithe.app.dense import Dense
from tithe.app.terminal import Bar
from tithe.delta.file import write_tensors
from tithe.errors import TitheError

RATES = (3e-3, 1e-2, 3e-2)
"""Learning rates that every method tries; its validation accuracy chooses, a tie goes to the lower validation loss."""

WARM_UP_STEPS = 10
PRETRAINING_RATE = 2e-3


@final
@dataclass(frozen=True)
class Length:
    """How much is run.

    Args:
        pretraining: steps on the first task.
        tuning: steps on the second task, for each learning rate and method but those that end earlier.
        rates: learning rates to choose from.
        rounds: timed steps of each method.
    """

    pretraining: int
    tuning: int
    rates: tuple[float, ...]
    rounds: int

    def steps(self, contestants: Sequence[Contestant]) -> int:
        """Training steps in all, those on the way to what is measured apart."""
        runs = sum(sum(contestant.num_steps(self.tuning)) for contestant in contestants)
        return self.pretraining + runs * len(self.rates) + len(contestants) * self.rounds


FULL = Length(pretraining=240, tuning=100, rates=RATES, rounds=25)
QUICK = Length(pretraining=12, tuning=4, rates=(1e-2,), rounds=3)


@final
@dataclass(frozen=True)
class Result:
    """One row: everything in it was measured in this run.

    Args:
        contestant: whose row it is.
        rate: the learning rate that the validation images chose.
        validation: accuracy of each learning rate on the validation images, in the order of the rates.
        correct: for each test image, whether the network is right; bool of shape (N,).
        trained: weights that the optimizer moves.
        choosing: bytes, highest sum of everything alive beyond the weights while the method chose what to train.
        peak: bytes, highest sum of everything alive beyond the weights during a training step: the optimizer's state,
            gradients, what is kept for backward, θ and indices.
        kept: bytes of that peak that are kept for backward.
        gradients: bytes of that peak that are gradients of parameters.
        optimizer: bytes of the optimizer's state.
        seconds: of one training step, the median of steps interleaved with those of the others.
        mapped: bytes of a mapped file that each step reads, which are in no peak.
        opening: steps that it trains as the first row does before its own, of which all of the above is.
        steps: of its own.
        besides: seconds of a run that belong to no step: to choose, or to write and read what was recorded.
        size: bytes of the file it ships.
    """

    contestant: Contestant
    rate: float
    validation: tuple[float, ...]
    correct: Tensor
    trained: int
    choosing: int
    peak: int
    kept: int
    gradients: int
    optimizer: int
    seconds: float
    mapped: int
    opening: int
    steps: int
    besides: float
    size: int

    @property
    def accuracy(self) -> float:
        """Part of the test images that the network gets right."""
        return self.correct.double().mean().item()


@final
@dataclass(frozen=True)
class _Tuned:
    rate: float
    validation: tuple[float, ...]
    correct: Tensor
    besides: float
    size: int


def race(contestants: Sequence[Contestant], folder: Path, *, length: Length, seed: int, bar: Bar) -> list[Result]:
    """Run all contestants from the same pretrained base on the same batches.

    Writes `base.safetensors` and `SLUG.safetensors` of each contestant into `folder`.

    Args:
        contestants: the rows.
        folder: an existing folder for the files.
        length: how much is run.
        seed: of the weights, the batches and the choices.
        bar: is told of every step.

    Raises:
        TitheError: a file, applied to a fresh copy of the base, does not give the outputs of the tuned network.
    """
    first, second = tasks()
    base = _pretrain(first, length.pretraining, seed, bar)
    write_tensors(folder / "base.safetensors", dict(base.named_parameters()), {})
    tuned = [_tune(contestant, base, second, folder, length, seed, bar) for contestant in contestants]
    bar.phase("measuring bytes and seconds of a step")
    batch = next(second.epochs(BATCH_SIZE, seed))[0]
    measured = Course(second, seed, length.tuning, measured=True)
    started = [_start(contestant, copy.deepcopy(base), measured) for contestant in contestants]
    trainees = [trainee for trainee, _ in started]
    ledgers = [_two_steps(trainee, batch) for trainee in trainees]
    seconds = _interleave(trainees, batch, length.rounds, bar)
    return [
        Result(
            contestant=contestant,
            rate=part.rate,
            validation=part.validation,
            correct=part.correct,
            trained=trained_weights(trainee.optimizer),
            choosing=choosing,
            peak=ledger.peak + trainee.attached_bytes,
            kept=ledger.by_kind.get("kept", 0),
            gradients=ledger.by_kind.get("gradients", 0),
            optimizer=optimizer_bytes(trainee.optimizer),
            seconds=median,
            mapped=trainee.mapped_bytes,
            opening=contestant.num_steps(length.tuning)[0],
            steps=contestant.num_steps(length.tuning)[1],
            besides=part.besides,
            size=part.size,
        )
        for contestant, part, (trainee, choosing), ledger, median in zip(
            contestants, tuned, started, ledgers, seconds, strict=True
        )
    ]


def _pretrain(task: Task, num_steps: int, seed: int, bar: Bar) -> nn.Module:
    """Train a new network on `task`, then give it a new head for the next task."""
    bar.phase(f"pretraining on {task.name}")
    torch.manual_seed(seed)
    model = Digits()
    trainee = Trainee(model, lambda: Dense(model, [name for name, _ in model.named_parameters()]))
    _fit(trainee, Course(task, seed, num_steps), PRETRAINING_RATE, num_steps, bar)
    trainee.release()
    bar.say(f"pretrained: {_logits(model, task.test).argmax(1).eq(task.test[1]).double().mean():.1%} of held-out")
    model.head = nn.Linear(WIDTH, NUM_CLASSES)
    return model


def _tune(
    contestant: Contestant, base: nn.Module, task: Task, folder: Path, length: Length, seed: int, bar: Bar
) -> _Tuned:
    """Train at every rate, keep the best on the validation images, save it, and check the file on a fresh base."""
    bar.phase(f"{contestant.name}: {len(length.rates)} learning rates on {task.name}")
    path = folder / f"{contestant.slug}.safetensors"
    accuracies: list[float] = []
    best: tuple[float, float] | None = None
    rate, outputs, besides = length.rates[0], torch.empty(0), 0.0
    course = Course(task, seed, length.tuning)
    for candidate in length.rates:
        trainee = contestant.start(copy.deepcopy(base), course)
        _fit(trainee, course, candidate, sum(contestant.num_steps(length.tuning)), bar)
        logits = _logits(trainee.model, task.validation)
        accuracy = logits.argmax(1).eq(task.validation[1]).double().mean().item()
        loss = nn.functional.cross_entropy(logits, task.validation[1]).item()
        accuracies.append(accuracy)
        if best is None or (accuracy, -loss) > best:
            best, rate, besides = (accuracy, -loss), candidate, trainee.besides
            trainee.save(path)
            trainee.release()
            outputs = _logits(trainee.model, task.test)
    fresh = copy.deepcopy(base)
    tithe.apply(fresh, path)
    if not torch.equal(_logits(fresh, task.test), outputs):
        raise TitheError(
            str(path),
            found="other outputs than those of the tuned network when it is applied to the base",
            expected="the same, bit for bit",
            remedy="report it with the seed: the file is not what was trained",
        )
    return _Tuned(rate, tuple(accuracies), outputs.argmax(1).eq(task.test[1]), besides, path.stat().st_size)


def _fit(trainee: Trainee | Averaged, course: Course, rate: float, num_steps: int, bar: Bar) -> None:
    """Train with a short warm-up and a linear decay to zero at the end of a whole run; stop after `num_steps`."""
    done = 0
    for epoch in course.task.epochs(BATCH_SIZE, course.seed):
        for batch in epoch:
            if done == num_steps:
                return
            for group in trainee.optimizer.param_groups:
                group["initial_lr"] = rate  # what a method's own rate follows, as under torch's schedulers
                group["lr"] = rate * min(1.0, (done + 1) / WARM_UP_STEPS) * (1.0 - done / course.num_steps)
            trainee.step(batch)
            done += 1
            bar.advance()
        trainee.end_epoch()


def _start(contestant: Contestant, model: nn.Module, course: Course) -> tuple[Trainee | Averaged, int]:
    """Start a contestant, and the bytes beyond the weights that its start had alive at the highest moment."""
    trainees: list[Trainee | Averaged] = []
    ledger = tithe.measure(lambda: trainees.append(contestant.start(model, course)), model=model)
    return trainees[0], ledger.peak


def _two_steps(trainee: Trainee | Averaged, batch: Batch) -> tithe.Ledger:
    """Measure two steps from a new optimizer: its state is born in the first and alive at the peak of the second."""

    def steps() -> None:
        trainee.step(batch)
        trainee.step(batch)

    return tithe.measure(steps, model=trainee.model)


def _interleave(trainees: Sequence[Trainee | Averaged], batch: Batch, rounds: int, bar: Bar) -> list[float]:
    """Median seconds of a step of each; the turns alternate so that a busy moment of the machine hits all alike."""
    seconds: list[list[float]] = [[] for _ in trainees]
    for _ in range(rounds):
        for trainee, own in zip(trainees, seconds, strict=True):
            start = time.perf_counter()
            trainee.step(batch)
            own.append(time.perf_counter() - start)
            bar.advance()
    return [statistics.median(own) for own in seconds]


@torch.no_grad()
def _logits(model: nn.Module, part: Batch) -> Tensor:
    """Outputs in evaluation mode, of shape (N, 5)."""
    training = model.training
    model.eval()
    logits = model(part[0])
    model.train(training)
    return logits
