"""Average checkpoints and write the result in their own format, without loading any of them whole.

safetensors files, Hugging Face folders    read and written a block at a time
`.pt` and `.ckpt` files                    read a block at a time; the average is in memory, for `torch.save`
recorded histories                         stored whole as safetensors files; coded ones decoded a few columns at a time
deltas                                     one delta, at the places that all of them change
"""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, cast

import torch
from torch import Tensor

from tithe.averages.formats import DeltaEntry, Entry, FileEntry, PickleEntry, load
from tithe.averages.history import History, spans
from tithe.averages.recorder import KEY
from tithe.averages.safetensors_ranges import FlatFile, FlatWriter, Form
from tithe.averages.stacked import DeltaRows, PlainRows
from tithe.averages.weighted_sum import Block, Given, Piece, Progress, Stream, Sums
from tithe.delta.file import save_tensors
from tithe.delta.fingerprint import checksum
from tithe.delta.format import Header, encode, index_dtype
from tithe.delta.source import PICKLES
from tithe.errors import TitheError
from tithe.files import check_place, replacing

_WEIGHTS: Final = (*PICKLES, ".safetensors", ".h5", ".msgpack", ".onnx", ".gguf", ".ot")
_OF_A_RUN: Final = ("trainer_state.json",)
_OLD: Final = "pytorch_model.bin"
_TOLERANCE: Final = 1e-3


