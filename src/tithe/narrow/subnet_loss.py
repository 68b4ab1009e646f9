"""Try narrow networks on data and measure their loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tithe.batch import num_samples
from tithe.errors import TitheError
from tithe.forward import RandomStates, evaluating, training
from tithe.narrow.stage import Stage

Loss = Callable[[Any, Any], Tensor]


def loss_without_gradient(stage: Stage, mask: Tensor, closure: Callable[[], Any], *, twice: bool) -> float:
    """Return the loss of a narrow network; random states and running statistics stay as they were.

    Args:
        stage: of the model.
        mask: bool (n,), the units that exist.
        closure: forward, returning the loss.
        twice: run it again, to see that the loss is the same.

    Raises:
        TitheError: when it is not, or is no scalar.
    """
    fit, found = stage.fit(mask), list[float]()
    states = RandomStates()
    with torch.no_grad():
        for _ in range(1 + twice):
            with stage.run(fit.read, stage.filled(fit), spare=True):
                found.append(_number(closure()))
            states.restore()
    if not math.isclose(found[0], found[-1], rel_tol=1e-4, abs_tol=1e-7) and math.isfinite(sum(found)):
        raise TitheError(
            "loss",
            found=f"{found[0]:g} and then {found[-1]:g} from two identical forward passes",
            expected="the same loss from the same weights, batch and random state",
            remedy="draw the batch and its augmentation before the closure, and keep no state between forwards",
        )
    return found[0]


def _number(loss: Any) -> float:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise TitheError(
            "loss",
            found=f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}",
            expected="a scalar tensor",
            remedy="return the mean loss itself: no .item(), no reduction='none'",
        )
    return float(loss)


def sum_losses(stage: Stage, masks: Sequence[Tensor], loss: Loss, batches: Sequence[Any]) -> Tensor:
    """Return the training loss of several narrow networks, summed over samples, and then the number of samples.

    Random states and running statistics stay as they were; each network sees the same random draws. A loss that is not
    finite is infinite.

    Args:
        stage: of the model.
        masks: the networks, bool (n,): the units that exist.
        loss: `loss(model, batch)`, the mean over the samples of the batch.
        batches: of training data.

    Returns:
        (networks + 1,), float64 on the device of the model; such sums can be added up.
    """
    losses = [_loss_of(stage, mask, loss, batches) for mask in masks]
    found = [value if math.isfinite(value) else math.inf for value in losses]
    count = sum(map(num_samples, batches))
    return torch.tensor([*found, count], dtype=torch.float64, device=next(stage.model.parameters()).device)


def pick_best(totals: Tensor) -> tuple[float, int]:
    """Return the lowest mean loss, and the number of the network that has it; the first of equals.

    Args:
        totals: as `sum_losses` returns them.

    Raises:
        TitheError: when there was no batch.
    """
    *losses, count = totals.tolist()
    if not count:
        raise TitheError("settle", found="no batch", expected="held-out training data", remedy="pass batches")
    best = min(range(len(losses)), key=losses.__getitem__)
    return losses[best] / count, best


def _loss_of(stage: Stage, mask: Tensor, loss: Loss, batches: Sequence[Any]) -> float:
    grids, states, total = stage.grids(mask), RandomStates(), 0.0
    with torch.no_grad(), training(stage.model), stage.run(grids, stage.live(grids), spare=True):
        for batch in batches:
            total += float(loss(stage.model, batch)) * num_samples(batch)
    states.restore()
    return total


def check_same_loss(one: nn.Module, other: nn.Module, loss: Loss, example: Any) -> None:
    """Compare two networks on a batch, in evaluation mode.

    Raises:
        TitheError: when their losses differ by more than rounding.
    """
    found: list[float] = []
    for model in (one, other):
        with torch.no_grad(), evaluating(model):
            found.append(float(loss(model, example)))
    if not math.isclose(*found, rel_tol=1e-3, abs_tol=1e-5):
        raise TitheError(
            "export",
            found=f"a loss of {found[1]:g} on the example",
            expected=f"{found[0]:g}, as of the attached model",
            remedy='leave the layers that count widths themselves whole with where="!name.*", and attach again',
        )
