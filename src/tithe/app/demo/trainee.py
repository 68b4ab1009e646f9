"""What a row of the demonstration trains: any plan, with its optimizer."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch
from torch import Tensor, nn

import tithe
from tithe.app.demo.digits import Batch, Task
from tithe.app.demo.network import classification_loss

BATCH_SIZE = 64


@final
@dataclass(frozen=True)
class Course:
    """What a trainee is in for.

    Args:
        task: the images.
        seed: of batches and choices.
        num_steps: of a whole run.
        measured: whether its steps are to be measured instead: it is to be where it can be measured at once, and to
            stay there.
    """

    task: Task
    seed: int
    num_steps: int
    measured: bool = False


@final
class Trainee:
    """A plan in training, through the calls that every user makes.

    Args:
        model: the network, trained in place.
        attach: makes its plan.
        make_optimizer: over the plan's parameters; AdamW by itself, whose rate the race sets.
        lean: whether all layers are made lean first; a method may ask for that itself.
        fixed_from: the step after which a network that gets narrower is fixed; 0 for never.
    """

    def __init__(
        self,
        model: nn.Module,
        attach: Callable[[], tithe.Plan],
        *,
        make_optimizer: Callable[[Sequence[Tensor]], torch.optim.Optimizer] | None = None,
        lean: bool = False,
        fixed_from: int = 0,
    ) -> None:
        self.model, self._fixed_from = model, fixed_from
        self._lean = tithe.lean(model) if lean else None
        started = time.perf_counter()
        self.plan = attach()
        self.besides = time.perf_counter() - started
        """Seconds spent so far that belong to no step: to choose, or to write and read what was recorded."""
        self.optimizer = (make_optimizer or _adamw)(list(self.plan.parameters()))
        self.plan.bind(self.optimizer)

    def step(self, batch: Batch) -> None:
        """Make one training step: the four calls of the library's training loop."""
        self.plan.backward(lambda: classification_loss(self.model, batch))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.plan.step()
        if self.plan.num_steps == self._fixed_from:
            self.plan.settle()  # on all training images, as in the paper

    def end_epoch(self) -> None:
        """Tell the plan, which may choose again."""
        self.plan.end_epoch()

    @property
    def attached_bytes(self) -> int:
        """Bytes that the method keeps beside the weights between two steps, the optimizer's state apart."""
        return self.plan.attached_bytes

    @property
    def mapped_bytes(self) -> int:
        """Bytes of a mapped file that each step reads."""
        return self.plan.mapped_bytes

    def save(self, path: Path) -> None:
        """Write what a user would ship."""
        self.plan.save(path)

    def release(self) -> None:
        """Give the model back, free of the plan and of lean layers."""
        self.plan.release()
        if self._lean is not None:
            self._lean.release()


def _adamw(parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Count the bytes of all tensors in the optimizer's state."""
    state = (value for entry in optimizer.state.values() for value in entry.values())
    return sum(value.numel() * value.element_size() for value in state if isinstance(value, Tensor))


def trained_weights(optimizer: torch.optim.Optimizer) -> int:
    """Count the numbers that an optimizer moves."""
    return sum(parameter.numel() for group in optimizer.param_groups for parameter in group["params"])
