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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, TypeVar

import torch
from torch import Tensor

from tithe.averages.averageable import check_averageable
from tithe.averages.decay import decay_weights
from tithe.averages.entry import Entry
from tithe.averages.formats import DeltaEntry, FileEntry, PickleEntry, open_beside
from tithe.averages.found import PIPELINE, find_checkpoints, open_pipeline
from tithe.averages.history import History, spans
from tithe.averages.pickles import Keys, items, load
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

_TOLERANCE: Final = 1e-3
_Name = TypeVar("_Name")


Weights = Sequence[float] | Callable[[int], Sequence[float]]
"""One number a checkpoint, or a function that gives them for so many."""


@dataclass(frozen=True)
class Averaged:
    """What was averaged, and what was not.

    Args:
        checkpoints: those that were found, once each.
        weights: one a checkpoint.
        models: averaged besides the first model of the checkpoints: files of their folders, keys of their files.
        kept: what is the last checkpoint's: integer tensors, and what else its file holds.
        copied: files of the first one's folder.
        skipped: what does not count, or is not in the output → why.
    """

    checkpoints: tuple[Path, ...]
    weights: tuple[float, ...]
    models: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    copied: tuple[str, ...] = ()
    skipped: Mapping[str, str] = field(default_factory=dict[str, str])


def average(
    checkpoints: History | str | Path | Sequence[str | Path],
    output: str | Path,
    weights: Weights | None = None,
    *,
    like: str | None = None,
    last: int | None = None,
    skip_damaged: bool = False,
    progress: Progress | None = None,
    report: Callable[[Averaged], object] | None = None,
) -> Path:
    """Write Σ weights_i w_i of checkpoints on disk as one checkpoint of their format; only a few blocks are in memory.

    Floating-point and complex tensors are averaged, summed in float32, or in float64 where they are float32 or float64.
    Others have to be the same in all, but for flags and counters, which are the last checkpoint's; so are entries that
    are the same infinity in every checkpoint. The running statistics of norms are averaged like weights: estimate them
    again before using the average (`tithe average` with a recipe does).

    A safetensors file comes out of safetensors files or of what a `History` recorded; a folder with the same files of
    weights out of Hugging Face folders and pipelines, with the first one's configuration and tokenizer; what the last
    one holds, with the tensors of its models replaced, out of `.pt` and `.ckpt` files; a delta out of deltas that
    change the same places of one base.

    Without weights each checkpoint counts once: links to it and copies of it are left out. With weights, give one a
    checkpoint, and one to each copy or to none.

    Args:
        checkpoints: a `History`, or what one is opened with: a folder or file, or several.
        output: the new file or folder; it must not exist.
        weights: one number a checkpoint; they sum to one within 0.001 and are divided by their sum. A checkpoint of
            weight 0 is not read. None gives all the same; a function is called with the number of checkpoints.
        like: in the place of weights, the kind of average that `History.weights` knows: "linear", "cosine" or "sqrt",
            the end of such a decay of the learning rate; "ema:0.08", a moving average of this relative width.
        last: how many checkpoints a decay covers, from the end; None for all. It needs `like`.
        skip_damaged: leave out checkpoints that cannot be read, with a warning that names them.
        progress: called now and then with the bytes read, and how many there are to read.
        report: called with what was averaged, when it is written.

    Returns:
        `output`.

    Raises:
        TitheError: when a checkpoint is missing, damaged, of other tensors than the first, or has a value that is not
            finite; when a mean of its tensors means nothing: quantised weights, integers that differ, LoRA adapters;
            when the weights or `like` are not as above, the output exists, or there is no room. Nothing is written
            then.

    Example:
        >>> import tempfile, safetensors.torch as st
        >>> folder = Path(tempfile.mkdtemp())
        >>> for name, value in (("a", 1.0), ("b", 3.0)):
        ...     st.save_file({"weight": torch.full((2,), value)}, folder / f"{name}.safetensors")
        >>> path = average(folder, folder / "mean.safetensors", weights=[0.25, 0.75])
        >>> st.load_file(path)["weight"]
        tensor([2.5000, 2.5000])
    """
    output = Path(output)
    if (weights if like is not None else last) is not None:
        raise TitheError(
            "average",
            found="weights beside like" if like is not None else "last without like",
            expected="weights, or like and maybe last",
            remedy="leave out one" if like is not None else "add like='linear' for the mean of the last ones",
        )
    if not isinstance(checkpoints, History):
        given = [Path(checkpoints)] if isinstance(checkpoints, (str, Path)) else [Path(one) for one in checkpoints]
        if weights is None or callable(weights):
            _check_once(given)
        pipelines = [path for one in given for path in find_checkpoints(one).paths]
        if pipelines and all((path / PIPELINE).is_file() for path in pipelines):
            factors = weights if like is None else decay_weights(like, len(pipelines), last=last)
            told = _average_pipelines(pipelines, output, check_weights(factors, len(pipelines)), progress)
            if report is not None:
                report(told)
            return output
        checkpoints = History(checkpoints, skip_damaged=skip_damaged)
    history, factors = weigh(checkpoints, weights, like, last)
    rows = history.rows
    if isinstance(rows, DeltaRows):
        _check_deltas(rows.entries)
    counted = [index for index, factor in enumerate(factors) if factor]
    check_averageable(rows, counted)

    def summing(entries: Sequence[Entry], first: bool) -> Sums:
        if not isinstance(rows, PlainRows):
            return _Columns(history, factors, progress)
        if not first:
            check_averageable(PlainRows(entries), counted)
        return Stream(entries, factors, progress if first else None)

    told = write_merged(history, output, summing)
    if report is not None:
        report(replace(told, weights=tuple(factors)))
    return output


