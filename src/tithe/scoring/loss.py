"""Compute losses for scores: evaluation mode, what a loss function may return, whether it is a mean over samples."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from tithe.batch import num_samples, take_samples
from tithe.errors import TitheError, TitheWarning
from tithe.forward import asked_for_gradient

Loss = Callable[[Any, Any], Tensor]

_REENTRANT = "None of the inputs have requires_grad=True"
"""How torch's warning begins when a reentrant checkpoint cuts the graph."""
_ALIKE = 1e-4
"""Relative difference up to which two losses are the same number."""


def check_loss(value: Any, *, finite: bool = True) -> Tensor:
    """Return `value` if it is a scalar that backward can start from; with `finite`, refuse NaN and infinity.

    Raises:
        TitheError: when it is not a tensor, not a real scalar, detached, or not finite.
    """
    if not isinstance(value, Tensor):
        found, remedy = _what_it_is(value)
    elif value.dim() != 0 and value.numel() != 1:
        found, remedy = f"a tensor of shape {tuple(value.shape)}", "return its mean: .mean(), or reduction='mean'"
    elif value.is_complex():
        found, remedy = "a complex number", "return a real one, as its .abs() or .real is"
    elif not value.requires_grad:
        found = "a tensor that no gradient flows through"
        remedy = "compute it from the model's output, and return it without .detach() and outside of torch.no_grad()"
    elif finite and not bool(torch.isfinite(value.detach()).all()):
        found = f"a loss of {float(value.detach())}"
        remedy = (
            "look for samples whose labels are all ignored, of which a mean is NaN, and leave them out; or for the "
            "operation that makes it: torch.autograd.set_detect_anomaly(True)"
        )
    else:
        return value
    raise TitheError(
        "loss",
        found=found,
        expected="a finite scalar computed from the model's output with gradients enabled",
        remedy=remedy,
    )


def _what_it_is(value: Any) -> tuple[str, str]:
    """What a loss function returned that is no tensor, and what it should return instead."""
    kind = type(value).__name__
    if isinstance(value, Mapping):  # what a Hugging Face model returns is one
        if isinstance(cast("Mapping[str, Any]", value).get("loss"), Tensor):
            return f"a {kind}, which holds the loss", 'return output.loss, or output["loss"] of a plain dict'
        return f"a {kind} without a loss", "give the model labels=, or compute a loss from its output and return that"
    if isinstance(value, (tuple, list)) and value and isinstance(value[0], Tensor) and value[0].numel() == 1:
        return f"a {kind} that begins with a scalar", "return output[0]"
    if value is None:
        return "None", "end the loss function with: return loss"
    if isinstance(value, (int, float)):
        return f"a {kind}", "return the tensor itself, without .item() or float()"
    return f"a {kind}", "return the mean loss, a tensor of one number"


def is_reentrant_cut(model: nn.Module, loss: Loss, batch: Any) -> bool:
    """Whether a reentrant checkpoint runs a part of the model of which no input needs a gradient.

    Such a checkpoint gives the weights inside none, whatever they are.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loss(model, batch)
    return any(str(warning.message).startswith(_REENTRANT) for warning in caught)


def reentrant_error(name: str) -> TitheError:
    """Make the error for a weight that gets no gradient because of a reentrant checkpoint."""
    return TitheError(
        name,
        found="no gradient for it: a reentrant checkpoint runs it, and none of the checkpoint's inputs needs one",
        expected="a checkpoint that gives the weights inside their gradients",
        remedy="checkpoint(…, use_reentrant=False), or of a Hugging Face model "
        'gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})',
    )


def quiet_loss(loss: Loss, model: nn.Module, batch: Any) -> Any:
    """Return what the loss function returns, without torch's warning of a checkpoint that cuts the graph.

    Weights that get no gradient from any of the data are named instead. A loss that takes a gradient within itself has
    gradients enabled, wherever it is asked for.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=_REENTRANT)
        try:
            return loss(model, batch)
        except RuntimeError as error:
            if torch.is_grad_enabled() or not asked_for_gradient(error):
                raise
        with torch.enable_grad():
            return loss(model, batch)


