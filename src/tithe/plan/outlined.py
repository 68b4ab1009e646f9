"""Training in the span of checkpoints, set up on shapes alone: no checkpoint is read, and no basis is made.

The model carries what `tithe.attach` puts on it; only the numbers of the basis are not there. What a step holds is the
same whatever they are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from tithe.averages import BLOCK, Basis, Strip, TensorColumns
from tithe.averages.quantize import block_bytes, code_bytes, combine, encode, project
from tithe.ledger import Blank, measure
from tithe.ledger.flops import uncounted
from tithe.plan.mount import Mount
from tithe.plan.parameters import split_parameters
from tithe.plan.shared_theta import ThetaSharing, in_order
from tithe.rules import SharedTheta
from tithe.selection import Span

_FEW = 1 << 10
"""Blocks after which more of them need no more working memory, and are not worth a measurement."""


@final
class OutlinedBasis(Basis):
    """A basis without numbers: every product takes the memory that it would take, and is zero.

    Args:
        columns: of the tensors that move.
        num_vectors: checkpoints.
        bits: of a code.
        blank: the place of all shapes.
    """

    def __init__(self, columns: Sequence[Strip], *, num_vectors: int, bits: int, blank: Blank) -> None:
        self.columns, self.num_vectors, self.blocks = columns, num_vectors, (0, columns[-1].stop)
        # One bit is read off its byte by numpy, which asks for the byte: small weights' products are those of eight.
        self.bits, self._own_bits = 8 if bits == 1 else bits, bits
        self.dtype, self.device = torch.float32, torch.device("cpu")
        self._num_rows = num_vectors - 1  # each but the first is a step
        with blank:
            self._paths = torch.empty(num_vectors, self._num_rows, dtype=torch.float64)
            self._codes = torch.empty(self.num_blocks, self._num_rows, code_bytes(self.bits), dtype=torch.uint8)
            self._scales = torch.empty(self.num_blocks, self._num_rows, dtype=torch.bfloat16)
        for num_blocks in {1, *(strip.numel // BLOCK for strip in columns)}:
            self._working(num_blocks)  # measured now: in a rehearsal nothing is allocated that could be measured

    def project(self, first: int, gradient: Tensor) -> Tensor:
        """Zeros, (n,) float64, after what a projection holds was held."""
        work = gradient.new_empty(self._working(gradient.shape[0])[0], dtype=torch.uint8)
        steps = work.new_zeros(self._num_rows, dtype=torch.float64)
        del work
        return steps.new_zeros(self.num_vectors)

    def products(self, first: int, gradient: Tensor, owners: Tensor, count: int) -> Tensor:
        """Numbers of no meaning, (count, n) float64."""
        with uncounted():
            return super().products(first, gradient, owners, count)

    def compose(self, first: int, stop: int, weights: Tensor, owners: Tensor | None = None) -> Tensor:
        """Return zeros of the right shape, (blocks, 256)."""
        return weights.new_zeros(stop - first, BLOCK, dtype=self.dtype)

    def compose_bytes(self, num_blocks: int) -> int:
        """Bytes of so many blocks as they are made anew, and of what that takes besides."""
        weights = (self.num_vectors + self._num_rows) * torch.float64.itemsize  # of differences and of steps
        return num_blocks * BLOCK * self.dtype.itemsize + self._working(num_blocks)[1] + weights

    def _working(self, num_blocks: int) -> tuple[int, int]:
        return working_bytes(min(num_blocks, _FEW), self._num_rows, self._own_bits)

    def _forget(self, part: tuple[Tensor, Tensor | None]) -> None:
        """There is no memory behind it."""


@functools.cache
def working_bytes(num_blocks: int, num_rows: int, bits: int) -> tuple[int, int]:
    """Bytes that the kernels hold beside operands and result, measured: in a projection, and in a weighted sum.

    Args:
        num_blocks: blocks of 256 columns.
        num_rows: of each.
        bits: of a code.
    """
    codes, scales = encode(torch.zeros(num_blocks, num_rows, BLOCK), bits)
    gradient, weights = torch.zeros(num_blocks, BLOCK), torch.zeros(num_rows, dtype=torch.float64)
    projection = measure(lambda: project(codes, scales, bits, gradient)).peak
    total = measure(lambda: combine(codes, scales, bits, weights)).peak
    return projection - weights.nbytes, total - gradient.nbytes


@final
@dataclass(frozen=True, eq=False)
class OutlinedSpan(Span):
    """A span whose basis has no numbers: gradients go their way all the same."""

    def gather(self, weight: Tensor) -> Tensor:
        """Zeros, (m,), after as much memory as the products take."""
        products = self.columns.project(weight.detach().reshape(-1))
        return (self.mix.T @ products).to(torch.promote_types(weight.dtype, torch.float32))


@final
class OutlinedSpread(ThetaSharing):
    """A shared θ over weights whose basis has no numbers."""

    def _collect(self, grad: Tensor) -> Tensor:
        """θ's gradient, after the products of what was kept were rehearsed."""
        if self.kept is None:
            return grad
        products = self.kept.products()
        return grad + (self.spans[-1].mix.T @ products.sum(0)).to(grad)


