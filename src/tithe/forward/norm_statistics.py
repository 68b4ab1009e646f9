"""Estimate the running statistics of norms again, as means over data, whatever the momentum of training."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase  # pyright: ignore[reportPrivateUsage]

from tithe.errors import TitheError
from tithe.forward.gradients import asked_for_gradient
from tithe.forward.modes import training
from tithe.forward.untouched import untouched


def tracked(model: nn.Module) -> list[_NormBase]:
    """Return the norms whose running statistics follow training: those in training mode."""
    return [m for m in model.modules() if isinstance(m, _NormBase) and m.track_running_stats and m.training]


def estimate_statistics(
    model: nn.Module,
    run: Callable[[nn.Module, Any], Any],
    batches: Iterable[Any],
    *,
    also: Iterable[nn.Parameter] = (),
) -> int:
    """Set every norm's running statistics to their mean over batches of training data.

    Norms that run in evaluation mode while the model trains keep theirs. Random states and all other buffers stay as
    they were.

    Args:
        model: in either mode; it is left as it was.
        run: one forward pass on a batch.
        batches: of training data.
        also: parameters that a forward pass of this model writes; they stay as they were.

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
        count = 0
        try:
            with untouched(model, but=norms, also=also):
                for norm in norms:
                    norm.reset_running_stats()
                    norm.momentum = None  # the mean over all batches
                for batch in itertools.chain([first], batches):
                    try:
                        run(model, batch)
                    except RuntimeError as error:
                        if count or not asked_for_gradient(error):
                            raise
                        torch.set_grad_enabled(True)
                        for norm in norms:
                            norm.reset_running_stats()
                        run(model, batch)
                    count += 1
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
    return count
