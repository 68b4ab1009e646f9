"""A run's state on disk: safetensors for the tensors, JSON for the rest, written so that no crash can spoil it."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any, cast

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from tithe.delta.fingerprint import digest
from tithe.errors import TitheError
from tithe.files import replacing, writing

_VERSION = 3
_TENSORS, _STATE = "tensors.safetensors", "state.json"


def flatten(value: object) -> tuple[dict[str, Tensor], object]:
    """Part nested dicts, lists and tuples into tensors and JSON data; `unflatten` puts them together.

    Raises:
        TitheError: a leaf is neither a tensor nor JSON data.

    Example:
        >>> tensors, data = flatten({"lr": 0.1, "state": {0: (torch.ones(2), None)}})
        >>> list(tensors), unflatten(tensors, data)["state"][0][1] is None
        (['0'], True)
    """
    tensors: dict[str, Tensor] = {}
    return tensors, _part(value, tensors)


def _part(value: object, tensors: dict[str, Tensor]) -> object:
    if isinstance(value, Tensor):
        tensors[str(len(tensors))] = value.detach()
        return {"tensor": str(len(tensors) - 1)}
    if isinstance(value, Mapping):
        # Keys may be integers (an optimizer's parameter numbers), which JSON objects cannot hold.
        items = cast(Mapping[object, object], value).items()
        return {"dict": [[_leaf(key), _part(inner, tensors)] for key, inner in items]}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_part(inner, tensors) for inner in cast(list[object], value)]}
    return _leaf(value)


def _leaf(value: object) -> object:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": repr(value)}
    raise TitheError(
        "checkpoint", found=type(value).__name__, expected="tensors, numbers and texts", remedy="report it"
    )


def unflatten(tensors: Mapping[str, Tensor], data: object) -> Any:
    """Put together what `flatten` parted."""
    if not isinstance(data, dict):
        return data
    ((kind, value),) = cast(dict[str, Any], data).items()
    if kind == "tensor":
        return tensors[value]
    if kind == "float":
        return float(value)
    if kind == "dict":
        return {key: unflatten(tensors, inner) for key, inner in value}
    items = [unflatten(tensors, inner) for inner in value]
    return tuple(items) if kind == "tuple" else items


def random_state() -> dict[str, Any]:
    """The states of the random generators of Python, numpy and torch (with every GPU)."""
    name, keys, position, has_gauss, gauss = cast(Any, np.random.get_state())
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(gauss)),
        "torch": torch.get_rng_state(),
        "cuda": list(torch.cuda.get_rng_state_all()) if torch.cuda.is_available() else [],
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Set all generators to the states that `random_state` found."""
    random.setstate(state["python"])
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


