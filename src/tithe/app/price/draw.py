"""A choice that needs no data: as many weights as a mask has, drawn evenly over the network."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

import tithe
from tithe.method import SelectionContext
from tithe.select.topk import share


@final
class Drawn(tithe.FISH):
    """A mask of the same size as FISH's, drawn uniformly, without a score for each weight.

    It touches every column of a matrix, so a layer keeps all of its input: what a mask with structure keeps is less.
    """

    @property
    def needs_data(self) -> bool:
        """Nothing is scored, so no data are read."""
        return False

    def choose(self, context: SelectionContext) -> dict[str, tithe.Coordinates]:
        """The same part of each tensor."""
        generator = torch.Generator().manual_seed(context.seed)
        counts = share(self.num_selected(context), context.sizes)
        return {
            name: tithe.Coordinates(shape, draw(context.sizes[name], counts[name], generator))
            for name, shape in context.shapes.items()
        }


def draw(size: int, count: int, generator: torch.Generator) -> Tensor:
    """`count` different numbers below `size`, ascending, in memory of the order of the fewer of drawn and left out.

    Example:
        >>> draw(5, 5, torch.Generator())
        tensor([0, 1, 2, 3, 4])
    """
    if 2 * count > size:
        left = torch.ones(size, dtype=torch.bool)
        left[draw(size, size - count, generator)] = False
        return left.nonzero().flatten()
    found = torch.empty(0, dtype=torch.int64)
    while found.numel() < count:
        more = torch.randint(size, (2 * (count - found.numel()) + 8,), generator=generator)
        found = torch.cat([found, more]).unique()
    return found[torch.randperm(found.numel(), generator=generator)[:count]].sort().values
