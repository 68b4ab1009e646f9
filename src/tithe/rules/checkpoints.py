"""Weights that activation checkpointing hands to a function again when backward computes it again.

An argument of the function is saved as any tensor is, and where hooks look at what is saved (`tithe.measure`, another
checkpoint around), what comes back has the memory of a carrier and is none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.checkpoint import _CheckpointFrame

# pyright: reportPrivateUsage=false

_top_hooks = cast(Any, torch._C)._autograd._top_saved_tensors_default_hooks


def current_frame() -> Any | None:
    """What torch notes about the checkpointed function that runs now, found in the hook that packs saved tensors."""
    hooks = _top_hooks(False)
    for cell in getattr(hooks[0], "__closure__", None) or () if hooks else ():
        if isinstance(cell.cell_contents, _CheckpointFrame):
            return cell.cell_contents
    return None


def hand_over(carrier: Tensor) -> None:
    """See that the checkpointed function that runs now is given this carrier again, if it was before."""
    frame = current_frame()
    if frame is None:
        return
    carriers: list[Tensor] = vars(frame).setdefault("carriers", [])
    if not carriers:
        frame.recompute_fn = _WithCarriers(frame.recompute_fn, carriers)
    if all(other is not carrier for other in carriers):
        carriers.append(carrier)


class _WithCarriers:
    """A checkpointed function that is given carriers again in place of tensors over their memory."""

    def __init__(self, run: Callable[..., Any], carriers: Sequence[Tensor]) -> None:
        self.run, self.carriers = run, carriers

    def __call__(self, *args: Any) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            args = tuple(self._again(arg) if type(arg) in (Tensor, FakeTensor) and arg.is_leaf else arg for arg in args)
        return self.run(*args)

    def _again(self, arg: Tensor) -> Tensor:
        return next((carrier for carrier in self.carriers if _stands_for(arg, carrier)), arg)


def _stands_for(arg: Tensor, carrier: Tensor) -> bool:
    """Whether it has the carrier's memory; in a run on shapes alone it has none, and its shape has to do."""
    if isinstance(arg, FakeTensor):
        return arg.requires_grad and (arg.shape, arg.dtype) == (carrier.shape, carrier.dtype)
    return arg.is_set_to(carrier)
