"""Coefficients of an average that are trained: on training data, TWA-t, or on a part of the validation data, TWA-v.

Each rate is trained from the mean; after every epoch the statistics are estimated anew and the selection rows say how
good the average is. What is kept is the best epoch of the best rate, the mean itself included.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

import tithe
from tithe.app.average.bench import Bench
from tithe.app.average.ways import Settings
from tithe.app.train.average_section import AverageSection
from tithe.app.train.course import AverageCourse
from tithe.app.train.data import to_device
from tithe.app.train.optimizer import make_optimizer
from tithe.errors import TitheError

_RATES: Final = {"model": (2.0, 0.2), "tensor": (1e-3, 1e-2)}
"""Tried where none is given: the papers', and one that suits shorter or smaller runs."""


@dataclass(frozen=True)
class Trained:
    """The best point of some training runs.

    Args:
        theta: coefficients as the plan has them.
        score: on the selection rows.
        epoch: 0 for the mean.
        rate: of the run it is from.
    """

    theta: Tensor
    score: float
    epoch: int
    rate: float


class Trainer:
    """Trains the average of a bench's checkpoints, from their mean, as often as asked.

    Args:
        bench: the model, its data and the checkpoints.
        settings: bits, granularity, epochs and rate.
    """

    def __init__(self, bench: Bench, settings: Settings) -> None:
        self._bench, self._settings = bench, settings
        bench.restore()
        method = tithe.TWA(bench.history, bits=settings.bits, granularity=settings.granularity)
        self.plan = tithe.attach(
            bench.model, method, loss=bench.loss, data=bench.statistics, seed=bench.recipe.run.seed
        )
        self._mean = self.plan.theta.detach().clone()
        self._start: float | None = None

    def train(self, split: str, rows: Sequence[int]) -> Trained:
        """Train on some rows of a split; the model is at the best point when this returns.

        Raises:
            TitheError: when a loss is not finite.
        """
        self._go(self._mean)
        if self._start is None:
            self._start = self._score()
        best = Trained(self._mean, self._start, 0, 0.0)
        for rate in rates(self._settings):
            for point in self._run(split, rows, rate):
                best = point if point.score > best.score else best
        self._go(best.theta)
        self.plan.refresh_statistics()
        return best

    def _run(self, split: str, rows: Sequence[int], rate: float) -> Iterator[Trained]:
        bench, settings, plan, samples = self._bench, self._settings, self.plan, self._bench.samples[split]
        self._go(self._mean)
        section = AverageSection.model_validate(
            {"granularity": settings.granularity, "epochs": settings.epochs, "lr": rate}
        )
        course = AverageCourse(bench.recipe, len(rows), (0, 1), section, 0)
        optimizer = make_optimizer(course.optimizer, plan.parameters())
        plan.bind(optimizer)
        for epoch in range(settings.epochs):
            bench.model.train()
            for number, parts in enumerate(course.parts(epoch, lambda part: samples.weight([rows[at] for at in part]))):
                batches = samples.batches([[rows[place] for place in part] for part, _ in parts])
                for group in optimizer.param_groups:
                    group["lr"] = course.rate(epoch * course.steps_per_epoch + number)
                for batch, (part, weight) in zip(batches, parts, strict=True):
                    self._backward(to_device(batch, bench.device), weight)
                    bench.advance(bench.step_cost(len(part)))
                optimizer.step()
                optimizer.zero_grad()
                plan.step()
            plan.end_epoch()
            yield Trained(plan.theta.detach().clone(), self._score(), epoch + 1, rate)

    def _backward(self, batch: object, weight: float) -> None:
        bench = self._bench

        def closure() -> Tensor:
            with bench.autocast():
                return bench.loss(bench.model, batch) * weight  # pyright: ignore[reportArgumentType]

        loss = self.plan.backward(closure)
        if not bool(loss.detach().isfinite()):
            raise TitheError("average", found=f"loss {float(loss)}", expected="a finite number", remedy="lower --lr")

    def _score(self) -> float:
        self.plan.refresh_statistics()
        self._bench.advance(self._bench.estimate_cost)
        return self._bench.merit()

    def _go(self, theta: Tensor) -> None:
        with torch.no_grad():
            self.plan.theta.copy_(theta)


def rates(settings: Settings) -> tuple[float, ...]:
    """The learning rates that are tried."""
    return _RATES[settings.granularity] if settings.lr is None else (settings.lr,)
