"""Let a part of a weight exist during one step: the whole tensor, and θ, which the optimizer holds.

        between steps                       from a forward pass to the optimizer's step
        θ.data ── the weight's memory       θ.data, θ.grad ── the live part
        state  ── of the whole tensor       state          ── of the live part, while the optimizer runs

θ keeps its identity. An optimizer therefore updates, and pays for, what took part in the step: every other value keeps
its bits, momentum and weight decay included.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tithe.narrow.stage import Fit, Stage
from tithe.selection import Grid


class LiveWeight:
    """A weight and its θ, which is the live part during a step and the whole otherwise.

    Args:
        name: the parameter's name in the model.
        weight: the model's own parameter; it gets no gradient while it is bound.
    """

    def __init__(self, name: str, weight: nn.Parameter) -> None:
        self.name, self.weight = name, weight
        self.trained = weight.requires_grad
        self.theta = nn.Parameter(weight.detach(), requires_grad=self.trained)
        self.leaf: Tensor | None = None
        self._grid: Grid | None = None
        self._fit: Fit | None = None
        self._received = False
        self._version = 0
        self._whole: dict[tuple[int, str], Tensor] = {}
        weight.requires_grad_(False)
        weight.grad = None

    def open(self, fit: Fit) -> Tensor:
        """Return the live part that modules read and autograd differentiates: the weight itself if all is live.

        A further micro-batch of the same step goes on with the same part, and with the gradient that θ has now.
        """
        if self.leaf is None:
            self._fit, self._grid = fit, fit.grids[self.name]
            weight = self.weight.detach()
            if self._received:
                live = fit.pad(self.name, self.theta.detach())
            else:
                live = weight if self._grid.full else fit.take(self.name, weight)
            self.leaf = nn.Parameter(live, self.trained)
        self.weight.requires_grad_(False)  # whatever set it meanwhile: θ is what is trained
        grad = self.theta.grad
        self.leaf.grad = None if grad is None else fit.pad(self.name, grad)
        return self.leaf

    def receive(self) -> None:
        """Turn θ into the live part with its gradient, after a backward pass."""
        live, grad = self.stripped()
        if not self._received:
            self.theta.grad = None
            self.theta.data = live
            self._received, self._version = True, self.theta._version
        self.theta.grad = grad

    def stripped(self) -> tuple[Tensor, Tensor | None]:
        """Let go of what modules read, and return it and its gradient without padding.

        One weight after the other, so that padded and unpadded parts of all of them never stand side by side.
        """
        assert self.leaf is not None
        assert self._fit is not None
        leaf, self.leaf = self.leaf, None
        grad = None if leaf.grad is None else self._fit.strip(self.name, leaf.grad)
        leaf.grad = None  # the graph of a loss that the caller keeps holds the leaf, but needs nothing of it any more
        leaf.data = self.theta.data if self._received else self._fit.strip(self.name, leaf.data)
        return leaf.data, grad

    @property
    def received(self) -> bool:
        """Return whether θ is the live part, since a backward pass went through it."""
        return self._received

    @property
    def moved(self) -> bool:
        """Return whether the live part was changed since backward."""
        return self._received and self.theta._version != self._version

    def before_update(self, optimizer: torch.optim.Optimizer) -> None:
        """Show the optimizer the live part of its state for this weight."""
        if self._grid is None or self._grid.full:
            return
        state = optimizer.state.get(self.theta, {})
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == self.weight.shape:
                self._whole[id(optimizer), key] = value
                state[key] = self._grid.gather(value)

    def after_update(self, optimizer: torch.optim.Optimizer) -> None:
        """Put the optimizer's state of the live part back into the whole state."""
        if self._grid is None or self._grid.full:
            return
        state = optimizer.state.get(self.theta, {})
        for key, value in state.items():
            if isinstance(value, Tensor) and value.dim() and tuple(value.shape) == self._grid.theta_shape:
                whole = self._whole.pop((id(optimizer), key), None)
                if whole is None:
                    whole = value.new_zeros(self.weight.shape)
                self._grid.scatter_(whole, value)
                state[key] = whole

    def close(self) -> None:
        """Write the live part into the weight, and make θ the whole again."""
        if self._grid is not None and self._received and not self._grid.full:
            self._grid.scatter_(self.weight.data, self.theta.detach())
        self.forget()

    def forget(self) -> None:
        """Make θ the whole again and discard the live part."""
        self.leaf = self._grid = self._fit = None
        self._received = False
        self.theta.grad = None
        self.theta.data = self.weight.data

    def shrink(self, grid: Grid, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Follow the weight, whose part in `grid` is all of it from now on, with the optimizers' state."""
        shape = grid.shape
        for optimizer in optimizers:
            state: dict[str, Any] = optimizer.state.get(self.theta, {})
            for key, value in state.items():
                if isinstance(value, Tensor) and tuple(value.shape) == shape:
                    state[key] = grid.gather(value)
        self.theta.data = self.weight.data

    def release(self) -> None:
        """Give the weight its `requires_grad` flag back."""
        self.close()
        self.weight.requires_grad_(self.trained)


class LiveWeights(dict[str, LiveWeight]):
    """The weights of a model that may be narrow, by name, and its running statistics, which no optimizer holds.

    Args:
        weights: every parameter of the model that may be narrow.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter]) -> None:
        super().__init__({name: LiveWeight(name, weight) for name, weight in weights.items()})

    def open(self, stage: Stage, fit: Fit) -> dict[str, Tensor]:
        """Return the live tensors of a step, θ among them; micro-batches of one step share the same θ."""
        live: dict[str, Tensor] = {}
        for name, tensor in stage.tensors.items():
            if name in self:
                live[name] = self[name].open(fit)
            else:
                live[name] = tensor if fit.grids[name].full else fit.take(name, tensor)
        return live

    def receive(self, stage: Stage, fit: Fit, live: dict[str, Tensor]) -> None:
        """Give every θ its gradient after backward, and write statistics back into the whole.

        Args:
            stage: of the model.
            fit: of the step.
            live: what `open` returned; it is emptied.
        """
        self._receive(stage, fit, live, LiveWeight.receive)

    def rehearse(self, stage: Stage, fit: Fit, live: dict[str, Tensor]) -> list[Any]:
        """Do on shapes alone what `receive` does, with θ as it was; the result stands for what stays in memory."""
        kept: list[Any] = []
        self._receive(stage, fit, live, lambda part: kept.append(part.stripped()))
        return kept

    def _receive(self, stage: Stage, fit: Fit, live: dict[str, Tensor], weight: Callable[[LiveWeight], None]) -> None:
        for name, tensor in stage.tensors.items():
            part = live.pop(name)
            if name in self:
                del part
                weight(self[name])
            elif part is not tensor:
                fit.grids[name].scatter_(tensor, fit.strip(name, part))

    @property
    def received(self) -> bool:
        """Return whether a backward pass went through the live parts of this step."""
        return any(part.received for part in self.values())

    @property
    def moved(self) -> bool:
        """Return whether a live part was changed since backward and is not written back yet."""
        return any(part.moved for part in self.values())

    def close(self) -> None:
        """End the step by writing the live parts back."""
        for part in self.values():
            part.close()

    def before_update(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Prepare every weight for an optimizer's step."""
        for part in self.values():
            part.before_update(optimizer)

    def after_update(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Write back what an optimizer holds, after its step."""
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for part in self.values():
            if id(part.theta) in held:
                part.after_update(optimizer)
                part.close()