def weigh(history: History, weights: Weights | None, like: str | None, last: int | None) -> tuple[History, list[float]]:
    """Return the checkpoints that count, and the weight of each.

    Args:
        history: the checkpoints, maybe with copies of some.
        weights: one for each; or one for each that is no copy of another; a function of the number of these; or None
            for the same of each of them.
        like: the kind of average, as for `average`.
        last: how many of them it covers.

    Raises:
        TitheError: when their number is another, or they do not sum to one.
    """
    if like is not None:
        history = history.distinct()
        weights = history.weights(like, last=last)
    if weights is None or callable(weights) or len(weights) != len(history):
        history = history.distinct()
    return history, check_weights(weights, len(history))


def _check_once(paths: Sequence[Path]) -> None:
    """Without weights nobody can tell whether a checkpoint that is named twice is to count twice."""
    for path in paths:
        if paths.count(path) > 1:
            raise TitheError(
                str(path),
                found=f"the same path {paths.count(path)} times",
                expected="each checkpoint once",
                remedy="leave it out once, or say with weights= (--weights) how much each counts",
            )


Summing = Callable[[Sequence[Entry], bool], Sums]
"""Makes the source of an average of some checkpoints; whether they are those of the history, or beside them."""


def _average_pipelines(
    folders: Sequence[Path], output: Path, factors: Sequence[float], progress: Progress | None
) -> Averaged:
    """Average pipelines of several models, each model with its namesakes.

    Raises:
        TitheError: when one lacks a model that the first has, or has another.
    """
    first, *rest = found = [open_pipeline(folder) for folder in folders]
    for folder, other in zip(folders[1:], rest, strict=True):
        odd = sorted(set(first.models) ^ set(other.models))
        if odd:
            raise TitheError(
                str(folder),
                found=f"no {odd[0]}" if odd[0] in first.models else f"a model {odd[0]}",
                expected=f"the models of {folders[0]}: {', '.join(first.models)}",
                remedy="average pipelines of one kind, or the folders of one model of each",
            )
    check_place(output, folder=True, new=True)
    kept: list[str] = []
    copied, skipped = [str(place) for place in found[0].copied], {str(p): why for p, why in found[0].skipped.items()}
    with replacing(output, folder=True) as temporary:
        temporary.mkdir()
        _copy(folders[0], found[0].copied, temporary)
        for name in first.models:
            parts: list[Averaged] = []
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            models = [folder / name for folder in folders]
            average(models, temporary / name, factors, progress=progress, report=parts.append)
            kept += [f"{name}: {one}" for one in parts[0].kept]
            copied += [f"{name}/{one}" for one in parts[0].copied]
            skipped.update({f"{name}/{one}": why for one, why in parts[0].skipped.items()})
    return Averaged(tuple(folders), tuple(factors), tuple(first.models), tuple(kept), tuple(copied), skipped)


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
    rows = history.rows
    if isinstance(rows, PlainRows):
        for entry in rows.entries:
            beside = [*map(str, open_beside(entry)), *(entry.others() if isinstance(entry, PickleEntry) else ())]
            if beside:
                raise TitheError(
                    str(entry.path),
                    found=f"another model beside the first: {beside[0]}",
                    expected="one model, which these tensors are of",
                    remedy="average all of them without a recipe, or save the one model alone",
                )
    given = Given(state)
    write_merged(history, Path(output), lambda entries, first: given)
    return Path(output)


