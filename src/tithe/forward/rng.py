"""Restore the random states of a forward pass, so that two passes see the same dropout and augmentation."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


class RandomStates:
    """The states of torch, Python and NumPy when this was made; `restore` goes back to them."""

    def __init__(self) -> None:
        self._torch = torch.get_rng_state()
        self._accelerator = _accelerator()
        self._devices = [] if self._accelerator is None else self._accelerator.get_rng_state_all()
        self._python, self._numpy = random.getstate(), np.random.get_state()

    def restore(self) -> None:
        """Set the random states back, so that the same numbers are drawn again."""
        torch.set_rng_state(self._torch)
        if self._accelerator is not None:
            self._accelerator.set_rng_state_all(self._devices)
        random.setstate(self._python)
        np.random.set_state(self._numpy)


def _accelerator() -> Any:
    """`torch.cuda`, or what stands in its place (`torch.xpu` …), once it is in use; None without an accelerator."""
    found = torch.accelerator.current_accelerator()
    if found is None or found.type == "mps":  # torch.mps tells neither whether it is in use nor all of its states
        return None
    module: Any = torch.get_device_module(found)
    return module if module.is_initialized() else None
