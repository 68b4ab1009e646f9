"""Which tensors of a history are which of a model's, and what each of them does."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tithe import delta
from tithe.averages import History, check_weights
from tithe.delta.source import prefix_hint
from tithe.errors import TitheError
from tithe.plan.parameters import Split


@dataclass(frozen=True)
class Places:
    """The tensors of a model that a history has, and how the two are matched.

    Args:
        rows: the history; of deltas, on the model as their base.
        moving: name of a parameter that moves in the span → its name in the history.
        places: that parameter → the flat places of the history's columns in it, or None for all.
        rest: name in the history → another tensor of the model, which takes its start value: frozen weights, the head,
            running statistics, counters.
    """

    rows: History
    moving: dict[str, str]
    places: dict[str, Tensor | None]
    rest: dict[str, Tensor]

    def start(self, name: str, weights: Sequence[float]) -> Tensor:
        """Return the start value of a tensor of the rest; a counter is that of the last checkpoint that counts."""
        return self.rows.average_tensor(name, weights)


def find_places(history: History, model: nn.Module, split: Split) -> Places:
    """Compare a history with a model, and match their tensors.

    Raises:
        TitheError: when the history is empty, lacks a parameter that is to move, or has it in another shape.
    """
    state = delta.state_tensors(model)
    history = history.on(state)
    forms, inside = history.rows.forms, history.rows.places
    spelled: dict[str, list[str]] = {}
    for name, origin in split.alias.items():
        spelled.setdefault(origin, []).append(name)
    moving: dict[str, str] = {}
    lacking: list[str] = []
    for name, parameter in split.candidates.items():
        there = next((other for other in spelled[name] if other in forms), None)
        if there is None:
            lacking.append(name)
            continue
        moving[name] = there
        expected = (inside[there].numel(),) if there in inside else tuple(parameter.shape)
        if forms[there].shape != expected:
            raise TitheError(
                name,
                found=f"shape {list(forms[there].shape)} in the history",
                expected=f"{list(expected)}, as in the model",
                remedy="build the model that the checkpoints are of",
            )
    if not moving or (lacking and not history.partial):
        raise TitheError(
            (lacking or ["history"])[0],
            found=f"no such tensor in {history.rows.paths[0]}{prefix_hint(lacking, forms)}",
            expected=f"checkpoints of this model, as for {len(lacking)} of its parameters",
            remedy="load the model that the checkpoints are of, or leave the parameter out with where= or head=",
        )
    taken = {other for name in moving for other in spelled[name]}
    rest = {
        name: tensor for name, tensor in state.items() if name in forms and name not in taken and name not in inside
    }
    _check_shapes(rest.items(), history)
    _check_constant([name for name in rest if name in split.left_out], history)
    return Places(history, moving, {name: inside.get(there) for name, there in moving.items()}, rest)


def _check_shapes(tensors: Iterable[tuple[str, Tensor]], history: History) -> None:
    for name, tensor in tensors:
        found = history.rows.forms[name].shape
        if found != tuple(tensor.shape):
            raise TitheError(
                name,
                found=f"shape {list(found)} in the history",
                expected=f"{list(tensor.shape)}, as in the model",
                remedy="build the model that the checkpoints are of",
            )


def _check_constant(names: Iterable[str], history: History) -> None:
    """Check that checkpoints agree in what has no average here: complex numbers, codes of other weights."""
    for name in names:
        first, *others = (history.rows.tensor(index, name) for index in range(len(history)))
        if not all(_same_bits(first, other) for other in others):
            raise TitheError(
                name,
                found=f"{first.dtype} that differs between the checkpoints",
                expected="weights of float16, bfloat16, float32 or float64, which alone have an average here",
                remedy="store the checkpoints with the weights converted, complex ones by torch.view_as_real",
            )


def start_weights(history: History, start: str | Sequence[float]) -> list[float]:
    """Return the weight of each checkpoint in the start.

    Raises:
        TitheError: when the best is asked for and none has a score, or the history is not what the start is made of.
    """
    n = len(history)
    if not isinstance(start, str):
        return check_weights(start, n)
    if start == "mean":
        return [1 / n] * n
    if start not in ("last", "best"):
        return history.weights(start)
    at = n - 1
    if start == "best":
        scores = [float("-inf") if score is None else score for score in history.scores]
        at = max(range(n), key=scores.__getitem__)
        if history.scores[at] is None:
            raise TitheError(
                "start",
                found="start='best' and no score",
                expected="scores told as history.record(model, step, score=…)",
                remedy="start from the mean, or from the last",
            )
    return [float(index == at) for index in range(n)]


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two dense tensors have the same dtype, shape and bits."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (one, other)))
