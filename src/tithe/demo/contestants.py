"""The rows of the demonstration's table: who trains what. A new method joins by one entry in `CONTESTANTS`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, final

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tithe
from tithe.demo.digits import Batch, Task
from tithe.demo.network import classification_loss

DENSITY = 0.02
"""Part of all weights, head included, that the sparse methods train."""

BUDGET = "512 kB"
"""What the channels that TraDy draws may cost: θ, gradients, AdamW's state, indices, kept inputs, the head's share."""

KEEP, FIXED = 0.4, 0.8
"""Share of a forward pass's operations that VR-PGE keeps; part of the steps after which its widths are fixed."""

BATCH_SIZE = 64

HEAD = ("head.*",)


class Trainee(Protocol):
    """A network in training: what the race needs from every method, and no more."""

    model: nn.Module
    optimizer: torch.optim.Optimizer

    def step(self, batch: Batch) -> None:
        """One training step, the optimizer's included."""
        ...

    def end_epoch(self) -> None:
        """Called when every training image has been seen."""
        ...

    def attached_bytes(self, batch: Batch) -> int:
        """Bytes that the method keeps beside the weights between two steps, the optimizer's state apart."""
        ...

    def save(self, path: Path) -> None:
        """Write what a user would ship."""
        ...

    def release(self) -> None:
        """End the training and leave `model` an ordinary module with the trained weights."""
        ...


@final
@dataclass(frozen=True)
class Contestant:
    """One row of the table.

    Args:
        name: of the row, at most 16 characters.
        slug: name of the file it writes, without the suffix.
        start: prepares a copy of the base network for training on a task, with a seed and for a number of steps, 0
            where no end is in sight.
        restore: puts a file that the trainee saved onto a fresh copy of the base network.
    """

    name: str
    slug: str
    start: Callable[[nn.Module, Task, int, int], Trainee]
    restore: Callable[[nn.Module, Path], object]


@final
class Plain:
    """Ordinary PyTorch: AdamW on whole tensors, the other tensors frozen.

    Args:
        model: the network, trained in place.
        prefix: parameters whose name starts with it are trained.
    """

    def __init__(self, model: nn.Module, prefix: str = "") -> None:
        self.model = model
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(prefix))
        self.optimizer = _adamw([parameter for parameter in model.parameters() if parameter.requires_grad])

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

    def save(self, path: Path) -> None:
        """Write the trained tensors: for full fine-tuning, a dense checkpoint."""
        trained = {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}
        save_file(trained, path)

    def release(self) -> None:
        """Let every parameter require its gradient again."""
        self.model.requires_grad_(True)


@final
class Attached:
    """Any method of the library, through the calls that every user makes.

    Args:
        model: the network, trained in place.
        method: what `tithe.attach` takes.
        task: its training images also choose the weights.
        seed: of the choice.
        lean: whether all layers are made lean first; a method may ask for that itself.
        fixed_from: the step after which a network that gets narrower is fixed; 0 for never.
    """

    def __init__(
        self,
        model: nn.Module,
        method: tithe.FISH | tithe.TraDy | tithe.VRPGE,
        task: Task,
        seed: int,
        *,
        lean: bool = False,
        fixed_from: int = 0,
    ) -> None:
        self.model, self._fixed_from = model, fixed_from
        self._lean = tithe.lean(model) if lean else None
        batches = list(zip(*(part.split(BATCH_SIZE) for part in task.train), strict=True))
        self.plan = tithe.attach(model, method, loss=classification_loss, data=batches, head=HEAD, seed=seed)
        self.optimizer = _adamw(list(self.plan.parameters()))
        self.plan.bind(self.optimizer)

    def step(self, batch: Batch) -> None:
        """The four calls of the library's training loop."""
        self.plan.backward(lambda: classification_loss(self.model, batch))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.plan.step()
        if isinstance(self.plan, tithe.AbsentPlan) and self.plan.num_steps == self._fixed_from:
            self.plan.settle()  # on all training images, as in the paper

    def end_epoch(self) -> None:
        """Tell the plan, which may choose again."""
        self.plan.end_epoch()

    def attached_bytes(self, batch: Batch) -> int:
        """Bytes of θ (the head's tensors are the model's own) and of the indices."""
        if isinstance(self.plan, tithe.AbsentPlan):  # between steps θ is the weights' own memory
            return self.plan.index_bytes + sum(s.nbytes for s in self.plan.structure_parameters())
        predicted, named = self.plan.predict(batch), dict(self.plan.named_parameters())
        return predicted.theta - sum(named[name].nbytes for name in self.plan.head) + predicted.index

    def save(self, path: Path) -> None:
        """Write the delta, or the narrow network."""
        self.plan.save(path)

    def release(self) -> None:
        """Give the model back, free of the plan and of lean layers."""
        self.plan.release()
        if self._lean is not None:
            self._lean.release()


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors in the optimizer's state."""
    state = (value for entry in optimizer.state.values() for value in entry.values())
    return sum(value.numel() * value.element_size() for value in state if isinstance(value, Tensor))


def trained_weights(trainee: Trainee) -> int:
    """Numbers that the optimizer moves."""
    return sum(parameter.numel() for group in trainee.optimizer.param_groups for parameter in group["params"])


def _adamw(parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)


def _load(model: nn.Module, path: Path) -> None:
    model.load_state_dict(load_file(path), strict=False)


def _fish(score: Literal["fisher", "random"], *, lean: bool = False) -> Callable[[nn.Module, Task, int, int], Trainee]:
    def start(model: nn.Module, task: Task, seed: int, _steps: int) -> Trainee:
        method = tithe.FISH(density=DENSITY, score=score, samples=len(task.train[0]))
        return Attached(model, method, task, seed, lean=lean)

    return start


def _trady(model: nn.Module, task: Task, seed: int, _steps: int) -> Trainee:
    return Attached(model, tithe.TraDy(tithe.Budget(BUDGET), samples=len(task.train[0])), task, seed)


def _vrpge(model: nn.Module, task: Task, seed: int, steps: int) -> Trainee:
    # The probabilities have 80 steps to get somewhere, where the paper's have a hundred thousand.
    method = tithe.VRPGE(keep=KEEP, cost="flops", structure_lr=0.05)
    return Attached(model, method, task, seed, fixed_from=round(FIXED * steps))


CONTESTANTS: tuple[Contestant, ...] = (
    Contestant("full fine-tuning", "full", lambda model, _task, _seed, _steps: Plain(model), _load),
    Contestant("FISH", "fish", _fish("fisher"), tithe.apply),
    Contestant("FISH + lean", "fish-lean", _fish("fisher", lean=True), tithe.apply),
    Contestant("TraDy", "trady", _trady, tithe.apply),
    Contestant("VR-PGE", "vrpge", _vrpge, tithe.apply),
    Contestant("random mask", "random", _fish("random"), tithe.apply),
    Contestant("head only", "head", lambda model, _task, _seed, _steps: Plain(model, "head."), _load),
)
