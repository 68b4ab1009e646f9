"""What a module's parameter is bound to while a plan is attached: its θ, its selection, its probe.

    its own θ  (K_w,)     one θ for all (m,), or a row each (W, m)     parts of one flat θ (K,), K = Σ K_w and unused
    `Binding.theta`       `SharedTheta`                                `FlatTheta`

Shapes: W weights, K_w selected entries of one, m coefficients of a span.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes  # pyright: ignore[reportPrivateUsage]

from tithe.rules.sparse.probes import Probe
from tithe.rules.sparse.sparse_gradient import Touch
from tithe.selection import Channels, Coordinates, Selection

_SUFFIX = "@theta"


def theta_key(parameter: str) -> str:
    """The name under which θ of a module's parameter is registered on that module."""
    return parameter + _SUFFIX


class CommonTheta(ABC):
    """One parameter that stands for θ of several weights."""

    @abstractmethod
    def view(self, binding: Binding) -> Tensor:
        """What stands for θ of this weight in autograd."""


class Binding:
    """One weight (however many modules share it), the selection in it, what was ever trained (`moved`), and its θ.

    Args:
        name: the parameter's name in the model.
        weight: the real parameter; it keeps its key in `state_dict` and gets no gradient of its own.
    """

    def __init__(self, name: str, weight: nn.Parameter) -> None:
        self.name = name
        self.weight = weight
        self.theta = nn.Parameter(weight.detach().new_empty(0), requires_grad=False)
        self.selection: Selection = Coordinates.nothing(tuple(weight.shape))
        self.moved = self.selection
        self.max_positions: int | None = None
        self.seen_positions = 0
        self.counted = False
        self.probe: Probe | None = None
        self.common: CommonTheta | None = None
        self.touch: Touch | None = None
        self.outlived: dict[torch.Size, bool] = {}
        self.committed = self.theta._version

    @property
    def indices(self) -> Tensor:
        """Sorted flat indices of the selected entries."""
        return self.selection.indices

    @property
    def active(self) -> bool:
        """Whether a gradient is asked of this weight: some of it is selected, or it is being scored."""
        return self.probe is not None or self.selection.size > 0

    def fits(self, groups: int, *, transposed: bool) -> bool:
        """Whether the selection has a rule for such a use of the weight; selected channels mean one layout alone."""
        selection = self.selection
        if self.probe is not None or not isinstance(selection, Channels):
            return True
        return (selection.groups, selection.transposed) == (groups, transposed)

    def note_positions(self, positions: int) -> None:
        """Note an input larger than the one that the selection's price was made for; the plan says so after the step.

        Args:
            positions: the values of one input channel.
        """
        if self.max_positions is not None and positions > max(self.max_positions, self.seen_positions):
            self.seen_positions = positions

    def saw(self, shape: torch.Size, outlived: bool) -> None:
        """Note in backward whether an input of this shape was alive without the rule, as a batch is that is held."""
        self.outlived[shape] = outlived

    @property
    def asked(self) -> Tensor | None:
        """The tensor that stands for θ in autograd, or None when the weight is frozen."""
        if self.probe is not None:
            return self.probe.anchor
        if not self.selection.size:
            return None
        return self.theta if self.common is None else self.common.view(self)

    def select(self, selection: Selection) -> None:
        """Take over `selection`: θ keeps its identity and gets the weight's values there."""
        self.selection = selection.to(self.weight.device)
        self.touch = self._touch()
        self.counted = False
        self.theta.grad = None
        self.theta.requires_grad_(False)
        if self.theta.shape != selection.theta_shape:
            # A loss of an earlier step keeps autograd's accumulator for θ alive, which remembers the old size; torch
            # drops it when the dtype changes. A wrapper that holds it (DDP) is told at the next step to wrap again.
            self.theta.data = self.theta.data.to(torch.float32 if self.theta.dtype == torch.float64 else torch.float64)
        self.theta.data = self.selection.gather(self.weight.detach())
        if self.selection.size:
            self.theta.requires_grad_(True)
        self.committed = self.theta._version

    def follow(self) -> None:
        """Follow the weight to other memory, perhaps on another device."""
        if self.selection.items.device != self.weight.device:
            self.selection = self.selection.to(self.weight.device)
            self.touch = self._touch()

    def _touch(self) -> Touch | None:
        selection = self.selection
        if not isinstance(selection, Coordinates) or not selection.size or len(selection.shape) < 2:
            return None
        return Touch.of(selection.indices, selection.shape)

    @property
    def index_bytes(self) -> int:
        """Bytes of the tensors that say where θ belongs."""
        tensors = [self.selection.items]
        if self.touch is not None:
            tensors += [self.touch.rows, self.touch.columns, self.touch.row, self.touch.column]
            tensors += [] if self.touch.inner is None else [self.touch.inner]
        return sum(t.numel() * t.element_size() for t in tensors)

    def commit(self, *, force: bool = False) -> None:
        """Write θ into the weight in place, w ← S θ; entries outside the selection keep their bits.

        Args:
            force: also when θ's version did not change, as after an update through `.data` or a foreign kernel.
        """
        if self.theta.numel() and (force or self.theta._version != self.committed):
            self.selection.scatter_(self.weight, self.theta.detach())
            self.committed = self.theta._version
            if not self.counted:
                self.moved = self.selection.union(self.moved)
                self.counted = True

    def refresh(self) -> None:
        """θ ← Sᵀ w, after the weight itself was loaded or changed; a θ that weights share follows none of them."""
        if not self.theta.numel():
            return
        with torch.no_grad():
            self.theta.copy_(self.selection.gather(self.weight))
        self.committed = self.theta._version


