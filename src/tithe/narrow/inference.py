"""Run a plan's model between its steps as the network that `export` would return now."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from tithe.errors import TitheError
from tithe.narrow.stage import Stage
from tithe.narrow.structure import Structure


class InferenceNetwork:
    """Hooks around the root's forward pass: if no step is running, the model is the likeliest narrow network.

    Its weights are read, not trained: a forward pass that is to be differentiated belongs into `plan.backward`. An
    object rather than closures, so that a deep copy of the model has its own hooks.

    Args:
        stage: of the model.
        structure: which of its units exist.
    """

    def __init__(self, stage: Stage, structure: Structure) -> None:
        self.stage, self.structure = stage, structure
        self._step: int | None = None
        self._mask: Tensor | None = None
        self._handles: list[RemovableHandle] = []
        self._inside: list[ExitStack] = []

    def follow(self, stage: Stage, step: int | None) -> None:
        """Use the structure after `step` finished steps from now on; None makes the model run whole."""
        self.stage, self._step, self._mask = stage, step, None

    def hook(self) -> None:
        """Put the hooks on the model."""
        model = self.stage.model
        self._handles = [
            model.register_forward_pre_hook(self.enter),
            model.register_forward_hook(self.leave, always_call=True),
            model.register_load_state_dict_pre_hook(self.check_widths),
        ]

    def check_widths(self, module: Any, state: Mapping[str, Any], prefix: str, *_: Any) -> None:
        """Check before weights are loaded into the model that they are as narrow as it is now.

        Raises:
            TitheError: naming the first that is not.
        """
        for name, tensor in self.stage.tensors.items():
            given = state.get(prefix + name)
            if isinstance(given, Tensor) and given.shape != tensor.shape:
                raise TitheError(
                    name,
                    found=f"values of shape {list(given.shape)} to load",
                    expected=f"{list(tensor.shape)}, as the network is now",
                    remedy="attach to a freshly built model with state= the plan's state that belongs to these weights"
                    ' (the optimizer\'s saved state has it: saved["state"]["tithe"]), and load them then; with_tithe'
                    " does so for Hugging Face's Trainer",
                )

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
            self._mask = self.structure.likely(self._step)
        grids = self.stage.grids(self._mask)
        self._inside[-1].enter_context(self.stage.run(grids, self.stage.live(grids), spare=True))

    def leave(self, module: Any, args: Any, output: Any) -> None:
        """Make the model whole after the forward pass, even after a failed one."""
        if self._inside:
            self._inside.pop().close()
