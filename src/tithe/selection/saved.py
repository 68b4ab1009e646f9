"""Rebuild selections from their saved state."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from tithe.errors import TitheError
from tithe.selection.base import Coordinates, Selection
from tithe.selection.channels import Channels
from tithe.selection.grid import Grid


def restore(shape: tuple[int, ...], state: Mapping[str, Tensor]) -> Selection:
    """Return the selection whose `state()` this is.

    Raises:
        TitheError: when no known kind has such a state.
    """
    if set(state) == {"indices"}:
        return Coordinates(shape, state["indices"])
    if set(state) == {"channels", "layout"}:
        groups, transposed = state["layout"].tolist()
        return Channels(shape, state["channels"], groups=int(groups), transposed=bool(transposed))
    if all(key.startswith("axis ") for key in state):
        return Grid(shape, {int(key.removeprefix("axis ")): positions for key, positions in state.items()})
    raise TitheError(
        "selection",
        found=f"a state of {', '.join(sorted(state))}",
        expected="indices, channels and layout, or positions along axes",
        remedy="save it with Selection.state()",
    )
