"""What `attach` asks of a method under which weights move in the span of their checkpoints."""

from __future__ import annotations

from abc import ABC
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from tithe.averages.history import History

Granularity = Literal["model", "tensor"]
Start = Literal["mean", "last", "best"]


class Spanning(ABC):
    """A history, and how weights move in it."""

    history: History | str | Path | Sequence[str | Path]
    """The checkpoints, or where they are."""
    bits: int | None
    """Of the basis; None takes the history's."""
    granularity: Granularity
    """Whether coefficients are shared by all weights, or each weight has its own."""
    start: Start
    """Which point of the span training starts from."""
