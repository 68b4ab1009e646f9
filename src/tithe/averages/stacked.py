"""Stream the checkpoints of a history side by side: n rows of the same few columns at a time.

    columns(name, start, stop) → (n, stop − start)

A row is a checkpoint of its own (`PlainRows`), a delta on a base (`DeltaRows`), or the coded step from the
row before it (`CodedRows`): then w̃_i = w̃_{i−1} + q_i, where q_i codes w_i − w̃_{i−1}, so that the error of a row is
that of its own code alone and never adds up; with one bit a code also takes up three quarters of the error before it,
which fade from row to row. Sums are taken in float32, or float64 for tensors of float64, here and
where they are recorded: both have the same w̃_i, bit for bit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from tithe.averages.entry import Entry
from tithe.averages.formats import DeltaEntry
from tithe.averages.quantize import BLOCK, code_bytes, decode
from tithe.averages.safetensors_ranges import FlatFile, Form
from tithe.delta.check_base import Match, check_base
from tithe.errors import TitheError

CODES: Final = "#codes"
SCALES: Final = "#scales"

_AT_ONCE: Final = 1 << 20
"""Entries of several rows that are decoded together."""


class Rows(ABC):
    """Checkpoints of the same tensors, as rows.

    Args:
        paths: where each lies.
        forms: name → form of the columns; of a delta's tensor, that of the values at its places.
        places: name → flat int64 places of the columns in the model's tensor; a name that is absent has all of them.
    """

    paths: Sequence[Path]
    forms: Mapping[str, Form]
    places: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(self.paths)

    @abstractmethod
    def ranges(self, name: str, start: int, stop: int) -> Iterator[Tensor]:
        """Yield entries [start, stop) of each row in turn, (stop − start,), in any dtype that holds them."""

    def columns(self, name: str, start: int, stop: int) -> Tensor:
        """Return entries [start, stop) of every row, (n, stop − start), in the dtype that they are computed in."""
        out = torch.empty(len(self), stop - start, dtype=computed_dtype(self.forms[name].dtype))
        for row, values in zip(out, self.ranges(name, start, stop), strict=True):
            row.copy_(values)
        return out

    @abstractmethod
    def tensor(self, index: int, name: str) -> Tensor:
        """Return a tensor of one row, in its own shape and dtype."""

    @abstractmethod
    def states(self) -> Iterator[dict[str, Tensor]]:
        """Yield each row as a dict of tensors, one after the other."""


class PlainRows(Rows):
    """Rows that are whole checkpoints.

    Args:
        entries: at least one.

    Raises:
        TitheError: naming the first checkpoint with other tensors, shapes or dtypes than the first.
    """

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.entries = entries
        self.paths = [entry.path for entry in entries]
        self.forms = entries[0].forms
        self.places = {}
        for entry in entries[1:]:
            check_forms(entry.path, entry.forms, self.forms, entries[0].path)

    def without(self, places: Collection[int]) -> PlainRows:
        """Return the rows but for those at some places."""
        return PlainRows([entry for index, entry in enumerate(self.entries) if index not in places])

    def ranges(self, name: str, start: int, stop: int) -> Iterator[Tensor]:
        """Yield ranges with one read per row."""
        return (entry.read(name, start, stop) for entry in self.entries)

    def tensor(self, index: int, name: str) -> Tensor:
        """Return a tensor as it is stored."""
        return self.entries[index].tensor(name)

    def states(self) -> Iterator[dict[str, Tensor]]:
        """Yield the rows as they are stored."""
        for entry in self.entries:
            yield {name: entry.tensor(name) for name in entry.forms}


class CodedRows(Rows):
    """Rows of which the first is whole and each other is the coded step from the one before it.

    A file after the first has codes of a tensor, or the tensor itself where that is shorter or it is no weight, or
    neither where it is as before.

    Args:
        files: the rows' files, in order.
        bits: of a code.

    Raises:
        TitheError: naming the first file with other tensors than follow from the first file and the bits.
    """

    def __init__(self, files: Sequence[FlatFile], bits: int) -> None:
        self.files, self.bits = files, bits
        self.paths = [file.path for file in files]
        self.forms = files[0].forms
        self.places = {}
        codes = _code_forms(self.forms, bits)
        for file in files[1:]:
            there = {name: form for name, form in {**self.forms, **codes}.items() if name in file.forms}
            check_forms(file.path, file.forms, there, files[0].path)
            for name, form in self.forms.items():
                if (name + CODES in file.forms) != (name + SCALES in file.forms):
                    raise _differs(file.path, name, "codes or scales alone", "both", files[0].path)
                if not form.dtype.is_floating_point and name not in file.forms:
                    raise _differs(file.path, name, "no such tensor", "one", files[0].path)

    def ranges(self, name: str, start: int, stop: int) -> Iterator[Tensor]:
        """Yield the first row, and the running sums of the steps after it."""
        first = start // BLOCK * BLOCK
        last = min(-(-stop // BLOCK) * BLOCK, self.forms[name].numel)
        for row in self._sums(name, first, last, len(self), _AT_ONCE):
            yield row[start - first : stop - first]

    def tensor(self, index: int, name: str) -> Tensor:
        """Return the running sum up to one row; a tensor without floating-point numbers comes from its file."""
        form = self.forms[name]
        if not form.dtype.is_floating_point:
            return self.files[index].tensor(name)
        return self.sum(index, name).to(form.dtype).view(form.shape)

    def sum(self, index: int, name: str) -> Tensor:
        """Return w̃_i, (numel,), in the dtype of the sum: float32, or float64 for a tensor of float64."""
        *_, row = self._sums(name, 0, self.forms[name].numel, index + 1, _AT_ONCE)
        return row

    def states(self) -> Iterator[dict[str, Tensor]]:
        """Yield the running sums; only those of one row are in memory at a time."""
        sums = {
            name: self._sums(name, 0, form.numel, len(self), 1)
            for name, form in self.forms.items()
            if form.dtype.is_floating_point
        }
        for file in self.files:
            yield {
                name: next(sums[name]).to(form.dtype, copy=True).view(form.shape) if name in sums else file.tensor(name)
                for name, form in self.forms.items()
            }

    def _sums(self, name: str, start: int, stop: int, count: int, at_once: int) -> Iterator[Tensor]:
        """Entries [start, stop), whole blocks, of the first rows; `at_once`: entries to decode together."""
        row = _computed(self.files[0].read(name, start, stop))
        yield row
        several = max(at_once // max(stop - start, 1), 1)
        for begin in range(1, count, several):
            files = self.files[begin : min(begin + several, count)]
            steps = iter(self._steps(name, start, stop, files))
            for file in files:
                if name in file.forms:
                    row = _computed(file.read(name, start, stop))
                elif name + CODES in file.forms:
                    row = row + next(steps)
                yield row

    def _steps(self, name: str, start: int, stop: int, files: Sequence[FlatFile]) -> Tensor:
        """The decoded steps of those files that have any: (m, stop − start)."""
        width, first, last = code_bytes(self.bits), start // BLOCK, -(-stop // BLOCK)
        coded = [file for file in files if name + CODES in file.forms]
        if not coded:
            return torch.empty(0, stop - start)
        codes = torch.cat([file.read(name + CODES, first * width, last * width) for file in coded])
        scales = torch.cat([file.read(name + SCALES, first, last) for file in coded])
        values = decode(codes.view(-1, 1, width), scales.view(-1, 1), self.bits)
        return values.view(len(coded), -1)[:, : stop - start]


class DeltaRows(Rows):
    """Rows that are deltas on one base.

    An entry that a delta does not change has the base's value; the places of a tensor are those that any delta changes.

    Args:
        entries: at least one.
        base: name → the base's tensor; needed where deltas change different places.

    Raises:
        TitheError: naming the first delta that is of another network than the first, or on another base.
    """

    def __init__(self, entries: Sequence[DeltaEntry], base: Mapping[str, Tensor] | None = None) -> None:
        self.entries, self._base = entries, base
        self.paths = [entry.path for entry in entries]
        told = [{n: Form(e.dtype, e.shape) for n, e in entry.header.entries.items()} for entry in entries]
        for entry, forms in zip(entries[1:], told[1:], strict=True):
            check_forms(entry.path, forms, told[0], entries[0].path)
        self.forms, self.places = {}, {}
        for name in dict.fromkeys(name for entry in entries for name in entry.forms):
            form = told[0][name]
            partial = [entry.places[name] for entry in entries if name in entry.places]
            whole = sum(name in entry.forms for entry in entries) > len(partial)
            if not whole:
                self.places[name] = places = torch.cat(partial).unique()
                form = Form(form.dtype, (places.numel(),))
                for entry in entries:
                    if name in entry.places:
                        entry.share(name, places)
            self.forms[name] = form

    def without(self, places: Collection[int]) -> DeltaRows:
        """Return the rows but for those at some places."""
        return DeltaRows([entry for index, entry in enumerate(self.entries) if index not in places], self._base)

    def on(self, base: Mapping[str, Tensor]) -> DeltaRows:
        """Return the same rows on the tensors of a base.

        Args:
            base: name → tensor, of the model that the deltas were made on, or of one that they were applied to; read
                when columns are.

        Raises:
            TitheError: naming the delta that was made on another base.
        """
        under: dict[str, Tensor] = {}
        first = self.entries[0]
        for lead, told in first.header.entries.items():
            name = next((one for one in (lead, *told.aliases) if one in base), lead)
            form = Form(told.dtype, told.shape)
            if name not in base or Form.of(base[name]) != form:
                raise TitheError(
                    name,
                    found=f"{Form.of(base[name])} in the base" if name in base else "no such tensor in the base",
                    expected=f"{form}, as in {first.path}",
                    remedy="pass the model that the deltas were made on"
                    + ("" if first.header.widths is None else ", made as narrow by tithe.apply"),
                )
            under[lead] = base[name]
        alike: set[tuple[str, str, str]] = set()
        for entry in self.entries:
            matches: list[Match] = []
            for lead, told in entry.header.entries.items():
                # Deltas that leave the same places of a tensor alone have the same digest of them, which is taken once.
                key = (lead, told.kind, told.base)
                if key in alike:
                    continue
                if told.kind == "kept" or self._has_all(entry, lead):
                    alike.add(key)
                matches.append(Match(lead, told, under[lead]))
            check_base(str(entry.path), matches, entry.places.get)
        return DeltaRows(self.entries, under)

    def ranges(self, name: str, start: int, stop: int) -> Iterator[Tensor]:
        """Yield values at the places; the base has those that a delta does not change."""
        return (self._range(entry, name, start, stop) for entry in self.entries)

    def tensor(self, index: int, name: str) -> Tensor:
        """Return the values at the places, or all of the tensor."""
        form = self.forms[name]
        return self._range(self.entries[index], name, 0, form.numel).view(form.shape)

    def states(self) -> Iterator[dict[str, Tensor]]:
        """Yield the changes of each delta, at the places of all."""
        for index in range(len(self)):
            yield {name: self.tensor(index, name) for name in self.forms}

    def _has_all(self, entry: DeltaEntry, name: str) -> bool:
        """Whether a delta holds all columns of a tensor."""
        return name in entry.forms and entry.places.get(name) is self.places.get(name)

    def _range(self, entry: DeltaEntry, name: str, start: int, stop: int) -> Tensor:
        if self._has_all(entry, name):
            return entry.read(name, start, stop)
        if self._base is None:
            raise TitheError(
                str(entry.path),
                found=f"other places of {name} than other deltas change, and no base to fill them from",
                expected="the base that the deltas were made on",
                remedy="use the history with the base model: tithe.attach(model, tithe.TWA(history))",
            )
        at = self.places[name][start:stop] if name in self.places else torch.arange(start, stop)
        base = self._base[name].detach().reshape(-1)
        out = base[at.to(base.device)].cpu()
        if name in entry.places and at.numel():
            own = entry.places[name]
            first, last = torch.searchsorted(own, torch.tensor([int(at[0]), int(at[-1]) + 1])).tolist()
            out[torch.searchsorted(at, own[first:last])] = entry.read(name, first, last)
        return out


def computed_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which numbers are computed: float64 for float64, else float32; complex ones alike."""
    if dtype.is_complex:
        return torch.complex128 if dtype == torch.complex128 else torch.complex64
    return torch.float64 if dtype == torch.float64 else torch.float32


