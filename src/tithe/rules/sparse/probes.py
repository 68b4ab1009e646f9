"""Probes ask a rule for scores instead of a gradient: what every entry of a weight contributes, sample by sample.

Shapes: N samples, T positions within a sample, O and I the two sides of a matrix, D the length of a vector.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Hashable, Iterable
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
        separable: whether several samples of a pass could be told apart so far.
        expand: whether a weight of leading size 1 is handed out once for each sample.
        reached: whether a gradient has reached the weight.
        stock: torch's own operations run for now, and whoever set this hands their gradients to the probe.
        deaf: while a loss is computed: what it differentiates within itself is no gradient of the loss.
    """

    deaf: bool = False

    def __init__(self, weight: Tensor) -> None:
        self.dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self.shape, self.device = weight.shape, weight.device
        self.anchor = torch.zeros((), dtype=weight.dtype, device=weight.device, requires_grad=True)
        self.num_samples = 1
        self.shapes: Hashable = None
        self.calls = 0
        self.separable = True
        self.expand = True
        self.reached = False
        self.stock = False
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

    def totals(self) -> list[Tensor]:
        """All sums that the probe holds, in the weight's shape."""
        return [self.total()]

    def fold(self) -> Tensor:
        """The sums over each of the first two axes, enough to tell two sets of sums apart."""
        if self._dense is None and self._rows is not None:
            rows, values = self._rows
            by_row = torch.zeros(self.shape[0], dtype=self.dtype, device=self.device)
            return torch.cat([values.sum(0), by_row.index_add_(0, rows, values.sum(1))])
        total = self.total()
        flat = total.flatten(1) if total.dim() > 1 else total.reshape(1, -1)
        return torch.cat([flat.sum(0), flat.sum(1)])

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

    def begin(self, num_samples: int, shapes: Hashable = None) -> None:
        """A backward pass over `num_samples` samples follows, each of these `shapes`."""
        self.num_samples, self.shapes, self.calls = num_samples, shapes, 0

    def end(self) -> None:
        """The backward pass is over."""
        self.reached = self.reached or self.calls > 0

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
    """Σ over samples of the squared per-sample gradient: the diagonal Fisher information, times N.

    A pass over one sample is exact however the weight is used: its uses are held until the pass is over, and added up
    before they are squared. A pass over several is exact where the probe stays `separable`: the weight is used once, by
    an operation that tells samples apart, and samples of the same shapes always bring it as many rows, which tells a
    layer that sees all of a sample from one that parts of it are routed to.

    Attributes:
        by_rule: torch's own operations would not do, whoever runs the passes has found.
        wrong: what was added up mixes samples, or tears the gradient of one apart.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight)
        self.wrong = self.by_rule = False
        self._lengths: dict[Hashable, int] = {}
        self._uses: list[tuple[Callable[[], None], Callable[[], Tensor]]] = []

    def end(self) -> None:
        """Square what one sample's uses add up to; a weight used twice by several had its gradients mixed."""
        super().end()
        if self.calls > 1:
            self.separable = False
        self.wrong = self.wrong or not (self.separable or self.num_samples == 1)
        uses, self._uses = self._uses, []
        if len(uses) == 1:
            uses[0][0]()
        elif uses:
            total = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
            for _, gradient in uses:
                total += gradient().reshape(self.shape)
            self._add_square(total)

    def gradient(self, grad: Tensor) -> None:
        """Add the square of what torch's own operations found for one sample, all uses together."""
        self.reached = True
        self.calls += 1
        self.wrong = self.wrong or self.calls > 1  # a reentrant checkpoint hands out what it finds part by part
        self._add_square(grad)

    def _use(self, num_rows: int, add: Callable[[], None], gradient: Callable[[], Tensor]) -> None:
        """Take one use of the weight.

        Args:
            num_rows: rows of its input, all samples together.
            add: adds the squares of each sample's gradient, where this is the only use.
            gradient: the gradient of all samples together.
        """
        self.calls += 1
        each, rest = divmod(num_rows, self.num_samples) if self.num_samples else (0, 1)
        if rest or self._lengths.setdefault(self.shapes, each) != each:
            self.separable = False
        if self.num_samples == 1:
            self._uses.append((add, gradient))
        elif not rest:
            add()

    def _by_sample(self, t: Tensor) -> Tensor:
        """`t` as (N, T, last) in the accumulator's dtype."""
        return t.reshape(self.num_samples, -1, t.shape[-1]).to(self.dtype)

    def matrix(self, left: Tensor, right: Tensor) -> None:
        """Add Σ_n (Σ_t left_nto right_nti)²; with one position a sample the squares factor into one product.

        Positions without a gradient (padding, or all but the first token in a classifier's last layer) are left out.
        """
        self._use(
            left.numel() // max(left.shape[-1], 1),
            lambda: self._add_products(self._by_sample(left), self._by_sample(right)),
            lambda: _flat(left).t().to(self.dtype) @ _flat(right).to(self.dtype),
        )

    def _add_products(self, left_NTO: Tensor, right_NTI: Tensor) -> None:
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
        num_rows = terms.numel() // max(terms.shape[-1], 1)
        if self.num_samples == 1:
            terms = _flat(terms).to(self.dtype).sum(0, keepdim=True)  # nothing of the activations' size is held
        self._use(
            num_rows,
            lambda: self._add_vectors(self._by_sample(terms)),
            lambda: _flat(terms).to(self.dtype).sum(0),
        )

    def _add_vectors(self, t_NTD: Tensor) -> None:
        self.dense.view(-1).add_(t_NTD.sum(1).square_().sum(0))

    def whole(self, grad: Tensor) -> None:
        """Add the square of the whole gradient, which is right for one sample alone."""
        if self.num_samples > 1 or not (len(self.shape) > 1 and self.shape[0] == 1):
            self.separable = False  # no operation told samples apart, nor can the weight be handed out once for each
        self._use(self.num_samples, lambda: self._add_square(grad), lambda: grad.to(self.dtype))

    def stacked(self, grads: Tensor) -> None:
        """Add the squares of gradients that come one a sample, Σ_n grads_n²."""
        self._use(
            self.num_samples,
            lambda: self._add_stacked(grads.to(self.dtype)),
            lambda: grads.to(self.dtype).sum(0),
        )

    def _add_stacked(self, grads: Tensor) -> None:
        self.dense.add_(grads.square().sum(0, keepdim=True))

    def per_sample(self, grad: Callable[[slice], Tensor], num_rows: int) -> None:
        """One small gradient at a time, squared at once."""
        step = num_rows // max(self.num_samples, 1)
        self._use(
            num_rows,
            lambda: self._add_each(grad, step),
            lambda: grad(slice(0, num_rows)).to(self.dtype),
        )

    def _add_each(self, grad: Callable[[slice], Tensor], step: int) -> None:
        for n in range(self.num_samples):
            self._add_square(grad(slice(n * step, (n + 1) * step)))

    def _add_square(self, grad: Tensor) -> None:
        grad = (grad.to_dense() if grad.is_sparse else grad).to(self.dtype)
        self.dense.addcmul_(grad, grad)

    def rows(self, ids: Tensor, gy: Tensor) -> None:
        """Rows repeated within a sample are summed before they are squared."""
        self._use(ids.numel(), lambda: self._add_looked_up(ids, gy), lambda: self._table(ids, gy))

    def _add_looked_up(self, ids: Tensor, gy: Tensor) -> None:
        num_rows, width = self.shape
        ids_NT = ids.reshape(self.num_samples, -1)
        owner = torch.arange(self.num_samples, device=ids.device)[:, None] * num_rows
        keys, place = (ids_NT + owner).reshape(-1).unique(return_inverse=True)
        sums = torch.zeros(keys.numel(), width, dtype=self.dtype, device=ids.device)
        sums.index_add_(0, place, gy.reshape(-1, width).to(self.dtype))
        rows, place = (keys % num_rows).unique(return_inverse=True)
        squares = torch.zeros(rows.numel(), width, dtype=self.dtype, device=ids.device)
        self.add_rows(rows, squares.index_add_(0, place, sums.square_()))

    def _table(self, ids: Tensor, gy: Tensor) -> Tensor:
        table = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        return table.index_add_(0, ids.reshape(-1), gy.reshape(-1, self.shape[1]).to(self.dtype))


