"""Read and write safetensors on disk: opened with clear errors, written whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tithe.errors import TitheError
from tithe.files import replacing

CODES: Final[Mapping[torch.dtype, str]] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""What safetensors calls a dtype."""

DTYPES: Final[Mapping[str, torch.dtype]] = {code: dtype for dtype, code in CODES.items()}


class TensorFile:
    """An open safetensors file whose tensors are read one at a time.

    Args:
        path: the file.

    Raises:
        TitheError: when there is no such file, or it is not a complete safetensors file.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            found = "a folder" if path.is_dir() else "no such file"
            raise TitheError(str(path), found=found, expected="a safetensors file", remedy="check the path")
        try:
            self._file: Any = safe_open(str(path), framework="pt")
            self.metadata: dict[str, str] = dict(self._file.metadata() or {})
            self.names: tuple[str, ...] = tuple(self._file.keys())
        except (SafetensorError, OSError) as error:
            raise TitheError(
                str(path),
                found=f"a file that cannot be read ({error})",
                expected="a complete safetensors file",
                remedy="copy or download it again: it is truncated, damaged or of another kind",
            ) from error
        self.path = path

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, from the header alone."""
        return tuple(self._file.get_slice(name).get_shape())

    def code(self, name: str) -> str:
        """Return safetensors' name for the dtype of a tensor, from the header alone."""
        return str(self._file.get_slice(name).get_dtype())

    def tensor(self, name: str) -> Tensor:
        """Return the tensor on the CPU; its memory may be a private map of the file."""
        return cast(Tensor, self._file.get_tensor(name))


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file at `path`, on the CPU, with compact tensors even if they are views."""
    compact: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        whole = plain.untyped_storage().nbytes() == plain.numel() * plain.element_size()
        compact[name] = plain if whole else plain.clone()
    save_file(compact, path, metadata=dict(metadata))


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file whole or not at all, with compact tensors even if they are views.

    Args:
        path: the file; an existing one is replaced in one step, or kept when anything goes wrong.
        tensors: name → tensor, on any device.
        metadata: free strings for the header.

    Raises:
        TitheError: when the path is a folder, or the system lets it not be written.
    """
    with replacing(path, num_bytes=sum(tensor.nbytes for tensor in tensors.values())) as temporary:
        save_tensors(temporary, tensors, metadata)
