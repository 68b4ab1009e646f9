"""Sum c_i w_i over checkpoints on disk, a block at a time: one is read while another is added up.

disk ──a block of w_1, of w_2, …──> three buffers ──> float32 or float64 sum ──> the block in its own dtype
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import torch
from torch import Tensor

from tithe.averages.entry import Entry
from tithe.averages.formats import FileEntry
from tithe.averages.safetensors_ranges import FlatFile, Form
from tithe.errors import TitheError

_LONGEST: Final = 16 << 20
_SHORTEST: Final = 1 << 18
_AT_ONCE: Final = 1 << 27
"""Bytes that are read at once of a checkpoint, as far as those of all do not exceed the last; a second set is filled
meanwhile. Long reads keep the disk busy."""

_CHUNK: Final = 1 << 15
"""Entries added up at once: their wide copies stay in the cache, and torch leaves so few to one thread. Ten thousand
operations that each wait for threads of a busy machine took 60 s where one thread took 0.5."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Piece:
    """A range of entries [start, stop) of a tensor."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class Block:
    """A run of consecutive pieces of one dtype."""

    dtype: torch.dtype
    pieces: tuple[Piece, ...]

    @property
    def averaged(self) -> bool:
        """Return whether an average has sums of the entries."""
        return self.dtype.is_floating_point or self.dtype.is_complex

    @property
    def numel(self) -> int:
        """Return the number of entries."""
        return sum(piece.stop - piece.start for piece in self.pieces)

    @property
    def nbytes(self) -> int:
        """Return the bytes of one checkpoint's entries."""
        return self.numel * self.dtype.itemsize