class FoldProbe(SquareProbe):
    """The same squares as sums over each of the first two axes, so that a second set of them takes no room.

    Attributes:
        folded: those of the last pass; None where it did not reach the weight.
    """

    folded: Tensor | None = None

    def _use(self, num_rows: int, add: Callable[[], None], gradient: Callable[[], Tensor]) -> None:
        """Hold the use until the pass is over."""
        super()._use(num_rows, lambda: None, gradient)
        if self.separable and self.calls == 1:
            self._uses = [(add, gradient)]

    def end(self) -> None:
        """Fold the pass's squares, where samples could be told apart."""
        if not self.separable or self.calls != 1:
            self._uses = []
        super().end()
        self.folded = self.fold() if self.calls else None
        self.clear()


class SumProbe(Probe):
    """Σ over samples of the gradient itself; exact for any use of the weight."""

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


class MomentProbe(SquareProbe):
    """Σ over samples of the gradient, and of its square, in the same passes.

    The squares decide whether samples can be told apart; where they cannot, both sums are taken anew.
    """

    def __init__(self, weight: Tensor) -> None:
        self.sums = SumProbe(weight)
        super().__init__(weight)

    def clear(self) -> None:
        """Forget both sums that were accumulated."""
        super().clear()
        self.sums.clear()

    @property
    def num_bytes(self) -> int:
        """Bytes of both sums as they are held now."""
        return super().num_bytes + self.sums.num_bytes

    def totals(self) -> list[Tensor]:
        """Return Σ g and Σ g², each in the weight's shape."""
        return [self.sums.total(), self.total()]

    def gradient(self, grad: Tensor) -> None:
        """Add what torch's own operations found for one sample."""
        super().gradient(grad)
        self.sums.whole(grad)

    def matrix(self, left: Tensor, right: Tensor) -> None:
        """Add the product of each sample, and its square."""
        super().matrix(left, right)
        self.sums.matrix(left, right)

    def vector(self, terms: Tensor) -> None:
        """Add the terms of each sample, and the square of their sum."""
        super().vector(terms)
        self.sums.vector(terms)

    def whole(self, grad: Tensor) -> None:
        """Add the gradient of all samples together, and its square."""
        super().whole(grad)
        self.sums.whole(grad)

    def stacked(self, grads: Tensor) -> None:
        """Add gradients that come one a sample, and their squares."""
        super().stacked(grads)
        self.sums.stacked(grads)

    def per_sample(self, grad: Callable[[slice], Tensor], num_rows: int) -> None:
        """Add small gradients, and their squares."""
        super().per_sample(grad, num_rows)
        self.sums.per_sample(grad, num_rows)

    def rows(self, ids: Tensor, gy: Tensor) -> None:
        """Add the rows of a table, and the squares of each sample's."""
        super().rows(ids, gy)
        self.sums.rows(ids, gy)


