"""Read and write safetensors by ranges of entries: only the requested part of a tensor is in memory.

A memory map would do for reading, but what it has shown counts as resident until the system wants it back; ranges are
read into buffers instead. A file is opened for each range: 3 µs more than a handle that is kept, and no limit on how
many checkpoints a history has. The format: eight bytes that say how long the header is, the header in JSON, the data.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Final

import torch
from torch import Tensor

from tithe.averages.checksums import KEY as CHECKSUMS
from tithe.averages.checksums import Pages, Summing, blank
from tithe.delta.file import CODES, DTYPES
from tithe.errors import TitheError

_LONGEST_HEADER: Final = 100_000_000
"""Bytes; what safetensors itself accepts."""


@dataclass(frozen=True)
class Form:
    """The dtype and the shape of a tensor.

    Args:
        dtype: one that safetensors stores.
        shape: () for a single number.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> Form:
        """Return the form of a tensor."""
        return cls(tensor.dtype, tuple(tensor.shape))

    @property
    def numel(self) -> int:
        """Return the number of entries."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Return the bytes of its data."""
        return self.numel * self.dtype.itemsize

    @property
    def averaged(self) -> bool:
        """Return whether an average has sums of its entries: of floating-point and complex numbers, not of integers."""
        return self.dtype.is_floating_point or self.dtype.is_complex

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} of shape {list(self.shape)}"


def check_plain(place: str, name: str, tensor: Tensor, *, pickled: bool = False) -> None:
    """Check that a tensor is what safetensors can store.

    Args:
        place: for the message.
        name: what the tensor is called.
        tensor: of any kind.
        pickled: take complex numbers of any width, too.

    Raises:
        TitheError: when it is sparse, quantised, or of another dtype.
    """
    plain = tensor.layout == torch.strided and not tensor.is_quantized
    if not plain or not (tensor.dtype in CODES or (pickled and tensor.is_complex())):
        raise TitheError(
            place,
            found=f"{name}, a {tensor.layout} tensor of {tensor.dtype}",
            expected="dense tensors of a dtype that safetensors stores",
            remedy="keep the weights from before they are made sparse or quantised",
        )


