"""The ordinary fine-tuning that methods are compared with, as a plan: whole parameters are trained, the rest is not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

import tithe
from tithe import ledger
from tithe.errors import TitheError
from tithe.plan.base import Settings


@final
class Dense(tithe.Plan):
    """Trains whole parameters of a model; what is not trained gets `requires_grad` False.

    Args:
        model: the module.
        trained: names of the parameters to train.
        loss: `loss(model, batch)`, which `predict` needs.
    """

    def __init__(self, model: nn.Module, trained: Iterable[str], *, loss: Any = None) -> None:
        names, self._required = set(trained), {name: p.requires_grad for name, p in model.named_parameters()}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in names)
        super().__init__(model, Settings(loss=loss))
        self._trained = self._split.candidates
        kept, stored = {**dict(model.named_buffers()), **self._trained}, model.state_dict()
        self._start = {name: tensor.detach().clone() for name, tensor in kept.items() if name in stored}

    @property
    def selections(self) -> dict[str, tithe.Selection]:
        """Name → all of each trained parameter."""
        return {name: tithe.Grid(tuple(p.shape), {}) for name, p in self._trained.items()}

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The trained parameters by name."""
        return iter(self._trained.items())

    @property
    def index_bytes(self) -> int:
        """Zero: nothing says where a whole parameter belongs."""
        return 0

    @property
    def attached_bytes(self) -> int:
        """Zero: what is trained are the model's own weights."""
        return 0

    def predict(self, batch: Any) -> tithe.Ledger:
        """Predict forward and backward on a batch."""
        loss = self._loss
        if loss is None:
            raise TitheError("predict", found="no loss", expected="loss=", remedy="Dense(model, names, loss=loss_fn)")
        return ledger.predict(self.model, lambda shapes: loss(self.model, shapes), batch)

    def backward(self, closure: Callable[[], Tensor]) -> Tensor:
        """Run one forward and backward."""
        loss = closure()
        loss.backward()
        return loss

    def bind(self, optimizer: torch.optim.Optimizer, *, elementwise: bool | None = None) -> None:
        """Do nothing: nothing follows from an optimizer's step."""

    def step(self) -> bool:
        """Count a step; what is trained never changes."""
        self.num_steps += 1
        return False

    def end_epoch(self) -> bool:
        """Count an epoch; what is trained never changes."""
        self.num_epochs += 1
        return False

    def reselect(self) -> bool:
        """Do nothing: what is trained never changes."""
        return False

    def state_dict(self) -> dict[str, Any]:
        """The trained parameters and the buffers, whole."""
        state = self.model.state_dict()
        return {name: state[name] for name in self._start}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Write the parameters and the buffers back."""
        own = self.model.state_dict()
        with torch.no_grad():
            for name in self._start:
                own[name].copy_(state[name])

    def save(self, path: str | Path, *, metadata: Mapping[str, str] | None = None) -> None:
        """Write what differs from the start."""
        state = self.model.state_dict()
        # A tied weight has several names, and one start.
        starts = {_storage(state[name]): tensor for name, tensor in self._start.items()}
        base = {name: starts[key] if (key := _storage(tensor)) in starts else tensor for name, tensor in state.items()}
        tithe.diff(base, self.model, path, metadata=metadata)

    def _let_go(self) -> None:
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._required[name])

    def _moving_whole(self) -> Iterable[str]:
        return self._trained


def _storage(tensor: Tensor) -> tuple[int, torch.Size]:
    return tensor.data_ptr(), tensor.shape