def average(
    checkpoints: History | str | Path | Sequence[str | Path],
    output: str | Path,
    weights: Sequence[float] | None = None,
    *,
    skip_damaged: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write Σ weights_i w_i of checkpoints on disk as one checkpoint of their format; only a few blocks are in memory.

    Floating-point tensors are averaged, summed in float32, or in float64 where they are float32 or float64. Others are
    the last checkpoint's, and so are entries that are the same infinity in every checkpoint. The running statistics of
    norms are averaged like weights: estimate them again before using the average (`tithe average` with a recipe does).

    A safetensors file comes out of safetensors files or of what a `History` recorded; a folder with the same shards out
    of Hugging Face folders, with the first one's configuration and tokenizer; what the last one holds, with the model's
    tensors replaced, out of `.pt` and `.ckpt` files; a delta out of deltas that change the same places of one base.

    Args:
        checkpoints: a `History`, or what one is opened with: a folder or file, or several.
        output: the new file or folder; it must not exist.
        weights: one number a checkpoint; they sum to one within 0.001 and are divided by their sum. A checkpoint of
            weight 0 is not read. None gives all the same.
        skip_damaged: leave out checkpoints that cannot be read, with a warning that names them.
        progress: called now and then with the bytes read, and how many there are to read.

    Returns:
        `output`.

    Raises:
        TitheError: when a checkpoint is missing, damaged, of other tensors than the first, or has a value that is not
            finite; when the weights are not as above, the output exists, or there is no room. Nothing is written then.

    Example:
        >>> import tempfile, safetensors.torch as st
        >>> folder = Path(tempfile.mkdtemp())
        >>> for name, value in (("a", 1.0), ("b", 3.0)):
        ...     st.save_file({"weight": torch.full((2,), value)}, folder / f"{name}.safetensors")
        >>> path = average(folder, folder / "mean.safetensors", weights=[0.25, 0.75])
        >>> st.load_file(path)["weight"]
        tensor([2.5000, 2.5000])
    """
    history = checkpoints if isinstance(checkpoints, History) else History(checkpoints, skip_damaged=skip_damaged)
    rows = history.rows
    factors = check_weights(weights, len(history))
    if isinstance(rows, PlainRows) and not isinstance(rows.entries[0], DeltaEntry):
        return _write(history, Path(output), Stream(rows.entries, factors, progress))
    return _write(history, Path(output), _Columns(history, factors, progress))


def write_like(history: History, output: str | Path, state: Mapping[str, Tensor]) -> Path:
    """Write tensors as one checkpoint in the format of a history's, as `average` does.

    Args:
        history: whole checkpoints, or deltas that change the same places.
        output: the new file or folder; it must not exist.
        state: name in the history → tensor of its shape, on any device; of a delta, the values at its places.

    Returns:
        `output`.

    Raises:
        TitheError: when the output exists, or there is no room.
    """
    return _write(history, Path(output), Given(state))


def _write(history: History, output: Path, sums: Sums) -> Path:
    rows = history.rows
    check_output(output, rows.paths[0])
    entries = rows.entries if isinstance(rows, DeltaRows | PlainRows) else ()
    deltas = [entry for entry in entries if isinstance(entry, DeltaEntry)]
    if deltas:
        _check_deltas(deltas)
    num_bytes, folder = sum(form.nbytes for form in rows.forms.values()), folder_of(rows.paths[0]) is not None
    with replacing(output, folder=folder, num_bytes=num_bytes) as temporary:
        if deltas:
            _write_delta(temporary, deltas, sums)
        elif isinstance(rows, PlainRows):
            _write_plain(temporary, rows.entries, sums)
        else:
            _write_flat(temporary, rows.forms, {"format": "pt"}, sums)
    return output


class _Columns:
    """The weighted sum of checkpoints that are not whole on disk, a few columns at a time.

    Args:
        history: coded checkpoints, or deltas.
        weights: one a checkpoint.
        progress: called with the bytes that were summed, and how many there are.
    """

    def __init__(self, history: History, weights: Sequence[float], progress: Progress | None) -> None:
        self._history, self._weights, self._progress = history, weights, progress

    def blocks(self, forms: Mapping[str, Form]) -> Iterator[tuple[Block, Tensor]]:
        """The sum over some tensors, taken in float64; others are the last checkpoint's."""
        factors = torch.tensor(self._weights, dtype=torch.float64)
        total, done = sum(form.nbytes for form in forms.values()), 0
        for name, form in forms.items():
            for start, stop in spans(form.numel, len(self._weights)):
                block = Block(form.dtype, (Piece(name, start, stop),))
                if form.dtype.is_floating_point:
                    values = factors @ self._history.columns(name, start, stop).double()
                else:
                    values = self._history.rows.tensor(len(self._weights) - 1, name).reshape(-1)[start:stop]
                yield block, values.to(form.dtype)
                done += block.nbytes
                if self._progress is not None:
                    self._progress(done, total)


def check_weights(weights: Sequence[float] | None, count: int) -> list[float]:
    """Return the weights of so many checkpoints, checked to sum to one.

    Raises:
        TitheError: when there is no checkpoint, or the weights are not one finite number each with a sum of one.
    """
    if weights is None:
        weights = [1 / max(count, 1)] * count
    total = math.fsum(weights)
    if len(weights) != count or count == 0:
        raise TitheError(
            "average",
            found=f"{len(weights)} weights for {count} checkpoints",
            expected="one a checkpoint, and at least one",
            remedy="name the weights in the order of the checkpoints",
        )
    if not abs(total - 1) <= _TOLERANCE:
        raise TitheError(
            "average",
            found=f"weights that sum to {total:g}",
            expected="a sum of 1",
            remedy=f"divide each by {total:g}" if math.isfinite(total) and total else "use finite weights",
        )
    return [weight / total for weight in weights]


def check_output(output: Path, first: Path) -> None:
    """Check a place to write to, before anything is read.

    Args:
        output: the place.
        first: a checkpoint of the format that will be written.

    Raises:
        TitheError: when something is there, or its name says another format.
    """
    folder = folder_of(first) is not None
    check_place(output, folder=folder, new=True)
    if folder:
        return
    pickles = first.suffix in PICKLES
    if output.suffix == ".safetensors" if pickles else output.suffix in PICKLES:
        raise TitheError(
            str(output),
            found=f"the ending {output.suffix}",
            expected=f"{first.suffix}, the format of {first}",
            remedy="change the ending of the output",
        )


def folder_of(checkpoint: Path) -> Path | None:
    """Return a checkpoint's Hugging Face folder, or None; a `pytorch_model.bin` has its configuration next to it."""
    if checkpoint.is_dir():
        return checkpoint
    return checkpoint.parent if checkpoint.name == _OLD else None


def _write_plain(target: Path, entries: Sequence[Entry], sums: Sums) -> None:
    """Write whole checkpoints' average in the format of the first."""
    first = entries[0]
    folder = folder_of(first.path)
    if folder is not None:
        target.mkdir()
        copy_extras(folder, target)
    if isinstance(first, PickleEntry):
        last = [entry for entry in entries if isinstance(entry, PickleEntry)][-1]
        _write_pickle(target if folder is None else target / _OLD, last, sums)
    elif isinstance(first, FileEntry):
        for file in first.files:
            _write_file(target if folder is None else target / file.path.name, file, sums)


def _write_file(target: Path, like: FlatFile, sums: Sums) -> None:
    """Write one safetensors file with the tensors of another, in its order."""
    forms = {name: like.forms[name] for name in sorted(like.forms, key=like.offsets.__getitem__)}
    _write_flat(target, forms, _metadata(like.metadata), sums)


def _write_flat(target: Path, forms: Mapping[str, Form], metadata: Mapping[str, str], sums: Sums) -> None:
    forms = _aligned(forms)
    with target.open("wb") as file:
        writer = FlatWriter(file, forms, metadata)
        for _, values in sums.blocks(forms):
            writer.write(values)


def _aligned(forms: Mapping[str, Form]) -> dict[str, Form]:
    """Return tensors with the widest dtypes first, so that each begins at a multiple of its width for views."""
    return {name: forms[name] for name in sorted(forms, key=lambda name: -forms[name].dtype.itemsize)}


def _metadata(found: Mapping[str, str]) -> dict[str, str]:
    """The free strings of a file, without what makes it part of a recorded history."""
    kept = {key: value for key, value in found.items() if key != KEY}
    return kept if KEY not in found else {"format": "pt", **kept}


def copy_extras(origin: Path, target: Path) -> None:
    """Copy a Hugging Face folder's other files: configuration, tokenizer, the index of shards.

    A folder inside comes along where it holds no weights.
    """
    for path in sorted(origin.iterdir()):
        if path.name.startswith(".") or path.name in _OF_A_RUN or path.suffix in _WEIGHTS:
            continue
        if path.is_file():
            shutil.copyfile(path, target / path.name)
        elif not any(inside.suffix in _WEIGHTS for inside in path.rglob("*")):
            shutil.copytree(path, target / path.name)


def _write_pickle(target: Path, last: PickleEntry, sums: Sums) -> None:
    """Write what a `.pt` file holds, with the model's tensors replaced; tied ones stay tied."""
    content: Any = load(last.path)
    outer = copy.copy(content)
    inner = outer
    for key in last.keys:
        inner[key] = copy.copy(inner[key])
        inner = inner[key]
    tensors = cast(MutableMapping[Any, Any], inner)
    spelled = {str(key): key for key, value in tensors.items() if isinstance(value, Tensor)}
    shared: dict[tuple[int, torch.Size, tuple[int, ...]], str] = {}
    leader: dict[str, str] = {}
    for name, key in spelled.items():
        found: Tensor = tensors[key]
        own = (found.data_ptr() if found.numel() else -len(shared) - 1, found.shape, found.stride())
        leader[name] = shared.setdefault(own, name)
    forms = {name: Form(tensors[spelled[name]].dtype, tuple(tensors[spelled[name]].shape)) for name in shared.values()}
    averaged = _in_memory(forms, sums)
    for name, key in spelled.items():
        tensors[key] = averaged[leader[name]]
    with target.open("wb") as file:
        torch.save(outer, file)


def _in_memory(forms: Mapping[str, Form], sums: Sums) -> dict[str, Tensor]:
    out = {name: torch.empty(form.shape, dtype=form.dtype) for name, form in forms.items()}
    for block, values in sums.blocks(forms):
        parts = values.split([piece.stop - piece.start for piece in block.pieces])
        for piece, part in zip(block.pieces, parts, strict=True):
            out[piece.name].view(-1)[piece.start : piece.stop] = part
    return out


def _check_deltas(entries: Sequence[DeltaEntry]) -> None:
    """Refuse deltas whose average is no delta.

    Raises:
        TitheError: when two change different places, or were made on different bases.
    """
    first = entries[0]
    for entry in entries[1:]:
        same = first.places.keys() == entry.places.keys() and first.forms == entry.forms
        if not same or any(not torch.equal(first.places[name], entry.places[name]) for name in first.places):
            raise TitheError(
                str(entry.path),
                found="a delta that changes other places",
                expected=f"those that {first.path} changes",
                remedy="write each into its base (tithe merge), and average the results",
            )
        if _base(first.header) != _base(entry.header):
            raise TitheError(
                str(entry.path),
                found="a delta on another base, or of other widths",
                expected=f"the base of {first.path}",
                remedy="average deltas of one base",
            )


def _base(header: Header) -> tuple[dict[str, str], Any]:
    """What a delta says of the tensors that it was made on."""
    return {name: entry.base for name, entry in header.entries.items()}, header.widths


def _write_delta(target: Path, deltas: Sequence[DeltaEntry], sums: Sums) -> None:
    """Write the average of deltas as a delta: their places, and what they leave alone, are those of the last."""
    last = deltas[-1]
    parts: dict[str, Tensor] = {}
    entries = dict(last.header.entries)
    for name, values in _in_memory(last.forms, sums).items():
        stored = {"dense": values}
        if name in last.places:
            stored = {"indices": last.places[name].to(index_dtype(entries[name].numel)), "values": values}
        parts.update({f"{name}#{part}": tensor for part, tensor in stored.items()})
        entries[name] = replace(entries[name], content=checksum(*stored.values()))
    told = {**last.header.metadata, "averaged": str(len(deltas))}
    save_tensors(target, parts, encode(Header(entries, told, widths=last.header.widths)))
