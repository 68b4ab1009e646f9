"""One θ that weights share: a vector for all of them, or a row for each."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from tithe.rules.theta import Binding


class Shared:
    """Stands for θ of every weight bound to it.

    Args:
        parameter: (m,), or (weights, m) with one row for each.
        names: of the weights, in the order of the rows.
    """

    def __init__(self, parameter: nn.Parameter, names: Sequence[str]) -> None:
        self.parameter = parameter
        self._rows = {name: row for row, name in enumerate(names)}

    def view(self, binding: Binding) -> Tensor:
        """What stands for θ of a weight in autograd: the vector, or its row."""
        return self.parameter if self.parameter.dim() == 1 else self.parameter[self._rows[binding.name]]

    def values(self, name: str) -> Tensor:
        """The present values of the same."""
        values = self.parameter.detach()
        return values if values.dim() == 1 else values[self._rows[name]]
