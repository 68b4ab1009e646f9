"""Read one checkpoint of any origin by ranges of entries.

A safetensors file, or a Hugging Face folder with one or several (`FileEntry`); a file by `torch.save` (`PickleEntry`),
alone or in a folder; a delta by `plan.save` (`DeltaEntry`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from tithe.averages.entry import Entry
from tithe.averages.found import is_pickle, open_folder
from tithe.averages.pickles import PickleEntry
from tithe.averages.safetensors_ranges import FlatFile, Form
from tithe.delta.file import TensorFile
from tithe.delta.format import Header, decode, read_record
from tithe.errors import TitheError


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


def open_entry(path: Path) -> FileEntry | PickleEntry | DeltaEntry:
    """Open the checkpoint at a path.

    Args:
        path: a file; or a folder with safetensors, or with a `pytorch_model.bin`.

    Raises:
        TitheError: when there is none, or it cannot be read.
    """
    if not path.is_dir():
        return _open_file(path)
    contents = open_folder(path)
    if is_pickle(contents.main[0]):
        entry = PickleEntry(contents.main[0])
    else:
        entry = FileEntry(path, [FlatFile.open(file) for file in contents.main])
        if "tithe" in entry.files[0].metadata:
            return DeltaEntry(entry.files[0].path)
    entry.folder, entry.contents = path, contents
    return entry


def open_beside(entry: Entry) -> dict[Path, FileEntry | PickleEntry]:
    """Open the other models in a checkpoint's folder, by where they lie in it.

    Raises:
        TitheError: when one cannot be read, or is no checkpoint but a delta.
    """
    found: dict[Path, FileEntry | PickleEntry] = {}
    if entry.folder is not None and entry.contents is not None:
        for place in entry.contents.others:
            other = _open_file(entry.folder / place)
            if isinstance(other, DeltaEntry):
                raise TitheError(
                    str(other.path),
                    found="a delta beside a whole model",
                    expected="checkpoints",
                    remedy="put the delta into a folder of its own",
                )
            found[place] = other
    return found


def _open_file(path: Path) -> FileEntry | PickleEntry | DeltaEntry:
    if path.is_file() and is_pickle(path):
        return PickleEntry(path)
    file = FlatFile.open(path)
    return DeltaEntry(path) if "tithe" in file.metadata else FileEntry(path, [file])
