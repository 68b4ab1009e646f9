"""Describe a delta from its header and the sizes of its parts, without reading a value."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tithe.delta.file import CODES, TensorFile
from tithe.delta.format import Entry, Kind, decode
from tithe.delta.ranges import fold, shorten

_WIDTH = 79
_HEADS = ("shape", "dtype", "values", "share")


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

    The table has one row for layers that follow each other and are alike; their values are added up.

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
        folded = fold([(t.name, (t.shape, t.dtype, t.kind, t.selected)) for t in self.tensors])
        known = {tensor.name: tensor for tensor in self.tensors}
        rows = [_row([known[name] for name in names]) for names in folded.values()]
        kept = self.num_tensors - len(self.tensors)
        total = f"{len(self.tensors)} tensors, {kept} untouched"
        last = (f"{self.num_weights:,}", "", f"{self.num_values:,}", f"{self.fraction:.3%}")
        columns = list(zip(_HEADS, *rows, last, strict=True))
        widths = [max(map(len, column)) for column in columns]
        room = _WIDTH - sum(widths) - len(widths)
        names = shorten(list(folded), room)
        for name, cells in zip(("tensor", *names, total), zip(*columns, strict=True), strict=True):
            numbers = " ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
            if len(name) > room:  # it is on a line of its own
                lines += textwrap.wrap(name, _WIDTH, break_on_hyphens=False)
                name = ""
            lines.append(f"{name:{room}} {numbers}")
        return "\n".join(lines)


def _row(alike: Sequence[TensorInfo]) -> tuple[str, str, str, str]:
    """What is said of tensors that differ in name alone: the values of all together, the share of each."""
    first = alike[0]
    shape = _middle("×".join(map(str, first.shape)) or "scalar", 15)
    return shape, _middle(first.dtype, 5), f"{sum(t.selected for t in alike):,}", f"{first.fraction:.3%}"


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
