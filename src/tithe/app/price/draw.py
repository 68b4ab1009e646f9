"""A choice that needs no data: as many weights as a mask has, drawn evenly over the network."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

import tithe
from tithe.method import SelectionContext
from tithe.select.topk import share, top_columns

_BLOCK = 1 << 17


@final
class Drawn(tithe.FISH):
    """A mask of the same size as FISH's, drawn uniformly, without a score for each weight.

    Of single weights it touches every column of a matrix, so a layer keeps all of its input: what a mask with structure
    keeps is less. Of whole columns it takes the same part of each matrix, the first ones.
    """

    @property
    def needs_data(self) -> bool:
        """Nothing is scored: no data are read but for the layout of columns."""
        return self.unit == "column"

    def choose(self, context: SelectionContext) -> dict[str, tithe.Selection]:
        """The same part of each tensor; of tensors of one shape, the same places."""
        if self.unit == "column":
            layers = context.layers()
            weights = {name: layer.weights for name, layer in layers.items()}
            level = {name: torch.zeros(layer.num_channels) for name, layer in layers.items()}
            picked = top_columns(level, weights, self.num_selected(context), {n: context.sizes[n] for n in layers})
            return {name: layers[name].select(columns) for name, columns in picked.items()}
        generator = torch.Generator().manual_seed(context.seed)
        counts = share(self.num_selected(context), context.sizes)
        drawn: dict[tuple[tuple[int, ...], int], tithe.Selection] = {}
        for name, shape in context.shapes.items():
            if (shape, counts[name]) not in drawn:
                places = draw(context.sizes[name], counts[name], generator)
                drawn[shape, counts[name]] = tithe.Coordinates(shape, places)
        return {name: drawn[shape, counts[name]] for name, shape in context.shapes.items()}


def draw(size: int, count: int, generator: torch.Generator) -> Tensor:
    """Draw one number from each of `count` equal parts of those below `size`: all different, and ascending.

    Example:
        >>> draw(5, 5, torch.Generator())
        tensor([0, 1, 2, 3, 4])
    """
    drawn = torch.empty(count, dtype=torch.int64)
    for at in range(0, count, _BLOCK):  # a mask may have millions of entries: what is made on the way stays small
        end = min(at + _BLOCK, count)
        edges = torch.arange(at, end + 1, dtype=torch.int64) * size // count
        start, length = edges[:-1], edges.diff()
        part = (torch.rand(end - at, dtype=torch.float64, generator=generator) * length).long()
        drawn[at:end] = start + part.clamp_max(length - 1)
    return drawn
