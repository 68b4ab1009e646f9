"""What a plan asks of a method, and what the method is handed when it chooses. It never sees a module."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tithe.batch import num_samples
from tithe.errors import TitheError
from tithe.rules import Binding
from tithe.schedule import Schedule
from tithe.scoring import Loss, Passes, channel_norms, price_channels
from tithe.select import importance
from tithe.select.channel_costs import Layer
from tithe.selection import Selection


class Method(Protocol):
    """What `attach` asks of a method: when to choose, and what."""

    @property
    def samples(self) -> int:
        """Samples that its score is taken over."""
        ...

    @property
    def warmup(self) -> int:
        """Steps before the first choice."""
        ...

    @property
    def reselect(self) -> Schedule | None:
        """When to choose again."""
        ...

    @property
    def needs_data(self) -> bool:
        """Whether choosing reads data."""
        ...

    @property
    def lean(self) -> bool:
        """Whether the other layers are to keep for backward only what it needs."""
        ...

    @property
    def charges_state(self) -> bool:
        """Whether its budget counts the optimizer's state, so that it chooses again when an optimizer is bound."""
        ...

    def num_selected(self, choosing: Choosing) -> int:
        """The most values it will select; raises TitheError when the budget leaves nothing."""
        ...

    def choose(self, choosing: Choosing) -> Mapping[str, Selection]:
        """Name → selection; a tensor to choose from that is not named stays frozen."""
        ...


def _no_tensors() -> dict[str, Tensor]:
    return {}


@dataclass
class Memory:
    """What a plan's choices have in common.

    Args:
        tensors: what a method remembers from one choice to the next; it is saved with the plan.
        layers: the price list of input channels, or None before it is asked for.
    """

    tensors: dict[str, Tensor] = field(default_factory=_no_tensors)
    layers: dict[str, Layer] | None = None


class Choosing:
    """One choice: the tensors to choose from, in the model's order, and their scores.

    Args:
        model: the attached model.
        bindings: the weights to choose from.
        num_parameters: floating-point parameters of the whole model.
        head: parameters trained whole, by name.
        loss: `loss(model, batch)`, or None.
        batches: the data, or None.
        seed: of the plan.
        step: finished steps; a choice is a pure function of scores, budget, seed, step and epoch.
        epoch: finished epochs.
        num_states: tensors of θ's size that the bound optimizer keeps, 0 while none is bound.
        room: values that the plan's flat θ holds, or None where every choice is made to measure.
        memory: of the plan.
    """

    def __init__(
        self,
        model: nn.Module,
        bindings: Sequence[Binding],
        *,
        num_parameters: int,
        head: Mapping[str, nn.Parameter],
        loss: Loss | None,
        batches: Iterable[Any] | None,
        seed: int,
        step: int,
        epoch: int,
        num_states: int,
        room: int | None,
        memory: Memory,
    ) -> None:
        self._model, self._bindings, self._loss, self._batches = model, bindings, loss, batches
        self._head = head
        self.num_parameters, self.num_head = num_parameters, sum(p.numel() for p in head.values())
        self.head_bytes = sum(p.numel() * p.element_size() for p in head.values())
        self.seed, self.step, self.epoch, self.num_states, self.room = seed, step, epoch, num_states, room
        self._memory = memory
        self.shapes = {b.name: tuple(b.weight.shape) for b in bindings}
        self.sizes = {b.name: b.weight.numel() for b in bindings}

    def scores(self, kind: str, *, samples: int = 1024, fisher: str = "empirical") -> Iterator[tuple[str, Tensor]]:
        """Name and score of each tensor, streamed; tables of which few rows were touched come last.

        Args:
            kind: "fisher", "gradient", "magnitude" or "random".
            samples: how many samples scores of gradients are taken over.
            fisher: "empirical" or "true".

        Raises:
            TitheError: when the score needs data or a loss and there is none.
        """
        if kind == "magnitude":
            return ((b.name, importance.magnitude(b.weight)) for b in self._bindings)
        if kind == "random":
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.step)
            return ((b.name, importance.random(b.weight, generator)) for b in self._bindings)
        remedy = 'pass attach(..., loss=loss_fn, data=batches), or use score="magnitude" or "random"'
        loss, batches = self._given(f"for the score {kind!r}", remedy)
        passes = Passes(self._model, self._bindings, loss, batches, samples, fisher, self._head)
        return passes.scores("square" if kind == "fisher" else "sum")

    def layers(self) -> dict[str, Layer]:
        """The price list of input channels, for the shapes of the first batch.

        Raises:
            TitheError: when there is no loss or no data, or no tensor to choose from has input channels.
        """
        if self._memory.layers is None:
            loss, batches = self._given("to price input channels", "pass attach(..., loss=loss_fn, data=batches)")
            for batch in batches:
                self._memory.layers = price_channels(self._model, self._bindings, loss, batch)
                break
        if not self._memory.layers:
            raise TitheError(
                "where",
                found="no weight with input channels" if self._memory.layers is not None else "data without a batch",
                expected="weights of linear layers or convolutions, and a batch to price them for",
                remedy="widen where=, or pass data= an iterable of batches",
            )
        return self._memory.layers

    def channel_norms(self, samples: int) -> dict[str, Tensor]:
        """Name → Σ over batches of the norm of each input channel's gradient, see `tithe.scoring.channel_norms`."""
        loss, batches = self._given("for scores of gradients", "pass attach(..., loss=loss_fn, data=batches)")
        return channel_norms(self._model, self._bindings, self.layers(), loss, batches, samples)

    def weight(self, name: str) -> Tensor:
        """The values of one tensor to choose from."""
        return next(b.weight.detach() for b in self._bindings if b.name == name)

    def hold_inputs(self) -> None:
        """From now on refuse inputs larger than those that the price list was made for."""
        layers = self.layers()
        rooms = [layers[name].positions if name in layers else -1 for name in self.shapes]
        self._memory.tensors["rooms"] = torch.tensor(rooms)

    def remember(self, key: str, make: Callable[[], Tensor]) -> Tensor:
        """What `make` returned when this key was first asked for, also in the run that this one goes on from."""
        if key not in self._memory.tensors:
            self._memory.tensors[key] = make()
        return self._memory.tensors[key]

    def _given(self, why: str, remedy: str) -> tuple[Loss, Iterable[Any]]:
        if self._loss is None or self._batches is None:
            missing = " and ".join(n for n, v in (("loss", self._loss), ("data", self._batches)) if v is None)
            raise TitheError("attach", found=f"no {missing}", expected=f"loss= and data= {why}", remedy=remedy)
        return self._loss, self._batches


def first_batches(data: Iterator[Any], samples: int) -> list[Any]:
    """The batches that hold the first `samples` samples of data that can be read only once."""
    kept: list[Any] = []
    count = 0
    for batch in data:
        kept.append(batch)
        count += num_samples(batch)
        if count >= samples:
            break
    return kept