class PeakProbe(SquareProbe):
    """The largest squared gradient of any one sample; nothing else is kept.

    Attributes:
        peak: the largest.
    """

    peak = 0.0

    def end(self) -> None:
        """Compare the pass's squares, one weight at a time."""
        super().end()
        held = [t for t in (self._dense, self._rows and self._rows[1]) if t is not None and t.numel()]
        self.peak = max([self.peak, *(float(t.max()) for t in held)])
        self.clear()


class Listener(SumProbe):
    """Hears how a weight is used and adds nothing up.

    Attributes:
        held: bytes that sums would take: those of touched rows for a table, of the weight for anything else.
        positions: values that each weight is multiplied by, where a rule says so.
    """

    held = 0
    positions = 0

    def used(self, usage: Usage) -> None:
        """Hear how many values each weight is multiplied by."""
        self.positions += usage.out_positions

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

    def per_sample(self, grad: Callable[[slice], Tensor], num_rows: int) -> None:
        """Hear a use as a convolution."""
        self._heard()

    def rows(self, ids: Tensor, gy: Tensor) -> None:
        """Hear a use as a table, and count the rows that were touched."""
        self.calls += 1
        self.held += ids.unique().numel() * self.shape[1] * self.dtype.itemsize

    def _heard(self) -> None:
        self.calls += 1
        self.held = self.shape.numel() * self.dtype.itemsize


def _flat(t: Tensor) -> Tensor:
    return t.reshape(-1, t.shape[-1])
