"""Make a stage from a model: find which channels belong together, and check that the model works without some.

The check runs once, before training, and compares with the same network with zeros for the absent channels:

    a channel whose weights, scale and shift are all zero, into it and out of it, emits nothing that is read
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from tithe.batch import num_samples, slice_batch
from tithe.coupling import couple
from tithe.errors import TitheError
from tithe.forward import RandomStates, asked_for_gradient, evaluating
from tithe.narrow.stage import Stage

_SAMPLES = 2
"""Batch norms refuse a single one."""
_REMEDY = 'keep that module whole with where="!{}.*", or let its forward take sizes from its inputs and attributes'


def make_stage(model: nn.Module, loss: Callable[[Any, Any], Any], batch: Any, names: Sequence[str]) -> Stage:
    """Run the model on two samples to find which channels belong together, and check that it works without some.

    Args:
        model: the model.
        loss: `loss(model, batch)`.
        batch: one of the data, or None when there was none.
        names: of the parameters of which a part may be absent.

    Raises:
        TitheError: when there is no batch, nothing can be absent, or the model cannot run narrow.
    """
    if batch is None:
        raise TitheError("attach", found="no batch in data=", expected="at least one", remedy="pass batches")
    few = slice_batch(batch, 0, _SAMPLES)
    stage = Stage(model, couple(model, lambda: _forward_alone(lambda: loss(model, few)), names, num_samples(few)))
    if not stage.coupling.groups:
        kept = [f"{path}: {reason}" for path, reason in stage.coupling.whole.items()]
        raise TitheError(
            type(model).__name__,
            found="nothing that could be absent" + (f" ({'; '.join(kept[:3])})" if kept else ""),
            expected="channels, hidden units or heads between two layers",
            remedy="widen where=",
        )
    _check_runs_narrow(stage, lambda: loss(model, few))
    return stage


def _forward_alone(run: Callable[[], Any]) -> Any:
    """Run a loss without gradients; one that takes a gradient within itself is told what to do."""
    try:
        return run()
    except RuntimeError as error:
        if not asked_for_gradient(error):
            raise
        raise TitheError(
            "loss",
            found="a gradient taken within the loss that attach is given",
            expected="a loss of the model's output, by which channels that belong together are found",
            remedy="pass attach the loss without that term, and plan.backward a closure with it",
        ) from error


def _check_runs_narrow(stage: Stage, run: Callable[[], Any]) -> None:
    """Compare the loss of a narrow network with that of the whole one in which what is absent is zero.

    Args:
        stage: of the model; every second unit of each group is left out.
        run: one forward pass and its loss on a small batch.

    Raises:
        TitheError: naming the module that cannot run narrow, or the two losses.
    """
    mask = torch.ones(stage.coupling.num_units, dtype=torch.bool)
    for group in stage.coupling.groups:
        mask[group.start + 1 : group.stop : 2] = False
    grids, states = stage.grids(mask), RandomStates()
    with torch.no_grad(), evaluating(stage.model), _running(stage.model) as path:
        live = stage.live(grids)
        try:
            with stage.run(grids, live, spare=True):
                narrow = float(run())
        except RuntimeError as error:
            place = path[-1] if path else "the loss function"
            raise TitheError(
                place,
                found=f"a forward pass that needs its full width ({str(error).splitlines()[0]})",
                expected="one that runs at other widths",
                remedy=_REMEDY.format(place),
            ) from error
        finally:
            states.restore()
        zeroed = {name: torch.zeros_like(tensor) for name, tensor in stage.tensors.items()}
        for name, grid in grids.items():
            grid.scatter_(zeroed[name], live[name])
        with stage.run({}, zeroed, spare=True):
            whole = float(run())
        states.restore()
    tolerance = max(1e-4, 20 * max(torch.finfo(t.dtype).eps for t in live.values()) if live else 0.0)
    if (
        math.isfinite(narrow)
        and math.isfinite(whole)
        and not math.isclose(narrow, whole, rel_tol=tolerance, abs_tol=tolerance)
    ):
        raise TitheError(
            type(stage.model).__name__,
            found=f"a loss of {narrow:g} with every second unit left out",
            expected=f"{whole:g}, as with zeros in their place",
            remedy=_REMEDY.format("name") + "; groups: " + ", ".join(group.name for group in stage.coupling.groups[:3]),
        )


@contextmanager
def _running(model: nn.Module) -> Generator[list[str]]:
    """The paths of the modules that run now, outermost first."""
    paths = {module: path or type(model).__name__ for path, module in model.named_modules()}
    running: list[str] = []
    handles: list[Any] = []

    def enter(module: nn.Module, args: Any) -> None:
        running.append(paths[module])

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        running.pop()  # not called when the forward fails, so that the place of the failure stays

    for module in model.modules():
        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        yield running
    finally:
        for handle in handles:
            handle.remove()
