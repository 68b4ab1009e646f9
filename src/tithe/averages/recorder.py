"""Record the history of a run: one file per checkpoint, each written whole or not at all.

    000000.safetensors    the first checkpoint, whole
    000001.safetensors    the next: whole, or the coded step from the one before it
    …

A checkpoint that is stored whole is an ordinary safetensors file under the model's own names. A coded one holds
`NAME#codes`, uint8 (blocks, bytes), with `NAME#scales`, bfloat16 (blocks,), for each weight that changed and whose
codes are shorter than its numbers; whole the other weights that changed, and what is no weight: running statistics,
counters. The metadata key `tithe_history` says step, score, bits, and the random name of the file before it, so that
files of two runs are told apart. Of a moving average it also says the width, and the steps that were followed.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from tithe.averages.power_ema import WIDEST, Profile, Runs
from tithe.averages.quantize import BLOCK, CARRIED, decode, encode
from tithe.averages.safetensors_ranges import FlatFile, FlatWriter, Form, check_plain
from tithe.averages.stacked import CODES, SCALES, CodedRows, coded_shorter, computed_dtype
from tithe.delta.fingerprint import state_tensors, ties
from tithe.errors import TitheError
from tithe.files import is_full, sync_folder

KEY: Final = "tithe_history"
VERSION: Final = 2
"""Files of version 1 have no checksums."""

_OF_TRACKS: Final = ("width", "steps")
_NO_LINKS: Final = (errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK)


@dataclass(frozen=True)
class Note:
    """The description that a recorded checkpoint has of itself.

    Args:
        step: of the run.
        score: how good it was, higher is better, or None.
        bits: of the codes; None when stored whole.
        name: random, of this file.
        after: name of the file before it; empty for the first.
        width: of a moving average; None of weights as they were.
        steps: that the moving average followed, as first, last and stride of ranges.
    """

    step: int
    score: float | None
    bits: int | None
    name: str
    after: str
    width: float | None = None
    steps: Runs = ()

    @property
    def profile(self) -> Profile | None:
        """Return how much of each step's weights a moving average holds; None of weights as they were."""
        return None if self.width is None else Profile(self.width, self.steps)

    def metadata(self) -> dict[str, str]:
        """Return the free strings of the file's header."""
        told = {key: value for key, value in vars(self).items() if self.width is not None or key not in _OF_TRACKS}
        return {KEY: json.dumps({"version": VERSION, **told})}

    @classmethod
    def of(cls, file: FlatFile) -> Note | None:
        """Read a file's note; return None for a file that no history recorded.

        Raises:
            TitheError: when it is damaged or of a later version.
        """
        if KEY not in file.metadata:
            return None
        try:
            told: Any = json.loads(file.metadata[KEY])
            version = told.pop("version")
            if version > VERSION:
                raise TitheError(
                    str(file.path),
                    found=f"a history of version {version}",
                    expected=f"version {VERSION}",
                    remedy="upgrade tithe",
                )
            if "steps" in told:
                told["steps"] = tuple((first, last, stride) for first, last, stride in told["steps"])
            note = cls(**told)
            if version != (1 if file.pages is None else VERSION) or not note._plain():
                raise ValueError(version)
            return note
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise TitheError(
                str(file.path), found="a damaged note", expected="what history.record wrote", remedy="copy it again"
            ) from error

    def _plain(self) -> bool:
        """Whether each value is of its kind, whatever a damaged file says."""
        kinds: dict[str, tuple[type, ...]] = {
            "step": (int,),
            "score": (int, float, type(None)),
            "bits": (int, type(None)),
            "name": (str,),
            "after": (str,),
            "width": (float, type(None)),
        }
        fine = all(type(getattr(self, name)) in kind for name, kind in kinds.items())
        return fine and self.bits in (None, 8, 4, 1) and self._followed()

    def _followed(self) -> bool:
        """Whether the steps of a moving average ascend to its own."""
        if self.width is None:
            return self.steps == ()
        ends = [number for first, last, _ in self.steps for number in (first, last)]
        whole = all(type(number) is int and number > 0 for run in self.steps for number in run)
        return 0 < self.width <= WIDEST and whole and ends == sorted(ends) and ends[-1:] == [self.step]


