"""Read files by `torch.save` by ranges of entries, without running what is in them.

Such a file holds a state dict, alone or among other data, as Lightning and training scripts write it; or several: the
model, its moving average, a second network. What an optimizer, a scheduler or a callback stores is no model.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any, Final, cast

import torch
from torch import Tensor

from tithe.averages.entry import Entry
from tithe.averages.safetensors_ranges import Form, check_plain, read_range
from tithe.errors import TitheError

_NESTED: Final = ("state_dict", "model_state_dict", "model", "module", "net", "ema_state_dict")
"""Keys under which training scripts store a model's tensors, next to the optimizer's."""

_NO_MODEL: Final = re.compile(
    r"(.*[^a-z])?(optim|sched|scaler|amp([^a-z]|$)|rng|random|callback|loop|hyper|hparam|args?([^a-z]|$)|conf"
    r"|param_groups|sampler|metric|history|loss).*",
    re.IGNORECASE,
)
"""Keys under which scripts store something else."""

Keys = tuple[Any, ...]


class PickleEntry(Entry):
    """A model in a file by `torch.save`.

    torch's reader of weights alone says where in the file each tensor lies; ranges are read from there. A file in the
    form from before torch 1.6 has no such places: it is loaded whole, and stays in memory.

    Args:
        path: the file.
        keys: those that lead to the model's tensors in the file, outermost first: none when the file is a state dict;
            None finds them.

    Attributes:
        keys: the same.

    Raises:
        TitheError: when the file cannot be read without running what is in it, is damaged, or has no state dict.
    """

    def __init__(self, path: Path, keys: Keys | None = None) -> None:
        self.path = path
        content = _load(path, "meta")
        self.keys = _main(content, path) if keys is None else keys
        self._content = content
        self._tensors = _tensors(content, self.keys, path)
        self._offsets = _offsets(path, self._tensors)
        if self._offsets is None:
            found = _tensors(_load(path, "cpu"), self.keys, path)
            self._tensors = {name: tensor.contiguous() for name, tensor in found.items()}
        self.forms = {name: Form.of(tensor) for name, tensor in self._tensors.items()}

    def others(self) -> dict[Keys, PickleEntry]:
        """Return the file's other models, by the keys that lead to them."""
        found: dict[Keys, PickleEntry] = {}
        own = {name: tuple(form.shape) for name, form in self.forms.items()}
        for keys, tensors in _models(self._content, ()):
            # What has the names and shapes of the model is a copy of it, wherever a callback stores it.
            copied = {str(name): tuple(tensor.shape) for name, tensor in tensors.items()} == own
            if keys != self.keys[: len(keys)] and (copied or not _stored_by_a_run(keys)):
                found[keys] = PickleEntry(self.path, keys)
        return found

    def beside(self) -> list[str]:
        """Return the outermost keys of what is no model."""
        models = {keys[0] for keys in (self.keys, *self.others()) if keys}
        own = set() if self.keys else set(self.forms)
        return [str(key) for key, _ in items(self._content) if key not in models and str(key) not in own]

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


def load(path: Path) -> Any:
    """Return the content of a file by `torch.save` on the CPU, with mapped tensors if the file's form allows it.

    Args:
        path: the file.

    Raises:
        TitheError: when it cannot be read without running what is in it, or not at all.
    """
    return _load(path, "cpu", mapped=zipfile.is_zipfile(path))


def items(container: Any) -> list[tuple[Any, Any]]:
    """Return the keys and values of a dict, or the places and values of a list or tuple; of anything else nothing."""
    if isinstance(container, Mapping):
        return list(cast(Mapping[Any, Any], container).items())
    if isinstance(container, list | tuple):
        return list(enumerate(cast(Sequence[Any], container)))
    return []


def _models(content: Any, keys: Keys) -> Iterator[tuple[Keys, dict[Any, Tensor]]]:
    """The containers that hold tensors of floating-point or complex numbers with an axis, and all their tensors."""
    tensors = {key: value for key, value in items(content) if isinstance(value, Tensor)}
    numbers = (tensor for tensor in tensors.values() if tensor.is_floating_point() or tensor.is_complex())
    if isinstance(content, MutableMapping | list) and any(tensor.ndim for tensor in numbers):
        yield keys, tensors
    inside = dict(items(content))
    if inside.keys() >= {"state", "param_groups"}:
        return  # an optimizer's, under whatever name
    for key, value in inside.items():
        yield from _models(value, (*keys, key))


def _main(content: Any, path: Path) -> Keys:
    """The keys that lead to the model: the innermost under the names that scripts give it, or else the first."""
    keys: Keys = ()
    found: Keys | None = None
    table = content
    while isinstance(table, Mapping):
        values = [value for _, value in items(table) if isinstance(value, Tensor)]
        # Single numbers on the outside are a loss or a score, if there is something else.
        if values and (keys or any(value.ndim for value in values)):
            found = keys
        inner = next((key for key in _NESTED if isinstance(table.get(key), Mapping)), None)
        if inner is None:
            break
        keys, table = (*keys, inner), table[inner]
    if found is None and isinstance(content, Mapping):
        models = (keys for keys, _ in _models(content, ()) if not _stored_by_a_run(keys))
        found = next(models, () if any(isinstance(value, Tensor) for _, value in items(content)) else None)
    if found is None:
        raise TitheError(
            str(path),
            found="no state dict",
            expected="a dict of tensors, or one under " + ", ".join(repr(key) for key in _NESTED[:3]),
            remedy="save model.state_dict() with torch.save, or with safetensors",
        )
    return found


def _stored_by_a_run(keys: Keys) -> bool:
    return any(_NO_MODEL.fullmatch(str(key)) for key in keys)


def _tensors(content: Any, keys: Keys, path: Path) -> dict[str, Tensor]:
    for key in keys:
        content = content[key]
    found = {str(key): value.detach() for key, value in items(content) if isinstance(value, Tensor)}
    for name, tensor in found.items():
        check_plain(str(path), name, tensor, pickled=True)
    return found


def _offsets(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, int] | None:
    """Where in the file each tensor begins, in bytes; None where torch does not tell.

    Raises:
        TitheError: when the file was packed again, so that its numbers are not stored as they are.
    """
    if not zipfile.is_zipfile(path):
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            packed = any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist())
    except Exception as error:  # torch's reader and Python's do not stumble over the same bytes
        raise _unreadable(path, error) from error
    if packed:
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
        if "uantized" in str(error):
            raise TitheError(
                str(path),
                found="quantised tensors of torch",
                expected="weights as floating-point numbers",
                remedy="save tensor.dequantize() of each, or the weights from before they were quantised",
            ) from error
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> TitheError:
    reason = re.split(r"\n|\. ", str(error))[0] or type(error).__name__
    return TitheError(
        str(path),
        found=f"a file that cannot be read ({reason})",
        expected="a complete file by torch.save",
        remedy="copy or download it again: it is truncated, damaged or of another kind",
    )