class _Split(torch.autograd.Function):
    """The flat parameter as one view for each part; backward joins their gradients in one copy."""

    @staticmethod
    def forward(ctx: Any, flat: Tensor, shapes: Sequence[tuple[int, ...]]) -> tuple[Tensor, ...]:
        """Views of the parts, in order."""
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


class FlatTheta(CommonTheta):
    """The flat parameter under all θ of a plan that chooses again: its size stays while its parts follow the choice.

        parameter (K,) ──split──> a view for each tensor ──> its rule
          │ same memory
          └──> θ of each tensor, the parameters that the optimizer holds

    Autograd, and DistributedDataParallel with it, sees `parameter` alone: buckets, compiled graphs and wrappers made
    before a new choice stay valid after it. The optimizer sees the parts, under the names that the model gives.

    Args:
        bindings: the weights whose θ are parts, in the model's order.
        size: room for the values of every choice; a choice that needs fewer leaves the end unused.
    """

    def __init__(self, bindings: Sequence[Binding], size: int) -> None:
        self.bindings = list(bindings)
        self.parameter = nn.Parameter(bindings[0].weight.detach().new_zeros(size))
        self.views: dict[str, Tensor] = {}
        for binding in self.bindings:
            binding.common = self
        self._listen()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "views"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
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
        if values.numel() > self.parameter.numel():
            self.parameter.data = values
        else:
            self.parameter.data.zero_()[: values.numel()].copy_(values)
        self.parameter.grad = None
        self.views = {}
        self._tie()

    @property
    def unused_bytes(self) -> int:
        """Bytes of the end that the present choice leaves unused."""
        return (self.parameter.numel() - sum(b.selection.size for b in self.bindings)) * self.parameter.element_size()

    def resize(self, size: int) -> bool:
        """Make room for `size` values; returns whether it is empty now, until a choice is taken over.

        A wrapper made before has to be made again.
        """
        if size == self.parameter.numel():
            return False
        self.parameter.data = self.parameter.data.new_zeros(size)
        self.parameter.grad, self.views = None, {}
        return True

    def view(self, binding: Binding) -> Tensor:
        """The part's view of the flat parameter; the plain values while the parameter asks for no gradient."""
        if not self.parameter.requires_grad:  # while scores are taken: a view kept from then would never be trained
            return binding.theta.detach()
        if not self.views:
            used = [b for b in self.bindings if b.selection.size]
            with _disable_current_modes(), torch.enable_grad():  # also when first asked for in a run on shapes alone
                self._tie()
                views = cast(tuple[Tensor, ...], _Split.apply(self.parameter, [b.selection.theta_shape for b in used]))
            self.views = {b.name: view for b, view in zip(used, views, strict=True)}
        return self.views[binding.name]

    def _tie(self) -> None:
        used = [b for b in self.bindings if b.selection.size]
        parts = _parts(self.parameter.data, [b.selection.theta_shape for b in used])
        for binding, part in zip(used, parts, strict=True):
            binding.theta.data = part
            binding.committed = binding.theta._version

    def link(self) -> None:
        """Show each θ its part of the flat gradient, or none; the gradient of parts that were cleared is cleared."""
        self._clear()
        self._show()

    def _show(self) -> None:
        start = 0
        for binding in self.bindings:
            size = binding.selection.size
            if size:
                grad = self.parameter.grad
                part = None if grad is None else grad[start : start + size]
                binding.theta.grad = None if part is None else part.view(binding.theta.shape)
            start += size

    def _listen(self) -> None:
        self.parameter.register_hook(self._before)
        self.parameter.register_post_accumulate_grad_hook(self._after)

    def _before(self, grad: Tensor) -> None:
        """An optimizer that cleared its gradients cleared those of the parts: the sum starts anew."""
        self._clear()

    def _clear(self) -> None:
        if any(b.theta.grad is None for b in self.bindings if b.selection.size):
            self.parameter.grad = None

    def _after(self, flat: Tensor) -> None:
        self._show()


class SharedTheta(CommonTheta):
    """One θ that weights share: a vector for all of them, or a row for each.

    Args:
        parameter: (m,), or (weights, m) with one row for each.
        names: of the weights, in the order of the rows.
    """

    def __init__(self, parameter: nn.Parameter, names: Sequence[str]) -> None:
        self.parameter = parameter
        self._rows = {name: row for row, name in enumerate(names)}

    def view(self, binding: Binding) -> Tensor:
        """The vector itself, or the weight's row of it."""
        return self.parameter if self.parameter.dim() == 1 else self.parameter[self._rows[binding.name]]

    def values(self, name: str) -> Tensor:
        """The values that a weight's θ has now, apart from autograd."""
        values = self.parameter.detach()
        return values if values.dim() == 1 else values[self._rows[name]]
