"""Read weights from a module, a state dict, or a checkpoint on disk (a file, or a Hugging Face folder)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from torch import Tensor, nn

from tithe.delta.file import TensorFile
from tithe.delta.fingerprint import state_tensors, ties
from tithe.errors import TitheError

PICKLES: Final = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


@dataclass(frozen=True)
class Source:
    """A source of named tensors, which are read one at a time.

    Args:
        place: what to call it in a message.
        readers: name → how to get the tensor.
        groups: leading name → all names of the same storage.
    """

    place: str
    readers: Mapping[str, Callable[[], Tensor]]
    groups: Mapping[str, tuple[str, ...]]

    def names_with(self, name: str) -> tuple[str, ...]:
        """Return all names that share their storage with `name`, itself included."""
        return next((names for names in self.groups.values() if name in names), (name,))


@dataclass(frozen=True)
class Shards:
    """The safetensors files of one checkpoint, and the index that lists them if there are several."""

    files: tuple[Path, ...]
    index: Path | None = None


def open_source(source: nn.Module | Mapping[str, Tensor] | str | Path) -> Source:
    """Open a module, a state dict, a safetensors file or a folder of them as a `Source`."""
    if isinstance(source, (str, Path)):
        files = [TensorFile(path) for path in find_shards(Path(source)).files]
        readers = {name: partial(file.tensor, name) for file in files for name in file.names}
        return Source(str(source), readers, {name: (name,) for name in readers})
    if isinstance(source, nn.Module):
        tensors = state_tensors(source)
        groups = ties(tensors, first=(name for name, _ in source.named_parameters()))
    else:
        tensors = {name: value for name, value in source.items() if isinstance(value, Tensor)}  # pyright: ignore[reportUnnecessaryIsInstance]
        groups = ties(tensors)
    return Source(type(source).__name__, {name: partial(_same, value) for name, value in tensors.items()}, groups)


def _same(tensor: Tensor) -> Tensor:
    return tensor


def find_shards(path: Path) -> Shards:
    """Find the safetensors files of a checkpoint.

    Args:
        path: a safetensors file, or a folder with an index, with `model.safetensors`, or with one safetensors file.

    Raises:
        TitheError: when there are none (pickles are never opened), or which of several is meant cannot be told.
    """
    if not path.exists():
        raise TitheError(str(path), found="no such file or folder", expected="a checkpoint", remedy="check the path")
    if path.is_file():
        if path.suffix in PICKLES:
            raise _pickled(path, path.name)
        return Shards((path,))
    indices = sorted(path.glob("*.safetensors.index.json"))
    preferred = path / "model.safetensors.index.json"
    if preferred in indices or len(indices) == 1:
        return _indexed(preferred if preferred in indices else indices[0])
    files = sorted(path.glob("*.safetensors"))
    whole = path / "model.safetensors"
    if not indices and (whole in files or len(files) == 1):
        return Shards((whole if whole in files else files[0],))
    pickles = sorted(file.name for file in path.iterdir() if file.suffix in PICKLES)
    if pickles and not files:
        raise _pickled(path, pickles[0])
    raise TitheError(
        str(path),
        found=f"{len(files)} safetensors files and {len(indices)} indices",
        expected="model.safetensors, or one *.safetensors file, or one *.safetensors.index.json",
        remedy="pass the file itself, or a folder with one checkpoint",
    )


def _pickled(path: Path, name: str) -> TitheError:
    return TitheError(
        str(path),
        found=f"a pickled checkpoint ({name})",
        expected="safetensors",
        remedy="load it once and save it with safe_serialization=True or safetensors.torch.save_model",
    )


def _indexed(index: Path) -> Shards:
    try:
        content: Any = json.loads(index.read_text(encoding="utf-8"))
        names = sorted({str(name) for name in content["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise TitheError(
            str(index), found="no readable weight_map", expected="a shard index", remedy="download it again"
        ) from error
    for name in names:
        if Path(name).name != name or not (index.parent / name).is_file():
            raise TitheError(
                str(index),
                found=f"shard '{name}', which is not in the folder",
                expected="every shard beside its index",
                remedy="download the missing shards",
            )
    return Shards(tuple(index.parent / name for name in names), index)


def prefix_hint(missing: Iterable[str], present: Iterable[str]) -> str:
    """Return a sentence if names differ by a prefix only ("module.", "bert."), else nothing."""
    theirs = list(present)
    for name in missing:
        for other in theirs:
            for longer, shorter, whose in ((other, name, "has"), (name, other, "lacks")):
                if longer.endswith("." + shorter):
                    return f" (it {whose} the prefix '{longer.removesuffix(shorter)}')"
    return ""
