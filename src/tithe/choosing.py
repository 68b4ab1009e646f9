"""What a method is handed when it chooses: sizes, shapes, and scores by name. The method never sees a module."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tithe.errors import TitheError
from tithe.rules import Binding
from tithe.scoring import Loss, Passes
from tithe.select import scores as formulas


class Choosing:
    """One choice: the tensors to choose from, in the model's order, and their scores.

    Args:
        model: the attached model.
        bindings: the weights to choose from.
        num_parameters: floating-point parameters of the whole model.
        num_head: those of the head.
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
        num_head: int,
        loss: Loss | None,
        batches: Sequence[Any] | None,
        seed: int,
        step: int,
    ) -> None:
        self._model, self._bindings, self._loss, self._batches = model, bindings, loss, batches
        self.num_parameters, self.num_head = num_parameters, num_head
        self.seed, self.step = seed, step
        self.shapes = {b.name: tuple(b.weight.shape) for b in bindings}
        self.sizes = {b.name: b.weight.numel() for b in bindings}

    def scores(self, kind: str, *, samples: int = 1024, fisher: str = "empirical") -> Iterator[tuple[str, Tensor]]:
        """Name and score of each tensor in the model's order, streamed.

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
        passes = Passes(self._model, self._bindings, self._loss, self._batches, samples, fisher)
        return passes.scores("square" if kind == "fisher" else "sum")
