"""Read and write safetensors by ranges of entries: only the requested part of a tensor is in memory.

A memory map would do for reading, but what it has shown counts as resident until the system wants it back; ranges are
read into buffers instead. A file is opened for each range: 3 µs more than a handle that is kept, and no limit on how
many checkpoints a history has. The format: eight bytes that say how long the header is, the header in JSON, the data.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path
from typing import Any, BinaryIO, Final

import torch
from torch import Tensor

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

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} of shape {list(self.shape)}"


def check_plain(place: str, name: str, tensor: Tensor) -> None:
    """Check that a tensor is what safetensors can store.

    Args:
        place: for the message.
        name: what the tensor is called.
        tensor: of any kind.

    Raises:
        TitheError: when it is sparse, quantised, or of another dtype.
    """
    plain = tensor.layout == torch.strided and not tensor.is_quantized
    if not plain or tensor.dtype not in CODES:
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
    """

    path: Path
    forms: Mapping[str, Form]
    offsets: Mapping[str, int]
    metadata: Mapping[str, str]

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
                length = int.from_bytes(file.read(8), "little")
                if not 0 < length <= _LONGEST_HEADER:
                    raise ValueError(f"a header of {length} bytes")
                content: Any = json.loads(file.read(length))
                size = file.seek(0, 2)
            metadata = {str(key): str(value) for key, value in content.pop("__metadata__", {}).items()}
            forms: dict[str, Form] = {}
            offsets: dict[str, int] = {}
            end = 8 + length
            for name, told in content.items():
                shape = tuple(int(n) for n in told["shape"])
                forms[name] = form = Form(DTYPES[told["dtype"]], shape)
                first, last = told["data_offsets"]
                offsets[name] = 8 + length + first
                if min(shape, default=0) < 0 or not 0 <= first <= last or last - first != form.nbytes:
                    raise ValueError(f"{last - first} bytes for {name}, {form}")
                end = max(end, 8 + length + last)
            if end != size:
                raise ValueError(f"{size} bytes where the header announces {end}")
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
        return cls(path, forms, offsets, metadata)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Return entries [start, stop) of a tensor in row-major order, a new 1-D tensor on the CPU.

        Raises:
            TitheError: when the file is gone, or shorter than it was.
        """
        form = self.forms[name]
        count = (form.numel if stop is None else stop) - start
        return read_range(self.path, self.offsets[name] + start * form.dtype.itemsize, count, form.dtype)

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
    if not count:
        return out
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            fill(file, out, path)
    except OSError as error:
        raise _gone(path, str(error)) from error
    return out


def fill(file: RawIOBase, out: Tensor, path: Path) -> None:
    """Read the bytes of a contiguous CPU tensor from the position of an unbuffered file.

    Args:
        file: open for reading.
        out: 1-D.
        path: of the file, for the message.

    Raises:
        TitheError: when the file ends before.
    """
    todo = out.view(torch.uint8).numpy().data
    while todo:
        done = file.readinto(todo)
        if not done:
            raise _gone(path, "it has become shorter")
        todo = todo[done:]


def _gone(path: Path, reason: str) -> TitheError:
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

    def __init__(self, file: BinaryIO, forms: Mapping[str, Form], metadata: Mapping[str, str]) -> None:
        # The widest dtypes come first, so that each tensor begins at a multiple of its own: readers view, not copy.
        self.names = tuple(sorted(forms, key=lambda name: -forms[name].dtype.itemsize))
        content: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
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
        self._file = file
        file.write(len(header).to_bytes(8, "little"))
        file.write(header)

    def write(self, values: Tensor) -> None:
        """Write the next entries, in the dtype that was announced."""
        plain = values.detach().cpu().contiguous().reshape(-1)
        self._file.write(plain.view(torch.uint8).numpy().data)
