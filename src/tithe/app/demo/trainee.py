"""What the race needs from every method, and ordinary training, which all are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, final

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

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


class Trainee(Protocol):
    """A network in training: what the race needs from every method, and no more."""

    model: nn.Module
    besides: float
    """Seconds spent so far that belong to no step: to choose, or to write and read what was recorded."""

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """What moves the weights now."""
        ...

    def step(self, batch: Batch) -> None:
        """One training step, the optimizer's included."""
        ...

    def end_epoch(self) -> None:
        """Called when every training image has been seen."""
        ...

    def attached_bytes(self, batch: Batch) -> int:
        """Bytes that the method keeps beside the weights between two steps, the optimizer's state apart."""
        ...

    def mapped_bytes(self) -> int:
        """Bytes of a mapped file that each step reads."""
        ...

    def save(self, path: Path) -> None:
        """Write what a user would ship."""
        ...

    def release(self) -> None:
        """End the training and leave `model` an ordinary module with the trained weights."""
        ...


@final
class Plain:
    """Ordinary PyTorch: AdamW on whole tensors, the other tensors frozen.

    Args:
        model: the network, trained in place.
        prefix: parameters whose name starts with it are trained.
    """

    def __init__(self, model: nn.Module, prefix: str = "") -> None:
        self.model, self.besides = model, 0.0
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(prefix))
        self.optimizer = adamw([parameter for parameter in model.parameters() if parameter.requires_grad])

    def step(self, batch: Batch) -> None:
        """Forward, backward and AdamW."""
        classification_loss(self.model, batch).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def end_epoch(self) -> None:
        """Nothing to do."""

    def attached_bytes(self, batch: Batch) -> int:
        """Zero: the trained tensors are the model's own weights."""
        return 0

    def mapped_bytes(self) -> int:
        """Zero."""
        return 0

    def save(self, path: Path) -> None:
        """Write the trained tensors: for full fine-tuning, a dense checkpoint."""
        trained = {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}
        save_file(trained, path)

    def release(self) -> None:
        """Let every parameter require its gradient again."""
        self.model.requires_grad_(True)


def adamw(parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
    """The optimizer of every row; the race sets its rate."""
    return torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors in the optimizer's state."""
    state = (value for entry in optimizer.state.values() for value in entry.values())
    return sum(value.numel() * value.element_size() for value in state if isinstance(value, Tensor))


def trained_weights(trainee: Trainee) -> int:
    """Numbers that the optimizer moves."""
    return sum(parameter.numel() for group in trainee.optimizer.param_groups for parameter in group["params"])
