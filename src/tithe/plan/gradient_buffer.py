"""Weights whose gradients are kept side by side until backward is done, and then projected together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tithe import distributed
from tithe.averages import BLOCK, Basis, Strip
from tithe.errors import TitheError
from tithe.selection import Columns


class GradientBuffer:
    """Gradients of small weights, projected together: a call for each would cost more than its products.

    Args:
        basis: what the weights move in.
        strips: theirs, one after the other.
        device: of the weights.
    """

    def __init__(self, basis: Basis, strips: Sequence[Strip], device: torch.device) -> None:
        self.basis, self.strips = basis, list(strips)
        self.first, self.stop = strips[0].first, strips[-1].stop
        self.waiting = torch.zeros(self._num_blocks * BLOCK, dtype=basis.dtype, device=device)
        """The gradient so far, in whole blocks."""
        self.is_waiting = False

    @property
    def _num_blocks(self) -> int:
        return self.stop - self.first

    def columns(self, strip: Strip) -> Columns:
        """Return columns that put their gradients aside in this buffer."""
        start = (strip.first - self.first) * BLOCK
        return _Aside(self, start, start + strip.numel)

    def forget(self) -> None:
        """Drop what a backward pass that failed has left."""
        if self.is_waiting:
            self.waiting.zero_()
            self.is_waiting = False

    def products(self) -> Tensor:
        """Return d_i · g of each weight, (weights, n) float64 on the CPU, and forget the gradients."""
        out = self._products(self.first, self.waiting.view(-1, BLOCK))
        self.forget()
        return out

    def entries(self, weights: Tensor) -> Tensor:
        """Return w̄ + Σ weights_i d_i of all of them, in whole blocks.

        Args:
            weights: (weights, n) float64, or (n,) for all alike.
        """
        return self._compose(self.first, self.stop, weights)

    def _products(self, first: int, gradient: Tensor) -> Tensor:
        owners = self._owners(first, first + gradient.shape[0])
        return self.basis.products(first, gradient, owners, len(self.strips)).cpu()

    def _compose(self, first: int, stop: int, weights: Tensor) -> Tensor:
        owners = None if weights.dim() == 1 else self._owners(first, stop)
        return self.basis.compose(first, stop, weights, owners).view(-1)

    def _owners(self, first: int, stop: int) -> Tensor:
        """Of each block the weight that it belongs to."""
        starts = torch.tensor([strip.first for strip in self.strips])
        return torch.searchsorted(starts, torch.arange(first, stop), right=True) - 1


class ShardedGradientBuffer(GradientBuffer):
    """Gradients of all weights on several ranks, each of which holds an equal part of the columns.

    A step is one reduce-scatter of the gradient, one sum of n numbers (a weight), one all-gather of the weights.
    """

    @property
    def _num_blocks(self) -> int:
        first, stop = self.basis.blocks
        return (stop - first) * distributed.world_size()

    def products(self) -> Tensor:
        """Return the products with the mean gradient over ranks."""
        distributed.meet("backward, where gradients are projected")
        part = distributed.scatter_mean(self.waiting).view(-1, BLOCK)
        self.forget()
        first, stop = self.basis.blocks
        return distributed.sum_(self._products(first, part[: stop - first]).to(self.waiting.device)).cpu()

    def entries(self, weights: Tensor) -> Tensor:
        """Return the same entries on every rank."""
        distributed.meet("the weights after a step")
        first, stop = self.basis.blocks
        return distributed.gather(self._compose(first, stop, weights).to(self.waiting.device))


class _Aside(Columns):
    """The columns of a weight whose gradient waits for the others."""

    def __init__(self, kept: GradientBuffer, start: int, stop: int) -> None:
        self.num_vectors = kept.basis.num_vectors
        self._kept, self._start, self._stop = kept, start, stop

    def project(self, gradient: Tensor) -> Tensor:
        """Put the gradient aside, and return zeros for now."""
        waiting = self._kept.waiting  # stays where it was made, with the codes, when the model moves to another device
        waiting[self._start : self._stop] += gradient.to(waiting.device)
        self._kept.is_waiting = True
        return torch.zeros(self.num_vectors, dtype=torch.float64)

    def compose(self, weights: Tensor) -> Tensor:
        """Refuse to write one weight alone.

        Raises:
            TitheError: always.
        """
        raise TitheError(
            "Span",
            found="one of several weights that are written together",
            expected="all of them, on every rank",
            remedy="call plan.step(), or plan.bind(optimizer) once",
        )
