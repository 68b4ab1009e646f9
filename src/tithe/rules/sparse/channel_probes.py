"""Probes over input channels: how a weight is used, which gives their price, and how large their gradients are."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tithe.rules.sparse.channels import Usage
from tithe.rules.sparse.probes import SumProbe


class Meter(SumProbe):
    """Writes down how a weight is used and adds nothing up; `usages` is empty for a weight that has no channels.

    Attributes:
        usages: the calls of rules that have a price for channels.
        table: whether it is looked up in, or is a vector: then it has no channels to choose from.
        unruled: whether an operation without a rule uses it.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight)
        self.usages: list[Usage] = []
        self.table = self.unruled = self._forward = False

    @property
    def num_uses(self) -> int:
        """Gradients that arise in one pass; 0 where the weight has no channels to choose from."""
        alike = len({(usage.groups, usage.transposed) for usage in self.usages}) == 1
        return len(self.usages) + self.unruled if alike and not self.table else 0

    @property
    def heard(self) -> bool:
        """Whether any operation uses it."""
        return bool(self.usages) or self.table or self.unruled

    def used(self, usage: Usage) -> None:
        """Hear one call of a rule; what activation checkpointing runs again during backward was heard before."""
        again = torch._C._current_graph_task_id() != -1 and self._forward
        self._forward = self._forward or torch._C._current_graph_task_id() == -1
        if not again:
            self.usages.append(usage)

    def matrix(self, left: Tensor, right: Tensor) -> None:
        """A product, which was heard when it ran forward."""

    def per_sample(self, grad: Callable[[slice], Tensor], num_rows: int) -> None:
        """A convolution, which was heard when it ran forward."""

    def vector(self, terms: Tensor) -> None:
        """Hear that a vector has no channels."""
        self.table = True

    def whole(self, grad: Tensor) -> None:
        """Hear an operation without a rule."""
        self.unruled = True

    def stacked(self, grads: Tensor) -> None:
        """Hear a parameter that is used directly."""
        self.unruled = True

    def rows(self, ids: Tensor, gy: Tensor) -> None:
        """Hear that a table has none either."""
        self.table = True


class ChannelProbe(SumProbe):
    """Σ over passes of the norm of each input channel's gradient, ‖∇W_c‖₂.

    The gradient of a weight used once in a pass is reduced where it arises and dropped, so that no two layers'
    gradients stand beside each other.

    Args:
        weight: the weight.
        groups: of the convolution; 1 for a matrix.
        num_uses: calls in one pass.
        transposed: the input channels are axis 0: a matrix stored as (I, O), a transposed convolution.
    """

    def __init__(self, weight: Tensor, groups: int, num_uses: int, *, transposed: bool) -> None:
        super().__init__(weight)
        self.groups, self.num_uses, self.transposed = groups, num_uses, transposed
        count = self.shape[0] if transposed else self.shape[1] * groups
        self.norms = torch.zeros(count, dtype=self.dtype, device=self.device)

    def matrix(self, left: Tensor, right: Tensor) -> None:
        """The product leftᵀ right, reduced to Σ‖∇W_c‖₂ of each channel."""
        self.calls += 1
        left, right = left.reshape(-1, left.shape[-1]), right.reshape(-1, right.shape[-1])
        self._add(left.t().to(self.dtype) @ right.to(self.dtype))

    def whole(self, grad: Tensor) -> None:
        """A gradient in the weight's shape, reduced."""
        self.calls += 1
        self._add(grad.to(self.dtype))

    def end(self) -> None:
        """What is left to reduce is reduced."""
        if self.num_uses > 1:
            self._reduce(self.total())
            self.clear()
        self.reached = self.reached or self.calls > 0

    def _add(self, grad: Tensor) -> None:
        if self.num_uses == 1:
            self._reduce(grad)
        else:
            self.dense.add_(grad)

    def _reduce(self, grad: Tensor) -> None:
        if self.transposed:
            squares = grad.flatten(1).square().sum(1)
        elif self.groups == 1:
            squares = grad.transpose(0, 1).flatten(1).square().sum(1)
        else:
            grouped = grad.unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(0, 1)
            squares = grouped.flatten(1).square().sum(1)
        self.norms += squares.sqrt()
