"""How a run goes: which rows each step sees, at what learning rate, and how many steps there are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import final

from tithe.app.train.average_section import AverageSection
from tithe.app.train.data import chunks, epoch_order
from tithe.app.train.lr_schedule import highest, rate, warmup_steps
from tithe.app.train.recipe import Recipe
from tithe.app.train.sections import OptimizerSection

_WARM = 0.2
"""The part of an average's steps in which the learning rate of a cosine rises, as in the paper."""

_MILESTONES = (0.5, 0.8)
"""The parts of an average's steps after which its learning rate is a tenth, then a hundredth: 5 and 8 epochs of 10."""


@dataclass(frozen=True)
class Course(ABC):
    """Some steps of a run; everything here is a pure function, so that a resumed run needs no state for it.

    Args:
        recipe: the run.
        num_rows: of the split that is trained on.
        share: this process's number, and how many there are.
    """

    recipe: Recipe
    num_rows: int
    share: tuple[int, int]

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the rows; the last may be smaller."""
        whole, rest = divmod(self.num_rows, self._step_size)
        # A rest smaller than the number of processes would leave one of them without a sample.
        return max(1, whole + (rest >= self.share[1]))

    @property
    @abstractmethod
    def split(self) -> str:
        """What is trained on."""

    @property
    @abstractmethod
    def optimizer(self) -> OptimizerSection:
        """Which, with its settings."""

    @property
    @abstractmethod
    def calmer(self) -> str:
        """What may be changed where a loss is not finite."""

    @property
    @abstractmethod
    def total_steps(self) -> int:
        """Optimizer steps of the run when these are done."""

    @property
    @abstractmethod
    def fixed_from(self) -> int:
        """The number of finished steps from which on the network's widths are fixed; 0 where they always are."""

    @abstractmethod
    def rate(self, step: int, suggested: float | None = None) -> float:
        """The learning rate of a step.

        Args:
            step: finished ones of the run.
            suggested: the highest rate, where the recipe names none.
        """

    @abstractmethod
    def records(self, step: int) -> bool:
        """Whether a checkpoint goes into the run's history after `step` finished ones."""

    @abstractmethod
    def follows(self, step: int) -> bool:
        """Whether the run's moving averages take in the weights after `step` finished ones."""

    @property
    def _step_size(self) -> int:
        run = self.recipe.run
        return run.batch_size * run.accumulate * self.share[1]

    def order(self, epoch: int) -> Sequence[int]:
        """The rows of an epoch, in the order in which they are seen."""
        return epoch_order(self.num_rows, seed=self.recipe.run.seed, epoch=epoch)

    def parts(
        self, epoch: int, weigh: Callable[[Sequence[int]], int] = len, *, start: int = 0
    ) -> Iterator[list[tuple[Sequence[int], float]]]:
        """For each step of an epoch, this process's micro-batches: their rows and what each one's mean counts for.

        The weights make the step's loss the mean over all that is predicted in it, on all processes, however uneven the
        parts are.

        Args:
            epoch: which.
            weigh: counts what the mean loss of a batch with these rows is a mean of.
            start: steps of the epoch that are left out at its beginning.
        """
        order, (rank, world) = self.order(epoch), self.share
        for step in range(start, self.steps_per_epoch):
            rows = order[step * self._step_size : (step + 1) * self._step_size]
            own = chunks(rows[rank::world], self.recipe.run.batch_size)
            yield [(part, weigh(part) * world / weigh(rows)) for part in own if len(rows) > 0]


