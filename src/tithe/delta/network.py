"""Store a narrow network in a file: its tensors in their own shapes, and the widths that its modules state.

It goes onto a freshly built network of full width, whose class and constructor stay the only place for its structure.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase  # pyright: ignore[reportPrivateUsage]
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd  # pyright: ignore[reportPrivateUsage]

from tithe.delta.file import write_tensors
from tithe.delta.fingerprint import checksum, state_tensors, storage_key, ties, words
from tithe.delta.format import Entry, Header, encode
from tithe.errors import TitheError
from tithe.forward import Probe, differs, make_probe

SAME_CLASS: Final = "build the network with the class, the settings and the code of the run that wrote the file"


def write_network(
    path: str | Path,
    network: nn.Module,
    widths: Mapping[str, Mapping[str, int]],
    *,
    metadata: Mapping[str, str],
    inputs: Any = None,
) -> None:
    """Write a narrow network to one safetensors file, atomically.

    Args:
        path: the file; an existing one is replaced in one step, or kept when anything goes wrong.
        network: plain.
        widths: module path → attribute → number, of every number of a module that follows a width.
        metadata: free strings for the header.
        inputs: of a forward pass (`tithe.forward.watch_call`), to ask the network; None where they are not known.

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
    write_tensors(path, stored, encode(Header(entries, metadata, widths=widths, probe=make_probe(network, inputs))))


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


@contextmanager
def narrow(
    model: nn.Module, widths: Mapping[str, Mapping[str, int]], values: Sequence[tuple[Tensor, Tensor]]
) -> Generator[None]:
    """Make a model a narrow network, or leave every bit as it was where the block fails.

    Args:
        model: changed in place; its parameters keep their identity, and those of the same shape their memory.
        widths: module path → attribute → number.
        values: tensors of its state dict, and what they become, on the same device.
    """
    modules = dict(model.named_modules())
    numbers = [(modules[path], key, number) for path, told in widths.items() for key, number in told.items()]
    before = [(module, key, getattr(module, key)) for module, key, _ in numbers]
    owners: dict[tuple[object, ...], list[Tensor]] = {}
    named = (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    for name, tensor in (*named[0], *named[1]):
        owners.setdefault(storage_key(name, tensor), []).append(tensor)
    swaps = [(owner, owner.data, new) for old, new in values for owner in owners.get(storage_key("", old), ())]
    try:
        for module, key, number in numbers:
            setattr(module, key, number)
        for owner, _, new in swaps:
            owner.data = new
        yield
    except BaseException:
        for module, key, number in before:
            setattr(module, key, number)
        for owner, old, _ in swaps:
            owner.data = old
        raise
    for owner, old, new in swaps:
        if old.shape == new.shape:
            owner.data = old.copy_(new)
        else:
            owner.grad = None


def disagreements(model: nn.Module) -> dict[str, str]:
    """Return the modules whose own numbers do not fit their tensors: path → what does not fit."""
    found: dict[str, str] = {}
    for path, module in model.named_modules():
        for key, stated in _stated(module).items():
            tensor = module._parameters.get(key)
            if tensor is not None and tuple(tensor.shape)[: len(stated)] != stated:
                found[path] = f"{key} of shape {list(tensor.shape)} where its numbers say {list(stated)}"
    return found


def _stated(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shapes that a layer states of its parameters, as far as it does."""
    match module:
        case nn.Linear():
            return {"weight": (module.out_features, module.in_features), "bias": (module.out_features,)}
        case _ConvTransposeNd():
            weight = (module.in_channels, module.out_channels // module.groups)
            return {"weight": weight, "bias": (module.out_channels,)}
        case _ConvNd():
            weight = (module.out_channels, module.in_channels // module.groups)
            return {"weight": weight, "bias": (module.out_channels,)}
        case _NormBase():
            return {"weight": (module.num_features,), "bias": (module.num_features,)}
        case nn.GroupNorm():
            return {"weight": (module.num_channels,), "bias": (module.num_channels,)}
        case nn.Embedding():
            return {"weight": (module.num_embeddings, module.embedding_dim)}
        case _:
            return {}


def check_numbers(place: str, model: nn.Module, known: Mapping[str, str]) -> None:
    """Check that the numbers of every module fit its tensors, after a model was made narrow.

    Args:
        place: the file, for the message.
        model: as it is now.
        known: what did not fit before (`disagreements`).

    Raises:
        TitheError: naming the first module that does not fit.
    """
    for path, found in disagreements(model).items():
        if path not in known:
            raise TitheError(
                path,
                found=f"{found}, after what {place} tells",
                expected="a file with every number that follows a width",
                remedy="write the file again with plan.save of this version",
            )


def check_answers(place: str, model: nn.Module, probe: Probe) -> None:
    """Ask a model that was just made narrow what the network of the file was asked.

    Args:
        place: the file, for the message.
        model: as it is now.
        probe: of the file.

    Raises:
        TitheError: when it answers otherwise; any other exception is of its own forward pass.
    """
    found = differs(model, probe)
    if found is not None:
        raise TitheError(
            place,
            found=f"{found} when the network made from it is asked what the saved one was asked",
            expected="the outputs of the network that was saved",
            remedy=SAME_CLASS,
        )
