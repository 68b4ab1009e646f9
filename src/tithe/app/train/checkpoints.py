"""A run's state on disk: safetensors for the tensors, JSON for the rest, written so that no crash can spoil it."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from tithe.errors import TitheError

_VERSION = 2
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
        """The steps there is a whole checkpoint of, ascending."""
        return sorted(int(path.name.removeprefix("step-")) for path in self.folder.glob("step-*") if path.is_dir())

    def path(self, step: int) -> Path:
        """The folder of one checkpoint."""
        return self.folder / f"step-{step:08d}"

    def save(self, step: int, state: Mapping[str, Any], best: int | None) -> Path:
        """Write a checkpoint beside its place, move it there in one operation, and drop the old ones but the best."""
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors, data = flatten(state)
        # safetensors writes shared memory once and refuses the second name: each tensor gets its own.
        tensors = {name: tensor.cpu().contiguous().clone() for name, tensor in tensors.items()}
        partial, path = self.folder / f"partial-{step:08d}", self.path(step)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        safetensors.torch.save_file(tensors, partial / _TENSORS)
        (partial / _STATE).write_text(json.dumps({"version": _VERSION, "state": data}), encoding="utf-8")
        for file in (partial / _TENSORS, partial / _STATE):
            _flush(file)
        if path.exists():
            shutil.rmtree(path)
        os.replace(partial, path)
        _flush(self.folder)
        for old in self.steps()[: -self.keep]:
            if old != best:
                shutil.rmtree(self.path(old))
        return path

    def load(self, step: int) -> dict[str, Any]:
        """Read the checkpoint of one step.

        Raises:
            TitheError: a file is missing or damaged, or comes from another version of the library.
        """
        path = self.path(step)
        try:
            content = json.loads((path / _STATE).read_text(encoding="utf-8"))
            tensors = safetensors.torch.load_file(path / _TENSORS)
        except (OSError, ValueError, safetensors.SafetensorError) as error:
            raise TitheError(
                str(path),
                found=str(error),
                expected="a whole checkpoint",
                remedy="delete this folder and resume from the one before",
            ) from error
        if content.get("version") != _VERSION:
            raise TitheError(
                str(path),
                found=f"version {content.get('version')}",
                expected=f"version {_VERSION}",
                remedy="resume it with the version of tithe that wrote it, or start anew in another output folder",
            )
        return unflatten(tensors, content["state"])


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
