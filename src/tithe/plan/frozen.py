"""The loss of a narrow network whose weights have no gradient, as they have none while the structure is learned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tithe.narrow import Stage, check_scalar, run_frozen
from tithe.narrow.stage import Fit
from tithe.scoring import Loss, check_loss


def loss_of_frozen(stage: Stage, fit: Fit, closure: Callable[[], Tensor], head: Sequence[nn.Parameter]) -> Tensor:
    """Return the loss of a network, with a gradient for the head alone; what is frozen keeps its statistics.

    Args:
        stage: of the model.
        fit: the network.
        closure: forward, returning the loss.
        head: parameters that are trained all the same; without one nothing is differentiated.

    Raises:
        TitheError: when the loss is no scalar, or no gradient flows through it to the head.
    """
    trained = {id(parameter) for parameter in head}
    own = [m for m in stage.model.modules() if any(id(p) in trained for p in m.parameters(recurse=False))]
    with run_frozen(stage, fit, but=own):
        if not trained:
            with torch.no_grad():
                loss = closure()
            check_scalar(loss)
            return loss
        loss = check_loss(closure(), finite=False)
        loss.backward()
    return loss


def loss_without_trace(stage: Stage, fit: Fit, loss: Loss, batch: Any) -> Tensor:
    """Return the loss of a network on a batch without a gradient; the model stays as it was."""
    with torch.no_grad(), stage.untouched(), stage.run(fit.read, stage.filled(fit)):
        return loss(stage.model, batch)
