"""Let a part of a weight exist during one step: the whole tensor, and θ, which the optimizer holds.

        between steps                       from a forward pass to the optimizer's step
        θ.data ── the weight's memory       θ.data, θ.grad ── the live part
        state  ── of the whole tensor       state          ── of the live part, while the optimizer runs

θ keeps its identity. An optimizer therefore updates, and pays for, what took part in the step: every other value keeps
its bits, momentum and weight decay included.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tithe.narrow.fit import Fit, batches
from tithe.narrow.stage import Stage
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
        self._received = False
        self._version = 0
        self._whole: dict[tuple[int, str], Tensor] = {}
        weight.requires_grad_(False)
        weight.grad = None

    def open(self, grid: Grid, live: Tensor) -> None:
        """Begin with `live`, what exists of the weight, padded: modules read it, and autograd differentiates it."""
        self._grid, self.leaf = grid, nn.Parameter(live, self.trained)

    def receive(self, live: Tensor, grad: Tensor | None) -> None:
        """Turn θ into the live part with its gradient, after a backward pass."""
        if not self._received:
            self.theta.grad = None
            self.theta.data = live
            self._received, self._version = True, self.theta._version
        self.theta.grad = grad

    @property
    def received(self) -> bool:
        """Return whether θ is the live part, since a backward pass went through it."""
        return self._received

    @property
    def moved(self) -> bool:
        """Return whether the live part was changed since backward."""
        return self._received and self.theta._version != self._version

    @property
    def narrow(self) -> bool:
        """Return whether a step goes on in which a part is absent."""
        return self._grid is not None and not self._grid.full

    def show(self, optimizer: torch.optim.Optimizer, key: str, live: Tensor) -> None:
        """Show the optimizer the live part of its state, and keep the whole meanwhile."""
        state = optimizer.state[self.theta]
        self._whole[id(optimizer), key] = state[key]
        state[key] = live

    def hide(self, optimizer: torch.optim.Optimizer, key: str) -> Tensor:
        """Give the optimizer its whole state back, and return it: the live part is to be written into it."""
        state = optimizer.state[self.theta]
        whole = self._whole.pop((id(optimizer), key), None)
        state[key] = state[key].new_zeros(self.weight.shape) if whole is None else whole
        return state[key]

    def forget(self) -> None:
        """Make θ the whole again and discard the live part."""
        self.leaf = self._grid = None
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


class LiveWeights(dict[str, LiveWeight]):
    """The weights of a model that may be narrow, by name, and its running statistics, which no optimizer holds.

    Args:
        weights: every parameter of the model that may be narrow.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter]) -> None:
        super().__init__({name: LiveWeight(name, weight) for name, weight in weights.items()})
        self._fit = Fit({}, {}, {}, {})

    @property
    def trained(self) -> list[str]:
        """Return the names of those that an optimizer moves."""
        return [name for name, part in self.items() if part.trained]

    def open(self, stage: Stage, fit: Fit) -> dict[str, Tensor]:
        """Return the live tensors of a step, which modules read: a weight itself if all of it is live.

        A further micro-batch of the same step goes on with the same parts, and with the gradients that θ has now.
        """
        self._fit = fit
        tensors, weights = stage.tensors, [part for part in self.values() if part.leaf is None]
        going_on = {part.name: part.theta.detach() for part in weights if part.received}
        begun = {name: tensor.detach() for name, tensor in tensors.items() if not fit.grids[name].full}
        begun = {
            n: tensor for n, tensor in begun.items() if n not in self or (self[n].leaf is None and n not in going_on)
        }
        found = {**fit.pad(going_on), **fit.take(begun)}
        for part in weights:
            part.open(fit.grids[part.name], found.pop(part.name, part.weight.detach()))
        grads = fit.pad({part.name: part.theta.grad for part in self.values() if part.theta.grad is not None})
        live: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            leaf = self[name].leaf if name in self else None
            live[name] = found.get(name, tensor) if leaf is None else leaf
            if leaf is not None:
                leaf.grad = grads.get(name)
                self[name].weight.requires_grad_(False)  # whatever set it meanwhile: θ is what is trained
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
        self._receive(stage, fit, live, lambda _, values, grad: kept.append((values, grad)))
        return kept

    def _receive(
        self,
        stage: Stage,
        fit: Fit,
        live: dict[str, Tensor],
        receive: Callable[[LiveWeight, Tensor, Tensor | None], None],
    ) -> None:
        """Batch after batch, so that padded and unpadded parts of all weights never stand side by side."""
        tensors = stage.tensors
        for names in batches(live):
            parts = {name: live.pop(name) for name in names}
            weights = {name: self[name] for name in names if name in self}
            grads = {name: grad for name in weights if (grad := parts[name].grad) is not None}
            for name, weight in weights.items():
                weight.leaf = parts[name].grad = None
            grads = fit.strip(grads)
            values = {name: part.data for name, part in parts.items() if part is not tensors[name]}
            values = fit.strip({n: value for n, value in values.items() if n not in weights or not weights[n].received})
            for name, weight in weights.items():
                # The graph of a loss that the caller keeps holds the leaf, but needs nothing of it any more.
                parts[name].data = here = values.pop(name, weight.theta.data)
                receive(weight, here, grads.pop(name, None))
            fit.scatter_({name: tensors[name] for name in values}, values)

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
        self._close(self)

    def release(self) -> None:
        """Write the live parts back, and give the weights their `requires_grad` flags."""
        self.close()
        for part in self.values():
            part.weight.requires_grad_(part.trained)

    def _close(self, names: Collection[str]) -> None:
        """Write live parts into the weights, and make θ the whole again."""
        moved = [part for name in names if (part := self[name]).narrow and part.received]
        self._fit.scatter_({p.name: p.weight.data for p in moved}, {p.name: p.theta.detach() for p in moved})
        for name in names:
            self[name].forget()

    def before_update(self, optimizer: torch.optim.Optimizer) -> None:
        """Show an optimizer the live parts of its state."""
        for key, whole in _by_key(optimizer, [part for part in self.values() if part.narrow]).items():
            whole = {name: value for name, value in whole.items() if value.shape == self[name].weight.shape}
            for name, live in self._fit.gather(whole).items():
                self[name].show(optimizer, key, live)

    def after_update(self, optimizer: torch.optim.Optimizer) -> None:
        """Put an optimizer's state of the live parts back into its whole state, and these into the weights."""
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        weights = {name: part.weight for name, part in self.items() if id(part.theta) in held}
        for names in batches(weights):  # so that the live state of all weights never stands beside the whole
            for key, live in _by_key(optimizer, [self[name] for name in names if self[name].narrow]).items():
                live = {n: value for n, value in live.items() if value.dim() and value.shape == self[n].theta.shape}
                self._fit.scatter_({name: self[name].hide(optimizer, key) for name in live}, live)
            self._close(names)


def _by_key(optimizer: torch.optim.Optimizer, parts: Iterable[LiveWeight]) -> dict[str, dict[str, Tensor]]:
    """The tensors that an optimizer remembers: what of it → name of the weight → tensor."""
    found: dict[str, dict[str, Tensor]] = {}
    for part in parts:
        for key, value in optimizer.state.get(part.theta, {}).items():
            if isinstance(value, Tensor):
                found.setdefault(key, {})[part.name] = value
    return found