def write_merged(history: History, output: Path, summing: Summing) -> Averaged:
    """Write one checkpoint in the format of a history's, with values that `summing` makes.

    Args:
        history: the checkpoints; the configuration is the first one's, what has no sum the last one's.
        output: the new file or folder; it must not exist.
        summing: the source of the values of some checkpoints' models.

    Raises:
        TitheError: when the output exists, its name says another format, or there is no room.
    """
    rows = history.rows
    check_output(output, history)
    skipped = {str(path): why for path, why in history.skipped.items()}
    told = Averaged(tuple(rows.paths), (), kept=_kept(rows.forms), skipped=skipped)
    folder = isinstance(rows, PlainRows) and rows.entries[0].folder is not None
    with replacing(output, folder=folder, num_bytes=sum(form.nbytes for form in rows.forms.values())) as temporary:
        if isinstance(rows, PlainRows):
            return _write_plain(temporary, rows.entries, summing, told)
        if isinstance(rows, DeltaRows):
            _write_delta(temporary, rows.entries, summing(rows.entries, True))
        else:
            _write_flat(temporary, rows.forms, {"format": "pt"}, summing((), True))
        return told


def _kept(forms: Mapping[str, Form], place: str = "") -> tuple[str, ...]:
    return tuple(place + name for name, form in forms.items() if not form.averaged)


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
                if form.averaged:
                    wide = torch.complex128 if form.dtype.is_complex else torch.float64
                    values = factors.to(wide) @ self._history.columns(name, start, stop).to(wide)
                else:
                    last = max(index for index, weight in enumerate(self._weights) if weight)
                    values = self._history.rows.tensor(last, name).reshape(-1)[start:stop]
                yield block, values.to(form.dtype)
                done += block.nbytes
                if self._progress is not None:
                    self._progress(done, total)


def check_weights(weights: Weights | None, count: int) -> list[float]:
    """Return the weights of so many checkpoints, checked to sum to one.

    Raises:
        TitheError: when there is no checkpoint, or the weights are not one finite number each with a sum of one.
    """
    if weights is None:
        weights = [1 / max(count, 1)] * count
    elif callable(weights):
        weights = weights(count)
    total = math.fsum(weights) if all(map(math.isfinite, weights)) else math.nan
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
            remedy=f"divide each by {total:g}" if math.isfinite(total) and total else "use weights that sum to 1",
        )
    return [weight / total for weight in weights]


def check_output(output: Path, history: History) -> None:
    """Check a place to write to, before anything is read.

    Args:
        output: the place.
        history: checkpoints of the format that will be written.

    Raises:
        TitheError: when something is there, or its name says another format.
    """
    rows = history.rows
    first = rows.entries[0] if isinstance(rows, PlainRows) else None
    folder = first is not None and first.folder is not None
    check_place(output, folder=folder, new=True)
    if folder:
        return
    pickled = isinstance(first, PickleEntry)
    if output.suffix == ".safetensors" if pickled else output.suffix in (*PICKLES, ".tar"):
        raise TitheError(
            str(output),
            found=f"the ending {output.suffix}",
            expected=f"{rows.paths[0].suffix}, the format of {rows.paths[0]}",
            remedy="change the ending of the output",
        )