class Checkpoints:
    """The checkpoints of one run: `step-00000100/` and so on, the last two and the best kept.

    Args:
        folder: where they are.
        keep: how many of the last are kept.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep

    def steps(self) -> list[int]:
        """The steps there is a whole checkpoint of, ascending; a folder that lacks a file is none."""
        return sorted(_step(path) for path in self.folder.glob("step-*") if _is_whole(path))

    def path(self, step: int) -> Path:
        """The folder of one checkpoint."""
        return self.folder / f"step-{step:08d}"

    def save(self, step: int, state: Mapping[str, Any], best: int | None) -> Path:
        """Write a checkpoint beside its place, move it there in one operation, and drop the old ones but the best.

        Raises:
            TitheError: it cannot be written; the ones before are as they were.
        """
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        tensors, data = flatten(state)
        # safetensors writes shared memory once and refuses the second name: each tensor gets its own.
        tensors = {name: tensor.cpu().contiguous().clone() for name, tensor in tensors.items()}
        path, sums = self.path(step), {name: digest(name, tensor) for name, tensor in tensors.items()}
        content = {"version": _VERSION, "digest": _sum(data, sums), "tensors": sums, "state": data}
        num_bytes = sum(tensor.nbytes for tensor in tensors.values())
        with replacing(path, folder=True, overwrite=True, num_bytes=num_bytes) as partial:
            partial.mkdir()
            safetensors.torch.save_file(tensors, partial / _TENSORS)
            (partial / _STATE).write_text(json.dumps(content), encoding="utf-8")
        with writing(self.folder):
            for old in self.steps()[: -self.keep]:
                if old != best:
                    self._drop(self.path(old))
        return path

    def recover(self) -> None:
        """Clear up after a process that was killed: put in place what it had written, remove what it had not.

        Only the one process that writes here may call it.
        """
        with writing(self.folder):
            for found in sorted([*self.folder.glob("partial-*"), *self.folder.glob(".step-*.tmp/step-*")]):
                step = _step(found)
                if step < 0 or _is_whole(self.path(step)):
                    continue
                try:
                    _read(found, "")
                except TitheError:
                    continue
                if self.path(step).exists():
                    self._drop(self.path(step))
                os.replace(found, self.path(step))
            for rest in [*self.folder.glob("partial-*"), *self.folder.glob(".step-*.tmp"), *self.folder.glob(".old-*")]:
                shutil.rmtree(rest, ignore_errors=True)

    def _drop(self, path: Path) -> None:
        """Remove a checkpoint; at no time does a part of one bear the name of a whole."""
        aside = path.with_name(f".old-{path.name}")
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(path, aside)
        shutil.rmtree(aside, ignore_errors=True)

    def load(self, step: int) -> dict[str, Any]:
        """Read the checkpoint of one step.

        Raises:
            TitheError: a file is missing, damaged or was edited, or comes from another version of the library.
        """
        path, earlier = self.path(step), [other for other in self.steps() if other < step]
        remedy = f"restore it, or delete {path} "
        remedy += f"and resume from step {earlier[-1]}" if earlier else "and start anew in another output folder"
        return _read(path, remedy)


def _step(path: Path) -> int:
    """The step that the name of a folder says; -1 for a name of another kind."""
    number = path.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1


def _is_whole(path: Path) -> bool:
    return _step(path) >= 0 and (path / _TENSORS).is_file() and (path / _STATE).is_file()


def _sum(data: object, sums: object) -> str:
    """A checksum of all that is no tensor, and of the tensors' own."""
    return blake2b(json.dumps([_VERSION, sums, data]).encode(), digest_size=8).hexdigest()


def _read(path: Path, remedy: str) -> dict[str, Any]:
    """Read a checkpoint and check every byte of it that counts.

    Args:
        path: the folder.
        remedy: what to do where it is damaged.

    Raises:
        TitheError: naming the folder or the file.
    """

    def damaged(place: Path, found: str) -> TitheError:
        return TitheError(str(place), found=found, expected="a whole checkpoint", remedy=remedy)

    try:
        content = json.loads((path / _STATE).read_text(encoding="utf-8"))
        tensors = safetensors.torch.load_file(path / _TENSORS)
    except (OSError, ValueError, RecursionError, safetensors.SafetensorError) as error:
        raise damaged(path, str(error)) from error
    if not isinstance(content, dict):
        raise damaged(path / _STATE, f"a {type(content).__name__}")
    told = cast(dict[str, Any], content)
    if told.get("version") != _VERSION:
        raise TitheError(
            str(path),
            found=f"version {told.get('version')}",
            expected=f"version {_VERSION}",
            remedy="resume it with the version of tithe that wrote it, or start anew in another output folder",
        )
    if told.get("digest") != _sum(told.get("state"), told.get("tensors")):
        raise damaged(path / _STATE, "content that was changed after it was written")
    if {name: digest(name, tensor) for name, tensor in tensors.items()} != told["tensors"]:
        raise damaged(path / _TENSORS, "values that were changed after they were written")
    return unflatten(tensors, told["state"])
