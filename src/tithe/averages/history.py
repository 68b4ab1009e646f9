"""Keep a run's checkpoints on disk: record them while it trains, or open existing ones."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from tithe.averages.averageable import check_averageable, check_numbers
from tithe.averages.copies import copies
from tithe.averages.decay import decay_weights, ema_width
from tithe.averages.formats import FileEntry
from tithe.averages.opened import none_left, open_found
from tithe.averages.power_ema import Profile, reconstruct
from tithe.averages.quantize import BLOCK
from tithe.averages.recorder import Note, Recorder, begun, read_recorded, recorded, weights_of
from tithe.averages.safetensors_ranges import FlatFile, Form
from tithe.averages.stacked import CodedRows, DeltaRows, PlainRows, Rows
from tithe.averages.tracks import Track, Tracks, check_widths, followed_tensors
from tithe.errors import TitheError, TitheWarning

COLUMNS: Final = 1 << 22
"""Entries, over all rows, that are in memory at a time: 16 MB of float32."""

_SUMMED: Final = 1 << 18
"""Entries of the mean that are summed at a time: float64 that stays in a processor's cache."""


class History:
    """Checkpoints w_1 … w_n of one model on disk, streamed by columns: n models are never in memory at once.

    A path that does not exist, an empty folder, or a folder that a history recorded: `record` appends to it. Anything
    else is read only: a folder of checkpoints, one checkpoint, or a list of them, in this order. A checkpoint is a
    safetensors file, a Hugging Face folder with one or several, a `.pt` or `.ckpt` file whose tensors can be read
    without running code, or a delta by `plan.save`. Of a tensor that deltas change in places, every method gives the
    values at those places, 1-D; `tithe.attach` puts them onto the model.

    It records the floating-point parameters, tied ones once, and the buffers that a `state_dict` holds.
    With bits, a weight is coded as its step from the checkpoint before, computed in float32 (float64 of float64); what
    did not change takes no room, and what is shorter than its codes is kept whole. Buffers are always kept whole.

    With `ema`, it records no weights as they were but moving averages of them, one file for each width: `update` after
    every optimizer step keeps them up, one copy of the weights in memory for each, and `record` writes them. From
    snapshots of two widths `weights("ema:0.08")` gives an average of any width near theirs.

    Args:
        path: a folder or file, or several.
        bits: how a recorded history stores its checkpoints after the first: None whole, 8, 4 or 1 bits a weight and 16
            more for each 256.
        ema: relative widths of moving averages, such as (0.05, 0.10): the standard deviation of an average's profile
            over the steps, as a share of the run so far. None records the weights themselves.
        skip_damaged: leave out checkpoints that cannot be read, with a warning that names them; of a coded history,
            also those after the first of them. Nothing is recorded then.

    Attributes:
        folder: the folder, or that of the first checkpoint.
        bits: of the codes that checkpoints are stored in; None when they are whole.
        ema: widths of the moving averages that are recorded; None where weights are.
        skipped: what does not count though it looks like a checkpoint, links to others and states of a run → why.

    Raises:
        TitheError: naming the checkpoint that is missing, damaged, a pickle with code in it, or of other tensors,
            shapes or dtypes than the first; or when `bits` is not what the history was recorded with.

    Example:
        >>> import tempfile
        >>> model = nn.Linear(2, 1, bias=False)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     history = History(folder)
        ...     for step, value in enumerate((1.0, 2.0)):
        ...         _ = nn.init.constant_(model.weight, value)
        ...         _ = history.record(model, step)
        ...     len(history), history.mean()["weight"]
        (2, tensor([[1.5000, 1.5000]]))
    """

    def __init__(
        self,
        path: str | Path | Sequence[str | Path],
        bits: int | None = None,
        *,
        ema: Sequence[float] | None = None,
        skip_damaged: bool = False,
    ) -> None:
        if bits not in (None, 8, 4, 1):
            raise TitheError("History", found=f"bits={bits}", expected="None, 8, 4 or 1", remedy="change bits")
        paths = [Path(path)] if isinstance(path, (str, Path)) else [Path(one) for one in path]
        if not paths:
            raise TitheError("History", found="no path", expected="at least one", remedy="pass the checkpoints")
        self.folder = paths[0].parent if paths[0].is_file() else paths[0]
        self.bits = bits
        self.ema = None if ema is None else check_widths(ema, bits)
        self._tracks: Tracks | None = None
        self._files: list[FlatFile] = []
        self._notes: list[Note] = []
        self._rows: Rows | None = None
        self._recorder: Recorder | None = None
        self._full = False
        self.skipped: dict[Path, str] = {}
        self._read_only = "checkpoints that something else wrote"
        left_out: list[str] = []
        files = recorded(paths[0]) if len(paths) == 1 else []
        if len(paths) == 1 and (begun(files, skip_damaged) or _empty(paths[0])):
            self._open_recorded(files, left_out if skip_damaged else None)
            self._read_only = "damaged checkpoints that were left out" if left_out else ""
        else:
            if bits is not None or ema is not None:
                raise TitheError(
                    str(paths[0]),
                    found=f"{f'bits={bits}' if ema is None else f'ema={ema}'} for checkpoints that are written already",
                    expected=f"{'bits' if ema is None else 'ema'} for a history that is recorded",
                    remedy="leave out bits= here; tithe.TWA(history, bits=…) codes the basis"
                    if ema is None
                    else "leave out ema= here, or record into a new folder",
                )
            self._rows, self._notes, self.skipped = open_found(paths, left_out if skip_damaged else None)
        for message in left_out:
            warnings.warn(f"left out: {message}", TitheWarning, stacklevel=2)

    @property
    def rows(self) -> Rows:
        """Return the checkpoints side by side.

        Raises:
            TitheError: when there are none.
        """
        if self._rows is None:
            if not self._files:
                raise TitheError(
                    str(self.folder),
                    found="no checkpoint",
                    expected="at least one",
                    remedy="check the path, or record some first",
                )
            self._rows = (
                PlainRows([FileEntry(file.path, [file]) for file in self._files])
                if self.bits is None
                else CodedRows(self._files, self.bits)
            )
        return self._rows

    @property
    def partial(self) -> bool:
        """Return whether checkpoints are deltas, which hold some of a model's tensors and do not change the others."""
        return isinstance(self._rows, DeltaRows)

    def on(self, base: Mapping[str, Tensor]) -> History:
        """Return the same checkpoints, where deltas take the tensors they do not change from a base.

        Args:
            base: name → tensor of the model that the deltas were made on, or were applied to; read when columns are.

        Raises:
            TitheError: naming the delta that was made on another base.
        """
        rows = self.rows
        if not isinstance(rows, DeltaRows):
            return self
        based = copy.copy(self)
        based._rows = rows.on(base)
        return based

    def distinct(self) -> History:
        """Return the same checkpoints, each once: copies of another are left out, and told in `skipped`.

        What a history recorded stays as it is: the checkpoints of a run are its steps, whether it moved or not.
        """
        rows = self.rows
        if self._notes or not isinstance(rows, PlainRows | DeltaRows):
            return self
        found = copies(rows.entries)
        if not found:
            return self
        once = copy.copy(self)
        once._rows = rows.without(found)
        paths = rows.paths
        once.skipped = {**self.skipped, **{paths[one]: f"a copy of {paths[two].name}" for one, two in found.items()}}
        return once

    @property
    def steps(self) -> list[int]:
        """Return the step of each checkpoint, as given to `record`, or else its place in the list."""
        return [note.step for note in self._notes] or list(range(len(self)))

    @property
    def scores(self) -> list[float | None]:
        """Return the score of each checkpoint, as given to `record`."""
        return [note.score for note in self._notes] or [None] * len(self)

    def __len__(self) -> int:
        return len(self._files) or (0 if self._rows is None else len(self._rows))

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self.rows.states() if len(self) else iter(())

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        rows = self.rows
        place = range(len(rows))[index]
        return {name: rows.tensor(place, name) for name in rows.forms}

    def record(self, model: nn.Module, step: int, *, score: float | None = None) -> bool:
        """Append the model's weights and buffers; return whether they were written.

        A full disk warns and leaves the history as it was: training goes on.

        Args:
            model: with or without a plan; its weights are recorded under their own names.
            step: later than the last one recorded.
            score: how good it is on data held out, higher is better; TWA can start from the best.

        Raises:
            TitheError: when the history is read only, the model is another, a weight is not finite, the step is not
                later, another run wrote a checkpoint meanwhile, or the folder cannot be written.
        """
        if self._read_only:
            raise TitheError(
                str(self.folder),
                found=self._read_only,
                expected="a new folder, or one that a history recorded",
                remedy="record into a folder of its own",
            )
        weights, rest = weights_of(model)
        write = self._write if self.ema is None else self._record_averages
        written = write(weights, rest, step, score)
        if not written and not self._full:
            warnings.warn(
                f"{self.folder}: no room for the checkpoint of step {step}; the {len(self)} before it are readable."
                " Make room, and recording goes on with the next.",
                TitheWarning,
                stacklevel=2,
            )
        self._full = not written
        return written

    def update(self, model: nn.Module, step: int) -> None:
        """Take the model's weights after a step into the moving averages; `record` does it where it is not done.

        Buffers of floating-point numbers are averaged too, so that running statistics stay near what they stand for.

        Args:
            model: as for `record`.
            step: optimizer steps since the run began: later than the last one. Steps may be left out; the averages then
                hold the next one's weights for them.

        Raises:
            TitheError: when the history records no moving averages, or as `record` does.
        """
        if self.ema is None or self._read_only:
            raise TitheError(
                str(self.folder),
                found=self._read_only or "a history of weights as they are",
                expected="one that records moving averages",
                remedy="open a new folder with ema=(0.05, 0.10), or leave out update",
            )
        self._followed().update(followed_tensors(*weights_of(model)), step)

    def state_dict(self) -> dict[str, Any]:
        """Return the moving averages since the last `record`, for the checkpoint that a run resumes from.

        Without it a run goes on from what was recorded last, and the averages have a gap, which their profiles tell.
        """
        return {} if self.ema is None else self._followed().state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`, exactly as if the run had never stopped.

        Raises:
            TitheError: when it is of other widths, or older than what was recorded last.
        """
        if self.ema is None:
            return
        tracks = self._followed()
        tracks.load_state_dict(state)
        later = [file.path.name for file, note in zip(self._files, self._notes, strict=True) if note.step > tracks.step]
        if later:
            raise TitheError(
                str(self.folder),
                found=f"averages of step {self._notes[-1].step}, and a state of step {tracks.step}",
                expected="none that the run will record again",
                remedy=f"remove {', '.join(later)}, or go on from a later state",
            )

    def _followed(self) -> Tracks:
        """The moving averages in memory; at first those that were recorded last."""
        if self._tracks is None:
            tracks: list[Track] = []
            for width in self.ema or ():
                last = max((at for at, note in enumerate(self._notes) if note.width == width), default=None)
                if last is None:
                    tracks.append(Track(width))
                    continue
                forms = self.rows.forms.items()
                values = {name: self.rows.tensor(last, name) for name, form in forms if form.averaged}
                tracks.append(Track(width, self._notes[last].steps, values))
            self._tracks = Tracks(tracks)
        return self._tracks

    def _record_averages(
        self, weights: Mapping[str, Tensor], rest: Mapping[str, Tensor], step: int, score: float | None
    ) -> bool:
        """Append a snapshot, one file for each moving average; return whether there was room for all of them."""
        tracks, followed = self._followed(), followed_tensors(weights, rest)
        if tracks.step != step:
            tracks.update(followed, step)
        written = len(self._files)
        for track in tracks.tracks:
            track.check(followed)
            own = {name: track.values[name] for name in weights}
            others = {name: track.values.get(name, tensor) for name, tensor in rest.items()}
            if not self._write(own, others, step, score, track.profile):
                self._take_back(written)
                return False
        return True

    def _take_back(self, count: int) -> None:
        """Remove the last files, until there are so many."""
        assert self._recorder is not None
        while len(self._files) > count:
            self._files.pop().path.unlink()
            self._recorder.notes.pop()
        self._notes, self._rows = list(self._recorder.notes), None

    def _write(
        self,
        weights: Mapping[str, Tensor],
        rest: Mapping[str, Tensor],
        step: int,
        score: float | None,
        profile: Profile | None = None,
    ) -> bool:
        """Append one checkpoint; return whether there was room."""
        if self._files:
            self._check_model({name: Form.of(tensor) for name, tensor in {**weights, **rest}.items()})
        if self._recorder is None:
            coded = self.rows if self._files else None
            self._recorder = Recorder(
                self.folder, self.bits, self._notes, coded if isinstance(coded, CodedRows) else None
            )
        written = self._recorder.record(weights, rest, step, score, profile)
        if written is None:
            return False
        self._files.append(FlatFile.open(written))
        self._notes, self._rows = list(self._recorder.notes), None
        return True

    def weights(self, like: str, *, last: int | None = None) -> list[float]:
        """Return the weights of the checkpoints for an average of a kind, one each, in sum 1.

        "linear", "cosine" and "sqrt" make checkpoints of a constant learning rate the end of such a decay (WSM,
        arXiv 2507.17634): c_j = w_j − w_{j+1} with w_j = f(j / n); "linear" is the uniform mean. "ema:0.08" makes
        recorded moving averages one of relative width 0.08 at the last step (Karras et al., arXiv 2312.02696): the
        least squares fit of their profiles, some of whose weights are negative.

        Args:
            like: the kind.
            last: how many checkpoints a decay covers, from the end; None for all.

        Raises:
            TitheError: when there is no such kind, there are fewer checkpoints than `last`, they are not what the kind
                is made of, or no sum of the moving averages comes near the one that is asked for.

        Example:
            >>> import tempfile
            >>> model, folder = nn.Linear(1, 1), tempfile.mkdtemp()
            >>> history = History(folder)
            >>> all(history.record(model, step) for step in range(4))
            True
            >>> [round(weight, 3) for weight in history.weights("cosine")]
            [0.146, 0.354, 0.354, 0.146]
        """
        width = ema_width(like)
        profiles = [note.profile for note in self._notes]
        averages = [profile for profile in profiles if profile is not None]
        if width is None:
            if averages:
                raise TitheError(
                    str(self.folder),
                    found=f"moving averages of the weights, for like={like!r}",
                    expected="the weights as they were",
                    remedy="use like='ema:0.08', or record a history without ema=",
                )
            return decay_weights(like, len(self.rows), last=last)
        if last is not None:
            raise TitheError(
                "average",
                found=f"last={last} beside like={like!r}",
                expected="all that was recorded: the width says how far back it reaches",
                remedy="leave out last",
            )
        if not averages or len(averages) < len(self.rows):
            raise TitheError(
                str(self.folder),
                found=f"the weights as they were, for like={like!r}",
                expected="moving averages of two widths",
                remedy="record them: tithe.History(path, ema=(0.05, 0.10)), with update after each step; or use"
                " like='linear', 'cosine' or 'sqrt'",
            )
        return reconstruct(averages, Profile(width, averages[-1].runs))[0]

    def mean(self) -> dict[str, Tensor]:
        """Return the mean of each floating-point tensor, summed in float64; others are the last checkpoint's.

        Raises:
            TitheError: when there is no checkpoint, or one has values that are not finite.
        """
        return self.average([1 / len(self.rows)] * len(self))

    def average(self, weights: Sequence[float]) -> dict[str, Tensor]:
        """Return Σ weights_i w_i of each floating-point or complex tensor; others are the last checkpoint's.

        Args:
            weights: one for each checkpoint.

        Raises:
            TitheError: when the number of weights is another, a checkpoint has values that are not finite, or the
                tensors are codes, integers or factors that no mean of them stands for.
        """
        check_averageable(self.rows, [index for index, weight in enumerate(weights) if weight])
        return {name: self.average_tensor(name, weights) for name in self.rows.forms}

    def average_tensor(self, name: str, weights: Sequence[float]) -> Tensor:
        """Average one tensor; an entry that is infinite in every checkpoint, as in masks, stays infinite.

        Args:
            name: of the tensor.
            weights: one for each checkpoint.

        Raises:
            TitheError: when the number of weights is another, or a checkpoint has values that are not finite.
        """
        rows, form = self.rows, self.rows.forms[name]
        if len(weights) != len(rows):
            raise TitheError(
                "average", found=f"{len(weights)} weights", expected=f"{len(rows)}", remedy="pass one a checkpoint"
            )
        if not form.averaged:
            return rows.tensor(max((index for index, weight in enumerate(weights) if weight), default=-1), name)
        out = torch.empty(form.numel, dtype=form.dtype)
        summed = torch.complex128 if form.dtype.is_complex else torch.float64
        for start in range(0, form.numel, _SUMMED):
            stop = min(start + _SUMMED, form.numel)
            total = torch.zeros(stop - start, dtype=summed)
            wide = torch.empty_like(total)
            for weight, values in zip(weights, rows.ranges(name, start, stop), strict=True):
                total.add_(wide.copy_(values), alpha=weight)
            if not bool(total.sum().isfinite()):
                for first, last in spans(stop - start, len(rows)):
                    total[first:last] = self._kept(name, start + first, start + last, total[first:last])
            out[start:stop] = total
        return out.view(form.shape)

    def columns(self, name: str, start: int, stop: int) -> Tensor:
        """Return entries [start, stop) of a tensor in every checkpoint, (n, stop − start), float32 or float64.

        Complex ones are complex64 or complex128.

        Args:
            name: of a floating-point or complex tensor.
            start: the first entry, in row-major order.
            stop: the entry after the last.

        Raises:
            TitheError: naming the checkpoint and the tensor, when a value is not finite, or no number but a code.
        """
        check_numbers(self.rows, name)
        block = self.rows.columns(name, start, stop)
        check_finite(block, name, self.rows.paths)
        return block

    def _kept(self, name: str, start: int, stop: int, total: Tensor) -> Tensor:
        """A sum, with the value itself where that is the same infinity in every checkpoint."""
        block = self.rows.columns(name, start, stop)
        same = (block == block[0]).all(0) & block[0].isinf()
        check_finite(block.masked_fill(same, 0), name, self.rows.paths)
        return torch.where(same, block[0].to(total.dtype), total)

    def _check_model(self, found: Mapping[str, Form]) -> None:
        forms = self._files[0].forms
        odd = sorted(name for name in {**found, **forms} if found.get(name) != forms.get(name))
        if odd:
            raise TitheError(
                odd[0],
                found=f"{found.get(odd[0], 'no such tensor')} in the model",
                expected=f"{forms.get(odd[0], 'none')}, as in {self._files[0].path}",
                remedy="record another model into a folder of its own",
            )

    def _open_recorded(self, paths: Sequence[Path], left_out: list[str] | None) -> None:
        """Read the files of a run; `left_out` takes the messages of those that are damaged, unless it is None."""
        self._files, self._notes = read_recorded(paths, left_out)
        if paths and not self._files:
            raise none_left(self.folder, left_out)
        if self._notes:
            widths = tuple(dict.fromkeys(note.width for note in self._notes if note.width is not None))
            if self.ema is not None and set(self.ema) != set(widths):
                raise TitheError(
                    str(self.folder),
                    found=f"moving averages of widths {widths}" if widths else "weights as they were",
                    expected=f"ema={self.ema}",
                    remedy="leave out ema=, or record into a new folder",
                )
            self.ema = widths or None
            asked, self.bits = self.bits, self._notes[0].bits
            if asked is not None and self.bits != asked:
                raise TitheError(
                    str(self.folder),
                    found="whole checkpoints" if self.bits is None else f"checkpoints of {self.bits} bits",
                    expected=f"bits={asked}",
                    remedy="leave out bits=, or record into a new folder",
                )
            self._rows = self.rows


def spans(numel: int, num_rows: int) -> Iterator[tuple[int, int]]:
    """Return ranges of columns that together fill a few blocks of memory, whatever their number; whole blocks of codes.

    Args:
        numel: columns.
        num_rows: rows that are in memory together.
    """
    size = max(COLUMNS // num_rows // BLOCK, 1) * BLOCK
    for start in range(0, numel, size):
        yield start, min(start + size, numel)


def check_finite(block: Tensor, name: str, paths: Sequence[Path]) -> None:
    """Check that every value is a number.

    Args:
        block: (n, c), floating-point.
        name: of the tensor, for the message.
        paths: of the n checkpoints.

    Raises:
        TitheError: naming the checkpoint and the tensor.
    """
    if bool(block.sum().isfinite()):
        return
    fine = block.isfinite().all(1)
    if not bool(fine.all()):
        raise TitheError(
            str(paths[int((~fine).nonzero()[0, 0])]),
            found=f"values of {name} that are not finite",
            expected="finite weights",
            remedy="leave this checkpoint out",
        )


def _empty(path: Path) -> bool:
    """Whether there is nothing yet; a run that was killed in its first checkpoint leaves a hidden file."""
    return not path.exists() or (path.is_dir() and all(one.name.startswith(".") for one in path.iterdir()))