def _write_plain(target: Path, entries: Sequence[Entry], summing: Summing, told: Averaged) -> Averaged:
    """Write whole checkpoints' average in the format of the first; return all that is told of it."""
    first = entries[0]
    if first.folder is None or first.contents is None:
        models, kept = _write_model(target, entries, summing, first=True)
        return replace(told, models=models, kept=told.kept + kept)
    target.mkdir()
    _copy(first.folder, first.contents.copied, target)
    main = first.contents.main[0]
    models, kept = _write_model(target / main.name, entries, summing, first=True)
    others = [open_beside(entry) for entry in entries]
    for place in _names_of_all(entries, others):
        beside = [other[place] for other in others]
        (target / place).parent.mkdir(parents=True, exist_ok=True)
        more, besides = _write_model(target / place, beside, summing)
        models += (str(place), *(f"{place}: {one}" for one in more))
        kept += _kept(beside[0].forms, f"{place}: ") + tuple(f"{place}: {one}" for one in besides)
    skipped = {**told.skipped, **{str(path): why for path, why in first.contents.skipped.items()}}
    copied = tuple(map(str, first.contents.copied))
    return replace(told, models=models, kept=told.kept + kept, copied=copied, skipped=skipped)


def _names_of_all(entries: Sequence[Entry], others: Sequence[Mapping[_Name, Entry]]) -> list[_Name]:
    """The names of the other models that are in checkpoints; the same in all.

    Raises:
        TitheError: naming the first checkpoint that has others than the first.
    """
    for entry, names in zip(entries[1:], others[1:], strict=True):
        odd = sorted(map(str, set(names) ^ set(others[0])))
        if odd:
            raise TitheError(
                str(entry.path),
                found=f"other models beside the first than in {entries[0].path}: {odd[0]} is in one of the two alone",
                expected="the same models in all",
                remedy="leave this checkpoint out, or average the files of one model by their names",
            )
    return list(others[0])


def _write_model(
    target: Path, entries: Sequence[Entry], summing: Summing, *, first: bool = False
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Write one model, or a file of several; return what else was averaged in it, and what is the last one's."""
    if isinstance(entries[0], FileEntry):
        sums = summing(entries, first)
        files = entries[0].files
        for file in files:
            _write_file(target if len(files) == 1 else target.parent / file.path.name, file, sums)
        return (), ()
    pickled = [entry for entry in entries if isinstance(entry, PickleEntry)]
    others = [entry.others() if isinstance(entry, PickleEntry) else {} for entry in entries]
    parts = {pickled[-1].keys: summing(entries, first)}
    for keys in _names_of_all(entries, others):
        parts[keys] = summing([other[keys] for other in others], False)
    _write_pickle(target, pickled[-1].path, parts)
    models = [".".join(map(str, keys)) for keys in others[0]]
    return tuple(models), tuple(pickled[-1].beside())


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


def _copy(origin: Path, places: Sequence[Path], target: Path) -> None:
    """Copy files of a folder: configuration, tokenizer, the index of shards."""
    for place in places:
        (target / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(origin / place, target / place)


def _write_pickle(target: Path, last: Path, parts: Mapping[Keys, Sums]) -> None:
    """Write what a `.pt` file holds, with the tensors of its models replaced; tied ones stay tied."""
    outer: Any = copy.copy(load(last))
    copied: dict[Keys, Any] = {(): outer}
    for keys, sums in parts.items():
        inner = outer
        for depth, key in enumerate(keys, 1):
            if keys[:depth] not in copied:
                copied[keys[:depth]] = inner[key] = copy.copy(inner[key])
            inner = copied[keys[:depth]]
        _replace_tensors(inner, sums)
    with target.open("wb") as file:
        torch.save(outer, file)


def _replace_tensors(tensors: Any, sums: Sums) -> None:
    spelled = {str(key): key for key, value in items(tensors) if isinstance(value, Tensor)}
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