def recorded(folder: Path) -> list[Path]:
    """Return the files of a recorded history, in order; empty if there is none."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if re.fullmatch(r"[0-9]{6}\.safetensors", path.name))


def begun(paths: Sequence[Path], skip: bool) -> bool:
    """Return whether a history recorded these files.

    Args:
        paths: in order.
        skip: tell it by those that can be read.

    Raises:
        TitheError: when one before the first that a history recorded is damaged, without `skip`.
    """
    for path in paths:
        try:
            if Note.of(FlatFile.open(path)) is not None:
                return True
        except TitheError:
            if not skip:
                raise
    return False


def read_recorded(paths: Sequence[Path], left_out: list[str] | None) -> tuple[list[FlatFile], list[Note]]:
    """Read the notes of the files of one run.

    Args:
        paths: in order.
        left_out: takes what is said of those that are damaged, of another run, or coded after one that is; None raises.

    Raises:
        TitheError: naming the first of them.
    """
    files: list[FlatFile] = []
    notes: list[Note] = []
    others: set[str] = set()
    last = -1  # number of the last file that is not left out
    for path in paths:
        number = int(path.stem)
        try:
            file = FlatFile.open(path)
            note = Note.of(file)
            if left_out is not None:
                file.check_all()
            follows = note is not None and note.after == (notes[-1].name if notes else "")
            # After a gap nothing tells which run goes on, but that it is not one that was left out before.
            unknown = note is not None and left_out is not None and number > last + 1 and note.after not in others
            if note is None or not (follows or unknown):
                others.add("" if note is None else note.name)
                raise TitheError(
                    str(path),
                    found="a checkpoint of another history, or one after a gap",
                    expected=f"what was recorded after {files[-1].path}" if files else "the first of a run",
                    remedy="keep each history in a folder of its own, with all of its files",
                )
            if unknown and not follows and note.bits is not None:
                raise TitheError(
                    str(path),
                    found="a coded step after one that is left out",
                    expected="all those before it",
                    remedy="restore them",
                )
            if files and file.pages is None and files[-1].pages is not None:
                raise TitheError(
                    str(path),
                    found="a checkpoint without checksums after one that has them",
                    expected="checksums",
                    remedy="copy it again",
                )
            if notes and note.bits != notes[-1].bits:
                raise TitheError(
                    str(path), found=f"bits={note.bits}", expected=f"bits={notes[-1].bits}", remedy="copy it again"
                )
        except TitheError as error:
            if left_out is None:
                raise
            left_out.append(str(error))
            continue
        files.append(file)
        notes.append(note)
        last = number
    return files, notes


def weights_of(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return a model's floating-point parameters, each once under its first name, and the rest of its state.

    The θ of an attached plan is not part of the state; the weights that it is written into are.

    Raises:
        TitheError: when a tensor has no values, is sparse, quantised, or of a dtype that safetensors does not store.
    """
    state = state_tensors(model)
    for name, tensor in state.items():
        check_plain("record", name, tensor)
        if tensor.is_meta:
            raise TitheError(name, found="a tensor without values", expected="weights", remedy="load the weights first")
    parameters = dict.fromkeys(name for name, _ in model.named_parameters())
    weights: dict[str, Tensor] = {}
    rest: dict[str, Tensor] = {}
    for name in ties(state, first=parameters):
        (weights if name in parameters and state[name].is_floating_point() else rest)[name] = state[name]
    return weights, rest


