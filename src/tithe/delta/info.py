"""Describe a delta from its header and the sizes of its parts, without reading a value."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tithe.delta.file import CODES, TensorFile
from tithe.delta.format import Entry, Kind, decode

_NAME = 36


@dataclass(frozen=True)
class TensorInfo:
    """The description of one tensor that a delta changes.

    Args:
        name: its name in the model.
        shape: its shape.
        dtype: what safetensors calls its dtype.
        kind: "indices" (some entries are stored) or "dense" (all are).
        selected: number of entries stored.
        fraction: that number divided by the tensor's entries.
        aliases: further names of the same storage.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    kind: Kind
    selected: int
    fraction: float
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class DeltaInfo:
    """The description of a delta: `str()` is a table under 80 columns, `as_dict()` plain data.

    Args:
        path: the file.
        version: format version.
        library: the release of this library that wrote it.
        num_bytes: size of the file.
        metadata: free strings, such as method and density.
        num_values: number of values stored.
        num_weights: number of entries of the whole model, tied ones once.
        num_tensors: number of tensors of the whole model, changed or not.
        tensors: the tensors that change.
    """

    path: str
    version: int
    library: str
    num_bytes: int
    metadata: Mapping[str, str]
    num_values: int
    num_weights: int
    num_tensors: int
    tensors: tuple[TensorInfo, ...]

    @property
    def fraction(self) -> float:
        """Return the number of values stored, divided by the entries of the whole model."""
        return self.num_values / max(self.num_weights, 1)

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as plain data, ready for JSON."""
        return {**asdict(self), "metadata": dict(self.metadata), "fraction": self.fraction}

    def __str__(self) -> str:
        lines = [_middle(self.path, 79)]
        told = [f"format {self.version}, tithe {self.library}, {self.num_bytes:,} bytes"]
        told += [f"{key} {value}" for key, value in self.metadata.items()]
        lines += textwrap.wrap(" · ".join(told), 79)
        lines.append(f"{'tensor':{_NAME}} {'shape':>15} {'dtype':>5} {'values':>11} {'share':>8}")
        for tensor in self.tensors:
            shape = _middle("×".join(map(str, tensor.shape)) or "scalar", 15)
            name = _middle(tensor.name, _NAME)
            numbers = f"{tensor.selected:>11,} {tensor.fraction:>8.3%}"
            lines.append(f"{name:{_NAME}} {shape:>15} {_middle(tensor.dtype, 5):>5} {numbers}")
        kept = self.num_tensors - len(self.tensors)
        total = f"{len(self.tensors)} tensors, {kept} untouched"
        lines.append(f"{total:{_NAME}} {self.num_weights:>15,} {'':>5} {self.num_values:>11,} {self.fraction:>8.3%}")
        return "\n".join(lines)


def inspect(path: str | Path) -> DeltaInfo:
    """Describe the changes in a delta from its header only.

    Args:
        path: a delta of `plan.save` or `tithe.diff`.

    Raises:
        TitheError: when the file is truncated, damaged, no delta or of a later version.
    """
    file = TensorFile(Path(path))
    header = decode(file)
    tensors = tuple(_tensor(file, name, entry) for name, entry in header.stored().items())
    return DeltaInfo(
        path=str(file.path),
        version=header.version,
        library=header.library,
        num_bytes=file.path.stat().st_size,
        metadata=header.metadata,
        num_values=sum(tensor.selected for tensor in tensors),
        num_weights=sum(entry.numel for entry in header.entries.values()),
        num_tensors=len(header.entries),
        tensors=tensors,
    )


def _tensor(file: TensorFile, name: str, entry: Entry) -> TensorInfo:
    selected = entry.numel if entry.kind == "dense" else file.shape(f"{name}#indices")[0]
    fraction = selected / max(entry.numel, 1)
    return TensorInfo(name, entry.shape, CODES[entry.dtype], entry.kind, selected, fraction, entry.aliases)


def _middle(text: str, width: int) -> str:
    """`text`, its middle cut out where it is longer than `width`."""
    if len(text) <= width:
        return text
    tail = (width - 1) * 2 // 3
    return f"{text[: width - 1 - tail]}…{text[-tail:]}"
