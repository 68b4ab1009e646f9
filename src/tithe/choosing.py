"""What a plan asks of a method, and what the method is handed when it chooses. It never sees a module."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tithe.batch import num_samples
from tithe.errors import TitheError
from tithe.rules import Binding
from tithe.schedule import Schedule
from tithe.scoring import Loss, Passes
from tithe.select import scores as formulas
from tithe.selection import Coordinates


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

    def num_selected(self, choosing: Choosing) -> int:
        """How many values it will select; raises TitheError when the budget leaves nothing."""
        ...

    def choose(self, choosing: Choosing) -> dict[str, Coordinates]:
        """A selection for each tensor to choose from."""
        ...


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
        step: finished steps; a choice is a pure function of scores, budget, seed and step.
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
    ) -> None:
        self._model, self._bindings, self._loss, self._batches = model, bindings, loss, batches
        self._head = head
        self.num_parameters, self.num_head = num_parameters, sum(p.numel() for p in head.values())
        self.seed, self.step = seed, step
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
            return ((b.name, formulas.magnitude(b.weight)) for b in self._bindings)
        if kind == "random":
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.step)
            return ((b.name, formulas.random(b.weight, generator)) for b in self._bindings)
        if self._loss is None or self._batches is None:
            missing = " and ".join(n for n, v in (("loss", self._loss), ("data", self._batches)) if v is None)
            raise TitheError(
                "attach",
                found=f"no {missing}",
                expected=f"loss= and data= for the score {kind!r}",
                remedy='pass attach(..., loss=loss_fn, data=batches), or use score="magnitude" or "random"',
            )
        passes = Passes(self._model, self._bindings, self._loss, self._batches, samples, fisher, self._head)
        return passes.scores("square" if kind == "fisher" else "sum")


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
