"""The contract of a checkpoint that is read by ranges of entries, whoever wrote it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from tithe.averages.found import Contents
from tithe.averages.safetensors_ranges import Form


class Entry(ABC):
    """A checkpoint of named tensors, whatever wrote it.

    Args:
        path: the file or folder.
        forms: name → form.

    Attributes:
        folder: the folder that the checkpoint is; None for a file.
        contents: what lies in the folder.
    """

    path: Path
    forms: Mapping[str, Form]
    folder: Path | None = None
    contents: Contents | None = None

    @abstractmethod
    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Return entries [start, stop) in row-major order, 1-D on the CPU, in the tensor's own dtype."""

    def tensor(self, name: str) -> Tensor:
        """Return all of a tensor."""
        form = self.forms[name]
        return self.read(name, 0, form.numel).view(form.shape)
