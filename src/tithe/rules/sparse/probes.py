"""Probes ask a rule for scores instead of a gradient: what every entry of a weight contributes, sample by sample.

Shapes: N samples, T positions within a sample, O and I the two sides of a matrix, D the length of a vector.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager

import torch
from torch import Tensor

from tithe.rules.sparse.channels import Usage

_CACHE = 1 << 18
"""Entries of a product that stay in a core's cache between the multiplication and the squaring."""


class Probe(ABC):
    """Accumulates a statistic of one weight's gradient over samples, in float32 (float64 for a float64 weight).

    Args:
        weight: the weight; only its shape, dtype and device are used.

    Attributes:
        deaf: while a loss is computed: what it differentiates within itself is no gradient of the loss.
    """

    deaf: bool = False

    def __init__(self, weight: Tensor) -> None:
        self.dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self.shape, self.device = weight.shape, weight.device
        self.anchor = torch.zeros((), dtype=weight.dtype, device=weight.device, requires_grad=True)
        self.num_samples = 1
        self.calls = 0
        self.separable = True
        self.expand = True
        self.reached = False
        self.clear()

    def clear(self) -> None:
        """Forget everything that was accumulated."""
        self._dense: Tensor | None = None
        self._rows: tuple[Tensor, Tensor] | None = None

    @property
    def dense(self) -> Tensor:
        """The running sums, in the weight's shape."""
        if self._dense is None:
            self._dense = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        return self._dense

    @property
    def num_bytes(self) -> int:
        """Bytes of the running sums as they are held now."""
        held = [] if self._dense is None else [self._dense]
        held += [] if self._rows is None else list(self._rows)
        return sum(t.numel() * t.element_size() for t in held)

    def total(self) -> Tensor:
        """The sums in the weight's shape; rows that no sample touched are zero."""
        dense = self.dense
        if self._rows is not None:
            dense.index_add_(0, *self._rows)
            self._rows = None
        return dense

    def fold(self) -> Tensor:
        """The sums over each of the first two axes, enough to tell two sets of sums apart; the probe starts anew."""
        if self._dense is None and self._rows is not None:
            rows, values = self._rows
            by_row = torch.zeros(self.shape[0], dtype=self.dtype, device=self.device)
            folded = torch.cat([values.sum(0), by_row.index_add_(0, rows, values.sum(1))])
        else:
            total = self.total()
            flat = total.flatten(1) if total.dim() > 1 else total.reshape(1, -1)
            folded = torch.cat([flat.sum(0), flat.sum(1)])
        self.clear()
        return folded

    def add_rows(self, rows: Tensor, values: Tensor) -> None:
        """Add `values` (U, D) to distinct `rows` (U,), holding only rows that were touched."""
        if self._rows is None:
            self._rows = rows, values
            return
        held, sums = self._rows
        merged, place = torch.cat([held, rows]).unique(return_inverse=True)
        if merged.numel() > held.numel():
            grown = sums.new_zeros(merged.numel(), sums.shape[1])
            sums = grown.index_copy_(0, place[: held.numel()], sums)
        self._rows = merged, sums.index_add_(0, place[held.numel() :], values)

    @property
    def hears(self) -> bool:
        """Whether gradients that arise now count: not within a loss, nor while they are recorded themselves."""
        return not self.deaf and not torch.is_grad_enabled()

    def used(self, usage: Usage) -> None:
        """A rule ran forward with this weight; most probes need not know how."""
        del usage

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

    def alone(self, grad: Tensor) -> None:
        """Add the gradient of a use that mixes all samples, in the weight's shape."""
        self.separable = False
        self.whole(grad if grad.layout == torch.strided else grad.to_dense())

    @abstractmethod
    def stacked(self, grads: Tensor) -> None:
        """Add gradients that come one per sample, (N, ...) for a weight of leading size 1."""

    @abstractmethod
    def per_sample(self, grad: Callable[[slice], Tensor], num_rows: int) -> None:
        """Add the gradient that `grad` computes from a slice of the `num_rows` leading rows."""

    @abstractmethod
    def rows(self, ids: Tensor, gy: Tensor) -> None:
        """Add the statistic of an embedding's gradient; `ids` (...), `gy` (..., D), samples along the first axis."""


