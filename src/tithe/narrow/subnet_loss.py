"""Try narrow networks on data and measure their loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tithe.batch import num_samples
from tithe.errors import TitheError
from tithe.forward import RandomStates, asked_for_gradient, evaluating, training, untouched
from tithe.narrow.stage import Fit, Stage

Loss = Callable[[Any, Any], Tensor]


def loss_without_gradient(stage: Stage, mask: Tensor, closure: Callable[[], Any], *, twice: bool) -> float:
    """Return the loss of a narrow network; random states and buffers stay as they were.

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
    for _ in range(1 + twice):
        with torch.no_grad(), stage.untouched(), stage.run(fit.read, stage.filled(fit)):
            found.append(check_scalar(_value(closure, states)))
    if not math.isclose(found[0], found[-1], rel_tol=1e-4, abs_tol=1e-7) and math.isfinite(sum(found)):
        raise TitheError(
            "loss",
            found=f"{found[0]:g} and then {found[-1]:g} from two identical forward passes",
            expected="the same loss from the same weights, batch and random state",
            remedy="draw the batch and its augmentation before the closure, and keep no state between forwards",
        )
    return found[0]


@contextmanager
def run_frozen(stage: Stage, fit: Fit, *, but: Collection[nn.Module] = ()) -> Generator[None]:
    """Run the model as a narrow network whose weights are not trained inside the block: buffers stay as they were.

    Random draws go on, as in any forward pass.

    Args:
        stage: of the model.
        fit: what exists.
        but: modules that are trained all the same, whose buffers may change.
    """
    states: RandomStates | None = None
    try:
        with untouched(stage.model, but=but, also=stage.written), stage.run(fit.read, stage.filled(fit)):
            yield
            states = RandomStates()
    finally:
        if states is not None:
            states.restore()


def _value(closure: Callable[[], Any], states: RandomStates) -> Any:
    """The loss, with gradients enabled only where it takes one within itself, as a penalty on it does."""
    try:
        return closure()
    except RuntimeError as error:
        if not asked_for_gradient(error):
            raise
    states.restore()
    with torch.enable_grad():
        return closure()


def check_scalar(loss: Any) -> float:
    """Return a loss as a number.

    Raises:
        TitheError: when it is no scalar tensor.
    """
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

    Random states and buffers stay as they were; each network sees the same random draws. A loss that is not finite is
    infinite.

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
    count = sum(_counts(batches))
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
    grids, total = stage.grids(mask), 0.0
    with torch.no_grad(), training(stage.model), stage.untouched(), stage.run(grids, stage.live(grids)):
        for batch, count in zip(batches, _counts(batches), strict=True):
            total += float(loss(stage.model, batch)) * count
    return total


def _counts(batches: Sequence[Any]) -> list[int]:
    """The samples of each batch; batches that do not tell how many they hold count alike."""
    try:
        return [num_samples(batch) for batch in batches]
    except TitheError:
        return [1 for _ in batches]


def check_same_loss(one: nn.Module, other: nn.Module, loss: Loss, example: Any) -> None:
    """Compare two networks on a batch, in evaluation mode.

    Raises:
        TitheError: when their losses differ by more than rounding.
    """
    found: list[float] = []
    for model in (one, other):
        with torch.no_grad(), evaluating(model), untouched(model):
            found.append(float(loss(model, example)))
    if not math.isclose(*found, rel_tol=1e-3, abs_tol=1e-5):
        raise TitheError(
            "export",
            found=f"a loss of {found[1]:g} on the example",
            expected=f"{found[0]:g}, as of the attached model",
            remedy='leave the layers that count widths themselves whole with where="!name.*", and attach again',
        )
