"""Transforms of `torch.func` (`vmap`, `grad`, `jvp`, `linearize`, …), forward-mode differentiation, batched gradients.

Under a transform no rule runs and nothing is lean: operations are torch's own, which know every transform.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self, TypeVar, cast

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import (
    retrieve_current_functorch_interpreter,
    temporarily_clear_interpreter_stack,
)
from torch.autograd import forward_ad

from tithe.errors import TitheError

# pyright: reportPrivateUsage=false

FunctionT = TypeVar("FunctionT", bound=type[torch.autograd.Function])
_torch: Any = torch
_functorch = _torch._C._functorch
outside = temporarily_clear_interpreter_stack
"""A context in which no transform runs."""


def transformed() -> bool:
    """Whether a transform of `torch.func` or forward-mode differentiation runs: our own functions know neither."""
    if torch._C._are_functorch_transforms_active():
        return True
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0


def each_row(function: FunctionT) -> FunctionT:
    """Let the backward of an `autograd.Function` take a batch of gradients (`is_grads_batched=True`): one by one.

    Kernels of ours read memory, which a batch that `vmap` runs over has in another layout than its shape says.
    """
    single = cast(Any, function).backward

    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        if torch.compiler.is_compiling():
            return single(ctx, *grads)
        for is_batch, rows in ((_functorch.is_legacy_batchedtensor, _Legacy), (_functorch.is_batchedtensor, _Rows)):
            if any(grad is not None and is_batch(grad) for grad in grads):
                with rows() as batch:
                    found = [single(ctx, *row) for row in batch.rows(grads)]
                return tuple(batch.join(of) for of in zip(*found, strict=True))
        return single(ctx, *grads)

    cast(Any, function).backward = staticmethod(backward)
    return function


class _Rows:
    """The innermost `vmap` that runs, which is left while its rows are worked on one by one."""

    def __init__(self) -> None:
        interpreter = retrieve_current_functorch_interpreter()
        self.level, self._outside = interpreter.level(), interpreter.lower()

    def __enter__(self) -> Self:
        self._outside.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._outside.__exit__(*error)

    def rows(self, grads: Sequence[Tensor | None]) -> Iterator[tuple[Tensor | None, ...]]:
        """The gradients of each row; one that is no batch is that of every row."""
        batches = [None if grad is None else self._batch(grad) for grad in grads]
        count = next(len(batch) for batch in batches if batch is not None)
        for row in range(count):
            yield tuple(grad if batch is None else batch[row] for grad, batch in zip(grads, batches, strict=True))

    def _batch(self, grad: Tensor) -> Tensor | None:
        tensor, axis = _functorch._unwrap_batched(grad, self.level)
        return None if axis is None else tensor.movedim(axis, 0)

    def join(self, rows: Sequence[Tensor | None]) -> Tensor | None:
        """One batch of what was found for each row."""
        return None if rows[0] is None else _functorch._add_batch_dim(torch.stack(cast(Any, rows)), 0, self.level)


class _Legacy(_Rows):
    """The same of the older kind, by which autograd itself batches gradients."""

    def __init__(self) -> None:
        self.level = torch._C._vmapmode_increment_nesting() - 1
        torch._C._vmapmode_decrement_nesting()

    def __enter__(self) -> Self:
        torch._C._vmapmode_decrement_nesting()
        return self

    def __exit__(self, *error: Any) -> None:
        torch._C._vmapmode_increment_nesting()

    def _batch(self, grad: Tensor) -> Tensor | None:
        is_batch = _functorch.is_legacy_batchedtensor(grad)
        return _torch._remove_batch_dim(grad, self.level, 1, 0) if is_batch else None

    def join(self, rows: Sequence[Tensor | None]) -> Tensor | None:
        """One batch of what was found for each row."""
        return None if rows[0] is None else _torch._add_batch_dim(torch.stack(cast(Any, rows)), 0, self.level)


class Lifted(torch.autograd.Function):
    """Graft inside of a transform: `apply(weight, theta, receive)`; neither is an argument of what is transformed."""

    @staticmethod
    def forward(weight: Tensor, theta: Tensor, receive: Callable[[Tensor], Tensor | None]) -> Tensor:  # pyright: ignore
        """An alias of the weight."""
        return weight.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Nothing is kept but what takes the gradient."""
        ctx.receive = inputs[2]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        """The gradient of θ: ∇θ = Sᵀ ∇w."""
        return None, ctx.receive(grads[0]), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        """Refuse a stack of weights: it comes through `functional_call`, which does without."""
        raise TitheError(
            "torch.func.vmap",
            found="a stack in place of a weight of an attached model",
            expected="the weights themselves, with inputs stacked",
            remedy="hand the stack to torch.func.functional_call under the weights' own names",
        )


def unwrapped(tensor: Tensor) -> tuple[Tensor, bool]:
    """The tensor under the wrappers of transforms, and whether `vmap` runs over it."""
    stacked = False
    while _functorch.is_functorch_wrapped_tensor(tensor):
        stacked = stacked or _functorch.is_batchedtensor(tensor)
        tensor = _functorch.get_unwrapped(tensor)
    return tensor, stacked
