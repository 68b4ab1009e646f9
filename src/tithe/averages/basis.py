"""Store the basis of checkpoints, their coded differences, in one file, and read it a block at a time.

    d_i = w_i − w̄ = Σ_e A_ie s_e        G = D Dᵀ, (n, n), summed in float64        columns in blocks of 256

Coded are the n − 1 steps s_e of a tree over the checkpoints: its root is the start, which is exact, and each other
checkpoint is a step from one that is decoded already. In a run that is its neighbour; checkpoints that are as far from
their neighbours as from the root are steps from the root. Every step makes good what the code before it has rounded,
so that nothing adds up: w̃_child = w̃_parent + q, where q codes w_child − w̃_parent. Of a history that was recorded
with one bit these are the recorded steps again; with as many of 8 or 4, but for scales that may be rounded up again.

Nothing of the length of a weight vector is ever made orthogonal: the n × n matrix G says all that there is to know
about lengths and angles, duplicates and near-duplicates included.

Kept exact, the checkpoints themselves are in the file: their differences need not be numbers of the same dtype.
Products are taken in float64 then, and A = 1 − 11ᵀ / n.
"""

from __future__ import annotations

import mmap
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tithe.averages.history import COLUMNS, History, spans
from tithe.averages.quantize import BLOCK, CARRIED, code_bytes, combine, decode, encode, products, project
from tithe.averages.quantize import gram as products_of_rows
from tithe.selection import Columns

CPU = torch.device("cpu")
_PAGE = mmap.PAGESIZE
_ALIGNED = 64
"""Bytes at whose multiples tensors begin: a line of a processor's cache."""


