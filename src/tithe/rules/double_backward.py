"""How the backward of a rule is differentiated itself, as `create_graph=True` asks; or refused where it cannot be.

    gx = f(gy, x, w)        of which a rule keeps less than x: a part of it, its output, one bit or a code an element

Autograd runs backward with gradients enabled then. Where what was kept suffices, f is computed by operations that
autograd can differentiate, from tensors that have their places in the graph: gy, the weight as a function of its θ, and
for x a *stand-in*, which has x's place in the graph and none of its data. Every further derivative follows by itself.
Where what was kept does not suffice, the result depends on a node that raises as soon as somebody differentiates
through it along what is missing: a first derivative that was asked for with `create_graph=True` and used as it is stays
what it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes  # pyright: ignore[reportPrivateUsage]

from tithe.errors import TitheError

_ORDINARY = (Tensor, nn.Parameter, FakeTensor)
_ZEROS: dict[tuple[torch.dtype, torch.device], Tensor] = {}
_NOWHERE: dict[torch.device, Tensor] = {}


def differentiated() -> bool:
    """Whether the backward that runs now is recorded, to be differentiated in its turn."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def uncaught() -> Any:
    """A context in which operations run as they are, also where a model differentiates within its own forward pass."""
    return torch._C.DisableTorchFunction()


class _StandIn(torch.autograd.Function):
    """A tensor of x's shape and place in the graph, of one element in memory: `apply(x)`; gx = gy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Zeros, all of them the same."""
        key = x.dtype, x.device
        zero = None if isinstance(x, FakeTensor) else _ZEROS.get(key)
        if zero is None:
            with _disable_current_modes():  # whoever counts bytes counts those of the model
                zero = x.new_zeros(())
            if not isinstance(x, FakeTensor):
                _ZEROS[key] = zero
        return zero.expand(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Tensor:
        """The gradient as it is."""
        return grads[0]


def stand_in(x: Tensor) -> Tensor | None:
    """What has x's place in the graph and none of its data, for forward to leave on `ctx`.

    It is no saved tensor: it takes no memory, and is still right when checkpointing has computed the others again.

    Returns:
        Zeros of x's shape, or x itself where it is none of torch's own tensors; None where x is in no graph.
    """
    if not x.requires_grad or torch.compiler.is_compiling():  # a captured graph has no second derivatives
        return None
    if type(x) not in _ORDINARY:
        return x
    with torch.enable_grad():
        return cast(Tensor, _StandIn.apply(x))


def mark(x: Tensor) -> Tensor | None:
    """The place of x in the graph alone, for what depends on x with a derivative of zero: a third of a stand-in's time.

    Returns:
        A tensor without elements; None where x is in no graph.
    """
    if not x.requires_grad or torch.compiler.is_compiling():
        return None
    if not x.dim():
        return stand_in(x)
    key = x.device
    nowhere = None if isinstance(x, FakeTensor) else _NOWHERE.get(key)
    if nowhere is None:
        with _disable_current_modes():
            nowhere = x.new_empty(0, dtype=torch.int64)
        if not isinstance(x, FakeTensor):
            _NOWHERE[key] = nowhere
    with torch.enable_grad():
        return x.index_select(0, nowhere)


def marked(gx: Tensor, place: Tensor | None) -> Tensor:
    """The gradient of x as a function of x whose derivative is zero: stock's depends on x too, and has that derivative.

    Args:
        gx: the gradient.
        place: x's `mark`.
    """
    return gx + place.sum() * 0 if place is not None and differentiated() else gx


class _Instead(torch.autograd.Function):
    """`apply(value, graph)`: the value of one tensor, which is differentiated as another of its shape."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, graph: Tensor) -> Tensor:
        """An alias of the value."""
        ctx.dtype = graph.dtype
        return value.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[None, Tensor]:
        """The gradient goes the other's way."""
        return None, grads[0].to(ctx.dtype)


def instead(value: Any, graph: Tensor | None) -> Any:
    """Return `value`, a tensor or None, differentiated as `graph` is, where that has a gradient to ask for."""
    if graph is None or not graph.requires_grad:
        return value
    return cast(Tensor, _Instead.apply(value, graph))


class _Entrywise(torch.autograd.Function):
    """`apply(gy, scaled)`: a linear map that multiplies entry by entry, and so is its own transpose."""

    @staticmethod
    def forward(ctx: Any, gy: Tensor, scaled: Callable[[Tensor], Tensor]) -> Tensor:
        """The map."""
        ctx.scaled = scaled
        return scaled(gy)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        """The map again."""
        return entrywise(grads[0], ctx.scaled), None


def entrywise(gy: Tensor, scaled: Callable[[Tensor], Tensor]) -> Tensor:
    """Return gy · d, with d what backward has kept.

    Args:
        gy: the gradient of the output.
        scaled: multiplies a tensor of gy's shape by d, in any way.
    """
    return cast(Tensor, _Entrywise.apply(gy, scaled)) if differentiated() else scaled(gy)


class _Missing(torch.autograd.Function):
    """`apply(error, *asked)`: a zero that depends on tensors in a way that nobody knows."""

    @staticmethod
    def forward(ctx: Any, error: Callable[[], TitheError], *asked: Tensor) -> Tensor:
        """The number 0."""
        ctx.error = error
        return asked[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """The refusal."""
        raise ctx.error()


def missing(
    found: Sequence[Tensor | None], asked: Sequence[Tensor | None], error: Callable[[], TitheError]
) -> list[Tensor | None]:
    """Gradients as they are, which raise when they are differentiated along tensors that they depend on.

    Args:
        found: the gradients.
        asked: what they depend on; what has no gradient to ask for does not count.
        error: what is raised.
    """
    on = [t for t in asked if t is not None and t.requires_grad]
    if not on:
        return list(found)
    zero = cast(Tensor, _Missing.apply(error, *on))
    return [None if t is None else t + zero.to(t) for t in found]


def refusal(place: str, kept: str, remedy: str) -> TitheError:
    """The error of a second derivative that what was kept does not give.

    Args:
        place: a parameter's name or an operation.
        kept: what was kept.
        remedy: what to do.
    """
    return TitheError(
        place,
        found=f"a second derivative (create_graph=True) through what keeps {kept}",
        expected="first derivatives alone: what is kept does not tell the second",
        remedy=remedy,
    )
