"""Select values that may move: injective linear maps from a small vector θ into a weight tensor.

    w = b + S θ            ∇θ = Sᵀ ∇w

A selection knows shapes and indices. It never sees a module, an optimizer or a rank.
"""

from tithe.selection.base import Coordinates, Selection, carried
from tithe.selection.channels import Channels
from tithe.selection.grid import Grid
from tithe.selection.saved import restore
from tithe.selection.subspace import Columns, Span, without_values

__all__ = ["Channels", "Columns", "Coordinates", "Grid", "Selection", "Span", "carried", "restore", "without_values"]
