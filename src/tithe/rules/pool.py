"""One flat parameter under all θ of a plan that chooses again: its size stays while the parts' sizes follow the choice.

    flat (K,) ──split──> a view for each tensor ──> its rule
      │ same memory
      └──> θ of each tensor, the parameters that the optimizer holds

Autograd, and DistributedDataParallel with it, sees `flat` alone: buckets, compiled graphs and wrappers made before a
new choice stay valid after it. The optimizer sees the parts, under the names of the model's own parameters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes  # pyright: ignore[reportPrivateUsage]

from tithe.rules.theta import Binding
from tithe.selection import Selection


class _Split(torch.autograd.Function):
    """The flat parameter as one view for each part; backward joins their gradients in one copy."""

    @staticmethod
    def forward(ctx: Any, flat: Tensor, shapes: Sequence[tuple[int, ...]]) -> tuple[Tensor, ...]:
        """The views."""
        ctx.set_materialize_grads(False)
        ctx.shapes, ctx.like = shapes, flat.detach()
        return tuple(_parts(flat, shapes))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        """The gradient of the flat parameter; a part that was not used has none, nor has the unused end."""
        like = cast(Tensor, ctx.like)
        if torch.is_grad_enabled():  # a gradient of this gradient is asked for: nothing in place
            parts = [like.new_zeros(s) if g is None else g for s, g in zip(ctx.shapes, grads, strict=True)]
            flat = torch.cat([part.reshape(-1) for part in parts])
            return torch.cat([flat, like.new_zeros(like.numel() - flat.numel())]), None
        out = like.new_zeros(like.shape)
        for part, grad in zip(_parts(out, ctx.shapes), grads, strict=True):
            if grad is not None:
                part.copy_(grad)
        return out, None


def _parts(flat: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Views of consecutive stretches of `flat`, one for each shape."""
    sizes = [math.prod(shape) for shape in shapes]
    parts = flat[: sum(sizes)].split(sizes)
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


class Pool:
    """The flat parameter and its parts.

    Args:
        bindings: the weights whose θ are parts, in the model's order.
        size: room for the values of every choice; a choice that needs fewer leaves the end unused.
    """

    def __init__(self, bindings: Sequence[Binding], size: int) -> None:
        self.bindings = list(bindings)
        self.flat = nn.Parameter(bindings[0].weight.detach().new_zeros(size))
        self.views: dict[str, Tensor] = {}
        for binding in self.bindings:
            binding.pool = self
        self._listen()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "views"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.views = {}
        self._listen()
        # The bindings of a copy are complete only when the whole copy is: parts are tied when first asked for.

    def take(self, selections: dict[str, Selection]) -> None:
        """Take over a new choice for every part.

        Args:
            selections: name → selection, one for each binding.
        """
        for binding in self.bindings:
            binding.select(selections[binding.name])
        values = torch.cat([binding.theta.detach().reshape(-1) for binding in self.bindings])
        if values.numel() > self.flat.numel():
            self.flat.data = values
        else:
            self.flat.data.zero_()[: values.numel()].copy_(values)
        self.flat.grad = None
        self.views = {}
        self._tie()

    @property
    def unused_bytes(self) -> int:
        """Bytes of the end that the present choice leaves unused."""
        return (self.flat.numel() - sum(b.selection.size for b in self.bindings)) * self.flat.element_size()

    def resize(self, size: int) -> bool:
        """Make room for `size` values; returns whether it is empty now, until a choice is taken over.

        A wrapper made before has to be made again.
        """
        if size == self.flat.numel():
            return False
        self.flat.data = self.flat.data.new_zeros(size)
        self.flat.grad, self.views = None, {}
        return True

    def view(self, binding: Binding) -> Tensor:
        """What stands for a part in autograd."""
        if not self.flat.requires_grad:  # while scores are taken: a view that is kept from then would never be trained
            return binding.theta.detach()
        if not self.views:
            used = [b for b in self.bindings if b.selection.size]
            with _disable_current_modes(), torch.enable_grad():  # also when first asked for in a run on shapes alone
                self._tie()
                views = cast(tuple[Tensor, ...], _Split.apply(self.flat, [b.selection.theta_shape for b in used]))
            self.views = {b.name: view for b, view in zip(used, views, strict=True)}
        return self.views[binding.name]

    def _tie(self) -> None:
        used = [b for b in self.bindings if b.selection.size]
        for binding, part in zip(used, _parts(self.flat.data, [b.selection.theta_shape for b in used]), strict=True):
            binding.theta.data = part
            binding.committed = binding.theta._version

    def link(self) -> None:
        """Show each θ its part of the flat gradient, or none."""
        start = 0
        for binding in self.bindings:
            size = binding.selection.size
            if size:
                grad = self.flat.grad
                part = None if grad is None else grad[start : start + size]
                binding.theta.grad = None if part is None else part.view(binding.theta.shape)
            start += size

    def _listen(self) -> None:
        self.flat.register_hook(self._before)
        self.flat.register_post_accumulate_grad_hook(self._after)

    def _before(self, grad: Tensor) -> None:
        """An optimizer that cleared its gradients cleared those of the parts: the sum starts anew."""
        if any(b.theta.grad is None for b in self.bindings if b.selection.size):
            self.flat.grad = None

    def _after(self, flat: Tensor) -> None:
        self.link()