@dataclass(frozen=True)
class FlatFile:
    """A safetensors file whose header was read and checked.

    Args:
        path: the file.
        forms: name → dtype and shape.
        offsets: name → where in the file the tensor begins, in bytes.
        metadata: the free strings of the header.
        pages: checksums of the data, where the file has them.
    """

    path: Path
    forms: Mapping[str, Form]
    offsets: Mapping[str, int]
    metadata: Mapping[str, str]
    pages: Pages | None = field(default=None, compare=False, repr=False)

    @classmethod
    def open(cls, path: Path) -> FlatFile:
        """Open a file and read its header.

        Args:
            path: of the file; it is closed again.

        Raises:
            TitheError: when there is no such file, or it is not a complete safetensors file.
        """
        try:
            with path.open("rb") as file:
                start = file.read(8)
                length = int.from_bytes(start, "little")
                if not 0 < length <= _LONGEST_HEADER:
                    raise ValueError(f"a header of {length} bytes")
                header = file.read(length)
                size = file.seek(0, 2)
            content: Any = json.loads(header.decode())
            metadata = {str(key): str(value) for key, value in content.pop("__metadata__", {}).items()}
            forms, offsets = _laid_out(content, 8 + length, size)
            told = metadata.pop(CHECKSUMS, None)
            pages = None if told is None else Pages(path, start + header, told, size)
        except FileNotFoundError as error:
            raise TitheError(
                str(path), found="no such file", expected="a safetensors file", remedy="check the path"
            ) from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise TitheError(
                str(path),
                found=f"a file that cannot be read ({error})",
                expected="a complete safetensors file",
                remedy="copy or download it again: it is truncated, damaged or of another kind",
            ) from error
        return cls(path, forms, offsets, metadata, pages)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Return entries [start, stop) of a tensor in row-major order, a new 1-D tensor on the CPU.

        Raises:
            TitheError: when the file is gone, or shorter than it was.
        """
        form = self.forms[name]
        out = torch.empty((form.numel if stop is None else stop) - start, dtype=form.dtype)
        self.fill(self.offsets[name] + start * form.dtype.itemsize, out)
        return out

    def fill(self, place: int, out: Tensor) -> None:
        """Read numbers as they are stored, and check the pages that they are in where the file has checksums.

        Args:
            place: of the first number in the file, in bytes.
            out: takes them, 1-D on the CPU, contiguous.

        Raises:
            TitheError: when the file is gone, shorter than it was, or not what was recorded.
        """
        fill_range(self.path, place, out, self.pages)

    def check_all(self) -> None:
        """Read the file through and check it, where it has checksums.

        Raises:
            TitheError: when it is not what was recorded, or cannot be read.
        """
        if self.pages is None:
            return
        try:
            self.pages.check_all()
        except (OSError, EOFError) as error:
            raise _gone(self.path, error) from error

    def tensor(self, name: str) -> Tensor:
        """Return all of a tensor."""
        return self.read(name).view(self.forms[name].shape)


def read_range(path: Path, offset: int, count: int, dtype: torch.dtype) -> Tensor:
    """Return numbers as they are stored in a file, a new 1-D tensor on the CPU.

    Args:
        path: the file.
        offset: of the first number, in bytes.
        count: how many numbers.
        dtype: theirs.

    Raises:
        TitheError: when the file cannot be read, or ends before.
    """
    out = torch.empty(count, dtype=dtype)
    fill_range(path, offset, out)
    return out


def fill_range(path: Path, place: int, out: Tensor, pages: Pages | None = None) -> None:
    """Read the bytes of a contiguous CPU tensor from a place in a file.

    Args:
        path: the file.
        place: of the first byte.
        out: 1-D.
        pages: checks what was read.

    Raises:
        TitheError: when the file cannot be read, ends before, or is not what was recorded.
    """
    if not out.numel():
        return
    data = out.view(torch.uint8).numpy().data
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(place)
            todo = data
            while todo:
                done = file.readinto(todo)
                if not done:
                    raise EOFError
                todo = todo[done:]
            if pages is not None:
                pages.check(file, place, data)
    except (OSError, EOFError) as error:
        raise _gone(path, error) from error


def _laid_out(content: Mapping[str, Any], start: int, size: int) -> tuple[dict[str, Form], dict[str, int]]:
    """Where each tensor lies by the header of a file: one after the other, without gaps, to the file's end.

    Raises:
        ValueError: when they do not.
        KeyError: for an unknown dtype, or something that is not said.
        TypeError: when something is not of its kind.
    """
    forms: dict[str, Form] = {}
    offsets: dict[str, int] = {}
    spans: list[tuple[int, int]] = []
    for name, told in content.items():
        shape, (first, last) = tuple(told["shape"]), told["data_offsets"]
        if any(type(number) is not int or number < 0 for number in (*shape, first, last)):
            raise ValueError(f"sizes of {name} that are no whole numbers")
        if told["dtype"] not in DTYPES:
            raise ValueError(f"{name} of dtype {told['dtype']}")
        forms[name] = form = Form(DTYPES[told["dtype"]], shape)
        if last - first != form.nbytes:
            raise ValueError(f"{last - first} bytes for {name}, {form}")
        offsets[name] = start + first
        spans.append((first, last))
    end = 0
    for first, last in sorted(spans):
        if first != end:
            raise ValueError(f"data that begins at byte {first} where {end} was expected")
        end = last
    if start + end != size:
        raise ValueError(f"{size} bytes where the header announces {start + end}")
    return forms, offsets


def _gone(path: Path, error: Exception) -> TitheError:
    reason = "it has become shorter" if isinstance(error, EOFError) else str(error)
    return TitheError(
        str(path),
        found=f"a file that can no longer be read ({reason})",
        expected="what was there when the history was opened",
        remedy="leave the checkpoints in place while they are read",
    )


class FlatWriter:
    """A writer of a safetensors file from its beginning to its end, a range of entries at a time.

    Args:
        file: open for writing, empty.
        forms: name → form, of what will be written.
        metadata: free strings of the header.
        checked: whether the header gets checksums, by `finish`; the file can then go back.

    Attributes:
        names: in the order in which the tensors are to be written.

    Example:
        >>> import io
        >>> file = io.BytesIO()
        >>> writer = FlatWriter(file, {"bit": Form(torch.bool, ()), "pair": Form(torch.float32, (2,))}, {})
        >>> writer.names
        ('pair', 'bit')
        >>> writer.write(torch.ones(2)), writer.write(torch.tensor(True))
        (None, None)
        >>> file.tell() % 8
        1
    """

    def __init__(
        self, file: BinaryIO, forms: Mapping[str, Form], metadata: Mapping[str, str], *, checked: bool = False
    ) -> None:
        # The widest dtypes come first, so that each tensor begins at a multiple of its own: readers view, not copy.
        self.names = tuple(sorted(forms, key=lambda name: -forms[name].dtype.itemsize))
        sums = {CHECKSUMS: blank(sum(form.nbytes for form in forms.values()))} if checked else {}
        content: dict[str, Any] = {"__metadata__": {**metadata, **sums}} if metadata or sums else {}
        end = 0
        for name in self.names:
            form = forms[name]
            content[name] = {
                "dtype": CODES[form.dtype],
                "shape": list(form.shape),
                "data_offsets": [end, end + form.nbytes],
            }
            end += form.nbytes
        header = json.dumps(content, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)  # data begins at a multiple of eight bytes, as safetensors asks
        self._file, self._header = file, len(header).to_bytes(8, "little") + header
        self._sums = Summing() if checked else None
        file.write(self._header)

    def write(self, values: Tensor) -> None:
        """Write the next entries, in the dtype that was announced."""
        data = values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        self._file.write(data)
        if self._sums is not None:
            self._sums.add(data)

    def finish(self) -> None:
        """Write the checksums of what was written into the header."""
        if self._sums is not None:
            self._file.seek(0)
            self._file.write(self._sums.filled(self._header))