def _computed(values: Tensor) -> Tensor:
    return values.to(computed_dtype(values.dtype))


def coded_shorter(form: Form, bits: int) -> bool:
    """Return whether the codes and scales of a tensor take fewer bytes than its numbers."""
    return sum(part.nbytes for part in _code_forms({"": form}, bits).values()) < form.nbytes


def _code_forms(forms: Mapping[str, Form], bits: int) -> dict[str, Form]:
    """What a file holds where it codes tensors."""
    found: dict[str, Form] = {}
    for name, form in forms.items():
        blocks = -(-form.numel // BLOCK)
        found[name + CODES] = Form(torch.uint8, (blocks, code_bytes(bits)))
        found[name + SCALES] = Form(torch.bfloat16, (blocks,))
    return found


def check_forms(path: Path, found: Mapping[str, Form], expected: Mapping[str, Form], first: Path) -> None:
    """Compare the tensors of a checkpoint with those of the first.

    Args:
        path: the checkpoint.
        found: its tensors.
        expected: those of the first.
        first: where that lies.

    Raises:
        TitheError: naming the first tensor that differs, and how.
    """
    for name in sorted(set(found) ^ set(expected)):
        raise _differs(path, name, *(("no such tensor", "one") if name in expected else ("a tensor", "none")), first)
    for name, form in expected.items():
        if found[name] != form:
            raise _differs(path, name, str(found[name]), str(form), first)


def _differs(path: Path, name: str, found: str, expected: str, first: Path) -> TitheError:
    return TitheError(
        str(path),
        found=f"{found} for {name}",
        expected=f"{expected}, as in {first}",
        remedy="average checkpoints of one architecture and dtype; convert or leave out this one",
    )
