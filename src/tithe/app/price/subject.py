"""What is priced: a network that can be built without data, its batches, and its loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tithe.errors import TitheError
from tithe.ledger import Blank


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A network to price, as three functions; the first two run where tensors have shapes and no data.

    Args:
        name: what it is called.
        build: makes the network in training mode or not.
        batch: makes a batch of n samples, any tree of tensors.
        loss: `loss(model, batch)` → scalar, the mean over the samples of the batch.
        head: names or globs of the parameters that every method trains whole.
        dtype: of the floating-point parameters and inputs that `build` and `batch` make.
    """

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[int], Any]
    loss: Callable[[nn.Module, Any], Tensor]
    head: tuple[str, ...] = ()
    dtype: torch.dtype = torch.float32

    def make(self, blank: Blank) -> nn.Module:
        """The network without its data.

        Raises:
            TitheError: its constructor reads values of its weights, or returns no network.
        """
        model = self._run(blank, self.build)
        if not isinstance(model, nn.Module):
            raise TitheError(
                self.name, found=type(model).__name__, expected="an nn.Module", remedy="return the network"
            )
        blank.adopt(model)
        return model.train()

    def draw(self, blank: Blank, num_samples: int) -> Any:
        """A batch without data, its whole numbers apart."""
        return self._run(blank, lambda: self.batch(num_samples))

    def _run(self, blank: Blank, make: Callable[[], Any]) -> Any:
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            with torch.random.fork_rng(devices=()), blank:
                return make()
        except RuntimeError as error:
            if "tensor subclasses" not in str(error):  # what torch says when a fake is asked for `.numpy()`
                raise
            raise TitheError(
                self.name,
                found=f"a constructor that needs the values of its weights ({error})",
                expected="one that works without them, as on the meta device",
                remedy="build the network for real and use plan.predict",
            ) from error
        finally:
            torch.set_default_dtype(before)
