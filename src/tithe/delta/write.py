"""Write a delta: from a selection that was trained, or from two checkpoints that are compared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from tithe.delta.file import write_tensors
from tithe.delta.fingerprint import checksum, digest, state_tensors, ties, words
from tithe.delta.format import CLASS, Entry, Header, encode, index_dtype
from tithe.delta.source import Source, open_source, prefix_hint
from tithe.errors import TitheError
from tithe.selection import Selection


def write_delta(
    path: str | Path,
    model: nn.Module,
    selections: Mapping[str, Selection],
    dense: Mapping[str, Tensor],
    *,
    metadata: Mapping[str, str],
) -> None:
    """Write what training changed in `model` to one safetensors file, atomically.

    Args:
        path: the file; an existing one is replaced in one step, or kept when anything goes wrong.
        model: the trained model, attached or not; its `state_dict` holds the trained values.
        selections: parameter name → the entries that were trained.
        dense: name → full tensor, for what is stored whole: heads, and buffers that changed.
        metadata: free strings for the header, such as method and density; the name of the model's class goes with them.

    Raises:
        TitheError: when a name is not in the model's `state_dict`, is given twice (once through a tied name), has
            another shape or dtype there, or cannot be stored; when the file cannot be written.
    """
    state = state_tensors(model)
    groups = ties(state, first=(name for name, _ in model.named_parameters()))
    leader = {name: lead for lead, names in groups.items() for name in names}
    picked: dict[str, Selection] = {}
    whole: dict[str, Tensor] = {}
    for name, selection in selections.items():
        lead = _leader(leader, name, picked, whole)
        _same_form(name, state[lead], selection.shape, state[lead].dtype)
        picked[lead] = selection
    for name, tensor in dense.items():
        lead = _leader(leader, name, picked, whole)
        _same_form(name, state[lead], tuple(tensor.shape), tensor.dtype)
        whole[lead] = tensor
    entries: dict[str, Entry] = {}
    stored: dict[str, Tensor] = {}
    for lead, names in groups.items():
        aliases = tuple(name for name in names if name != lead)
        if lead in whole:
            entry, parts = _dense(lead, whole[lead], aliases)
        else:
            indices = picked[lead].indices if lead in picked else torch.empty(0, dtype=torch.int64)
            entry, parts = _sparse(lead, state[lead], indices, aliases)
        entries[lead] = entry
        stored.update(parts)
    write_tensors(path, stored, encode(Header(entries, {CLASS: type(model).__name__, **metadata})))


def diff(
    base: nn.Module | Mapping[str, Tensor] | str | Path,
    tuned: nn.Module | Mapping[str, Tensor] | str | Path,
    path: str | Path,
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write the delta that turns `base` into `tuned`: every entry whose bits differ, one tensor in memory at a time.

    Args:
        base: a module, a state dict, a safetensors file, or a folder with a (sharded) safetensors checkpoint.
        tuned: the same network after training, in any of these forms.
        path: the delta, written atomically.
        metadata: free strings for the header.

    Raises:
        TitheError: when the two differ in names, shapes or dtypes, one of them is stored as a pickle, or the delta
            cannot be written.
    """
    old, new = open_source(base), open_source(tuned)
    entries: dict[str, Entry] = {}
    stored: dict[str, Tensor] = {}
    for name, aliases in _paired(old, new):
        before, after = old.readers[name](), new.readers[name]()
        _same_form(name, before, tuple(after.shape), after.dtype)
        indices = (words(name, before) != words(name, after)).nonzero().reshape(-1)
        entries[name], parts = _sparse(name, after, indices, aliases)
        stored.update(parts)
    write_tensors(path, stored, encode(Header(entries, {"method": "diff", **(metadata or {})})))


def _paired(old: Source, new: Source) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The names to compare, each with its aliases: tied names missing from one side, or equal on both."""
    for source, other in ((old, new), (new, old)):
        lacking = [
            name
            for name in source.readers
            if name not in other.readers and not any(tied in other.readers for tied in source.names_with(name))
        ]
        if lacking:
            raise TitheError(
                lacking[0],
                found=f"{len(lacking)} tensors that only {source.place} has{prefix_hint(lacking, other.readers)}",
                expected=f"the same names in {other.place}",
                remedy="compare two checkpoints of the same network, saved in the same way",
            )
    done: set[str] = set()
    for name in new.readers:
        if name in done or name not in old.readers:
            continue
        others = [other for other in (*new.names_with(name), *old.names_with(name)) if other != name]
        aliases = tuple(dict.fromkeys(other for other in others if _tied(old, name, other) and _tied(new, name, other)))
        done.update((name, *aliases))
        yield name, aliases


def _tied(source: Source, name: str, other: str) -> bool:
    """Whether `other` is another name of `name` there, absent, or a second copy of the same bits."""
    if other not in source.readers or other in source.names_with(name):
        return True
    one, two = source.readers[name](), source.readers[other]()
    return (one.shape, one.dtype) == (two.shape, two.dtype) and torch.equal(words(name, one), words(other, two))


def _leader(leader: Mapping[str, str], name: str, *taken: Mapping[str, object]) -> str:
    if name not in leader:
        raise TitheError(
            name,
            found=f"no such tensor in the model's state_dict{prefix_hint([name], leader)}",
            expected="a parameter or a persistent buffer",
            remedy="pass names as model.state_dict() spells them",
        )
    if any(leader[name] in names for names in taken):
        raise TitheError(
            name,
            found="a tensor that is given twice, here or under a tied name",
            expected="one selection, or one dense tensor, for each storage",
            remedy="leave all but one out",
        )
    return leader[name]


def _same_form(name: str, found: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if (tuple(found.shape), found.dtype) != (shape, dtype):
        raise TitheError(
            name,
            found=f"{dtype} of shape {list(shape)}",
            expected=f"{found.dtype} of shape {list(found.shape)}",
            remedy="use the same network in the same dtype on both sides",
        )


def _dense(name: str, tensor: Tensor, aliases: tuple[str, ...]) -> tuple[Entry, dict[str, Tensor]]:
    words(name, tensor)
    entry = Entry(tensor.dtype, tuple(tensor.shape), "dense", "", checksum(tensor), aliases)
    return entry, {f"{name}#dense": tensor.detach()}


def _sparse(name: str, tensor: Tensor, indices: Tensor, aliases: tuple[str, ...]) -> tuple[Entry, dict[str, Tensor]]:
    """The entry and record for `indices` of a trained tensor; dense where that takes fewer bytes."""
    at = indices.cpu()
    if at.numel() == 0:
        return Entry(tensor.dtype, tuple(tensor.shape), "kept", digest(name, tensor), "", aliases), {}
    flat = words(name, tensor)
    stored_as = index_dtype(flat.numel())
    if at.numel() * (stored_as.itemsize + tensor.dtype.itemsize) > tensor.numel() * tensor.dtype.itemsize:
        return _dense(name, tensor, aliases)
    base = digest(name, tensor, at)
    parts = {f"{name}#indices": at.to(stored_as), f"{name}#values": flat[at].view(tensor.dtype)}
    content = checksum(*parts.values())
    return Entry(tensor.dtype, tuple(tensor.shape), "indices", base, content, aliases), parts
