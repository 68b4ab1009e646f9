"""Try whether a model runs without some of its units, and gives then what it gives with zeros in their place.

a channel whose weights, scale and shift are all zero, into it and out of it, emits nothing that is read
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from tithe.batch import leaves
from tithe.coupling import Group
from tithe.errors import TitheError
from tithe.forward import evaluating, training
from tithe.narrow.stage import Stage

Run = Callable[[], Any]
_ALONE = 100
"""Groups up to which each is tried alone, to say which one does not fit."""


class Unfit(TitheError):
    """A model that does not run, or gives something else, without some units.

    Args:
        place: as `TitheError`, like what follows.
        found: what is there.
        expected: what should be there.
        module: path of the module that failed; "" for the model itself, or where none did.
        suspects: globs over the parameters of the groups that do not fit.
    """

    def __init__(
        self, place: str, *, found: str, expected: str, module: str = "", suspects: Sequence[str] = ()
    ) -> None:
        remedy = (
            "let the forward pass take each width from the tensor at hand (x.shape, x.view(len(x), -1)) or from its"
            " layers (layer.out_features)"
        )
        super().__init__(place, found=found, expected=expected, remedy=remedy)
        self.module, self.suspects = module, tuple(suspects)


def try_narrow(stage: Stage, run: Run) -> None:
    """Compare narrow networks with the whole one in which what is absent is zero.

    Every second unit of each group is left out, then all but one. In training mode, where random draws differ, it is
    only seen whether the narrow network runs.

    Args:
        stage: of the model, which stays as it is.
        run: one forward pass and its loss on a small batch.

    Raises:
        Unfit: naming the module that cannot run narrow, or what differs.
    """
    half, one = _halves(stage, stage.coupling.groups), _firsts(stage)
    for mask, what in ((half, "every second unit"), (one, "all but one unit of each group")):
        _compare(stage, mask, run, what)
    with training(stage.model):
        narrow = _run(stage, half, run, zeros=False)
        if narrow.error is not None and _run(stage, half, run, zeros=True).error is None:
            raise _fails(stage, narrow, run, "in training mode ")


def _halves(stage: Stage, groups: Sequence[Group]) -> Tensor:
    mask = torch.ones(stage.coupling.num_units, dtype=torch.bool)
    for group in groups:
        mask[group.start + 1 : group.stop : 2] = False
    return mask


def _firsts(stage: Stage) -> Tensor:
    mask = torch.zeros(stage.coupling.num_units, dtype=torch.bool)
    mask[[group.start for group in stage.coupling.groups]] = True
    return mask


@dataclass(frozen=True, eq=False)
class _Outcome:
    """What a trial gave: the loss and every output of the model, or the error and where it came from."""

    loss: Tensor | None = None
    outputs: tuple[Tensor, ...] = ()
    error: Exception | None = None
    module: str | None = None


def _run(stage: Stage, mask: Tensor, run: Run, *, zeros: bool) -> _Outcome:
    """Run the narrow network of a mask, or the whole one with zeros in place of what is absent."""
    grids = stage.grids(mask)
    live = stage.live(grids)
    if zeros:
        whole = {name: torch.zeros_like(tensor) for name, tensor in stage.tensors.items()}
        for name, grid in grids.items():
            grid.scatter_(whole[name], live[name])
        grids, live = {}, whole
    with torch.no_grad(), stage.untouched(), _watched(stage.model) as (running, outputs), stage.run(grids, live):
        try:
            loss = run()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            return _Outcome(error=error, module=running[-1] if running else None)
        return _Outcome(loss.detach().double().flatten(), tuple(outputs))


@contextmanager
def _watched(model: nn.Module) -> Generator[tuple[list[str], list[Tensor]]]:
    """The paths of the modules that run, outermost first, and the floating-point tensors that the model returned."""
    running: list[str] = []
    outputs: list[Tensor] = []
    handles: list[Any] = []

    def entering(path: str) -> Callable[[nn.Module, Any], None]:
        return lambda module, args: running.append(path)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        running.pop()  # not called when the forward fails, so that the place of the failure stays
        if not running:
            outputs.extend(tensor.detach() for tensor in leaves(output) if tensor.is_floating_point())

    for path, module in model.named_modules():
        handles += [module.register_forward_pre_hook(entering(path)), module.register_forward_hook(leave)]
    try:
        yield running, outputs
    finally:
        for handle in handles:
            handle.remove()


def _compare(stage: Stage, mask: Tensor, run: Run, what: str) -> None:
    with evaluating(stage.model):
        narrow, whole = (_run(stage, mask, run, zeros=zeros) for zeros in (False, True))
        if narrow.error is not None:
            if whole.error is None:
                raise _fails(stage, narrow, run)
            return  # with zeros it fails too: the width is not the reason
        if _differ(stage, narrow, whole) is None:
            return
        suspects = _suspects(stage, lambda outcome, whole: _differ(stage, outcome, whole) is not None, run)
    found, expected = _differ(stage, narrow, whole) or ("", "")
    raise Unfit(
        type(stage.model).__name__,
        found=f"{found} with {what} left out",
        expected=f"{expected}, as with zeros in their place",
        suspects=suspects,
    )


def _differ(stage: Stage, narrow: _Outcome, whole: _Outcome) -> tuple[str, str] | None:
    """What the narrow network gave and what it should have given, or None if the two agree up to rounding."""
    if narrow.loss is None or whole.loss is None:
        return None if narrow.loss is whole.loss is None else ("an error", "none")
    kinds = {t.dtype for t in (*stage.tensors.values(), *narrow.outputs) if t.is_floating_point()}
    tolerance = max(1e-4, 20 * max((torch.finfo(kind).eps for kind in kinds), default=0.0))
    shapes = [[tuple(output.shape) for output in seen.outputs] for seen in (narrow, whole)]
    if shapes[0] != shapes[1]:
        return f"outputs of shapes {shapes[0][:3]}", f"{shapes[1][:3]}"
    for one, other in zip((narrow.loss, *narrow.outputs), (whole.loss, *whole.outputs), strict=True):
        if not _close(one, other, tolerance):
            if narrow.loss.numel() == 1 == whole.loss.numel() and float(narrow.loss) != float(whole.loss):
                return f"a loss of {float(narrow.loss):g}", f"{float(whole.loss):g}"
            return "other outputs", "the same outputs"
    return None


def _close(one: Tensor, other: Tensor, tolerance: float) -> bool:
    if isinstance(one, FakeTensor) or isinstance(other, FakeTensor):  # a network that is priced has shapes alone
        return True
    one, other = one.double(), other.double()
    finite = one.isfinite() & other.isfinite()
    if not torch.equal(one.isfinite(), other.isfinite()):
        return False
    one, other = one[finite], other[finite]
    if not one.numel():
        return True
    return bool((one - other).abs().max() <= tolerance * max(1.0, float(other.abs().max())))


def _fails(stage: Stage, narrow: _Outcome, run: Run, when: str = "") -> Unfit:
    error = narrow.error
    told = (str(error).splitlines() or [""])[0]
    name = "" if type(error) is RuntimeError else f"{type(error).__name__}: "
    place = "the loss function" if narrow.module is None else narrow.module or type(stage.model).__name__
    refused = Unfit(
        place,
        found=f"a forward pass that {when}needs its full width ({name}{told})",
        expected="one that runs at other widths",
        module=narrow.module or "",
        suspects=_suspects(stage, lambda outcome, whole: outcome.error is not None and whole.error is None, run),
    )
    refused.__cause__ = error
    return refused


def _suspects(stage: Stage, unfit: Callable[[_Outcome, _Outcome], bool], run: Run) -> list[str]:
    """Globs over the parameters of the groups that do not fit alone."""
    found: dict[str, None] = {}
    groups = stage.coupling.groups
    for group in groups if len(groups) <= _ALONE else ():
        mask = _halves(stage, [group])
        if unfit(_run(stage, mask, run, zeros=False), _run(stage, mask, run, zeros=True)):
            for name, _ in group.members:
                owner = name.rpartition(".")[0]
                found[f"{owner}.*" if owner else name] = None
    return list(found)
