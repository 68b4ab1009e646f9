"""Make a stage from a model: find which channels belong together, and check that the model works without some."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from tithe.batch import num_samples, slice_batch
from tithe.coupling import Coupling, Unfollowed, couple
from tithe.errors import TitheError
from tithe.forward import asked_for_gradient, untouched, watch_call, written_weights
from tithe.narrow.remedy import with_remedy
from tithe.narrow.stage import Stage
from tithe.narrow.subnet_loss import check_scalar
from tithe.narrow.trial import Unfit, try_narrow
from tithe.narrow.widths import OUTSIDE, Count, find_counts, other_counts

Loss = Callable[[Any, Any], Any]
_SAMPLES = 2
"""Batch norms refuse a single one."""


def make_stage(
    model: nn.Module, loss: Loss, batch: Any, names: Sequence[str], *, where: str | Sequence[str] = "*"
) -> tuple[Stage, Any]:
    """Run the model on two samples to find which channels belong together, and check that it works without some.

    Args:
        model: the model.
        loss: `loss(model, batch)`.
        batch: one of the data, or None when there was none.
        names: of the parameters of which a part may be absent.
        where: the globs that chose them, for what is told.

    Returns:
        The stage, and the inputs of the model's forward pass on those samples as `tithe.forward.watch_call` tells them.

    Raises:
        TitheError: when there is no batch, the loss does not run on it, nothing can be absent, or the model cannot run
            narrow. It names what to leave whole, where that was found to help.
    """
    if batch is None:
        raise TitheError("attach", found="no batch in data=", expected="at least one", remedy="pass batches")
    written = written_weights(model, lambda: loss(model, batch))
    few, samples, inputs = _few(model, loss, batch, written)
    spelled: dict[str, list[str]] = {}
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        spelled.setdefault(first[id(parameter)], []).append(name)

    def attempt(globs: Sequence[str], of: Sequence[str] = names) -> Stage:
        left = [n for n in of if not any(fnmatchcase(other, glob) for other in spelled[n] for glob in globs)]
        try:
            coupling = couple(model, lambda: loss(model, few), left, samples, also=written)
        except (TitheError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            if isinstance(error, RuntimeError) and asked_for_gradient(error):
                raise _takes_gradient() from error
            raise Unfollowed(
                type(model).__name__,
                found=f"a forward pass that fails while its operators are watched ({type(error).__name__}: {error})",
                expected="one that runs inside a TorchDispatchMode",
                remedy="use torch's own operators",
            ) from error
        if not coupling.groups:
            raise _Nothing(model, coupling)
        return _fitting(model, coupling, written, lambda: loss(model, few))

    try:
        return attempt(()), inputs
    except (Unfollowed, Unfit) as refusal:
        left = {name: spelled[name] for name in names}
        raise with_remedy(refusal, attempt, left, [where] if isinstance(where, str) else where) from refusal
    except _Nothing as nothing:
        every = [n for n, p in model.named_parameters() if p.is_floating_point() and p.requires_grad]
        if len(every) == len(names):
            raise
        try:
            attempt((), every)
        except TitheError:
            raise nothing from None
        raise nothing.with_remedy('pass where="*" and no head=, with which it was seen to run narrow') from None


def _takes_gradient() -> TitheError:
    return TitheError(
        "loss",
        found="a gradient taken within the loss that attach is given",
        expected="a loss of the model's output, by which channels that belong together are found",
        remedy="pass attach the loss without that term, and plan.backward a closure with it",
    )


class _Nothing(TitheError):
    """A model in which nothing can be absent, for the reasons that the coupling tells."""

    def __init__(self, model: nn.Module, coupling: Coupling) -> None:
        kept = [f"{path}: {reason}" for path, reason in coupling.whole.items()]
        summed = any("outside of any module" in reason for reason in coupling.whole.values())
        super().__init__(
            type(model).__name__,
            found="nothing that could be absent" + (f" ({'; '.join(kept[:3])})" if kept else ""),
            expected="channels, hidden units or heads between two layers",
            remedy="leave sums over whole weights out of the loss (the optimizer's weight_decay stands for a penalty)"
            if summed
            else "train it by a method that leaves every channel in place: this model has none that it can do without",
        )

    def with_remedy(self, remedy: str) -> TitheError:
        """Return the same, with something that was found to help."""
        return TitheError(self.place, found=self.found, expected=self.expected, remedy=remedy)


def _few(model: nn.Module, loss: Loss, batch: Any, written: Sequence[nn.Parameter]) -> tuple[Any, int, Any]:
    """A batch that is as small as the loss allows, how many samples it counts, and the model's inputs on it.

    Where samples are not counted by the first dimension of each tensor (images of several sizes in a list), a part of
    the batch is something else than fewer samples, and the loss of it fails: then it is the batch as it is.

    Raises:
        TitheError: when the loss fails on the batch too, or is no scalar.
    """
    inputs: list[Any] = []

    def failure_on(part: Any) -> Exception | None:
        try:
            with torch.no_grad(), untouched(model, also=written):
                inputs.append(watch_call(model, lambda: check_scalar(loss(model, part))))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            return error
        return None

    try:
        few, samples = slice_batch(batch, 0, _SAMPLES), num_samples(batch)
        if failure_on(few) is None:
            return few, min(samples, _SAMPLES), inputs[0]
    except TitheError:
        samples = 1
    failure = failure_on(batch)
    if failure is None:
        return batch, samples, inputs[0]
    if isinstance(failure, TitheError):
        raise failure
    if isinstance(failure, RuntimeError) and asked_for_gradient(failure):
        raise _takes_gradient() from failure
    raise TitheError(
        "loss",
        found=f"a forward pass that fails on the first batch of data= ({type(failure).__name__}: {failure})",
        expected="a loss that runs on a batch, under torch.no_grad() too",
        remedy="call loss(model, batch) under torch.no_grad() before attaching: it is to return the loss there",
    ) from failure


def _fitting(model: nn.Module, coupling: Coupling, written: Sequence[nn.Parameter], run: Callable[[], Any]) -> Stage:
    """A stage that works, with the numbers of its modules by name or, where these do not do, by what works."""
    stage = Stage(model, coupling, written=written)
    try:
        try_narrow(stage, run)
    except Unfit as refusal:
        for counts in _other_counts(model, coupling):
            other = Stage(model, coupling, counts, written)
            try:
                try_narrow(other, run)
            except Unfit:
                continue
            return other
        raise refusal
    return stage


def _other_counts(model: nn.Module, coupling: Coupling) -> Iterator[list[Count]]:
    """Numbers that may follow a width besides those that are known by name, or some of those that may not."""
    known = find_counts(model, coupling)
    others = other_counts(model, coupling, known)
    attributes = list(dict.fromkeys(count.attribute for count in others))
    if others:
        yield [*known, *others]
    if len(attributes) > 1:
        for attribute in attributes:
            yield [*known, *(count for count in others if count.attribute == attribute)]
    for attribute in dict.fromkeys(count.attribute for count in known if count.attribute in OUTSIDE):
        yield [count for count in known if count.attribute != attribute]
