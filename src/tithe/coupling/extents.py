"""Handle operations that need some dimensions whole (norms, reductions, softmax, windows), and entrywise ones."""

from __future__ import annotations

from tithe.coupling.call import Call, Operand, operands
from tithe.coupling.labels import Label, Labels, moved


def entrywise(call: Call) -> list[Labels]:
    """Unite the labels of all arguments after broadcasting: an entry that exists in one exists in all."""
    met = list(operands(call.arguments))
    return [call.meet(shape, *met) for shape in call.shapes]


def same(call: Call) -> list[Labels]:
    """Label a tensor in the shape of the first argument: a copy, a cast, zeros or noise like it."""
    one = call.first()
    return [one.labels if shape == one.shape else () for shape in call.shapes]


def created(call: Call) -> list[Labels]:
    """Label a new tensor whose size depends on no argument."""
    return [() for _ in call.shapes]


def whole(call: Call) -> list[Labels]:
    """Keep everything whole in an operation of which nothing may be absent."""
    for one in operands(call.arguments):
        for label in one.labels:
            call.classes.pin(label, call.why(f"taken whole by {call.name}"))
    return created(call)


def along(call: Call) -> list[Labels]:
    """Keep one dimension whole, for softmax, cumulative sums and sorting; the others may shrink."""
    one = call.first()
    labels = call.without(one, _dims(call, one), f"taken whole by {call.name}")
    return [labels for _ in call.shapes]


def reduction(call: Call) -> list[Labels]:
    """Keep the dimensions whole that a sum, mean or extreme removes."""
    one = call.first()
    dims = [dim % one.num_dims for dim in _dims(call, one)] if one.num_dims else []
    labels = call.without(one, dims, f"taken whole by {call.name}")
    if one.num_dims and call.shapes and len(call.shapes[0]) < one.num_dims:
        rest = [dim for dim in range(one.num_dims) if dim not in dims]
        labels = tuple(moved(label, rest) for label in labels)
    return [labels for _ in call.shapes]


def _dims(call: Call, one: Operand) -> list[int]:
    dim = call.arguments.get("dim")
    if dim is None or dim == []:
        return list(range(one.num_dims))
    return [dim] if isinstance(dim, int) else list(dim)


def windows(num_spatial: int, call: Call) -> list[Labels]:
    """Pool, resize or reflect over the last `num_spatial` dimensions, each channel separately."""
    one = call.first()
    labels = call.without(one, range(one.num_dims - num_spatial, one.num_dims), "in a window")
    return [labels for _ in call.shapes]


def batch_norm(call: Call) -> list[Labels]:
    """Tie scale, shift and statistics to the channel of x (N, C, ...)."""
    x = call["input"]
    shape = (x.shape[1], *[1] * (x.num_dims - 2))
    parts = [
        Operand(shape, tuple(label.reshape(-1, *shape[1:]) for label in part.labels))
        for name in ("weight", "bias", "running_mean", "running_var")
        if isinstance(part := call.arguments.get(name), Operand)
    ]
    labels = call.meet(x.shape, x, *parts)
    return [labels, *[_channels(labels, s, x.shape[1]) for s in call.shapes[1:]]]


def _channels(labels: Labels, shape: tuple[int, ...], count: int) -> Labels:
    """The labels of what a batch norm says about each channel."""
    return tuple(moved(label, [1]) for label in labels if label.shape[1] > 1) if shape == (count,) else ()


def group_norm(call: Call) -> list[Labels]:
    """Keep each of the G groups of x (N, C, ...) whole, since each is normalised as a whole."""
    x, groups = call["input"], call["group"]
    why = "normalised in one group"
    labels = call.without(x, range(2, x.num_dims), why)
    each = x.shape[1] // groups
    shape = (x.shape[1], *[1] * (x.num_dims - 2))
    met = [x.with_labels(_by_group(call, label, 1, groups, each, why) for label in labels)]
    for part in (call["weight"], call["bias"]):
        if part is not None:
            grouped = [_by_group(call, label, 0, groups, each, why) for label in part.labels]
            met.append(Operand(shape, tuple(label.reshape(-1, *shape[1:]) for label in grouped)))
    out = call.meet(x.shape, *met)
    return [out, *[() for _ in call.shapes[1:]]]


def _by_group(call: Call, label: Label, dim: int, groups: int, each: int, why: str) -> Label:
    """The label, tied inside of each group along a dimension of channels; the same shape."""
    if label.shape[dim] == 1:
        return label
    apart = label.reshape(*label.shape[:dim], groups, each, *label.shape[dim + 1 :])
    tied = call.classes.tie(apart, [dim + 1], call.why(why))
    return label if tied is None else tied.expand(apart.shape).reshape(label.shape)


def layer_norm(call: Call) -> list[Labels]:
    """Keep the normalised last dimensions whole, in x and in scale and shift."""
    x = call["input"]
    count, why = len(call["normalized_shape"]), f"normalised by {call.name.strip('_')}"
    labels = call.without(x, range(x.num_dims - count, x.num_dims), why)
    for name in ("weight", "bias"):
        if (part := call.arguments.get(name)) is not None:
            call.without(part, range(count), why)
    return [labels for _ in call.shapes]


def table(call: Call) -> list[Labels]:
    """Keep the rows of an embedding, (V, D), whole, since they are read by index; columns may be absent."""
    weight, shape = call["weight"], call.shapes[0]
    columns = call.without(weight, [0], "rows taken by index")
    call.made += columns
    return [tuple(label.reshape(*[1] * (len(shape) - 1), -1) for label in columns)]


def halves(call: Call) -> list[Labels]:
    """Label the product of one half of a dimension with the squashed other half, as in `glu`."""
    one, dim = call["self"], call["dim"]
    size = call.shapes[0][dim]
    parts = [
        Operand(call.shapes[0], tuple(_half(label, dim, start, size) for label in one.labels)) for start in (0, size)
    ]
    return [call.meet(call.shapes[0], *parts)]


def _half(label: Label, dim: int, start: int, size: int) -> Label:
    return label.narrow(dim, start, size) if label.shape[dim] > 1 else label
