"""A plan's state as plain tensors and numbers: checked before anything is changed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from tithe.errors import TitheError
from tithe.selection import Selection, restore

Selections = dict[str, Selection]

_FORMAT = 5


@dataclass(frozen=True)
class PlanState:
    """The contents of `plan.state_dict()`, checked.

    Args:
        num_steps: finished steps.
        num_epochs: finished epochs.
        seed: of the plan.
        chosen: whether the first choice was made.
        capacity: values that the flat θ holds; 0 for a plan that chooses once.
        selected: name → state of the selection made now.
        moved: name → state of everything ever selected.
        values: name → the weight's values at `moved`.
        masters: name → θ of what is selected now, where it holds more than the weight does.
        head: name → head parameter.
        buffers: name → buffer that changed in training.
        memory: what the method remembers from one choice to the next.
        max_positions: int64, for each tensor the values of an input channel that were priced, or -1; None for any.
    """

    num_steps: int
    num_epochs: int
    seed: int
    chosen: bool
    capacity: int
    selected: dict[str, dict[str, Tensor]]
    moved: dict[str, dict[str, Tensor]]
    values: dict[str, Tensor]
    masters: dict[str, Tensor]
    head: dict[str, Tensor]
    buffers: dict[str, Tensor]
    memory: dict[str, Tensor]
    max_positions: Tensor | None

    def as_dict(self) -> dict[str, Any]:
        """Return a plain dict with the format's version."""
        return {"format": _FORMAT, **{field.name: getattr(self, field.name) for field in fields(self)}}

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> PlanState:
        """Read a plain dict, and check it.

        Raises:
            TitheError: when keys are missing or the version is another.
        """
        missing = [field.name for field in fields(cls) if field.name not in state]
        if missing or state.get("format") != _FORMAT:
            raise TitheError(
                "plan state",
                found=f"format {state.get('format')!r}" + (f" without {', '.join(missing)}" if missing else ""),
                expected=f"what plan.state_dict() of format {_FORMAT} returns",
                remedy="save it with plan.state_dict() of this version",
            )
        return cls(**{field.name: state[field.name] for field in fields(cls)})

    def read(self, moved: Mapping[str, Selection], head: Mapping[str, Tensor]) -> tuple[Selections, Selections]:
        """Return what is selected and what ever was, after comparing with a plan.

        The same tensors, and no trained weight that this state does not set.

        Args:
            moved: name → what was ever selected in the plan.
            head: its head parameters.

        Raises:
            TitheError: naming the first difference.
        """
        for what, here, there in (("where", moved, self.selected), ("head", head, self.head)):
            if set(here) != set(there):
                differ = sorted(set(here) ^ set(there))
                raise TitheError(
                    differ[0],
                    found=f"{len(differ)} names on one side only",
                    expected=f"a state saved with the same model and {what}=",
                    remedy=f"attach with the {what}= of the saved plan",
                )
        for name, parameter in head.items():
            if parameter.shape != self.head[name].shape:
                raise _shape_error(name, tuple(self.head[name].shape), tuple(parameter.shape))
        selected: Selections = {}
        ever: Selections = {}
        for name, selection in moved.items():
            try:
                selected[name] = restore(selection.shape, self.selected[name])
                ever[name] = restore(selection.shape, self.moved[name])
            except TitheError as error:
                raise _shape_error(name, tuple(self.values[name].shape), selection.shape) from error
            if ever[name].theta_shape != tuple(self.values[name].shape):
                raise _shape_error(name, tuple(self.values[name].shape), ever[name].theta_shape)
            if selection.size and ever[name].union(selection).size != ever[name].size:
                raise TitheError(
                    name,
                    found="weights already trained here that the state does not set",
                    expected="a freshly loaded base, or the plan that the state was saved from",
                    remedy="load the base model again, attach, and load the state then",
                )
        return selected, ever


def _shape_error(name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> TitheError:
    return TitheError(
        name,
        found=f"a saved tensor that needs shape {found}",
        expected=f"shape {expected}",
        remedy="load the model that the state was saved with",
    )


class Buffers:
    """The persistent buffers (running statistics) that changed since a plan was attached.

    Args:
        model: read now for the comparison.
    """

    def __init__(self, model: nn.Module) -> None:
        self._before = {name: _digest(buffer) for name, buffer in _persistent(model).items()}

    def changed(self, model: nn.Module) -> dict[str, Tensor]:
        """Return copies of the buffers whose bytes changed."""
        return {
            name: buffer.detach().clone()
            for name, buffer in _persistent(model).items()
            if self._before.get(name) != _digest(buffer)
        }

    def write(self, model: nn.Module, values: Mapping[str, Tensor]) -> None:
        """Write saved buffers in place.

        Raises:
            TitheError: when the model has no such buffer.
        """
        buffers = _persistent(model)
        for name, value in values.items():
            if name not in buffers or buffers[name].shape != value.shape:
                raise TitheError(
                    name, found="no buffer of that shape", expected=f"shape {tuple(value.shape)}", remedy="same model"
                )
            buffers[name].copy_(value)


def _persistent(model: nn.Module) -> dict[str, Tensor]:
    keys = model.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in model.named_buffers() if name in keys}


def _digest(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    data = flat.view(torch.uint8) if flat.numel() else flat.new_empty(0, dtype=torch.uint8)
    return hashlib.blake2b(data.numpy().data, digest_size=16).digest()