@dataclass(frozen=True)
class Strip:
    """The columns of one tensor, and the position of its blocks among all.

    Args:
        name: in the history.
        numel: entries.
        first: its first block.
    """

    name: str
    numel: int
    first: int

    @property
    def stop(self) -> int:
        """Return the block after its last."""
        return self.first + -(-self.numel // BLOCK)


def strips(history: History, names: Sequence[str]) -> list[Strip]:
    """Return the columns of some tensors, one after the other; each begins a new block."""
    out: list[Strip] = []
    first = 0
    for name in names:
        out.append(Strip(name, history.rows.forms[name].numel, first))
        first = out[-1].stop
    return out


class Storage:
    """A mapped file without a name, whose pages can be given back to the system after they were read.

    Args:
        nbytes: how many.
        folder: where the file lies; a folder that cannot be written is replaced by the system's temporary one.
    """

    def __init__(self, nbytes: int, folder: Path) -> None:
        place = folder if os.access(folder, os.W_OK) else None
        with tempfile.TemporaryFile(dir=place, prefix=".basis-") as file:
            file.truncate(max(nbytes, 1))
            self._map = mmap.mmap(file.fileno(), max(nbytes, 1))
        self.bytes = torch.from_numpy(np.frombuffer(self._map, dtype=np.uint8))

    def take(self, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a tensor over a range of the bytes."""
        count = int(np.prod(shape)) * dtype.itemsize
        return self.bytes[start : start + count].view(dtype).view(shape)

    def forget(self, tensor: Tensor) -> None:
        """Give the memory behind a tensor back to the system; the bytes stay in the file."""
        first = tensor.data_ptr() - self.bytes.data_ptr()
        start = -(-first // _PAGE) * _PAGE
        length = (first + tensor.numel() * tensor.element_size()) // _PAGE * _PAGE - start
        if length > 0 and sys.platform == "linux":  # elsewhere the advice means other things, or is not known
            self._map.madvise(mmap.MADV_DONTNEED, start, length)


Edge = tuple[int, int]
"""Parent and child."""


def edges(n: int, root: int, *, chained: bool) -> list[Edge]:
    """Return a tree over n checkpoints, parents before their children.

    Args:
        n: how many.
        root: where it begins.
        chained: outward from neighbour to neighbour; else all from the root.

    Example:
        >>> edges(4, 1, chained=True), edges(4, 1, chained=False)
        ([(1, 2), (2, 3), (1, 0)], [(1, 2), (1, 3), (1, 0)])
    """
    after = [(child - 1 if chained else root, child) for child in range(root + 1, n)]
    before = [(child + 1 if chained else root, child) for child in range(root - 1, -1, -1)]
    return after + before


def centred_paths(n: int, tree: Sequence[Edge]) -> Tensor:
    """Return A, (n, n − 1) float64: the coefficient of each step in each checkpoint's difference from the mean."""
    paths = torch.zeros(n, len(tree), dtype=torch.float64)
    for place, (parent, child) in enumerate(tree):
        paths[child] = paths[parent]
        paths[child, place] = 1.0
    return paths - paths.mean(0)


class Basis:
    """The differences of checkpoints from their mean, and the start that they are added to.

    Args:
        history: the checkpoints.
        columns: of the tensors that move.
        bits: of the codes; None keeps the checkpoints as they are.
        start: weights (n,) of the checkpoints in the start: one nth each for the mean.
        blocks: [first, stop): the blocks that are held here; others are on other ranks.
        device: where products are taken; another than the CPU holds the codes.

    Attributes:
        gram: D Dᵀ of what is held here, (n, n) float64.
        squares: of each tensor the squared lengths of its d_i, (tensors, n) float64.
        offsets: D w̄ of what is held here, (n,) float64.
    """

    def __init__(
        self,
        history: History,
        columns: Sequence[Strip],
        *,
        bits: int | None,
        start: Sequence[float],
        blocks: tuple[int, int] | None = None,
        device: torch.device = CPU,
    ) -> None:
        self.columns, self.bits, self.device = columns, bits, device
        self.num_vectors = n = len(history)
        self.blocks = blocks or (0, columns[-1].stop)
        wide = any(history.rows.forms[strip.name].dtype == torch.float64 for strip in columns)
        self.dtype = torch.float64 if wide and bits is None else torch.float32
        weights = torch.tensor(start, dtype=torch.float64)
        if bits is None:
            self._tree: list[Edge] = []
            self._paths = torch.eye(n, dtype=torch.float64) - 1 / n
        else:
            self._tree = self._planted(history, weights)
            self._paths = centred_paths(n, self._tree)
        held, num_rows = self.num_blocks, self._paths.shape[1]
        width = BLOCK * self.dtype.itemsize if bits is None else code_bytes(bits)
        sizes = (held * num_rows * width, held * num_rows * 2 * (bits is not None), held * BLOCK * self.dtype.itemsize)
        ends = np.cumsum([-(-size // _ALIGNED) * _ALIGNED for size in sizes])
        self._storage = Storage(int(ends[-1]), history.folder)
        shape, dtype = (BLOCK, self.dtype) if bits is None else (width, torch.uint8)
        self._codes = self._storage.take(0, (held, num_rows, shape), dtype)
        self._scales = None if bits is None else self._storage.take(int(ends[0]), (held, num_rows), torch.bfloat16)
        self._start = self._storage.take(int(ends[1]), (held, BLOCK), self.dtype)
        self.gram = torch.zeros(n, n, dtype=torch.float64)
        self.squares = torch.zeros(len(columns), n, dtype=torch.float64)
        self.offsets = torch.zeros(n, dtype=torch.float64)
        for index, strip in enumerate(columns):
            self._fill(history, index, strip, weights)
        if device.type != "cpu":
            self._codes = self._codes.to(device)
            self._scales = None if self._scales is None else self._scales.to(device)
            self._start = self._start.to(device)
            self._paths = self._paths.to(device)

    def __deepcopy__(self, memo: dict[int, object]) -> Basis:
        return self  # nothing of it ever changes

    @property
    def nbytes(self) -> int:
        """Return the bytes of the codes and scales in this process."""
        return self._codes.numel() * self._codes.element_size() + (
            0 if self._scales is None else self._scales.numel() * self._scales.element_size()
        )

    def held(self, strip: Strip) -> tuple[int, int]:
        """Return the blocks of a tensor in this process, counted among all."""
        first, stop = max(strip.first, self.blocks[0]), min(strip.stop, self.blocks[1])
        return first, max(first, stop)

    @property
    def num_blocks(self) -> int:
        """Return the number of blocks in this process."""
        return self.blocks[1] - self.blocks[0]

    def project(self, first: int, gradient: Tensor) -> Tensor:
        """Return d_i · g over the blocks in this process: (n,) float64.

        Args:
            first: the block where the gradient begins.
            gradient: (blocks, 256).
        """
        part = self._part(first, gradient.shape[0])
        out = project(*part, self.bits, gradient.to(self.device))
        self._forget(part)
        return self._paths @ out

    def products(self, first: int, gradient: Tensor, owners: Tensor, count: int) -> Tensor:
        """Return these products for each of several weights that blocks belong to: (count, n) float64.

        Args:
            first: the block where the gradient begins.
            gradient: (blocks, 256).
            owners: of each block its weight, (blocks,) int64.
            count: weights.
        """
        part = self._part(first, gradient.shape[0])
        out = products(*part, self.bits, gradient.to(self.device), owners, count)
        self._forget(part)
        return out @ self._paths.T

    def compose(self, first: int, stop: int, weights: Tensor, owners: Tensor | None = None) -> Tensor:
        """Return w̄ + Σ weights_i d_i over the blocks in this process: (blocks, 256).

        Args:
            first: the first block.
            stop: the block after the last.
            weights: (n,) float64; with owners, a row for each.
            owners: (blocks,) int64, the row of each block.
        """
        part = self._part(first, stop - first)
        at = slice(first - self.blocks[0], stop - self.blocks[0])
        out = combine(*part, self.bits, weights.to(self.device) @ self._paths, owners).add_(self._start[at])
        self._forget(part)
        if self.device.type == "cpu":
            self._storage.forget(self._start[at])
        return out

    def _part(self, first: int, count: int) -> tuple[Tensor, Tensor | None]:
        at = slice(first - self.blocks[0], first - self.blocks[0] + count)
        return self._codes[at], None if self._scales is None else self._scales[at]

    def _forget(self, part: tuple[Tensor, Tensor | None]) -> None:
        if self.device.type == "cpu":
            for tensor in part:
                if tensor is not None:
                    self._storage.forget(tensor)

    def _planted(self, history: History, weights: Tensor) -> list[Edge]:
        """The tree that codes go along, by the first columns of the largest tensor, which every rank looks at."""
        n, root = self.num_vectors, int(weights.argmax())
        largest = max(self.columns, key=lambda strip: strip.numel)
        sample = history.columns(largest.name, 0, min(largest.numel, max(COLUMNS // n, 1))).double()
        near, far = sample.diff(dim=0).square().sum(), (sample - sample[root]).square().sum()
        return edges(n, root, chained=bool(2 * near < far))  # about equal where nothing has neighbours

    def _fill(self, history: History, index: int, strip: Strip, weights: Tensor) -> None:
        """Code the steps of one tensor, as far as they are held here, and add up products of differences."""
        first, last = self.held(strip)
        begin, end = (first - strip.first) * BLOCK, min((last - strip.first) * BLOCK, strip.numel)
        paths = torch.eye(self.num_vectors, dtype=torch.float64) if self.bits is None else self._paths
        for start, stop in spans(max(end - begin, 0), self.num_vectors):
            block = history.columns(strip.name, begin + start, begin + stop).to(self.dtype)
            mean = block.mean(0, dtype=torch.float64)
            at = slice(first + start // BLOCK - self.blocks[0], first + -(-stop // BLOCK) - self.blocks[0])
            self._start[at] = blocked(_weighted(block, weights, mean)[None].to(self.dtype))[:, 0]
            if self._scales is None:
                self._codes[at] = blocked(block)
                part, scales = blocked(block.double() - mean), None
            else:
                part, scales = self._encode(blocked(block))
                self._codes[at], self._scales[at] = part, scales
            gram = paths @ products_of_rows(part, scales, self.bits) @ paths.T
            self.gram += gram
            self.squares[index] += gram.diagonal()
            self.offsets += paths @ project(part, scales, self.bits, self._start[at])
            self._forget(self._part(at.start + self.blocks[0], at.stop - at.start))

    def _encode(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and scales of the steps along the tree, from checkpoints (B, n, 256), which are overwritten."""
        assert self.bits is not None
        errors = torch.zeros_like(rows) if CARRIED[self.bits] else None
        codes = rows.new_empty(rows.shape[0], len(self._tree), code_bytes(self.bits), dtype=torch.uint8)
        scales = rows.new_empty(rows.shape[0], len(self._tree), dtype=torch.bfloat16)
        for place, (parent, child) in enumerate(self._tree):
            wanted = rows[:, child]
            if errors is not None:
                wanted = wanted.add(errors[:, parent], alpha=CARRIED[self.bits])
            coded, scale = encode((wanted - rows[:, parent])[:, None], self.bits)
            assert scale is not None
            codes[:, place], scales[:, place] = coded[:, 0], scale[:, 0]
            reached = rows[:, parent] + decode(coded, scale, self.bits)[:, 0]
            if errors is not None:
                errors[:, child] = wanted - reached
            rows[:, child] = reached
        return codes, scales


def _weighted(block: Tensor, weights: Tensor, mean: Tensor) -> Tensor:
    """Σ weights_i of the rows, (c,) float64; the mean is at hand."""
    if bool((weights == weights[0]).all()):
        return mean
    used = weights.nonzero().flatten()
    return weights[used] @ block[used].double()


class TensorColumns(Columns):
    """The columns of one tensor, all of them in this process."""

    def __init__(self, basis: Basis, strip: Strip) -> None:
        self.basis, self.strip, self.num_vectors = basis, strip, basis.num_vectors

    def project(self, gradient: Tensor) -> Tensor:
        """Return d_i · g; only an incomplete last block of the gradient is copied."""
        count, rest = divmod(gradient.numel(), BLOCK)
        out = self.basis.project(self.strip.first, gradient[: count * BLOCK].view(count, BLOCK))
        if rest:
            out = out + self.basis.project(self.strip.first + count, blocked(gradient[None, count * BLOCK :])[:, 0])
        return out

    def compose(self, weights: Tensor) -> Tensor:
        """Return w̄ + Σ weights_i d_i for the tensor."""
        return self.basis.compose(self.strip.first, self.strip.stop, weights).view(-1)[: self.strip.numel]


def blocked(rows: Tensor) -> Tensor:
    """Cut rows (n, c) into blocks, (⌈c / 256⌉, n, 256), the last one filled up with zeros."""
    missing = -rows.shape[1] % BLOCK
    padded = torch.nn.functional.pad(rows, (0, missing)) if missing else rows
    return padded.reshape(rows.shape[0], -1, BLOCK).transpose(0, 1).contiguous()


def orthonormal(gram: Tensor, tolerance: float = 1e-10) -> Tensor:
    """Return M with Mᵀ G M = 1 on the directions that exist, and zero columns for the others.

    G = U Λ Uᵀ;  M = U Λ^{−½} where λ > tolerance · λ_max.

    Args:
        gram: (n, n) float64.
        tolerance: of squared lengths; what is shorter is rounding.

    Returns:
        (n, n) float64; the strongest direction first.
    """
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.flip(0), vectors.flip(1)
    there = values > tolerance * values[0].clamp_min(torch.finfo(torch.float64).tiny)
    return torch.where(there, vectors * values.clamp_min(torch.finfo(torch.float64).tiny).rsqrt(), 0.0)