@final
@dataclass(frozen=True)
class OwnCourse(Course):
    """The steps of the recipe's method; of a stream an epoch is what lies between two evaluations."""

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the rows, or between two evaluations of a stream."""
        if self.recipe.data.streaming:
            return self.recipe.run.evaluate_every or self.total_steps
        return super().steps_per_epoch

    def order(self, epoch: int) -> Sequence[int]:
        """The rows of an epoch; those of a stream come one after the other."""
        if not self.recipe.data.streaming:
            return super().order(epoch)
        size = self.steps_per_epoch * self._step_size
        return range(epoch * size, min((epoch + 1) * size, self.num_rows))

    @property
    def split(self) -> str:
        """The method trains on the training rows."""
        return "train"

    @property
    def optimizer(self) -> OptimizerSection:
        """The optimizer of the recipe."""
        return self.recipe.optimizer

    @property
    def calmer(self) -> str:
        """The learning rate, clipping, a warm-up."""
        lr = "lower" if self.recipe.optimizer.lr is not None else "name a lower"
        return f"{lr} lr ({self.recipe.place('optimizer', 'lr')}), add [optimizer] clip or warmup_steps"

    @property
    def total_steps(self) -> int:
        """As many steps as `[run]` says."""
        return self.recipe.run.steps or (self.recipe.run.epochs or 1) * self.steps_per_epoch

    @property
    def fixed_from(self) -> int:
        """The number of finished steps from which on the network's widths are fixed; 0 where they always are."""
        return self.recipe.method.fixed_from(self.total_steps)

    def rate(self, step: int, suggested: float | None = None) -> float:
        """The learning rate of the step after `step` finished ones; of some methods it starts again at fixed widths."""
        section, method = self.recipe.optimizer, self.recipe.method
        start = self.fixed_from if method.restarts else 0
        lr = highest(section, suggested)
        if start and step >= start:
            return rate(section, method.finetuning_rate(lr), step - start, self.total_steps - start, 0)
        return rate(section, lr, step, start or self.total_steps, warmup_steps(section, self.steps_per_epoch))

    def records(self, step: int) -> bool:
        """As `[history]` says, once widths are fixed: checkpoints of one history have the same shapes."""
        history = self.recipe.history
        if history is None or step < self.fixed_from:
            return False
        return history.due(step, self.steps_per_epoch, self.total_steps)

    def follows(self, step: int) -> bool:
        """Where `[history]` has moving averages, after each step from the first with these widths on."""
        history = self.recipe.history
        return history is not None and history.ema is not None and step >= max(self.fixed_from, 1)


@final
@dataclass(frozen=True)
class AverageCourse(Course):
    """The steps in which the average of the run's history is trained, after its own.

    Args:
        section: how.
        start: the run's own steps.
    """

    section: AverageSection
    start: int

    @property
    def split(self) -> str:
        """The training rows, or those held out for this."""
        return "train" if self.section.on == "train" else "average"

    @property
    def optimizer(self) -> OptimizerSection:
        """The average's, which clips nothing."""
        section = self.section
        return OptimizerSection(
            name=section.optimizer,
            lr=section.lr,
            momentum=section.momentum,
            weight_decay=section.weight_decay,
            schedule="cosine" if section.schedule == "cosine" else "constant",
        )

    @property
    def calmer(self) -> str:
        """Only the learning rate may be lowered."""
        return f"lower lr ({self.recipe.place('average', 'lr')})"

    @property
    def total_steps(self) -> int:
        """The run's own, and then so many epochs; none for the mean."""
        return self.start + (self.section.epochs * self.steps_per_epoch if self.section.method == "twa" else 0)

    @property
    def fixed_from(self) -> int:
        """All widths are fixed from the start."""
        return 0

    def rate(self, step: int, suggested: float | None = None) -> float:
        """As `[average] schedule` says, with the rate that the section has in any case."""
        done, total = step - self.start, self.total_steps - self.start
        lr = self.section.lr
        if self.section.schedule == "steps":
            lr *= 0.1 ** sum(done >= round(part * total) for part in _MILESTONES)
        return rate(self.optimizer, lr, done, total, round(_WARM * total) if self.section.schedule == "cosine" else 0)

    def records(self, step: int) -> bool:
        """The history is complete."""
        return False

    def follows(self, step: int) -> bool:
        """The history is complete."""
        return False
