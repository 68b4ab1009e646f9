"""The running statistics of norms, estimated anew: means over data, whatever the momentum of training."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase  # pyright: ignore[reportPrivateUsage]

from tithe.chance import Chance
from tithe.errors import TitheError


def tracked(model: nn.Module) -> list[_NormBase]:
    """The norms whose running statistics follow training: those in training mode."""
    return [m for m in model.modules() if isinstance(m, _NormBase) and m.track_running_stats and m.training]


def estimate_statistics(model: nn.Module, run: Callable[[nn.Module, Any], Any], batches: Iterable[Any]) -> int:
    """Set every norm's running statistics to their mean over batches of training data.

    Norms that run in evaluation mode while the model trains keep theirs. Random states stay as they were.

    Args:
        model: in either mode; it is left as it was.
        run: one forward pass on a batch.
        batches: of training data.

    Returns:
        How many batches there were; 0 where no norm has statistics, and then none was run.

    Raises:
        TitheError: when there is no batch.
    """
    with torch.no_grad(), training(model):
        norms = tracked(model)
        if not norms:
            return 0
        batches = iter(batches)
        first = next(batches, None)
        if first is None:
            raise TitheError("statistics", found="no batch", expected="training data", remedy="pass batches")
        momenta = [norm.momentum for norm in norms]
        chance = Chance()
        try:
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # the mean over all batches
            count = 0
            for batch in itertools.chain([first], batches):
                run(model, batch)
                count += 1
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
            chance.again()
    return count


@contextmanager
def training(model: nn.Module) -> Generator[None]:
    """Inside, the model is in training mode; one that is already stays as it is, frozen norms included."""
    flags = [(module, module.training) for module in model.modules()]
    if not model.training:
        model.train()
    try:
        yield
    finally:
        for module, was in flags:
            module.training = was
