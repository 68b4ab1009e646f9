"""What a plan has to be told by a Trainer's loop, and what is counted on the way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from tithe.errors import TitheError


@final
class TitheCallback(TrainerCallback, ExportableState):
    """Ends the plan's epochs where the Trainer's end, and counts choices; `with_tithe` adds it.

    An epoch ends with its last step, before that is saved, so that a run that goes on from there has ended it too.

    Args:
        draws: choices made so far.
        peak: bytes that a measured step needed; 0 before one was measured.
    """

    def __init__(self, draws: int = 0, peak: int = 0) -> None:
        self.draws, self.peak = draws, peak
        self.plan: Any = None
        self.chosen: Callable[[], None] | None = None
        self._ended, self._epochs = False, 0

    def __reduce__(self) -> Any:
        return TitheCallback, (self.draws, self.peak)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of it."""
        return {"args": {"draws": self.draws, "peak": self.peak}, "attributes": {}}

    def follow(self, plan: Any, chosen: Callable[[], None]) -> None:
        """Follow a plan from now on.

        Args:
            plan: the plan.
            chosen: called after each change of its choice.
        """
        self.plan, self.chosen = plan, chosen

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start counting epochs from where the plan is."""
        self._epochs = self.plan.num_epochs
        self._clear()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note that an epoch has begun."""
        self._ended = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count a new choice, and end the epoch with its last step."""
        self._clear()
        self._count(self.plan.step())
        if _has_length(kwargs.get("train_dataloader")) and float(state.epoch).is_integer():
            self._end_epoch()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End an epoch of unknown length, or one that was cut short; not one that training stopped within."""
        if not self._ended and not control.should_training_stop:
            self._end_epoch()

    def _end_epoch(self) -> None:
        if self.plan.num_epochs != self._epochs:
            raise TitheError(
                "callbacks",
                found=f"{self.plan.num_epochs - self._epochs} epochs that something else ended",
                expected="plan.end_epoch() called by with_tithe alone",
                remedy="leave the call out of your callbacks",
            )
        self._ended = True
        self._count(self.plan.end_epoch())
        self._epochs = self.plan.num_epochs

    def _count(self, changed: bool) -> None:
        if changed:
            self.draws += 1
            if self.chosen is not None:
                self.chosen()

    def _clear(self) -> None:
        """Forget gradients: the Trainer forgets those of the model's own parameters alone."""
        for parameter in self.plan.parameters():
            parameter.grad = None


def _has_length(loader: Any) -> bool:
    try:
        return len(loader) > 0
    except TypeError:
        return False
