"""Handle operations that move entries and compute nothing: they act on the labels as on the tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch

from tithe.coupling.call import Call, Operand, operands
from tithe.coupling.labels import ALWAYS, Label, Labels, always, varying

MOVES = frozenset(
    {
        *("view", "_unsafe_view", "reshape", "_reshape_copy", "view_copy", "permute", "transpose", "t", "expand"),
        *("squeeze", "unsqueeze", "diagonal", "select", "slice", "split", "split_with_sizes", "unbind", "flip"),
        *("clone", "_to_copy", "detach", "alias", "contiguous"),
    }
)
"""Operations through which a weight stays itself: they move entries or copy them, in whatever precision."""


def view(call: Call) -> list[Labels]:
    """Label another shape of the same entries."""
    return _through(call, call.first(), lambda label: [label.reshape(call.shapes[0])], taken_apart=True)


def rearranged(call: Call) -> list[Labels]:
    """Permute, repeat or transpose the labels by the operation itself."""
    return _through(call, call.first(), lambda label: _listed(call.run(label)))


def parted(call: Call) -> list[Labels]:
    """Label the parts of a tensor that is cut along one dimension at places written in the program."""
    one = call.first()
    dim = call["dim"] % one.num_dims
    size = one.shape[dim]
    match call.name:
        case "select":
            cuts = [call["index"] % size, call["index"] % size + 1]
        case "slice" if call["step"] == 1:
            cuts = list(slice(call["start"], call["end"]).indices(size)[:2])
        case "split" if size:
            cuts = list(range(0, size, call["split_size"]))
        case "split_with_sizes":
            cuts = list(accumulate(call["split_sizes"]))
        case _:
            cuts = list(range(size))
    for label in one.labels:
        if label.shape[dim] > 1:
            call.classes.remember_cuts(label, dim, cuts, call.why("taken apart at a fixed place"))
    return rearranged(call)


def shifted(call: Call) -> list[Labels]:
    """Keep dimensions whole that are rolled, flipped or seen through a window: the rest would change its place."""
    one = call.first()
    dims = call.arguments.get("dims", call.arguments.get("dimension"))
    dims = range(one.num_dims) if dims == [] else [dims] if isinstance(dims, int) else dims
    labels = call.without(one, dims, f"taken whole by {call.name}")
    return _through(call, one.with_labels(labels), lambda label: _listed(call.run(label)))


def padded(call: Call) -> list[Labels]:
    """Label padding by a constant: new channels always exist; the padding around an absent channel does not."""
    one = call.first()
    pad = list(call["pad"])
    labels: list[Label] = []
    for label in one.labels:
        dims = [one.num_dims - 1 - k // 2 for k in range(len(pad))]
        sizes = [size if label.shape[dim] > 1 else 0 for dim, size in zip(dims, pad, strict=True)]
        labels.append(_kept(call, torch.constant_pad_nd(label, sizes, ALWAYS)))
    return [tuple(labels)]


def indexed(call: Call) -> list[Labels]:
    """Keep the dimensions whole from which entries are taken by index."""
    one, indices = call["self"], call["indices"]
    dims: list[int] = []
    at = 0
    for index in indices:
        taken = 1 if index is None or not _is_mask(index) else index.num_dims
        dims += [] if index is None else range(at, at + taken)
        at += taken
    values = [None if index is None else index.tensor.cpu() for index in indices]
    labels = call.without(one, dims, "taken by index")
    return _through(call, one.with_labels(labels), lambda label: [torch.ops.aten.index(label, values)])


def gathered(call: Call) -> list[Labels]:
    """Keep the dimension whole along which entries are taken by index; `gather` has an index for every entry."""
    one, dim, index = call["self"], call["dim"], call["index"]
    labels = call.without(one, [dim], "taken by index")
    take, values = (torch.gather if call.name == "gather" else torch.index_select), index.tensor.cpu()
    moved = _through(call, one.with_labels(labels), lambda label: [take(label, dim, values)])[0]
    return [call.meet(call.shapes[0], Operand(call.shapes[0], moved), index)] if call.name == "gather" else [moved]


def joined(call: Call) -> list[Labels]:
    """Label the result of `cat` or `stack`: joined along the dimension, united along every other."""
    shape = call.shapes[0]
    dim = call["dim"] % len(shape)
    # `cat` leaves an empty vector out, whatever the rest is; a part of length 0 adds nothing.
    parts = [part for part in call["tensors"] if 0 not in part.shape]
    if call.name == "stack":
        parts = [_lifted(part, dim) for part in parts]
    labels = [label for part in parts for label in part.labels]
    free = frozenset[int]().union(*map(varying, labels)) - {dim}
    common = [label for label in labels if label.shape[dim] == 1]
    common += [always(d, shape[d], len(shape)) for part in parts for d in part.fixed() if d in free]
    if any(label.shape[dim] > 1 for label in labels):
        common.append(_row(call, parts, dim))
    return [call.classes.merge(common, call.why("joined with a tensor of fixed size"))]


def _row(call: Call, parts: Sequence[Operand], dim: int) -> Label:
    """One label along `dim`, of the label of each part; a part whose length there is fixed has what it has across."""
    ends = [next((label for label in part.labels if label.shape[dim] > 1), None) for part in parts]
    across = frozenset[int]().union(*(varying(label) for label in ends if label is not None)) - {dim}
    shape = [size if d in across else 1 for d, size in enumerate(call.shapes[0])]
    nothing = torch.full([1] * len(shape), ALWAYS, dtype=torch.int64)
    pieces: list[Label] = []
    for part, end in zip(parts, ends, strict=True):
        shape[dim] = part.shape[dim]
        label = end if end is not None else next((one for one in part.labels if varying(one) <= across), nothing)
        pieces.append(label.expand(shape))
    return _kept(call, torch.cat(pieces, dim))


def _lifted(part: Operand, dim: int) -> Operand:
    """A part of a stack, with the new dimension."""
    stretched = frozenset(d + (d >= dim) for d in part.stretched)
    shape = (*part.shape[:dim], 1, *part.shape[dim:])
    return Operand(shape, tuple(label.unsqueeze(dim) for label in part.labels), stretched, loose=part.loose)


def _through(
    call: Call, one: Operand, run: Callable[[Label], Sequence[Label]], *, taken_apart: bool = False
) -> list[Labels]:
    """Every label of `one`, written out and sent through `run`: for each output its labels.

    Args:
        call: the operation.
        one: its tensor.
        run: what it does to a label.
        taken_apart: whether a dimension becomes several. The innermost, such as the width of a head, then is a number
            in the program, and stays.
    """
    results = [run(label.expand(one.shape)) for label in one.labels]
    outputs = zip(*results, strict=True) if results else [() for _ in call.shapes]
    why = call.why("viewed as a grid")
    return [call.classes.merge((_kept(call, label, taken_apart) for label in labels), why) for labels in outputs]


def _kept(call: Call, label: Label, taken_apart: bool = False) -> Label:
    label = call.classes.compress(label)
    if len(varying(label)) > 1:
        whole = [max(varying(label))] if taken_apart else []
        call.classes.remember_grid(label, whole, call.why("viewed as a grid of which no rectangle would be left"))
    return label


def _listed(value: Label | Sequence[Label]) -> Sequence[Label]:
    return [value] if isinstance(value, torch.Tensor) else value


def _is_mask(index: Operand) -> bool:
    return index.tensor is not None and index.tensor.dtype in (torch.bool, torch.uint8)


def masks(arguments: Mapping[str, Any]) -> bool:
    """Return whether an index is a mask that depends on the parameters, so that a shape does."""
    return any(_is_mask(index) and index.depends for index in operands(arguments["indices"]))
