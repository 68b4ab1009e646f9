"""The rows of the demonstration's table: who trains what. A new method joins by one entry in `CONTESTANTS`."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, final

from safetensors.torch import load_file
from torch import nn

import tithe
from tithe.app.demo.averaged import Averaged, averaging_steps, opening_steps
from tithe.app.demo.digits import Batch
from tithe.app.demo.network import classification_loss
from tithe.app.demo.trainee import BATCH_SIZE, Course, Plain, Trainee, adamw

DENSITY = 0.02
"""Part of all weights, head included, that the sparse methods train."""

BUDGET = "512 kB"
"""What the channels that TraDy draws may cost: θ, gradients, AdamW's state, indices, kept inputs, the head's share."""

KEEP, FIXED = 0.4, 0.8
"""Share of a forward pass's operations that VR-PGE keeps; part of the steps after which its widths are fixed."""

HEAD = ("head.*",)


@final
@dataclass(frozen=True)
class Contestant:
    """One row of the table.

    Args:
        name: of the row, at most 16 characters.
        slug: name of the file it writes, without the suffix.
        start: prepares a copy of the base network.
        restore: puts a file that the trainee saved onto a fresh copy of the base network.
        opening: of so many steps of a whole run, those that it trains as the first row does before it does anything of
            its own; None where there are none.
        closing: of so many steps of a whole run, those that it does of its own; None for all.
    """

    name: str
    slug: str
    start: Callable[[nn.Module, Course], Trainee]
    restore: Callable[[nn.Module, Path], object]
    opening: Callable[[int], int] | None = None
    closing: Callable[[int], int] | None = None

    def num_steps(self, whole: int) -> tuple[int, int]:
        """How many steps it trains as the first row does, and how many as itself, where others train `whole`."""
        opening = self.opening(whole) if self.opening is not None else 0
        return opening, self.closing(whole) if self.closing is not None else whole


@final
class Attached:
    """Any method of the library, through the calls that every user makes.

    Args:
        model: the network, trained in place.
        method: what `tithe.attach` takes.
        course: its training images also choose the weights.
        lean: whether all layers are made lean first; a method may ask for that itself.
        fixed_from: the step after which a network that gets narrower is fixed; 0 for never.
    """

    def __init__(
        self,
        model: nn.Module,
        method: tithe.FISH | tithe.TraDy | tithe.VRPGE,
        course: Course,
        *,
        lean: bool = False,
        fixed_from: int = 0,
    ) -> None:
        self.model, self._fixed_from = model, fixed_from
        self._lean = tithe.lean(model) if lean else None
        batches = list(zip(*(part.split(BATCH_SIZE) for part in course.task.train), strict=True))
        start = time.perf_counter()
        self.plan = tithe.attach(model, method, loss=classification_loss, data=batches, head=HEAD, seed=course.seed)
        self.besides = time.perf_counter() - start
        self.optimizer = adamw(list(self.plan.parameters()))
        self.plan.bind(self.optimizer)

    def step(self, batch: Batch) -> None:
        """The four calls of the library's training loop."""
        self.plan.backward(lambda: classification_loss(self.model, batch))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.plan.step()
        if isinstance(self.plan, tithe.NarrowPlan) and self.plan.num_steps == self._fixed_from:
            self.plan.settle()  # on all training images, as in the paper

    def end_epoch(self) -> None:
        """Tell the plan, which may choose again."""
        self.plan.end_epoch()

    def attached_bytes(self, batch: Batch) -> int:
        """Bytes of θ (the head's tensors are the model's own) and of the indices."""
        if isinstance(self.plan, tithe.NarrowPlan):  # between steps θ is the weights' own memory
            return self.plan.index_bytes + sum(s.nbytes for s in self.plan.structure_parameters())
        predicted, named = self.plan.predict(batch), dict(self.plan.named_parameters())
        return predicted.theta - sum(named[name].nbytes for name in self.plan.head) + predicted.index

    def mapped_bytes(self) -> int:
        """Zero."""
        return 0

    def save(self, path: Path) -> None:
        """Write the delta, or the narrow network."""
        self.plan.save(path)

    def release(self) -> None:
        """Give the model back, free of the plan and of lean layers."""
        self.plan.release()
        if self._lean is not None:
            self._lean.release()


def _load(model: nn.Module, path: Path) -> None:
    model.load_state_dict(load_file(path), strict=False)


def _fish(score: Literal["fisher", "random"], *, lean: bool = False) -> Callable[[nn.Module, Course], Trainee]:
    def start(model: nn.Module, course: Course) -> Trainee:
        method = tithe.FISH(density=DENSITY, score=score, samples=len(course.task.train[0]))
        return Attached(model, method, course, lean=lean)

    return start


def _trady(model: nn.Module, course: Course) -> Trainee:
    return Attached(model, tithe.TraDy(tithe.Budget(BUDGET), samples=len(course.task.train[0])), course)


def _vrpge(model: nn.Module, course: Course) -> Trainee:
    # The probabilities have 80 steps to get somewhere, where the paper's have a hundred thousand.
    method = tithe.VRPGE(keep=KEEP, cost="flops", structure_lr=0.05)
    return Attached(model, method, course, fixed_from=0 if course.measured else round(FIXED * course.num_steps))


CONTESTANTS: tuple[Contestant, ...] = (
    Contestant("full fine-tuning", "full", lambda model, _course: Plain(model), _load),
    Contestant("full, then TWA", "twa", Averaged, tithe.apply, opening_steps, averaging_steps),
    Contestant("FISH", "fish", _fish("fisher"), tithe.apply),
    Contestant("FISH + lean", "fish-lean", _fish("fisher", lean=True), tithe.apply),
    Contestant("TraDy", "trady", _trady, tithe.apply),
    Contestant("VR-PGE", "vrpge", _vrpge, tithe.apply),
    Contestant("random mask", "random", _fish("random"), tithe.apply),
    Contestant("head only", "head", lambda model, _course: Plain(model, "head."), _load),
)
