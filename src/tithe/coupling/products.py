"""Handle products: positions of the summed axis are absent together in both factors; the other axes remain."""

from __future__ import annotations

import math

from tithe.coupling.call import Call, Operand
from tithe.coupling.labels import Label, Labels

_MATRICES = {
    "mm": ("self", "mat2", None, "mk,kn->mn"),
    "bmm": ("self", "mat2", None, "bmk,bkn->bmn"),
    "mv": ("self", "vec", None, "mk,k->m"),
    "dot": ("self", "tensor", None, "k,k->"),
    "addmm": ("mat1", "mat2", "self", "mk,kn->mn"),
    "_addmm_activation": ("mat1", "mat2", "self", "mk,kn->mn"),
    "addmv": ("mat", "vec", "self", "mk,k->m"),
    "addr": ("vec1", "vec2", "self", "m,n->mn"),
    "baddbmm": ("batch1", "batch2", "self", "bmk,bkn->bmn"),
}
MATRICES = tuple(_MATRICES)


def matrices(call: Call) -> list[Labels]:
    """Label products of matrices and vectors, with an optional addend."""
    left, right, added, dims = _MATRICES[call.name]
    labels = call.product(call[left], call[right], dims)
    return [labels if added is None else _plus(call, labels, call[added])]


def linear(call: Call) -> list[Labels]:
    """Label the linear map of x (..., I), weight (O, I), bias (O,)."""
    x = call["input"]
    batch = "abcdefgh"[: x.num_dims - 1]
    return [_plus(call, call.product(x, call["weight"], f"{batch}k,nk->{batch}n"), call["bias"])]


def convolution(call: Call) -> list[Labels]:
    """Label x (N, I, ...), weight (O, I / G, ...), transposed (I, O / G, ...); each of several groups is a unit."""
    x, weight, groups, transposed = call["input"], call["weight"], call["groups"], call["transposed"]
    shape = call.shapes[0]
    places = math.prod(x.shape[2:] if transposed else shape[2:])
    total = 2.0 * x.shape[0] * x.shape[1] * shape[1] / groups * math.prod(weight.shape[2:]) * places
    channels, matrix = _flat(call, x, "in a window"), _flat(call, weight, "a kernel")
    if groups == 1:
        labels = call.product(channels, matrix, "ni,io->no" if transposed else "ni,oi->no", total)
    else:
        channels, matrix = _grouped(call, channels, 1, groups), _grouped(call, matrix, 0, groups)
        labels = tuple(
            label.repeat_interleave(shape[1] // groups, 1) if label.shape[1] > 1 else label
            for label in call.product(channels, matrix, "ng,go->ng", total)
        )
    spatial = [1] * (len(shape) - 2)
    labels = tuple(label.reshape(*label.shape, *spatial) for label in labels)
    bias = call["bias"]
    if bias is not None:  # the channels are its last dimension, and the output's second
        bias = Operand((shape[1], *spatial), tuple(label.reshape(-1, *spatial) for label in bias.labels))
    return [_plus(call, labels, bias)]


def attention(call: Call) -> list[Labels]:
    """Label q (B, H, T, d), k (B, K, S, d), v (B, K, S, e): each head stays whole inside, heads may be absent."""
    q, k, v = call["query"], call["key"], call["value"]
    if k.shape[1] != q.shape[1]:
        k, v = (_repeated(one, q.shape[1]) for one in (k, v))
    inside = "inside of a head"
    q, k, v = (one.with_labels(call.without(one, [3], inside)) for one in (q, k, v))
    shape = (*q.shape[:3], k.shape[2])
    scores = call.product(q, k, "bhtd,bhsd->bhts")
    bias = call.arguments.get("attn_mask", call.arguments.get("attn_bias"))
    if bias is not None:
        scores = call.meet(shape, Operand(shape, scores), bias)
    weights = call.without(Operand(shape, scores), [3], "normalised by a softmax")
    out = call.product(Operand(shape, weights), v, "bhts,bhse->bhte")
    return [out, *[() for _ in call.shapes[1:]]]


def _plus(call: Call, labels: Labels, bias: Operand | None) -> Labels:
    shape = call.shapes[0]
    return labels if bias is None else call.meet(shape, Operand(shape, labels), bias)


def _flat(call: Call, one: Operand, why: str) -> Operand:
    """The first two dimensions; the others stay whole."""
    labels = call.without(one, range(2, one.num_dims), why)
    return Operand(one.shape[:2], tuple(label.reshape(label.shape[:2]) for label in labels), weight=one.weight)


def _grouped(call: Call, one: Operand, dim: int, groups: int) -> Operand:
    """The groups in place of the channels of dimension `dim`; what is inside of a group, and what follows, is whole."""
    inside = one.shape[dim] // groups
    apart: list[Label] = []
    for label in one.labels:
        sizes = (groups, inside) if label.shape[dim] > 1 else (1, 1)
        apart.append(call.classes.compress(label.reshape(*label.shape[:dim], *sizes, *label.shape[dim + 1 :])))
    shape = (*one.shape[:dim], groups, inside, *one.shape[dim + 1 :])
    whole = Operand(shape, tuple(apart))
    labels = call.without(whole, range(dim + 1, len(shape)), "in one group of a convolution")
    # A matrix of (groups, 1) or activations of (samples, groups): two dimensions again.
    kept = (*shape[: dim + 1], 1)[:2]
    return Operand(kept, tuple(label.reshape((*label.shape[: dim + 1], 1)[:2]) for label in labels))


def _repeated(one: Operand, num_heads: int) -> Operand:
    """Keys or values with each head as often as queries use it."""
    times = num_heads // one.shape[1]
    labels = tuple(label.repeat_interleave(times, 1) if label.shape[1] > 1 else label for label in one.labels)
    shape = (one.shape[0], num_heads, *one.shape[2:])
    return Operand(shape, labels, stretched=one.stretched, depends=one.depends)