class Recorder:
    """A writer that appends checkpoints of a model in training.

    A coded history needs the checkpoint before, as it is decoded, in memory: one number for each weight; with one bit
    also what its code has rounded, which the next takes up in part. A run that goes on begins with nothing of that.

    Args:
        folder: of the history.
        bits: of the codes, or None.
        notes: of the checkpoints that are there.
        rows: those checkpoints, to go on coding from; None when there are none, or they are stored whole.
    """

    def __init__(self, folder: Path, bits: int | None, notes: Sequence[Note], rows: CodedRows | None) -> None:
        self.folder, self.bits = folder, bits
        self.notes = list(notes)
        self._rows = rows
        self._last: dict[str, Tensor] = {}
        self._errors: dict[str, Tensor] = {}
        for stale in folder.glob(".[0-9]*.tmp") if folder.is_dir() else ():
            stale.unlink(missing_ok=True)  # of a run that was killed while it wrote

    def record(
        self,
        weights: Mapping[str, Tensor],
        rest: Mapping[str, Tensor],
        step: int,
        score: float | None,
        profile: Profile | None = None,
    ) -> Path | None:
        """Write one checkpoint; return None when the disk is full.

        Args:
            weights: name → parameter.
            rest: name → what else the model's state holds.
            step: of the run.
            score: or None.
            profile: of a moving average, of which those of other widths may have the same step.

        Raises:
            TitheError: when a weight is not finite, the step is not after the last one, another run writes here, or the
                file cannot be written.
        """
        same = [note.width for note in self.notes if note.step == step]
        beside = profile is not None and profile.width not in same
        if self.notes and step < self.notes[-1].step + (not beside):
            raise TitheError(
                str(self.folder),
                found=f"step {step} after step {self.notes[-1].step}",
                expected="a later step",
                remedy="give a new run a folder of its own; a run that goes on counts on",
            )
        for name, weight in weights.items():
            values = weight.to(computed_dtype(weight.dtype))
            if not math.isfinite(float(values.sum())) and not bool(values.isfinite().all()):
                raise TitheError(
                    name,
                    found="a weight that is not finite",
                    expected="finite weights",
                    remedy="lower the learning rate, or clip gradients; the history so far is readable",
                )
        tensors, last, errors = self._coded(weights) if self.bits is not None else (dict(weights), {}, {})
        after = self.notes[-1].name if self.notes else ""
        told = (None, ()) if profile is None else (profile.width, profile.runs)
        note = Note(int(step), None if score is None else float(score), self.bits, secrets.token_hex(8), after, *told)
        path = self.folder / f"{len(self.notes):06d}.safetensors"
        if not _write(path, {**tensors, **rest}, note):
            return None
        self.notes.append(note)
        self._last.update(last)
        self._errors.update(errors)
        return path

    def _coded(self, weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        """The codes of the steps from the last checkpoint, what they decode to, and what of it the next takes up."""
        assert self.bits is not None
        tensors: dict[str, Tensor] = {}
        last: dict[str, Tensor] = {}
        errors: dict[str, Tensor] = {}
        for name, weight in weights.items():
            values = weight.cpu().reshape(-1).to(computed_dtype(weight.dtype))
            if not self.notes:
                tensors[name], last[name] = weight, values.clone()
                continue
            if name not in self._last:
                assert self._rows is not None
                self._last[name] = self._rows.sum(len(self._rows) - 1, name)
            step = values - self._last[name]
            if not bool(step.any()):
                continue
            if name in self._errors:
                step += self._errors[name]
            if not coded_shorter(Form.of(weight), self.bits):
                tensors[name], last[name] = weight, values.clone()
                continue
            blocks = torch.nn.functional.pad(step, (0, -step.numel() % BLOCK)).view(-1, 1, BLOCK)
            codes, scales = encode(blocks, self.bits)
            assert scales is not None
            tensors[name + CODES], tensors[name + SCALES] = codes[:, 0], scales[:, 0]
            decoded = decode(codes, scales, self.bits).view(-1)[: step.numel()]
            last[name] = self._last[name] + decoded
            if CARRIED[self.bits]:
                errors[name] = step.sub_(decoded).mul_(CARRIED[self.bits])
        return tensors, last, errors


def _write(path: Path, tensors: Mapping[str, Tensor], note: Note) -> bool:
    """Write a temporary file, then give it its name unless that is taken; return False when the disk is full."""
    temporary = path.parent / f".{path.stem}.{note.name}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            forms = {name: Form.of(tensor) for name, tensor in tensors.items()}
            writer = FlatWriter(file, forms, note.metadata(), checked=True)
            for name in writer.names:
                writer.write(tensors[name])
            writer.finish()
            file.flush()
            os.fsync(file.fileno())
        link(temporary, path)
    except (FileExistsError, FileNotFoundError) as error:
        raise TitheError(
            str(path),
            found="a checkpoint that another run wrote meanwhile, or is writing",
            expected="one run a history",
            remedy="give each run a folder of its own",
        ) from error
    except OSError as error:
        if is_full(error):
            return False
        raise TitheError(
            str(path),
            found=f"a file that cannot be written ({error.strerror})",
            expected="a folder for checkpoints",
            remedy="check its permissions, or record into another folder",
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    sync_folder(path.parent)
    return True


def link(temporary: Path, path: Path) -> None:
    """Give a complete file its name, in one step, unless the name is taken.

    Args:
        temporary: the file, in the same folder.
        path: its name.

    Raises:
        FileExistsError: when it is.
        OSError: when the folder cannot be written.
    """
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if path.exists():
            raise FileExistsError(errno.EEXIST, "File exists", str(path)) from None
        os.replace(temporary, path)
