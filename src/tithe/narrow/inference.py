"""Run a plan's model between its steps as the network that `export` would return now."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from tithe.narrow.probabilities import Probabilities
from tithe.narrow.stage import Stage


class InferenceNetwork:
    """Hooks around the root's forward pass: if no step is running, the model is the likeliest narrow network.

    Its weights are read, not trained: a forward pass that is to be differentiated belongs into `plan.backward`. An
    object rather than closures, so that a deep copy of the model has its own hooks.

    Args:
        stage: of the model.
        probabilities: of its units.
    """

    def __init__(self, stage: Stage, probabilities: Probabilities) -> None:
        self.stage, self.probabilities = stage, probabilities
        self._step: int | None = None
        self._mask: Tensor | None = None
        self._handles: list[RemovableHandle] = []
        self._inside: list[ExitStack] = []

    def follow(self, stage: Stage, step: int | None) -> None:
        """Use the probabilities after `step` finished steps from now on; None makes the model run whole."""
        self.stage, self._step, self._mask = stage, step, None

    def hook(self) -> None:
        """Put the hooks on the model."""
        model = self.stage.model
        self._handles = [
            model.register_forward_pre_hook(self.enter),
            model.register_forward_hook(self.leave, always_call=True),
        ]

    def unhook(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()

    def enter(self, module: Any, args: Any) -> None:
        """Make the model narrow before the forward pass."""
        self._inside.append(ExitStack())  # one for each call: a forward pass may call the model itself
        if self.stage.running or self._step is None:
            return
        if self._mask is None:
            self._mask = self.probabilities.likely(self._step)
        grids = self.stage.grids(self._mask)
        self._inside[-1].enter_context(self.stage.run(grids, self.stage.live(grids), spare=True))

    def leave(self, module: Any, args: Any, output: Any) -> None:
        """Make the model whole after the forward pass, even after a failed one."""
        if self._inside:
            self._inside.pop().close()
