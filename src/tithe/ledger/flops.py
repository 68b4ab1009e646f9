"""Floating-point operations of a step, by what they are for: the output, the gradient of inputs, or that of weights."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from tithe.rules.blocks import repeats

_aten = torch.ops.aten
_ATTENTION = _aten._scaled_dot_product_flash_attention_for_cpu
_ATTENTION_BACKWARD = _aten._scaled_dot_product_flash_attention_for_cpu_backward
_SAMPLED = torch.ops.tithe.sampled_product


@dataclass(frozen=True, kw_only=True)
class Flops:
    """Floating-point operations of one step: a multiply-add counts as two; only products are counted.

    Args:
        forward: of the outputs.
        input_gradient: of what backward hands on to the layers below, attention included.
        weight_gradient: of the trained values.
    """

    forward: int
    input_gradient: int
    weight_gradient: int

    @property
    def total(self) -> int:
        """All of a step."""
        return self.forward + self.input_gradient + self.weight_gradient


_UNCOUNTED: list[bool] = []


@contextmanager
def uncounted() -> Generator[None]:
    """Count nothing of what runs inside: it stands for something else, or is counted by hand."""
    _UNCOUNTED.append(True)
    try:
        yield
    finally:
        _UNCOUNTED.pop()


_COUNTING: list[FlopCounter] = []


def tell(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], given: Sequence[Tensor], out: Any) -> None:
    """Tell every counter of an operator that a prediction ran.

    Args:
        func: the operator.
        args: that it was called with.
        kwargs: that it was called with.
        given: the tensors among them.
        out: its result.
    """
    if not _UNCOUNTED:
        for counter in _COUNTING:
            counter.see(func, args, kwargs, given, out)


@final
class FlopCounter:
    """Counts the products of the predictions that run while it is entered.

    A product in backward is one for inputs when a weight is among its factors, or when what it gives is a factor of a
    later product; the others end in the gradient of a weight.

    Args:
        weights: the model's parameters.
    """

    def __init__(self, weights: Iterable[Tensor]) -> None:
        self.forward = self.inputs = self.weights = 0
        self._of_weights = _Marks()
        self._of_product: dict[int, int] = {}  # product → FLOPs, as long as it may be for a weight
        self._from = _Marks()
        for weight in weights:
            self._of_weights.add(weight, frozenset({0}))

    def __enter__(self) -> FlopCounter:
        _COUNTING.append(self)
        return self

    def __exit__(self, *error: object) -> None:
        _COUNTING.remove(self)

    def see(
        self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], given: Sequence[Tensor], out: Any
    ) -> None:
        """Count an operator; see `tell`."""
        packet = func.overloadpacket
        in_backward = torch._C._current_graph_task_id() != -1
        formula = _FORMULAS.get(packet) or flop_registry.get(packet)
        if packet is _aten.convolution_backward:
            of_inputs, of_weights = _convolution_backward(*args, **kwargs)
            self.inputs += of_inputs * repeats()
            self.weights += of_weights * repeats()
            self._reach(given)
        elif formula is not None:
            count = int(formula(*args, **kwargs, out_val=out)) * repeats()
            if not in_backward:
                self.forward += count
            elif packet is _ATTENTION_BACKWARD or any(map(self._of_weights.of, given)):
                self.inputs += count
                self._reach(given)
            else:
                self._reach(given)
                product = len(self._of_product)
                self._of_product[product] = count
                self.weights += count
                for tensor in _tensors(out):
                    self._from.add(tensor, frozenset({product}))
        else:
            sources = given[:1] if packet is _aten.index_select else given  # positions say which part of a weight it is
            if sources and all(map(self._of_weights.of, sources)):
                for tensor in _tensors(out):
                    self._of_weights.add(tensor, frozenset({0}))
            products = frozenset[int]().union(*map(self._from.of, given)) if in_backward else ()
            if products:
                for tensor in _tensors(out):
                    self._from.add(tensor, products)

    def _reach(self, factors: Iterable[Tensor]) -> None:
        """What these factors came from was for inputs."""
        for product in frozenset[int]().union(*map(self._from.of, factors)):
            count, self._of_product[product] = self._of_product[product], 0
            self.inputs, self.weights = self.inputs + count, self.weights - count

    @property
    def counted(self) -> Flops:
        """What was counted so far."""
        return Flops(forward=self.forward, input_gradient=self.inputs, weight_gradient=self.weights)


_NONE: frozenset[int] = frozenset()


@final
class _Marks:
    """Marks on storages, which go when the storage does."""

    def __init__(self) -> None:
        self._marks: dict[int, frozenset[int]] = {}
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def add(self, tensor: Tensor, marks: frozenset[int]) -> None:
        if not _is_plain(tensor):
            return
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._marks:
            self._marks[address] |= marks
        else:
            self._marks[address] = marks
            self._alive[address] = weakref.ref(storage, lambda _, a=address: self._forget(a))

    def _forget(self, address: int) -> None:
        del self._marks[address], self._alive[address]

    def of(self, tensor: Tensor) -> frozenset[int]:
        return self._marks.get(tensor.untyped_storage()._cdata, _NONE) if _is_plain(tensor) else _NONE


def _is_plain(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and torch._C._has_storage(tensor)


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_iter(tree) if isinstance(leaf, Tensor))


def _convolution_backward(gy: Tensor, x: Tensor, weight: Tensor, *settings: Any) -> tuple[int, int]:
    # torch's own formula multiplies out all pairs of channels for the weight, also of a grouped convolution.
    transposed, mask = settings[4], settings[-1]
    places = (x if transposed else gy).shape
    count = 2 * math.prod(weight.shape) * places[0] * math.prod(places[2:])
    return count * bool(mask[0]), count * bool(mask[1])


def _sampled(starts: Tensor, column: Tensor, left: Tensor, right: Tensor, *, out_val: Tensor) -> int:
    return 2 * column.numel() * left.shape[1]


_FORMULAS: dict[Any, Callable[..., int]] = {
    _ATTENTION: lambda q, k, v, *_, out_val, **__: sdpa_flop_count(q.shape, k.shape, v.shape),
    _ATTENTION_BACKWARD: lambda gy, q, k, v, *_, out_val, **__: sdpa_backward_flop_count(
        gy.shape, q.shape, k.shape, v.shape
    ),
    _SAMPLED: _sampled,
}