@dataclass(frozen=True, kw_only=True)
class Outlined:
    """A model whose weights move together in the span of checkpoints that are not there.

    Args:
        theta: the coefficients, which an optimizer trains.
        index: bytes in memory that say how checkpoints make directions, and in which small gradients wait.
        basis: bytes of the basis and of the start, in a mapped file.
        write: bytes that making weights anew takes at most.
        operations: of projecting all gradients and making all weights, in a step.
        sent: bytes that ranks exchange in a step, which share out the basis by columns.
        release: gives the model back.
    """

    theta: nn.Parameter
    index: int
    basis: int
    write: int
    operations: int
    sent: int
    release: Callable[[], None]


def span(model: nn.Module, blank: Blank, *, num_vectors: int, bits: int) -> Outlined:
    """Bind every weight of a model without data to coefficients that all share, as `tithe.attach` does.

    Args:
        model: built under `blank`.
        blank: the place of all shapes.
        num_vectors: checkpoints.
        bits: of a code of the basis.

    Raises:
        TitheError: when the model has no weight that can move.
    """
    weights = split_parameters(model, where="*", head=()).candidates
    required = {name: p.requires_grad for name, p in model.named_parameters()}
    moving = {name: weights[name] for name in in_order({name: p.numel() for name, p in weights.items()})}
    strips: list[Strip] = []
    for name, weight in moving.items():
        strips.append(Strip(name, weight.numel(), strips[-1].stop if strips else 0))
    basis = OutlinedBasis(strips, num_vectors=num_vectors, bits=bits, blank=blank)
    mount = Mount(model, moving)
    with blank:
        dtype = torch.promote_types(next(iter(moving.values())).dtype, torch.float32)
        theta = nn.Parameter(torch.zeros(num_vectors, dtype=dtype))
        mix = torch.zeros(num_vectors, num_vectors, dtype=torch.float64)
        origin = torch.zeros(num_vectors, dtype=torch.float64)
        shared, bindings = SharedTheta(theta, list(moving)), [mount.bindings[name] for name in moving]
        columns = [TensorColumns(basis, strip) for strip in strips]
        spans = [
            OutlinedSpan(tuple(b.weight.shape), own, mix, origin) for b, own in zip(bindings, columns, strict=True)
        ]
        spread = OutlinedSpread(shared, bindings, spans, basis)
        for binding in bindings:
            binding.common, bound = shared, binding.selection
            assert isinstance(bound, Span)
            binding.selection = OutlinedSpan(bound.shape, bound.columns, bound.mix, bound.origin)
        spread.commit(force=True)
    mount.show_root(theta)
    handle = model.register_forward_pre_hook(spread)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter is theta)

    def release() -> None:
        handle.remove()
        mount.release()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(required[name])

    waiting = 0 if spread.kept is None else spread.kept.waiting.nbytes
    # The mix of directions, the products of checkpoints, what each is of the steps, squared lengths in each weight, and
    # products with the start.
    numbers = (3 * num_vectors - 1) * num_vectors + num_vectors * (len(moving) + 1)
    together = [strip.stop - strip.first for strip in strips[: spread.num_large]]
    together.append(waiting // (BLOCK * basis.dtype.itemsize))
    return Outlined(
        theta=theta,
        index=numbers * torch.float64.itemsize + waiting,
        basis=basis.num_blocks * ((num_vectors - 1) * block_bytes(bits) + BLOCK * basis.dtype.itemsize),
        write=max(map(basis.compose_bytes, together)),
        operations=2 * 2 * (num_vectors - 1) * sum(weight.numel() for weight in moving.values()),
        sent=basis.num_blocks * BLOCK * basis.dtype.itemsize,
        release=release,
    )
