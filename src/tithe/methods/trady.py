"""TraDy: transfer learning under a strict memory budget, in channels drawn anew each epoch.

Quélennec, Hezbri, Mozharovskyi, Nguyen, Tartaglione. *Study of Training Dynamics for Memory-Constrained Fine-Tuning.*
arXiv 2510.19675, 2025.

Deviations from the paper: the flat buffer that holds θ of every epoch's draw has one size, and the budget pays for all
of it; the other layers are lean, so that the counted saving is a measured one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from tithe.budget import Budget, written_as_percent
from tithe.errors import TitheError
from tithe.method import SelectionContext, SparseMethod, Spending
from tithe.ranking import Ranking
from tithe.schedule import Schedule, every
from tithe.select.channel_costs import Costs, Layer, cover
from tithe.select.topk import under_budget
from tithe.selection import Channels, Selection

Layers = Literal["topk", "all"]
ChannelScore = Literal["uniform", "rgn", "fisher"]

_TRIALS = 64
"""Draws whose median size is the buffer's: its error is then a sixth of one draw's spread."""

_WITHOUT = ', or draw without gradients, by layers="all" and score="uniform"'


@dataclass(frozen=True)
class TraDy(SparseMethod):
    """Train input channels drawn uniformly each epoch from the layers that matter, within a budget.

        cost(c) = C'·D² + H·W          layers: the fewest with `coverage` of Σ_c ‖∂L/∂W_c‖₂ / cost(c)

    Args:
        budget: what the drawn channels may cost, never exceeded. `Budget(elements=…)` and `Budget(fraction=…)` count
            weight gradients and kept inputs as the paper does (batch 1, head apart); `Budget("2MB")` counts the bytes
            of θ, gradients, optimizer state and the kept inputs of the first batch, the head's gradient and state
            included; `Budget(flops=…)` counts the weight gradients' operations a step.
        ranking: a `Ranking`, the path of one, or None to measure it on `data` when attaching.
        coverage: part of the total RGN that the layers to draw from hold, in (0, 1].
        layers: "topk" draws from those layers, "all" from every layer.
        dynamic: draw anew each epoch; False keeps the first draw.
        lean: let the other layers keep only what backward needs (`tithe.lean`).
        score: "uniform" is the paper's draw; "rgn" takes the channels of the largest RGN, measured before each choice
            (its oracle); "fisher" those of the most Fisher information for their cost.
        samples: over which a ranking and scores are measured, all ranks together.
        optimizer_states: tensors of θ's size that the optimizer keeps, which the budget pays for: 2 for Adam, 1 for
            SGD with momentum, 0 for SGD. One that keeps more is refused by its first step.

    Raises:
        TitheError: when a value is out of range.

    Example:
        >>> TraDy(Budget(elements=27_946)).reselect
        Schedule(period=1, unit='epochs')
    """

    budget: Budget
    ranking: Ranking | str | Path | None = None
    coverage: float = 0.97
    layers: Layers = "topk"
    dynamic: bool = True
    lean: bool = True
    score: ChannelScore = "uniform"
    samples: int = 256
    optimizer_states: int = 2  # pyright: ignore[reportIncompatibleVariableOverride]
    reselect: Schedule | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "reselect", every(1, "epochs") if self.dynamic else None)
        if not isinstance(self.budget, Budget):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TitheError(
                "TraDy", found=f"budget={self.budget!r}", expected="a Budget", remedy='write TraDy(tithe.Budget("2MB"))'
            )
        if not 0 < self.coverage <= 1:
            raise TitheError(
                "TraDy",
                found=f"coverage={self.coverage}",
                expected="a fraction in (0, 1]",
                remedy=written_as_percent("coverage", self.coverage, "try 0.97"),
            )
        if self.samples < 1:
            raise TitheError("TraDy", found=f"samples={self.samples}", expected="at least 1", remedy="try 256")
        for name, options in (("layers", Layers), ("score", ChannelScore)):
            if getattr(self, name) not in get_args(options):
                raise TitheError(
                    "TraDy",
                    found=f"{name}={getattr(self, name)!r}",
                    expected="one of " + ", ".join(map(repr, get_args(options))),
                    remedy=f"change {name}",
                )

    @property
    def needs_data(self) -> bool:
        """Return True: the price list is made for the shapes of a batch."""
        return True

    def num_selected(self, context: SelectionContext) -> int:
        """Return how many values the buffer for θ holds: the median of 64 draws.

        Raises:
            TitheError: when the budget is smaller than the head or than any channel.
        """
        costs = self._costs(context)
        count = costs.weights.numel()
        if self.score == "uniform":
            draws = (_shuffle(count, trial) for trial in range(_TRIALS))  # one at a time: a network has many channels
        else:
            draws = iter([self._order(context, costs)])
        sizes = [int(costs.weights[self._take(order, costs, None)].sum()) for order in draws]
        return sorted(sizes)[len(sizes) // 2]  # of a draw that was made, so that at least this one fits again

    def choose(self, context: SelectionContext) -> dict[str, Channels]:
        """Choose the channels of one draw."""
        costs = self._costs(context)
        if self.budget.bytes is not None:
            context.limit_inputs()
        taken = self._take(self._order(context, costs), costs, context.capacity)
        chosen = costs.split(taken)
        return {layer.name: layer.select(chosen[layer.name]) for layer in costs.layers}

    def spending(self, context: SelectionContext, selections: Mapping[str, Selection]) -> Spending:
        """Return what a choice costs in the budget's measure; the whole buffer for θ is charged.

        Where the budget counts bytes, the head's gradient and optimizer state are in the cost and in the limit.
        """
        costs = self._costs(context)
        spent = costs.unit * (context.capacity or sum(selection.size for selection in selections.values()))
        start = 0
        for layer in costs.layers:
            if layer.name in selections:
                spent += float(costs.kept[start]) * selections[layer.name].items.numel()
            start += layer.num_channels
        budget, everything = self.budget, self._priced(context).values()
        head = float(budget.of(0)) - costs.limit if budget.bytes is not None else 0.0
        return Spending(
            spent=spent + head,
            limit=costs.limit + head,
            measure="bytes" if budget.bytes is not None else "flops" if budget.flops is not None else "elements",
            channels=sum(selection.items.numel() for selection in selections.values()),
            of_channels=sum(layer.num_channels for layer in everything),
            layers=len(selections),
            of_layers=len(everything),
        )

    def _priced(self, context: SelectionContext) -> Mapping[str, Layer]:
        return context.layers(largest=self.budget.bytes is not None)

    def _costs(self, context: SelectionContext) -> Costs:
        priced = self._priced(context)
        everything = list(priced.values())
        if self.layers == "topk":
            names = set(self._ranked(context))
            layers = [layer for layer in everything if layer.name in names]
        else:
            layers = everything
        total = sum(layer.num_channels * layer.elements for layer in everything)
        costs = Costs.of(layers, self.budget, num_states=context.num_states, head=context.head_bytes, total=total)
        if costs.limit <= 0:
            raise TitheError(
                "head",
                found=f"{context.head_bytes * (1 + context.num_states)} bytes of its gradient and optimizer state",
                expected=f"less than the budget of {self.budget.of(0)} bytes",
                remedy="raise the budget, or train a smaller head",
            )
        self._cheapest(costs)
        return costs

    def _cheapest(self, costs: Costs) -> int:
        each = costs.each
        least = int(each.argmin())
        if float(each[least]) > costs.limit:
            name = next(name for name, channels in costs.split(torch.tensor([least])).items() if channels.numel())
            raise TitheError(
                "budget",
                found=f"{costs.limit:g} left for channels",
                expected=f"at least {float(each[least]):g}, the cost of one channel of {name}",
                remedy="raise the budget, use smaller inputs or batches, or choose other layers with where=",
            )
        return least

    def _ranked(self, context: SelectionContext) -> list[str]:
        layers = self._priced(context)
        if isinstance(self.ranking, (str, Path)):
            ranking = Ranking.load(self.ranking)
        elif self.ranking is not None:
            ranking = self.ranking
        else:
            measured = context.remember("rgn", lambda: self._measure(context))
            return cover(dict(zip(layers, measured.tolist(), strict=True)), self.coverage)
        ranking.check({name: layer.shape for name, layer in layers.items()})
        return cover({name: ranking.rgn[name] for name in layers}, self.coverage)

    def _measure(self, context: SelectionContext) -> Tensor:
        ranking = Ranking.of(self._priced(context), context.channel_norms(self.samples, or_else=_WITHOUT))
        return torch.tensor(list(ranking.rgn.values()), dtype=torch.float64)

    def _order(self, context: SelectionContext, costs: Costs) -> Tensor:
        """Positions in the list of channels, first to be taken first; ties by position."""
        if self.score == "uniform":
            epoch = context.epoch if self.dynamic else 0
            return _shuffle(costs.weights.numel(), (context.seed + 1) * 1_000_003 + epoch)
        norms = (
            context.channel_norms(self.samples, or_else=_WITHOUT)
            if self.score == "rgn"
            else context.channel_scores("fisher", samples=self.samples, or_else=_WITHOUT)
        )
        each = torch.tensor([layer.elements for layer in costs.layers], dtype=torch.float64)
        counts = torch.tensor([layer.num_channels for layer in costs.layers])
        values = torch.cat([norms[layer.name].double().cpu() for layer in costs.layers])
        return torch.sort(values / each.repeat_interleave(counts), descending=True, stable=True).indices

    def _take(self, order: Tensor, costs: Costs, capacity: int | None) -> Tensor:
        return under_budget(order, costs.weights, costs.kept, costs.unit, costs.limit, capacity)


def _shuffle(count: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))
