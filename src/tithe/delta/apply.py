"""Apply a delta to a model in memory: everything is checked before the first byte of the model is written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final, TypeVar

import torch
from torch import Tensor, nn

from tithe.delta.check_base import Match, check_base, check_form
from tithe.delta.file import TensorFile
from tithe.delta.fingerprint import state_tensors, storage_key, ties, words
from tithe.delta.format import Header, Record, decode, read_record
from tithe.delta.network import SAME_CLASS, check_answers, check_numbers, check_widths, disagreements, narrow
from tithe.delta.source import prefix_hint
from tithe.errors import TitheError
from tithe.forward import Probe, ask

Model = TypeVar("Model", bound=nn.Module)
_SAME_NETWORK: Final = (
    "pass the network that the delta was made with, unwrapped (model.module under DDP, model._orig_mod under compile)"
)


def apply(model: Model, path: str | Path) -> Model:
    """Write a delta into `model`, in place; applying it again changes nothing.

    A file that holds a narrow network makes a model of full width, whatever its values, that network. If the file tells
    what the saved network answered to numbers that can be drawn again, the model is asked the same.

    Args:
        model: the base that the delta was made from, or the tuned model itself, attached or not, on any device.
        path: what `plan.save` or `tithe.diff` wrote.

    Returns:
        The same model.

    Raises:
        TitheError: when the file is truncated, damaged, no delta or of a later version; when names, shapes, dtypes or
            ties differ; when the model is another base; or when a narrow network does not run or answers otherwise than
            the saved one. The model then has every bit it had before.

    Example:
        >>> import tempfile, tithe
        >>> base, tuned = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
        >>> path = tempfile.mkdtemp() + "/delta.safetensors"
        >>> tithe.diff(base, tuned, path)
        >>> torch.equal(tithe.apply(base, path).weight, tuned.weight)
        True
    """
    file = TensorFile(Path(path))
    header = decode(file)
    if header.widths is not None:
        return _apply_network(model, file, header, header.widths)
    state = state_tensors(model)
    matches = _matches(model, state, header, file.path)
    records = {name: read_record(file, name, entry) for name, entry in header.stored().items()}
    check_base(str(file.path), matches, lambda name: records[name].indices if name in records else None)
    writes = [(match.target, _placed(records[match.name], match.target)) for match in matches if match.name in records]
    with torch.no_grad():
        for target, record in writes:
            write_record(target, record)
    if any(name not in state for name, _ in model.named_parameters()):
        # An attached plan hides θ, a copy of selected weights, from state_dict; its loading hooks read it again.
        model.load_state_dict({}, strict=False)
    return model


def _apply_network(model: Model, file: TensorFile, header: Header, widths: Mapping[str, Mapping[str, int]]) -> Model:
    """Make `model` the narrow network of a file, and ask it what the saved one was asked."""
    place = str(file.path)
    check_widths(place, model, header)
    matches = _matches(model, state_tensors(model), header, file.path, any_shape=True)
    for match in matches:
        if match.target.is_meta:
            raise TitheError(
                match.name,
                found="a tensor on the meta device",
                expected="weights in memory",
                remedy="build the network on the device that it is to run on",
            )
    records = {name: read_record(file, name, entry) for name, entry in header.entries.items()}
    values = [(match.target, _placed(records[match.name], match.target).values) for match in matches]
    known = disagreements(model)
    try:
        with torch.no_grad(), narrow(model, widths, values):
            check_numbers(place, model, known)
            if header.probe is not None:
                check_answers(place, model, header.probe)
    except TitheError:
        raise
    except Exception as error:
        if header.probe is not None and _runs(model, header.probe):
            raise TitheError(
                place,
                found=f"a forward pass that fails in the network made from it ({type(error).__name__}: {error})",
                expected="one that runs, as in the network that was saved",
                remedy=SAME_CLASS,
            ) from error
        with torch.no_grad(), narrow(model, widths, values):  # it does not run here whatever its width
            check_numbers(place, model, known)
    return model


def _runs(model: nn.Module, probe: Probe) -> bool:
    try:
        ask(model, probe.inputs)
    except Exception:
        return False
    return True


def write_record(target: Tensor, record: Record) -> None:
    """Write a record into a tensor of any memory layout, in place, bit for bit."""
    if record.indices is None:
        target.copy_(record.values)
    elif target.is_contiguous():
        bits = record.values.view(_word(record.values))
        target.view(-1).view(bits.dtype)[record.indices] = bits
    else:
        whole = target.contiguous()
        write_record(whole, record)
        target.copy_(whole)


def _word(values: Tensor) -> torch.dtype:
    return words("values", values[:0]).dtype


def _placed(record: Record, target: Tensor) -> Record:
    indices = None if record.indices is None else record.indices.to(target.device)
    return Record(indices, record.values.to(target.device))


def _matches(
    model: nn.Module, state: Mapping[str, Tensor], header: Header, path: Path, *, any_shape: bool = False
) -> list[Match]:
    """Every storage of the model with its entry, after all checks that need no values."""
    leader = {name: lead for lead, entry in header.entries.items() for name in (lead, *entry.aliases)}
    absent = [
        lead for lead, entry in header.entries.items() if not any(name in state for name in (lead, *entry.aliases))
    ]
    if absent:
        raise TitheError(
            absent[0],
            found=f"no such tensor in the model, as for {len(absent)} of the delta's{prefix_hint(absent, state)}",
            expected=f"the tensors that {path} was made with",
            remedy=_SAME_NETWORK,
        )
    matches: list[Match] = []
    for names in ties(state, first=leader).values():
        known = [leader[name] for name in names if name in leader]
        if not known:
            raise TitheError(
                names[0],
                found=f"a tensor that {path} does not know{prefix_hint(names[:1], leader)}",
                expected="the tensors that the delta was made with and no others",
                remedy=_SAME_NETWORK,
            )
        stored = [lead for lead in known if header.entries[lead].kind != "kept"]
        if stored and len(set(known)) > 1:
            raise TitheError(
                names[0],
                found=f"one storage for {' and '.join(sorted(set(known)))}",
                expected="separate weights, as when the delta was made",
                remedy="untie these weights before applying",
            )
        for lead in dict.fromkeys(known):
            entry, tensor = header.entries[lead], state[names[0]]
            check_form(names[0], entry, entry.shape if any_shape else tuple(tensor.shape), tensor.dtype)
            matches.append(Match(lead, header.entries[lead], state[names[0]]))
    _check_live(model, [match for match in matches if match.entry.kind != "kept"])
    return matches


def _check_live(model: nn.Module, matches: list[Match]) -> None:
    own = {storage_key(name, tensor) for name, tensor in model.named_parameters(remove_duplicate=False)}
    own |= {storage_key(name, tensor) for name, tensor in model.named_buffers(remove_duplicate=False)}
    for match in matches:
        if match.target.numel() and storage_key(match.name, match.target) not in own:
            raise TitheError(
                match.name,
                found="a state_dict entry that is a copy, not a parameter or buffer of the model",
                expected="a state_dict that shares memory with the model",
                remedy="apply to the plain model, before it is sharded or quantised",
            )
