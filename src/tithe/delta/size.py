"""The sizes of files, from names, shapes and counts."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from tithe.delta.file import CODES
from tithe.delta.format import Entry, Header, encode, index_dtype

_DIGEST = "0" * 16


def delta_bytes(state: Mapping[str, Tensor], selected: Mapping[str, int], whole: Collection[str]) -> int:
    """Bytes of the file that `plan.save` writes, to the last few of its free metadata.

    Args:
        state: the model's `state_dict`; tied names share one storage.
        selected: name → number of values trained in it.
        whole: names that are stored whole.
    """
    entries: dict[str, Entry] = {}
    parts: list[tuple[str, torch.dtype, Sequence[int]]] = []
    for names in _tied(state):
        lead = next((name for name in names if name in selected or name in whole), names[0])
        tensor, count = state[lead], selected.get(lead, 0)
        stored_as = index_dtype(tensor.numel())
        sparse = count * (stored_as.itemsize + tensor.dtype.itemsize) <= tensor.numel() * tensor.dtype.itemsize
        kind = "dense" if lead in whole or not sparse else "indices" if count else "kept"
        aliases = tuple(name for name in names if name != lead)
        base, content = ("" if kind == "dense" else _DIGEST), ("" if kind == "kept" else _DIGEST)
        entries[lead] = Entry(tensor.dtype, tuple(tensor.shape), kind, base, content, aliases)
        if kind == "dense":
            parts.append((f"{lead}#dense", tensor.dtype, tensor.shape))
        elif kind == "indices":
            parts += [(f"{lead}#indices", stored_as, (count,)), (f"{lead}#values", tensor.dtype, (count,))]
    told = {"method": 126 * " ", "seed": "0", "steps": "1000"}
    return file_bytes(parts, encode(Header(entries, told)))


def network_bytes(
    state: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]], widths: Mapping[str, Mapping[str, int]]
) -> int:
    """Bytes of the file of a narrow network, to the last few hundred of its free metadata and its probe.

    Args:
        state: the `state_dict` of the whole network; tied names share one storage.
        shapes: name → shape of every tensor that is narrower.
        widths: module path → attribute → number, as the file says them.
    """
    entries: dict[str, Entry] = {}
    for names in _tied(state):
        lead = next((name for name in names if name in shapes), names[0])
        shape = tuple(shapes.get(lead, state[lead].shape))
        aliases = tuple(name for name in names if name != lead)
        entries[lead] = Entry(state[lead].dtype, shape, "dense", "", _DIGEST, aliases)
    told = {"method": 87 * " ", "seed": "0", "steps": "1000"}
    parts = [(f"{lead}#dense", entry.dtype, entry.shape) for lead, entry in entries.items()]
    return file_bytes(parts, encode(Header(entries, told, widths=widths)))


def _tied(state: Mapping[str, Tensor]) -> list[list[str]]:
    """The names of each tensor."""
    groups: dict[tuple[int, int], list[str]] = {}
    for name, tensor in state.items():
        groups.setdefault((tensor.untyped_storage()._cdata, int(tensor.storage_offset())), []).append(name)
    return list(groups.values())


def file_bytes(tensors: Sequence[tuple[str, torch.dtype, Sequence[int]]], metadata: Mapping[str, str]) -> int:
    """Bytes of a safetensors file with these names, dtypes and shapes: data, header, and the header's length.

    Example:
        >>> file_bytes([("a", torch.float32, (2, 3))], {})
        96
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, dtype, shape in tensors:
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = len(json.dumps(header, separators=(",", ":")).encode())
    return 8 + math.ceil(text / 8) * 8 + end
