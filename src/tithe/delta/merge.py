"""Merge deltas into a checkpoint on disk, shard by shard; the result is a plain checkpoint in the same form."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from tithe.delta.apply import Match, check_base, check_form, write_record
from tithe.delta.file import DTYPES, TensorFile, save_tensors
from tithe.delta.format import Header, Record, decode, read_record
from tithe.delta.source import PICKLES, Shards, find_shards, prefix_hint
from tithe.errors import TitheError
from tithe.files import check_place, replacing

_STALE: Final = (*PICKLES, ".safetensors", ".h5", ".msgpack", ".onnx", ".gguf", ".ot")
_STALE_FOLDERS: Final = ("onnx", "openvino")


@dataclass(frozen=True)
class _Delta:
    """One delta and where its tensors are in the base: leading name → names there."""

    file: TensorFile
    header: Header
    places: dict[str, tuple[str, ...]]

    def record(self, name: str) -> Record:
        return read_record(self.file, name, self.header.entries[name])

    def indices(self, name: str) -> Tensor | None:
        """The indices that are written of a leading name; all when None."""
        kind = self.header.entries[name].kind
        return torch.empty(0, dtype=torch.int64) if kind == "kept" else self.record(name).indices

    def leader(self, name: str) -> str:
        """The leading name of a name in the base."""
        return next((lead for lead, names in self.places.items() if name in names), name)


def merge(
    base: str | Path, paths: str | Path | Sequence[str | Path], output: str | Path, *, overwrite: bool = False
) -> Path:
    """Write the checkpoint `base` with one or more deltas applied, atomically; memory stays at about one shard.

    Tensors of the base that a delta does not know are copied. Tensors that a delta stores whole and the base lacks (a
    new head) are added. Configuration and tokenizer files of a folder come along, other weight formats do not.

    Args:
        base: a safetensors file, or a folder with one (sharded) safetensors checkpoint in the Hugging Face form.
        paths: the deltas, all made from this base.
        output: the new file or folder; it must not exist.
        overwrite: let later deltas win where two write the same entry.

    Returns:
        `output`.

    Raises:
        TitheError: when a file is damaged, no delta, or a narrow network; the base is another, a pickle, or stores
            other names, shapes or dtypes; two deltas write the same entry; or the output exists or cannot be written.
            Nothing is written then.
    """
    origin, final = Path(base), Path(output)
    shards = find_shards(origin)
    check_place(final, folder=not origin.is_file(), new=True)
    where = {name: file for file in (TensorFile(path) for path in shards.files) for name in file.names}
    listed = [paths] if isinstance(paths, (str, Path)) else list(paths)
    if not listed:
        raise TitheError(str(origin), found="no delta", expected="at least one", remedy="pass the deltas to merge")
    deltas = [_locate(TensorFile(Path(path)), where, origin) for path in listed]
    for delta in deltas:
        check_base(str(delta.file.path), _matches(delta, where), delta.indices)
    if not overwrite:
        _check_overlap(deltas)
    num_bytes = sum(path.stat().st_size for path in shards.files)
    with replacing(final, folder=not origin.is_file(), num_bytes=num_bytes) as temporary:
        if origin.is_file():
            _write_shard(temporary, origin, deltas, _added(deltas))
        else:
            _write_folder(temporary, origin, shards, deltas)
    return final


def _locate(file: TensorFile, where: Mapping[str, TensorFile], origin: Path) -> _Delta:
    """Find each tensor of a delta in the base, under its own or a tied name, in the same shape and dtype."""
    header = decode(file)
    if header.widths is not None:
        raise TitheError(
            str(file.path),
            found="a narrow network, whole",
            expected="a delta, which changes weights of the base and leaves their shapes",
            remedy="build the network at full width, tithe.apply(model, path), and save its state_dict()",
        )
    places: dict[str, tuple[str, ...]] = {}
    for lead, entry in header.entries.items():
        places[lead] = tuple(name for name in (lead, *entry.aliases) if name in where)
    absent = [lead for lead, names in places.items() if not names and header.entries[lead].kind != "dense"]
    if absent:
        raise TitheError(
            absent[0],
            found=f"no such tensor in {origin}, as for {len(absent)} of the delta's{prefix_hint(absent, where)}",
            expected=f"the tensors that {file.path} was made with",
            remedy="load the base with the class that was trained, save_pretrained it, and merge into that folder",
        )
    for lead, names in places.items():
        for name in names:
            code, entry = where[name].code(name), header.entries[lead]
            if code not in DTYPES:
                remedy = "convert the base to that dtype"
                raise TitheError(name, found=f"dtype {code}", expected=str(entry.dtype), remedy=remedy)
            check_form(name, entry, where[name].shape(name), DTYPES[code])
    return _Delta(file, header, places)


def _matches(delta: _Delta, where: Mapping[str, TensorFile]) -> Iterator[Match]:
    for lead, names in delta.places.items():
        for name in names:
            yield Match(lead, delta.header.entries[lead], where[name].tensor(name))


def _check_overlap(deltas: Sequence[_Delta]) -> None:
    """Refuse two deltas that write the same entry of a tensor."""
    written: dict[str, list[_Delta]] = {}
    for delta in deltas:
        for lead in delta.header.stored():
            for name in delta.places[lead] or (lead,):
                for earlier in written.get(name, ()):
                    _check_disjoint(name, earlier, delta)
                written.setdefault(name, []).append(delta)


def _check_disjoint(name: str, one: _Delta, two: _Delta) -> None:
    first, second = (delta.indices(delta.leader(name)) for delta in (one, two))
    count = 1 if first is None or second is None else int(torch.isin(first, second).sum())
    if count:
        raise TitheError(
            name,
            found=f"{count} or more entries written by both {one.file.path} and {two.file.path}",
            expected="deltas that write different entries",
            remedy="merge one of them, or let later deltas win with overwrite=True",
        )


def _added(deltas: Sequence[_Delta]) -> dict[str, Tensor]:
    """What the deltas store whole and the base lacks."""
    lacking = ((delta, lead) for delta in deltas for lead, names in delta.places.items() if not names)
    return {lead: delta.record(lead).values for delta, lead in lacking}


def _write_shard(target: Path, shard: Path, deltas: Sequence[_Delta], added: Mapping[str, Tensor]) -> None:
    file = TensorFile(shard)
    tensors = {name: file.tensor(name) for name in file.names}
    for delta in deltas:
        for lead in delta.header.stored():
            for name in delta.places[lead]:
                if name in tensors:
                    tensors[name] = tensors[name].clone()
                    write_record(tensors[name], delta.record(lead))
    save_tensors(target, {**tensors, **added}, file.metadata)


def copy_extras(origin: Path, target: Path) -> None:
    """Copy what lies beside the weights of a checkpoint to a folder, where that does not have it."""
    for path in sorted(origin.iterdir()):
        if path.name.startswith(".") or path.suffix in _STALE or path.name.endswith(".index.json"):
            continue
        if (target / path.name).exists():
            continue
        if path.is_file():
            shutil.copyfile(path, target / path.name)
        elif path.is_dir() and path.name not in _STALE_FOLDERS:
            shutil.copytree(path, target / path.name)


def _write_folder(target: Path, origin: Path, shards: Shards, deltas: Sequence[_Delta]) -> None:
    target.mkdir()
    copy_extras(origin, target)
    added = _added(deltas)
    for number, shard in enumerate(shards.files, start=1):
        last = number == len(shards.files)
        _write_shard(target / shard.name, shard, deltas, added if last else {})
    if shards.index is not None:
        content: Any = json.loads(shards.index.read_text(encoding="utf-8"))
        content["weight_map"].update(dict.fromkeys(added, shards.files[-1].name))
        total: Any = content.get("metadata", {})
        for key, grown in (("total_size", "nbytes"), ("total_parameters", "numel")):
            if key in total:
                total[key] += sum(tensor.nbytes if grown == "nbytes" else tensor.numel() for tensor in added.values())
        (target / shards.index.name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
