"""Define the versioned header of a delta, and its records.

A tensor `NAME` that changed is stored as `NAME#indices` (flat row-major, strictly increasing, int32 below 2³¹ entries,
else int64) with `NAME#values` (1-D, the tensor's dtype), or whole as `NAME#dense`. The metadata key `tithe` holds the
header, JSON:

    {"version": 1, "library": "0.1.0", "metadata": {"method": "…", …}, "aliases": {"NAME": ["OTHER NAME", …]},
     "tensors": {"NAME": [dtype, shape, "kept" | "indices" | "dense", digest of the unselected part, checksum]},
     "checksum": "…"}

The last is of the header itself, so that no damaged bit goes unnoticed. The same delta is the same bytes.

A narrow network (version 2) stores every tensor whole, at its own shape, and has one more key,

    "widths": {"MODULE": {"out_channels": 12, …}, …}

the numbers by which the modules of a wider network become it, and where it could be asked,

    "probe": {"inputs": …, "answers": …}

a question to it and its answer (`tithe.forward.probe`). Readers of version 2 may leave the probe out of account.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from typing import Any, Final, Literal

import torch
from torch import Tensor

from tithe.delta.file import CODES, DTYPES, TensorFile
from tithe.delta.fingerprint import checksum
from tithe.errors import TitheError
from tithe.forward import Probe

VERSION: Final = 2
CLASS: Final = "class"
"""The key of the metadata that names the class of the model; it is only ever looked up among known classes."""
Kind = Literal["kept", "indices", "dense"]


@dataclass(frozen=True)
class Entry:
    """The header's description of one tensor.

    Args:
        dtype: its dtype.
        shape: its shape.
        kind: "kept" (nothing stored), "indices" (some entries) or "dense" (all of it).
        base: digest of the entries that are not stored; empty for "dense".
        content: checksum of what is stored; empty for "kept".
        aliases: further names of the same storage.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    kind: Kind
    base: str
    content: str
    aliases: tuple[str, ...] = ()

    @property
    def numel(self) -> int:
        """Return the number of entries."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """The description of a delta: tensors by name, free metadata, the writer, a narrow network's widths and probe."""

    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]
    version: int = 1
    library: str = ""
    widths: Mapping[str, Mapping[str, int]] | None = None
    probe: Probe | None = None

    def stored(self) -> dict[str, Entry]:
        """Return the entries that a record changes."""
        return {name: entry for name, entry in self.entries.items() if entry.kind != "kept"}


@dataclass(frozen=True, eq=False)
class Record:
    """New values of one tensor: at flat int64 `indices`, or all of it when they are None."""

    indices: Tensor | None
    values: Tensor


def index_dtype(numel: int) -> torch.dtype:
    """Return the dtype of stored indices into a tensor of `numel` entries."""
    return torch.int32 if numel < 2**31 else torch.int64


def encode(header: Header) -> dict[str, str]:
    """Return the safetensors metadata of a delta."""
    try:
        library = installed_version("tithe")
    except PackageNotFoundError:
        library = "unknown"
    tensors = {
        name: [CODES[entry.dtype], list(entry.shape), entry.kind, entry.base, entry.content]
        for name, entry in header.entries.items()
    }
    aliases = {name: list(entry.aliases) for name, entry in header.entries.items() if entry.aliases}
    content: dict[str, Any] = {
        "version": 1 if header.widths is None else 2,
        "library": library,
        "metadata": dict(header.metadata),
        "aliases": aliases,
        "tensors": tensors,
    }
    if header.widths is not None:
        content["widths"] = {path: dict(numbers) for path, numbers in header.widths.items()}
    if header.probe is not None:
        content["probe"] = header.probe.plain()
    return {"tithe": seal(json.dumps(content, separators=(",", ":")))}


def seal(text: str) -> str:
    """Return a JSON object whose last key is its own checksum."""
    return f'{text[:-1]},"checksum":"{blake2b(text.encode(), digest_size=8).hexdigest()}"}}'


def _damaged(file: TensorFile, found: str, expected: str = "the header that tithe wrote") -> TitheError:
    remedy = "copy or download the file again: it is damaged or was edited"
    return TitheError(str(file.path), found=found, expected=expected, remedy=remedy)


def _entry(value: Any, aliases: Any) -> Entry:
    code, shape, kind, base, content = value
    numbers = tuple(shape)
    sound = all(type(n) is int and n >= 0 for n in numbers) and kind in ("kept", "indices", "dense")
    others = tuple(aliases)
    if not sound or not all(isinstance(text, str) for text in (base, content, *others)):
        raise ValueError("not an entry")
    return Entry(DTYPES[code], numbers, kind, base, content, others)


def _numbers(told: Any) -> dict[str, int]:
    if not all(type(number) is int and number > 0 for number in told.values()):
        raise ValueError("not widths")
    return {str(attribute): number for attribute, number in told.items()}