def compute_loss(loss: Loss, model: nn.Module, batch: Any, whole: Any = None) -> Tensor:
    """Return the checked loss of a batch, without a gradient where none of the weights that are scored is reached.

    A part of a batch may have no loss, NaN, though the whole has one: where every label in it is ignored, as of a row
    in which nothing was masked. That comes without a gradient too.

    Args:
        loss: the loss function.
        model: its model.
        batch: the batch.
        whole: the batch that `batch` is a part of, or None where it is no part.

    Raises:
        TitheError: as `check_loss`, or when the model runs on the whole batch and not on a part of it.
    """
    try:
        value = quiet_loss(loss, model, batch)
    except (RuntimeError, ValueError, IndexError, KeyError, TypeError, AttributeError, AssertionError) as error:
        if whole is None or not _runs(loss, model, whole):
            raise
        raise TitheError(
            "data",
            found=f"a batch that runs whole, and not in parts ({type(error).__name__}: {error})",
            expected="batches of which each sample can be scored alone",
            remedy="yield batches of one sample each, as DataLoader(…, batch_size=1) does",
        ) from error
    if isinstance(value, Tensor) and value.numel() == 1 and not value.requires_grad:
        return value  # of samples that take another branch; that none of the data has a gradient is said in the end
    value = check_loss(value, finite=False)
    if whole is not None and bool(value.detach().isnan().all()) and _is_finite(loss, model, whole):
        return value.detach()  # a mean over nothing, as of a sample whose labels are all ignored: it adds no gradient
    return check_loss(value)


def check_depends(model: nn.Module, loss: Loss, batch: Any) -> None:
    """Check that a loss from which nothing that is scored got a gradient depends on some weight of the model.

    Raises:
        TitheError: as `check_loss`, when it does not.
    """
    floats = [p for p in model.parameters() if p.is_floating_point() and not p.requires_grad]
    for parameter in floats:
        parameter.requires_grad_(True)
    try:
        check_loss(loss(model, batch))
    finally:
        for parameter in floats:
            parameter.requires_grad_(False)


def _is_finite(loss: Loss, model: nn.Module, batch: Any) -> bool:
    with torch.no_grad():
        return math.isfinite(_number(quiet_loss(loss, model, batch)))


def _runs(loss: Loss, model: nn.Module, batch: Any) -> bool:
    try:
        with torch.no_grad():
            loss(model, batch)
    except Exception:  # whatever it is, the caller has one of its own to raise
        return False
    return True


def all_zero_error(model: nn.Module, name: str, or_else: str) -> TitheError:
    """Make the error for scores of which none is above zero, which would be picked by their order alone.

    Args:
        model: its first weight that holds nothing but zeros is named: no gradient passes through it.
        name: of the first weight that was scored.
        or_else: what could be done without these scores, as the remedy ends.
    """
    named = model.named_parameters()
    zero = next((n for n, p in named if p.dim() > 1 and p.numel() and not p.is_meta and not bool(p.any())), None)
    why = "" if zero is None else f", and {zero} holds nothing but zeros, through which no gradient passes"
    return TitheError(
        name,
        found=f"scores that are all zero, of this weight and of every other{why}",
        expected="gradients to choose by",
        remedy=f"give {zero or 'the layers above'} small random values, as nn.init.normal_(…, std=0.02){or_else}",
    )


def is_sum(one: float, other: float, both: float) -> bool:
    """Whether the loss of two samples is the sum of their losses and not the mean."""
    total = one + other
    near = _ALIKE * max(abs(one), abs(other))
    return abs(both - total / 2) > near and abs(both - total) <= near


def adds_up(model: nn.Module, loss: Loss, batches: list[Any]) -> bool:
    """Whether a loss adds up over samples instead of averaging, which is said once; by two samples of the data.

    Warns:
        TitheWarning: where it does.
    """
    batch = max(batches, key=num_samples)
    if num_samples(batch) < 2:
        return False
    with torch.no_grad():
        one, other, both = (_number(quiet_loss(loss, model, take_samples(batch, at))) for at in ([0], [1], [0, 1]))
    summed = is_sum(one, other, both)
    if summed:
        say_sum()
    return summed


def _number(value: Any) -> float:
    """The loss as a number; NaN for what is none, which `check_loss` refuses where a gradient is asked for."""
    known = isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex()
    return float(value.detach()) if known else float("nan")


def say_sum() -> None:
    """Warn that a loss is a sum over the samples of a batch."""
    warnings.warn(
        "loss: a sum over the samples of a batch; scores are taken as of their mean. Return the mean "
        "(reduction='mean'), so that gradients do not grow with the batch.",
        TitheWarning,
        stacklevel=2,
    )


@contextmanager
def evaluation(model: nn.Module) -> Generator[None]:
    """Evaluation mode, gradients enabled for what is scored alone; every flag as it was afterwards."""
    training = [module for module in model.modules() if module.training]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        for module in training:
            module.training = True
