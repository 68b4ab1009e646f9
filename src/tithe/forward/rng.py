"""Restore the random states of a forward pass, so that two passes see the same dropout and augmentation."""

from __future__ import annotations

import random

import numpy as np
import torch


class RandomStates:
    """The states of torch, Python and NumPy when this was made; `restore` goes back to them."""

    def __init__(self) -> None:
        self._torch = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        self._python, self._numpy = random.getstate(), np.random.get_state()

    def restore(self) -> None:
        """Set the random states back, so that the same numbers are drawn again."""
        torch.set_rng_state(self._torch)
        if self._cuda:
            torch.cuda.set_rng_state_all(self._cuda)
        random.setstate(self._python)
        np.random.set_state(self._numpy)
