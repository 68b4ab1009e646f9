"""Read one checkpoint of any origin by ranges of entries, and find the checkpoints at a path.

A safetensors file, or a Hugging Face folder with one or several (`FileEntry`); a `.pt` file by `torch.save` or
Lightning (`PickleEntry`): tensors and plain containers alone, what would run code is refused; a delta by `plan.save`
(`DeltaEntry`).
"""

from __future__ import annotations

import pickle
import re
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, cast

import torch
from torch import Tensor

from tithe.averages.safetensors_ranges import FlatFile, Form, check_plain, read_range
from tithe.delta.file import TensorFile
from tithe.delta.format import Header, decode, read_record
from tithe.delta.source import PICKLES, find_shards
from tithe.errors import TitheError

_NESTED: Final = ("state_dict", "model_state_dict", "model", "module", "net", "ema_state_dict")
"""Keys under which training scripts store a model's tensors, next to the optimizer's."""

_NO_WEIGHTS: Final = re.compile(r"(optimizer|scheduler|scaler|rng_state|random_states|training_args)[._].*")
"""Files of the same kinds that Hugging Face's trainer and accelerate write next to the weights."""

PICKLED: Final = "pytorch_model.bin"
"""What Hugging Face calls weights that are no safetensors."""


class Entry(ABC):
    """A checkpoint of named tensors, whatever wrote it.

    Args:
        path: the file or folder.
        forms: name → form.
    """

    path: Path
    forms: Mapping[str, Form]

    @abstractmethod
    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Return entries [start, stop) in row-major order, 1-D on the CPU, in the tensor's own dtype."""

    def tensor(self, name: str) -> Tensor:
        """Return all of a tensor."""
        form = self.forms[name]
        return self.read(name, 0, form.numel).view(form.shape)


