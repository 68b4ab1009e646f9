"""List what each input channel of each layer costs, for a selector of channels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tithe.budget import Budget
from tithe.selection import Channels

_INDEX = 8
"""Bytes of a channel's number, int64."""


@dataclass(frozen=True)
class Layer:
    """A weight with input channels, and the cost of selecting one of them.

    Args:
        name: of the parameter.
        shape: of the parameter.
        groups: of the convolution; 1 for a matrix.
        transposed: the input channels are axis 0 of the weight.
        num_channels: I.
        num_uses: calls in one forward pass.
        weights: values of one channel's columns, C'·D².
        positions: values of one channel's input in the batch that was priced, N·H·W.
        per_sample: the same for one sample, H·W.
        flops: floating-point operations of one channel's weight gradient, for that batch.
        theta_bytes: of one value of θ.
        value_bytes: of one value of the input.
    """

    name: str
    shape: tuple[int, ...]
    groups: int
    transposed: bool
    num_channels: int
    num_uses: int
    weights: int
    positions: int
    per_sample: float
    flops: float
    theta_bytes: int
    value_bytes: int

    @property
    def elements(self) -> float:
        """Return the paper's cost of a channel, C'·D² + H·W."""
        return self.weights + self.per_sample

    def select(self, channels: Tensor) -> Channels:
        """Return the selection of these channels, int64 and ascending, on the CPU."""
        return Channels(self.shape, channels, groups=self.groups, transposed=self.transposed)

    def for_positions(self, positions: int) -> Layer:
        """Return the price for a batch with so many values of a channel's input, where that is more."""
        if positions <= self.positions:
            return self
        return replace(self, positions=positions, flops=self.flops * positions / self.positions)


@dataclass(frozen=True)
class Costs:
    """The cost of every channel of some layers, in order, in a budget's measure: `unit` · weights + `kept`.

    Args:
        layers: in order.
        weights: (channels,) int64: values of θ, C'·D².
        unit: cost of one value of θ, with its gradient and optimizer state; 0 where θ is not what the budget limits.
        kept: (channels,) float64: what else a channel costs, the input that is kept for backward.
        limit: what may be spent.
    """

    layers: Sequence[Layer]
    weights: Tensor
    unit: float
    kept: Tensor
    limit: float

    @classmethod
    def of(cls, layers: Sequence[Layer], budget: Budget, *, num_states: int, head: int, total: float) -> Costs:
        """Return the costs in the measure of `budget`.

        Elements and fractions are the paper's count: C'·D² for the weight gradient (and as much for each optimizer
        state) and H·W for the input, batch 1, the head apart. Bytes are those of a step: θ, its gradient and each
        state, the channel's index, the input of the whole batch; the head's gradient and state come off the limit.
        FLOPs are those of the weight gradient.

        Args:
            layers: to choose from.
            budget: the limit.
            num_states: tensors of θ's size that the optimizer keeps.
            head: bytes of the parameters that are trained whole.
            total: elements of all channels of all layers, of which a fraction is taken.
        """
        unit, limit = float(1 + num_states), float(budget.of(int(total)))
        kept = [layer.per_sample for layer in layers]
        if budget.bytes is not None:
            unit = float(max(layer.theta_bytes for layer in layers) * (2 + num_states))
            limit -= head * (1 + num_states)
            kept = [float(layer.positions * layer.value_bytes + _INDEX) for layer in layers]
        elif budget.flops is not None:
            unit, kept = 0.0, [layer.flops for layer in layers]
        counts = torch.tensor([layer.num_channels for layer in layers])
        weights = torch.tensor([layer.weights for layer in layers]).repeat_interleave(counts)
        spread = torch.tensor(kept, dtype=torch.float64).repeat_interleave(counts)
        return cls(layers, weights, unit, spread, limit)

    @property
    def each(self) -> Tensor:
        """Return the cost of each channel, float64 (channels,)."""
        return self.unit * self.weights + self.kept

    def split(self, chosen: Tensor) -> dict[str, Tensor]:
        """Return name → sorted channels, from positions in the list of all channels."""
        out: dict[str, Tensor] = {}
        start = 0
        for layer in self.layers:
            mine = chosen[(chosen >= start) & (chosen < start + layer.num_channels)] - start
            out[layer.name] = mine.sort().values
            start += layer.num_channels
        return out


def cover(scores: Mapping[str, float], coverage: float) -> list[str]:
    """Return the fewest names whose scores add up to `coverage` of the total, largest first; ties by order.

    Example:
        >>> cover({"a": 1.0, "b": 6.0, "c": 3.0}, 0.8)
        ['b', 'c']
    """
    total, held = sum(scores.values()), 0.0
    names: list[str] = []
    for name in sorted(scores, key=lambda name: -scores[name]):
        if held >= coverage * total - 1e-12 * total:
            break
        names.append(name)
        held += scores[name]
    return names