def blocks(forms: Mapping[str, Form], num_bytes: int) -> Iterator[Block]:
    """Return all entries of some tensors in order, in blocks of one dtype and of a limited size, a multiple of 16."""
    pieces: list[Piece] = []
    dtype, room = torch.float32, 0
    for name, form in forms.items():
        start = 0
        while start < form.numel:
            if form.dtype != dtype or room < form.dtype.itemsize:
                if pieces:
                    yield Block(dtype, tuple(pieces))
                pieces, dtype, room = [], form.dtype, num_bytes
            stop = min(form.numel, start + room // dtype.itemsize)
            pieces.append(Piece(name, start, stop))
            room -= (stop - start) * dtype.itemsize
            start = stop
    if pieces:
        yield Block(dtype, tuple(pieces))


class Sums(Protocol):
    """A source of the values of an average."""

    def blocks(self, forms: Mapping[str, Form]) -> Iterator[tuple[Block, Tensor]]:
        """Yield all entries of some tensors in order: blocks with their 1-D values, which are valid until the next."""
        ...


class Given:
    """Values that are in memory already.

    Args:
        state: name → tensor, on any device, in any dtype that holds them.
    """

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self._state = state

    def blocks(self, forms: Mapping[str, Form]) -> Iterator[tuple[Block, Tensor]]:
        """Yield the values in the dtypes that are asked for."""
        for block in blocks(forms, _LONGEST):
            flat = [self._state[piece.name].detach().reshape(-1)[piece.start : piece.stop] for piece in block.pieces]
            yield block, torch.cat([values.to("cpu", block.dtype) for values in flat])


class _Source:
    """Reads blocks of one checkpoint."""

    def __init__(self, entry: Entry) -> None:
        self._entry = entry
        files = entry.files if isinstance(entry, FileEntry) else ()
        self._file = {name: file for file in files for name in file.forms}

    def read(self, block: Block, out: Tensor) -> Tensor:
        """Fill `out`, 1-D of the block's dtype; one read for all pieces that follow each other in a file."""
        if not self._file:
            at = 0
            for piece in block.pieces:
                size = piece.stop - piece.start
                out[at : at + size] = self._entry.read(piece.name, piece.start, piece.stop)
                at += size
            return out
        runs: list[tuple[FlatFile, int, int, int]] = []
        at = 0
        for piece in block.pieces:
            file = self._file[piece.name]
            place = file.offsets[piece.name] + piece.start * block.dtype.itemsize
            size = piece.stop - piece.start
            if runs and runs[-1][0] is file and runs[-1][1] + (at - runs[-1][2]) * block.dtype.itemsize == place:
                runs[-1] = (*runs[-1][:3], at + size)
            else:
                runs.append((file, place, at, at + size))
            at += size
        for file, place, start, stop in runs:
            file.fill(place, out[start:stop])
        return out


class Stream:
    """A weighted sum of checkpoints, read from the first byte to the last.

    Args:
        entries: whole checkpoints, n of them, with the same tensors.
        weights: n numbers. A checkpoint of weight 0 is not read.
        progress: called with the bytes that were read, and how many there are to read.
    """

    def __init__(self, entries: Sequence[Entry], weights: Sequence[float], progress: Progress | None = None) -> None:
        taken = [(entry, weight) for entry, weight in zip(entries, weights, strict=True) if weight]
        self._paths, self._weights = [entry.path for entry, _ in taken], [weight for _, weight in taken]
        self._sources = [_Source(entry) for entry, _ in taken]
        self._last = self._sources[-1]
        self._progress, self._done = progress, 0
        self._total = sum(form.nbytes * (len(taken) if form.averaged else 1) for form in entries[0].forms.values())
        each = max(_SHORTEST, min(_LONGEST, _AT_ONCE // len(taken) // 16 * 16))
        self._buffers = torch.empty(2, len(taken), each, dtype=torch.uint8)
        self._out = torch.empty(each, dtype=torch.uint8)
        self._sum, self._chunk = torch.empty(2, _CHUNK * 8, dtype=torch.uint8)

    def blocks(self, forms: Mapping[str, Form]) -> Iterator[tuple[Block, Tensor]]:
        """Yield the sum over some tensors, in order: floats are summed in float32, or float64 from float32 on.

        Of complex numbers both parts are summed so. Other tensors are those of the last checkpoint that counts, and so
        is an entry that is the same infinity in each, as in masks.
        The values that come with a block, 1-D of its dtype, are valid until the next one.

        Raises:
            TitheError: naming the checkpoint and the tensor, when a value is not finite, or a file ends too early.
        """
        for block, rows in self._reads(forms):
            if not block.averaged:
                yield block, rows[0]
                continue
            values = _viewed(self._out, block.dtype, block.numel)
            parts, sums = [real(row) for row in rows], real(values)
            if not self._add(parts, sums):
                self._mend(block, parts, sums)
            yield block, values

    def _reads(self, forms: Mapping[str, Form]) -> Iterator[tuple[Block, list[Tensor]]]:
        """Block after block, of each the checkpoints that count; the next is read while one is looked at."""
        pool = ThreadPoolExecutor(1)
        before: tuple[Block, list[Future[Tensor]]] | None = None
        try:
            for number, block in enumerate(blocks(forms, self._buffers.shape[2])):
                sources = self._sources if block.averaged else [self._last]
                rows = [_viewed(buffer, block.dtype, block.numel) for buffer in self._buffers[number % 2]]
                reads = [pool.submit(one.read, block, row) for one, row in zip(sources, rows, strict=False)]
                if before is not None:
                    yield self._finished(*before)
                before = block, reads
            if before is not None:
                yield self._finished(*before)
        finally:
            pool.shutdown(cancel_futures=True)

    def _finished(self, block: Block, reads: Sequence[Future[Tensor]]) -> tuple[Block, list[Tensor]]:
        rows: list[Tensor] = []
        for read in reads:
            rows.append(read.result())
            self._done += block.nbytes
            if self._progress is not None:
                self._progress(self._done, self._total)
        return block, rows

    def _add(self, rows: Sequence[Tensor], out: Tensor) -> bool:
        """Write the weighted sum of some rows; returns whether all of it is finite, in the dtype of the rows."""
        wide, limit = summed_dtype(out.dtype), torch.finfo(out.dtype).max
        total, chunk = (_viewed(buffer, wide, _CHUNK) for buffer in (self._sum, self._chunk))
        fine = True
        for part, *few in zip(out.split(_CHUNK), *(row.split(_CHUNK) for row in rows), strict=True):
            size = part.numel()
            if size < _CHUNK:
                total, chunk = total[:size], chunk[:size]
            torch.mul(chunk.copy_(few[0]), self._weights[0], out=total)
            for values, weight in zip(few[1:], self._weights[1:], strict=True):
                total.add_(chunk.copy_(values), alpha=weight)
            low, high = torch.aminmax(total)
            fine = fine and -limit <= float(low) and float(high) <= limit  # false for a NaN
            part.copy_(total)
        return fine

    def _mend(self, block: Block, rows: Sequence[Tensor], out: Tensor) -> None:
        """Sum again, keeping the infinities that all checkpoints share.

        Raises:
            TitheError: naming the checkpoint and the tensor, when another value is not finite, or the sum is too large.
        """
        same = rows[0].to(torch.float64)
        same.masked_fill_(~same.isinf(), 0)
        for row in rows[1:]:
            same.masked_fill_(row.double() != same, 0)
        kept = same.isinf()
        for path, row in zip(self._paths, rows, strict=True):
            _check(path, block, row.to(torch.float32).isfinite() | kept)
            # Zeros are zero bits in every dtype; float8 itself cannot be filled.
            row.view(torch.uint8).view(-1, row.dtype.itemsize).masked_fill_(kept[:, None], 0)
        fine = self._add(rows, out)
        if not fine:
            raise TitheError(
                block.pieces[0].name,
                found=f"an average beyond the range of {block.dtype}",
                expected="one that keeps within it",
                remedy="use weights between 0 and 1",
            )
        out.copy_(torch.where(kept, same, out.double()))


def _check(path: Path, block: Block, fine: Tensor) -> None:
    at, fine = 0, fine.view(block.numel, -1).all(1)  # of a complex number both parts
    for piece in block.pieces:
        stop = at + piece.stop - piece.start
        if not bool(fine[at:stop].all()):
            raise TitheError(
                str(path),
                found=f"values of {piece.name} that are not finite",
                expected="finite weights",
                remedy="leave this checkpoint out",
            )
        at = stop


def _viewed(buffer: Tensor, dtype: torch.dtype, numel: int) -> Tensor:
    return buffer[: numel * dtype.itemsize].view(dtype)


def real(values: Tensor) -> Tensor:
    """Return a 1-D tensor, or of complex numbers a view of the real and imaginary parts in turn.

    Example:
        >>> real(torch.tensor([1 + 2j, 3 - 4j])).tolist()
        [1.0, 2.0, 3.0, -4.0]
    """
    return torch.view_as_real(values).view(-1) if values.is_complex() else values


def summed_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which entries are added up: float64 from float32 on, else float32."""
    return torch.float64 if dtype.itemsize >= 4 else torch.float32