class FileEntry(Entry):
    """A checkpoint of one or several safetensors files.

    Args:
        path: what the checkpoint is called: the file, or the folder.
        files: its files, no tensor in two of them.
    """

    def __init__(self, path: Path, files: Sequence[FlatFile]) -> None:
        self.path, self.files = path, files
        self._owner = {name: file for file in files for name in file.forms}
        self.forms = {name: file.forms[name] for name, file in self._owner.items()}

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Read a range of entries from the file."""
        return self._owner[name].read(name, start, stop)


class PickleEntry(Entry):
    """A file by `torch.save`: a state dict, alone or among other data, as Lightning and training scripts write it.

    torch's reader of weights alone says where in the file each tensor lies; ranges are read from there. A file in the
    form from before torch 1.6 has no such places: it is loaded whole, and stays in memory.

    Args:
        path: the file.

    Attributes:
        keys: those that lead to the state dict in the file, outermost first: none when the file is one.

    Raises:
        TitheError: when the file cannot be read without running what is in it, is damaged, or has no state dict.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.keys, self._tensors = _state(_load(path, "meta"), path)
        self._offsets = _offsets(path, self._tensors)
        if self._offsets is None:
            self._tensors = {name: tensor.contiguous() for name, tensor in _state(_load(path, "cpu"), path)[1].items()}
        self.forms = {name: Form.of(tensor) for name, tensor in self._tensors.items()}

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Read a range of entries; for a tensor that is not stored row-major, the rows around it."""
        tensor = self._tensors[name]
        if self._offsets is None:
            return tensor.view(-1)[start:stop].clone()
        offset, dtype = self._offsets[name], tensor.dtype
        if start >= stop or tensor.is_contiguous():
            return read_range(self.path, offset + start * dtype.itemsize, max(stop - start, 0), dtype)
        width = tensor.numel() // tensor.shape[0]
        first, last = start // width, -(-stop // width)
        part = tensor[first:last]
        count = 1 + sum((size - 1) * step for size, step in zip(part.shape, part.stride(), strict=True))
        memory = read_range(self.path, offset + first * tensor.stride(0) * dtype.itemsize, count, dtype)
        return memory.as_strided(part.shape, part.stride()).reshape(-1)[start - first * width : stop - first * width]


def _offsets(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, int] | None:
    """Where in the file each tensor begins, in bytes; None where torch does not tell.

    Raises:
        TitheError: when the file was packed again, so that its numbers are not stored as they are.
    """
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
            raise TitheError(
                str(path),
                found="a compressed file",
                expected="what torch.save writes",
                remedy="load it, and save it with torch.save",
            )
    found: dict[str, int] = {}
    for name, tensor in tensors.items():
        first = vars(tensor.untyped_storage()).get("_checkpoint_offset")
        if first is None:
            return None
        found[name] = first + tensor.storage_offset() * tensor.dtype.itemsize
    return found


def load(path: Path) -> Any:
    """Return the content of a file by `torch.save` on the CPU, with mapped tensors if the file's form allows it.

    Args:
        path: the file.

    Raises:
        TitheError: when it cannot be read without running what is in it, or not at all.
    """
    return _load(path, "cpu", mapped=zipfile.is_zipfile(path))


def _load(path: Path, device: str, *, mapped: bool = False) -> Any:
    try:
        return torch.load(path, map_location=device, weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        reason = re.search(r"GLOBAL ([\w.]+)|(?:class|function) ([\w.]+)", str(error))
        if reason is None:
            raise _unreadable(path, error) from error
        raise TitheError(
            str(path),
            found=f"a pickle that holds {reason.group(1) or reason.group(2)}, which is no tensor",
            expected="tensors in plain containers, which can be read without running code",
            remedy="save model.state_dict() alone with torch.save, or with safetensors",
        ) from error
    except Exception as error:  # whatever the bytes of a damaged file make the reader stumble over
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> TitheError:
    reason = re.split(r"\n|\. ", str(error))[0] or type(error).__name__
    return TitheError(
        str(path),
        found=f"a file that cannot be read ({reason})",
        expected="a complete file by torch.save",
        remedy="copy or download it again: it is truncated, damaged or of another kind",
    )


def _state(content: Any, path: Path) -> tuple[tuple[str, ...], dict[str, Tensor]]:
    """The keys that lead to the state dict, and its tensors; the innermost under the names that scripts give it."""
    keys: tuple[str, ...] = ()
    found: tuple[tuple[str, ...], dict[str, Tensor]] | None = None
    while isinstance(content, Mapping):
        table = cast(Mapping[Any, Any], content)
        tensors = {str(name): value.detach() for name, value in table.items() if isinstance(value, Tensor)}
        found = (keys, tensors) if tensors else found
        inner = next((key for key in _NESTED if isinstance(table.get(key), Mapping)), None)
        if inner is None:
            break
        keys, content = (*keys, inner), table[inner]
    if found is None:
        raise TitheError(
            str(path),
            found="no state dict",
            expected="a dict of tensors, or one under " + ", ".join(repr(key) for key in _NESTED[:3]),
            remedy="save model.state_dict() with torch.save, or with safetensors",
        )
    for name, tensor in found[1].items():
        check_plain(str(path), name, tensor)
    return found


class DeltaEntry(Entry):
    """A delta by `plan.save`; a tensor that it changes in places has the form of the values there.

    Values at places are held in memory, k numbers and their places; tensors that are stored whole stay on disk.

    Args:
        path: the file.

    Attributes:
        header: what the delta says of itself.
        places: name → flat int64 places, of the tensors that it changes in some.

    Raises:
        TitheError: when the file is damaged, or its values are not those that were written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        file = TensorFile(path)
        self.header: Header = decode(file)
        self._flat = FlatFile.open(path)
        self._values: dict[str, Tensor] = {}
        self.places: dict[str, Tensor] = {}
        forms: dict[str, Form] = {}
        for name, entry in self.header.stored().items():
            record = read_record(file, name, entry)
            forms[name] = Form.of(record.values)
            if record.indices is not None:
                self._values[name], self.places[name] = record.values, record.indices
        self.forms = forms

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Read a range of the values."""
        if name in self._values:
            return self._values[name][start:stop]
        return self._flat.read(f"{name}#dense", start, stop)

    def share(self, name: str, places: Tensor) -> None:
        """Share one tensor of places with other deltas that change the same: n deltas have k places, not n·k."""
        if torch.equal(self.places[name], places):
            self.places[name] = places


def open_entry(path: Path) -> Entry:
    """Open the checkpoint at a path.

    Args:
        path: a file; or a folder with safetensors, or with a `pytorch_model.bin`.

    Raises:
        TitheError: when there is none, or it cannot be read.
    """
    if path.is_dir() and (path / PICKLED).is_file() and not any(path.glob("*.safetensors*")):
        path = path / PICKLED
    if path.is_file() and path.suffix in PICKLES:
        return PickleEntry(path)
    files = [FlatFile.open(file) for file in find_shards(path).files]
    if "tithe" in files[0].metadata:
        return DeltaEntry(files[0].path)
    return FileEntry(path, files)


def find_entries(path: Path) -> list[Path]:
    """Find the checkpoints at a path: in a folder, in the order of the numbers in their names.

    A folder that is one checkpoint itself is that one; else every subfolder with weights, and every file of weights.

    Args:
        path: a file, which is that one, or a folder.

    Raises:
        TitheError: when there are none, or the folder is a checkpoint and has others of its run in it.
    """
    if not path.is_dir():
        return [path]
    inside = [one for one in path.iterdir() if not one.name.startswith(".") and not _NO_WEIGHTS.fullmatch(one.name)]
    folders = [one for one in inside if one.is_dir() and _has_weights(one)]
    if _is_checkpoint(path):
        others = [one.name for one in folders if re.fullmatch(r"checkpoint-\d+", one.name)]
        if others:
            raise TitheError(
                str(path),
                found=f"a checkpoint, and {len(others)} more in folders like {others[0]}",
                expected="one or the other",
                remedy="pass those to average one by one",
            )
        return [path]
    found = [one for one in inside if one.is_file() and one.suffix in (".safetensors", *PICKLES)] + folders
    if not found:
        raise TitheError(
            str(path),
            found=f"{len(inside)} files and folders, none of them a checkpoint",
            expected="safetensors or .pt files, or folders with safetensors files",
            remedy="check the path, or pass the checkpoints themselves",
        )
    return sorted(found, key=_natural)


def _is_checkpoint(folder: Path) -> bool:
    """Whether a folder is one checkpoint, by the names that Hugging Face gives its files."""
    names = {"model.safetensors", PICKLED} & {path.name for path in folder.iterdir()}
    return bool(names) or any(folder.glob("*.safetensors.index.json"))


def _has_weights(folder: Path) -> bool:
    return any(folder.glob("*.safetensors")) or (folder / PICKLED).is_file()


def _natural(path: Path) -> list[str | int]:
    """Digits compare as numbers: checkpoint-500 comes before checkpoint-1000."""
    parts = re.split(r"([0-9]+)", path.name)
    return [int(part) if place % 2 else part for place, part in enumerate(parts)]
