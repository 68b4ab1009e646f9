"""Store a narrow network in a file: its tensors in their own shapes, and the widths that its modules state.

It goes onto a freshly built network of full width, whose class and constructor stay the only place for its structure.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from tithe.delta.file import write_tensors
from tithe.delta.fingerprint import checksum, state_tensors, ties, words
from tithe.delta.format import Entry, Header, encode
from tithe.errors import TitheError


def write_network(
    path: str | Path, network: nn.Module, widths: Mapping[str, Mapping[str, int]], *, metadata: Mapping[str, str]
) -> None:
    """Write a narrow network to one safetensors file, atomically.

    Args:
        path: the file; an existing one is replaced in one step, or kept when anything goes wrong.
        network: plain.
        widths: module path → attribute → number, of every number of a module that follows a width.
        metadata: free strings for the header.

    Raises:
        TitheError: when the file cannot be written, or a tensor cannot be stored.
    """
    state = state_tensors(network)
    entries: dict[str, Entry] = {}
    for lead, names in ties(state, first=(name for name, _ in network.named_parameters())).items():
        words(lead, state[lead])
        aliases = tuple(name for name in names if name != lead)
        shape = tuple(state[lead].shape)
        entries[lead] = Entry(state[lead].dtype, shape, "dense", "", checksum(state[lead]), aliases)
    stored = {f"{lead}#dense": state[lead] for lead in entries}
    write_tensors(path, stored, encode(Header(entries, metadata, widths=widths)))


def check_widths(place: str, model: nn.Module, header: Header) -> None:
    """Check that a model can be made as narrow as a file says: the same modules and tensors, none of them smaller.

    Args:
        place: the file, for the message.
        model: as it is.
        header: of the file.

    Raises:
        TitheError: naming the first module or tensor that does not fit.
    """
    modules = dict(model.named_modules())
    for path, numbers in (header.widths or {}).items():
        for attribute, number in numbers.items():
            own = vars(modules[path]).get(attribute) if path in modules else None
            if type(own) is not int or own < number:
                raise TitheError(
                    f"{path}.{attribute}",
                    found="no such number" if type(own) is not int else str(own),
                    expected=f"at least {number}, as in {place}",
                    remedy="build the network that the file was made with, at its full width",
                )
    for name, tensor in state_tensors(model).items():
        entry = header.entries.get(name)
        if entry is None:
            continue
        shape = tuple(tensor.shape)
        if len(shape) != len(entry.shape) or any(own < kept for own, kept in zip(shape, entry.shape, strict=True)):
            raise TitheError(
                name,
                found=f"shape {list(shape)}",
                expected=f"at least {list(entry.shape)} along each axis, as in {place}",
                remedy="build the network that the file was made with, at its full width",
            )


def make_narrow(
    model: nn.Module, widths: Mapping[str, Mapping[str, int]], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Give a model's tensors and modules the sizes of a narrow network; values are written afterwards.

    Args:
        model: changed in place; its parameters keep their identity.
        widths: module path → attribute → number.
        shapes: tensor name → shape.
    """
    modules = dict(model.named_modules())
    for path, numbers in widths.items():
        for attribute, number in numbers.items():
            setattr(modules[path], attribute, number)
    tensors: dict[str, Tensor] = dict([*model.named_parameters(), *model.named_buffers()])
    with torch.no_grad():
        for name, shape in shapes.items():
            if name in tensors and tuple(tensors[name].shape) != shape:
                tensors[name].data = tensors[name].data.new_empty(shape)
