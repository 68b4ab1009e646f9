"""Sparse update (SU): a fixed scheme of layers and ratios, the hand-searched ancestor of a budget.

Lin et al. *On-Device Training Under 256KB Memory.* NeurIPS 2022, arXiv 2206.15472, section 3.2.

Deviation from the paper: the channels of a ratio are those of the largest magnitude in the given weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from tithe.budget import written_as_percent
from tithe.errors import TitheError
from tithe.method import SelectionContext, SparseMethod
from tithe.select.importance import channel_sums, magnitude
from tithe.select.topk import largest
from tithe.selection import Coordinates, Selection


@dataclass(frozen=True)
class SparseUpdate(SparseMethod):
    """Train a given part of the input channels of given layers, and given biases whole; chosen once.

    Args:
        ratios: parameter name → part of its input channels, in (0, 1]; at least one channel each.
        biases: names of parameters that are trained whole.
        lean: let the other layers keep only what backward needs (`tithe.lean`).

    Raises:
        TitheError: when `ratios` is no mapping, or a ratio is out of range.

    Example:
        >>> SparseUpdate({"blocks.12.pointwise1.weight": 0.25}).needs_data
        True
    """

    ratios: Mapping[str, float]
    biases: Sequence[str] = ()
    lean: bool = True

    def __post_init__(self) -> None:
        if not isinstance(cast(Any, self.ratios), Mapping):
            raise TitheError(
                "SparseUpdate",
                found=f"ratios={self.ratios!r}",
                expected="a mapping from names of weights to parts of their input channels",
                remedy='write SparseUpdate({"blocks.12.pointwise1.weight": 0.25}); TraDy is the method with a budget',
            )
        for name, ratio in self.ratios.items():
            if not 0 < ratio <= 1:
                raise TitheError(
                    name,
                    found=f"ratio {ratio}",
                    expected="a fraction in (0, 1]",
                    remedy=written_as_percent("ratio", ratio, "change it"),
                )

    @property
    def needs_data(self) -> bool:
        """Return True: the layout of channels is read off one batch."""
        return True

    def choose(self, context: SelectionContext) -> dict[str, Selection]:
        """Choose the scheme's channels and biases.

        Raises:
            TitheError: when a name is no layer with input channels, or no parameter to choose from.
        """
        layers = context.layers()
        chosen: dict[str, Selection] = {}
        for name, ratio in self.ratios.items():
            if name not in layers:
                raise _unknown(name, "a weight with input channels")
            layer = layers[name]
            count = max(1, round(ratio * layer.num_channels))
            scores = channel_sums(magnitude(context.weight(name)), layer.groups, transposed=layer.transposed)
            chosen[name] = layer.select(largest(scores, count).cpu())
        for name in self.biases:
            if name not in context.shapes or name in chosen:
                raise _unknown(name, "a parameter to choose from, named once")
            chosen[name] = Coordinates.everything(context.shapes[name])
        return chosen


def _unknown(name: str, expected: str) -> TitheError:
    return TitheError(name, found="none in the model", expected=expected, remedy="use a name of named_parameters()")