@contextmanager
def deaf(probes: Iterable[Probe]) -> Generator[None]:
    """Hear no gradient inside: a loss is computed there, and what it differentiates within itself is no gradient of it.

    Where it differentiates its own gradient (a penalty on it, forces), that reaches a probe afterwards as one more use
    of its weight.
    """
    silent = list(probes)
    for probe in silent:
        probe.deaf = True
    try:
        yield
    finally:
        for probe in silent:
            probe.deaf = False


class SquareProbe(Probe):
    """Σ over samples of the squared per-sample gradient: the diagonal Fisher information, times N."""

    def matrix(self, left: Tensor, right: Tensor) -> None:
        """Add Σ_n (Σ_t left_nto right_nti)²; with one position a sample the squares factor into one product.

        Positions without a gradient (padding, or all but the first token in a classifier's last layer) are left out.
        """
        left_NTO, right_NTI = self.samples(left, left.shape[-1]), self.samples(right, right.shape[-1])
        self.calls -= 1
        if left_NTO is None or right_NTI is None or left_NTO.shape[1] != right_NTI.shape[1]:
            self.separable = False
            return
        pairs = self._live_pairs(left_NTO, right_NTI)
        height, width = self.shape[0], self.shape[1]
        step = height if height * width <= _CACHE * 2 else max(_CACHE // width, 1)
        product_OI = torch.empty(min(step, height), width, dtype=self.dtype, device=self.device)
        for start in range(0, height, step):
            total_OI = self.dense[start : start + step]
            block_OI = product_OI[: total_OI.shape[0]]
            for left_TO, right_TI in pairs:
                torch.mm(left_TO[:, start : start + step].t(), right_TI, out=block_OI)
                total_OI.addcmul_(block_OI, block_OI)

    def _live_pairs(self, left_NTO: Tensor, right_NTI: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The factors of each sample without its dead positions; samples with one live position are added at once."""
        lefts, rights = left_NTO.unbind(), right_NTI.unbind()
        length = left_NTO.shape[1]
        if length > 1 and bool((left_NTO[:, [length // 2, length - 1]] != 0).any(-1).all()):
            return list(zip(lefts, rights, strict=True))  # a glance at two positions: no padding, no lone first token
        live_NT = (left_NTO != 0).any(-1)
        counts = live_NT.sum(1)
        alone_NT = live_NT & (counts == 1)[:, None]
        self.dense.addmm_(left_NTO[alone_NT].square_().t(), right_NTI[alone_NT].square_())
        many = (counts > 1).nonzero().flatten().tolist()
        return [(lefts[n][live_NT[n]], rights[n][live_NT[n]]) for n in many]

    def vector(self, terms: Tensor) -> None:
        """Add the squares of each sample's gradient, Σ_n (Σ_t terms_ntd)²."""
        t_NTD = self.samples(terms, terms.shape[-1])
        if t_NTD is not None:
            self.dense.view(-1).add_(t_NTD.sum(1).square_().sum(0))

    def whole(self, grad: Tensor) -> None:
        """Add the square of the whole gradient, which is right for one sample alone."""
        self.calls += 1
        self.separable = self.separable and self.num_samples == 1
        self._add_square(grad)

    def stacked(self, grads: Tensor) -> None:
        """Add the squares of gradients that come one a sample, Σ_n grads_n²."""
        self.calls += 1
        self.dense.add_(grads.to(self.dtype).square().sum(0, keepdim=True))

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
        self.dense.addcmul_(grad, grad)

    def rows(self, ids: Tensor, gy: Tensor) -> None:
        """Rows repeated within a sample are summed before they are squared."""
        self.calls += 1
        num_rows, width = self.shape
        if self.num_samples == 0 or ids.numel() % self.num_samples:
            self.separable = False
            return
        ids_NT = ids.reshape(self.num_samples, -1)
        owner = torch.arange(self.num_samples, device=ids.device)[:, None] * num_rows
        keys, place = (ids_NT + owner).reshape(-1).unique(return_inverse=True)
        sums = torch.zeros(keys.numel(), width, dtype=self.dtype, device=ids.device)
        sums.index_add_(0, place, gy.reshape(-1, width).to(self.dtype))
        rows, place = (keys % num_rows).unique(return_inverse=True)
        squares = torch.zeros(rows.numel(), width, dtype=self.dtype, device=ids.device)
        self.add_rows(rows, squares.index_add_(0, place, sums.square_()))


class SumProbe(Probe):
    """Σ over samples of the gradient itself; exact for any use of the weight."""

    def end(self) -> None:
        """Sums may come in any number of calls."""
        self.reached = self.reached or self.calls > 0

    def matrix(self, left: Tensor, right: Tensor) -> None:
        """Add the product leftᵀ right over all rows."""
        self.calls += 1
        self.dense.addmm_(
            left.reshape(-1, left.shape[-1]).t().to(self.dtype), right.reshape(-1, right.shape[-1]).to(self.dtype)
        )

    def vector(self, terms: Tensor) -> None:
        """The sum over all rows."""
        self.calls += 1
        self.dense.view(-1).add_(terms.reshape(-1, terms.shape[-1]).to(self.dtype).sum(0))

    def whole(self, grad: Tensor) -> None:
        """Add the gradient as it is."""
        self.calls += 1
        self.dense.add_(grad)

    def stacked(self, grads: Tensor) -> None:
        """Add gradients that come one a sample, Σ_n grads_n."""
        self.calls += 1
        self.dense.add_(grads.to(self.dtype).sum(0, keepdim=True))

    def per_sample(self, grad: Callable[[slice], Tensor], num_rows: int) -> None:
        """The whole batch in one call."""
        self.whole(grad(slice(0, num_rows)))

    def rows(self, ids: Tensor, gy: Tensor) -> None:
        """Each row's gradient is added to its place."""
        self.calls += 1
        rows, place = ids.reshape(-1).unique(return_inverse=True)
        sums = torch.zeros(rows.numel(), self.shape[1], dtype=self.dtype, device=ids.device)
        self.add_rows(rows, sums.index_add_(0, place, gy.reshape(-1, self.shape[1]).to(self.dtype)))


class SampleProbe(SumProbe):
    """Squared per-sample gradients, one sample to a backward pass: exact for any use, at twice the bytes."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight)
        self.squares = torch.zeros(self.shape, dtype=self.dtype, device=self.device)

    def end(self) -> None:
        """Square the sample's gradient and start anew."""
        super().end()
        grad = super().total()
        self.squares.addcmul_(grad, grad)
        grad.zero_()

    def total(self) -> Tensor:
        """The sums of the squared gradients."""
        return self.squares


class Listener(SumProbe):
    """Hears how a weight is used and adds nothing up.

    `held` counts the bytes that sums would take: touched rows for a table, the weight's size for anything else.
    """

    held = 0

    def matrix(self, left: Tensor, right: Tensor) -> None:
        """Hear a use as a matrix."""
        self._heard()

    def vector(self, terms: Tensor) -> None:
        """Hear a use as a vector."""
        self._heard()

    def whole(self, grad: Tensor) -> None:
        """Hear a use in any other way."""
        self._heard()

    def stacked(self, grads: Tensor) -> None:
        """Hear a use once per sample."""
        self._heard()

    def rows(self, ids: Tensor, gy: Tensor) -> None:
        """Hear a use as a table, and count the rows that were touched."""
        self.calls += 1
        self.held += ids.unique().numel() * self.shape[1] * self.dtype.itemsize

    def _heard(self) -> None:
        self.calls += 1
        self.held = self.shape.numel() * self.dtype.itemsize
