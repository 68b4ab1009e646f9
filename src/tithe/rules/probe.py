"""Probes ask a rule for scores instead of a gradient: what every entry of a weight contributes, sample by sample.

Shapes: N samples, T positions within a sample, O and I the two sides of a matrix, D the length of a vector.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor


class Probe(ABC):
    """Accumulates a statistic of one weight's gradient over samples, in float32 (float64 for a float64 weight).

    Args:
        weight: the weight; only its shape, dtype and device are used.
    """

    def __init__(self, weight: Tensor) -> None:
        self.dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self.total = torch.zeros(weight.shape, dtype=self.dtype, device=weight.device)
        self.anchor = torch.zeros((), dtype=weight.dtype, device=weight.device, requires_grad=True)
        self.num_samples = 1
        self.calls = 0
        self.separable = True
        self.expand = True
        self.reached = False

    def begin(self, num_samples: int) -> None:
        """A backward pass over `num_samples` samples follows."""
        self.num_samples, self.calls = num_samples, 0

    def end(self) -> None:
        """The backward pass is over; a weight used twice in it mixed two gradients of a sample before squaring."""
        self.reached = self.reached or self.calls > 0
        if self.calls > 1:
            self.separable = False

    def samples(self, t: Tensor, last: int) -> Tensor | None:
        """`t` as (N, T, last) in the accumulator's dtype; None when its rows do not divide among the samples."""
        self.calls += 1
        rows = t.numel() // last if last else 0
        if self.num_samples == 0 or rows % self.num_samples:
            self.separable = False
            return None
        return t.reshape(self.num_samples, -1, last).to(self.dtype)

    @abstractmethod
    def matrix(self, left: Tensor, right: Tensor) -> None:
        """Add the statistic of leftᵀ right; `left` (..., O) and `right` (..., I), samples along the first axis."""

    @abstractmethod
    def vector(self, terms: Tensor) -> None:
        """Add the statistic of a vector's gradient terms (..., D), samples along the first axis."""

    @abstractmethod
    def whole(self, grad: Tensor) -> None:
        """Add the gradient of all samples together, in the weight's shape."""

    @abstractmethod
    def stacked(self, grads: Tensor) -> None:
        """Add gradients that come one per sample, (N, ...) for a weight of leading size 1."""

    @abstractmethod
    def per_sample(self, grad: Callable[[slice], Tensor], num_rows: int) -> None:
        """Add the gradient that `grad` computes from a slice of the `num_rows` leading rows."""

    @abstractmethod
    def rows(self, ids: Tensor, gy: Tensor) -> None:
        """Add the statistic of an embedding's gradient; `ids` (...), `gy` (..., D), samples along the first axis."""


class SquareProbe(Probe):
    """Σ over samples of the squared per-sample gradient: the diagonal Fisher information, times N."""

    def matrix(self, left: Tensor, right: Tensor) -> None:
        """Σ_n (Σ_t left_nto right_nti)²; with one position a sample the squares factor into one product."""
        ls, rs = self.samples(left, left.shape[-1]), self.samples(right, right.shape[-1])
        self.calls -= 1
        if ls is None or rs is None or ls.shape[1] != rs.shape[1]:
            self.separable = False
        elif ls.shape[1] == 1:
            self.total.addmm_(ls[:, 0].square().t(), rs[:, 0].square())
        else:
            product = torch.empty_like(self.total)
            for l_TO, r_TI in zip(ls, rs, strict=True):
                torch.mm(l_TO.t(), r_TI, out=product)
                self.total.addcmul_(product, product)

    def vector(self, terms: Tensor) -> None:
        """Σ_n (Σ_t terms_ntd)²."""
        t_NTD = self.samples(terms, terms.shape[-1])
        if t_NTD is not None:
            self.total.add_(t_NTD.sum(1).square_().sum(0))

    def whole(self, grad: Tensor) -> None:
        """grad², right for one sample alone."""
        self.calls += 1
        self.separable = self.separable and self.num_samples == 1
        self._add_square(grad)

    def stacked(self, grads: Tensor) -> None:
        """Σ_n grads_n²."""
        self.calls += 1
        self.total.add_(grads.to(self.dtype).square_().sum(0, keepdim=True))

    def per_sample(self, grad: Callable[[slice], Tensor], num_rows: int) -> None:
        """One small gradient at a time, squared at once."""
        self.calls += 1
        if self.num_samples == 0 or num_rows % self.num_samples:
            self.separable = False
            return
        step = num_rows // self.num_samples
        for n in range(self.num_samples):
            self._add_square(grad(slice(n * step, (n + 1) * step)))

    def _add_square(self, grad: Tensor) -> None:
        grad = grad.to(self.dtype)
        self.total.addcmul_(grad, grad)

    def rows(self, ids: Tensor, gy: Tensor) -> None:
        """Rows repeated within a sample are summed before they are squared."""
        self.calls += 1
        num_rows, width = self.total.shape
        if self.num_samples == 0 or ids.numel() % self.num_samples:
            self.separable = False
            return
        ids_NT = ids.reshape(self.num_samples, -1)
        owner = torch.arange(self.num_samples, device=ids.device)[:, None] * num_rows
        keys, place = (ids_NT + owner).reshape(-1).unique(return_inverse=True)
        sums = torch.zeros(keys.numel(), width, dtype=self.dtype, device=ids.device)
        sums.index_add_(0, place, gy.reshape(-1, width).to(self.dtype))
        self.total.index_add_(0, keys % num_rows, sums.square_())


class SumProbe(Probe):
    """Σ over samples of the gradient itself; exact for any use of the weight."""

    def end(self) -> None:
        """Sums may come in any number of calls."""
        self.reached = self.reached or self.calls > 0

    def matrix(self, left: Tensor, right: Tensor) -> None:
        """leftᵀ right over all rows."""
        self.calls += 1
        self.total.addmm_(
            left.reshape(-1, left.shape[-1]).t().to(self.dtype), right.reshape(-1, right.shape[-1]).to(self.dtype)
        )

    def vector(self, terms: Tensor) -> None:
        """The sum over all rows."""
        self.calls += 1
        self.total.add_(terms.reshape(-1, terms.shape[-1]).to(self.dtype).sum(0))

    def whole(self, grad: Tensor) -> None:
        """The gradient."""
        self.calls += 1
        self.total.add_(grad)

    def stacked(self, grads: Tensor) -> None:
        """Σ_n grads_n."""
        self.calls += 1
        self.total.add_(grads.to(self.dtype).sum(0, keepdim=True))

    def per_sample(self, grad: Callable[[slice], Tensor], num_rows: int) -> None:
        """The whole batch in one call."""
        self.whole(grad(slice(0, num_rows)))

    def rows(self, ids: Tensor, gy: Tensor) -> None:
        """Each row's gradient is added to its place."""
        self.calls += 1
        self.total.index_add_(0, ids.reshape(-1), gy.reshape(-1, gy.shape[-1]).to(self.dtype))


class SampleProbe(SumProbe):
    """Squared per-sample gradients, one sample to a backward pass; exact for any use of the weight, at twice the bytes."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight)
        self.squares = torch.zeros_like(self.total)

    def end(self) -> None:
        """Square the sample's gradient and start anew."""
        super().end()
        self.squares.addcmul_(self.total, self.total)
        self.total.zero_()