def decode(file: TensorFile) -> Header:
    """Return the header of an open file.

    Raises:
        TitheError: when the file is no delta, is of a later format, or its header is damaged.
    """
    text = file.metadata.get("tithe")
    if text is None:
        raise TitheError(
            str(file.path),
            found="a safetensors file without a tithe header",
            expected="a delta written by plan.save or tithe.diff",
            remedy="pass a delta, or load this file as a plain checkpoint",
        )
    try:
        content: Any = json.loads(text)
        version = content["version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(file, "a header that is not readable JSON with a version") from error
    if type(version) is not int or version < 1:
        raise _damaged(file, f"format version {version!r}", f"a format version from 1 to {VERSION}")
    if version > VERSION:
        raise TitheError(
            str(file.path),
            found=f"format version {version}",
            expected=f"a format version up to {VERSION}",
            remedy="upgrade tithe: this delta was written by a later release",
        )
    try:
        aliases: Any = content["aliases"]
        entries = {str(name): _entry(value, aliases.get(name, ())) for name, value in content["tensors"].items()}
        metadata = {str(key): str(value) for key, value in content["metadata"].items()}
        library = str(content["library"])
        widths = None if version == 1 else {str(path): _numbers(told) for path, told in content["widths"].items()}
        probe = Probe.of(content["probe"]) if version > 1 and "probe" in content else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(file, "a header with missing or malformed parts") from error
    header = Header(entries, metadata, version, library, widths, probe)
    _check_layout(file, header)
    if text != seal(text[: text.rfind(',"checksum":')] + "}"):
        raise _damaged(file, "a header that does not match its checksum")
    return header


def _check_layout(file: TensorFile, header: Header) -> None:
    """Compare the tensors that the file holds with those the header announces: names, shapes, dtypes, counts."""
    names = [name for key, entry in header.entries.items() for name in (key, *entry.aliases)]
    if len(set(names)) != len(names):
        raise _damaged(file, "a header that names a tensor twice")
    parts = {
        f"{name}#{part}"
        for name, entry in header.stored().items()
        for part in (("dense",) if entry.kind == "dense" else ("indices", "values"))
    }
    odd = sorted(parts.symmetric_difference(file.names))
    if odd:
        what = "no" if odd[0] in parts else "an unannounced"
        raise _damaged(file, f"{what} tensor '{odd[0]}'", "exactly the tensors that the header announces")
    for name, entry in header.stored().items():
        if entry.kind == "dense":
            _check_part(file, f"{name}#dense", CODES[entry.dtype], entry.shape)
            continue
        count = file.shape(f"{name}#indices")
        if len(count) != 1:
            raise _damaged(file, f"'{name}#indices' of shape {list(count)}", "one dimension")
        _check_part(file, f"{name}#indices", CODES[index_dtype(entry.numel)], count)
        _check_part(file, f"{name}#values", CODES[entry.dtype], count)


def _check_part(file: TensorFile, part: str, code: str, shape: tuple[int, ...]) -> None:
    found = (file.code(part), file.shape(part))
    if found != (code, shape):
        raise TitheError(
            part,
            found=f"{found[0]} of shape {list(found[1])} in {file.path}",
            expected=f"{code} of shape {list(shape)}",
            remedy="copy or download the file again: it is damaged or was edited",
        )


def read_record(file: TensorFile, name: str, entry: Entry) -> Record:
    """Read one record, copied out of the file and checked.

    Raises:
        TitheError: when indices are out of range, unsorted or repeated, or the bytes do not match their checksum.
    """
    if entry.kind == "dense":
        parts = (file.tensor(f"{name}#dense").clone(),)
        record = Record(None, parts[0])
    else:
        parts = (file.tensor(f"{name}#indices").clone(), file.tensor(f"{name}#values").clone())
        record = Record(parts[0].long(), parts[1])
    at = record.indices
    if at is not None and at.numel():
        low, high = int(at.min()), int(at.max())
        steps = at[1:] - at[:-1]
        bad = [
            (low < 0 or high >= entry.numel, f"indices from {low} to {high}", f"indices in [0, {entry.numel})"),
            (bool((steps < 0).any()), "unsorted indices", "strictly increasing indices"),
            (bool((steps == 0).any()), "duplicate indices", "strictly increasing indices"),
        ]
        for wrong, found, expected in bad:
            if wrong:
                remedy = "copy or download the file again: it is damaged or was edited"
                raise TitheError(f"{name}#indices", found=f"{found} in {file.path}", expected=expected, remedy=remedy)
    if checksum(*parts) != entry.content:
        raise TitheError(
            name,
            found=f"stored values in {file.path} that do not match their checksum",
            expected="the bytes that were written",
            remedy="copy or download the file again: it is damaged or was edited",
        )
    return record
