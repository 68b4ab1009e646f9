"""Operators on shapes that were met before: a network repeats its layers, so most of them were.

What an operator makes of tensors without data follows from their shapes and from its other arguments. torch finds it
out in some hundred microseconds; here it is looked up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

# pyright: reportPrivateUsage=false

__all__ = ["Remembered", "fresh", "remembered"]

_aten = torch.ops.aten
_UNFIT = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output, torch.Tag.inplace_view}
_NEVER = {
    _aten.lift_fresh,  # it keeps its input as a constant
    *(_aten.set_, _aten.resize_, _aten.resize_as_, _aten._resize_output_),  # they change storages
    *(_aten.index, _aten.index_put, _aten.index_put_, _aten._index_put_impl_),  # they read masks
}
_MOST = 1 << 15
"""Results that are remembered, a kilobyte each; a Llama of 32 layers has a few thousand."""
_REAL = {Tensor, nn.Parameter}
_PLAIN = {int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format}


@final
class _Like:
    """Makes fake tensors like one that torch made, without its constructor, which takes half of the time.

    Args:
        made: by torch; it is not kept.
    """

    def __init__(self, made: FakeTensor) -> None:
        self._device = made.fake_device
        self._attributes = {key: value for key, value in vars(made).items() if key != "fake_mode"}

    def wrap(self, mode: FakeTensorMode, meta: Tensor) -> FakeTensor:
        """Return the fake tensor over a meta tensor."""
        fake: Any = Tensor._make_subclass(
            FakeTensor, meta, False, dispatch_device=True, device_for_backend_keys=self._device
        )
        if mode._allow_unsafe_data_ptr_access:
            torch._C._set_warn_deprecated_on_mutable_data_ptr(fake)
        else:
            torch._C._set_throw_on_mutable_data_ptr(fake)
        vars(fake).update(self._attributes, fake_mode=mode)
        return fake


@final
@dataclass(frozen=True, slots=True)
class New:
    """A tensor with a storage of its own."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    like: _Like

    def __call__(self, mode: FakeTensorMode, inputs: Sequence[Any]) -> FakeTensor:
        made = torch.empty_strided(self.size, self.stride, dtype=self.dtype, device="meta")
        return self.like.wrap(mode, made)


@final
@dataclass(frozen=True, slots=True)
class View:
    """A tensor on the storage of an input."""

    place: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    like: _Like

    def __call__(self, mode: FakeTensorMode, inputs: Sequence[Any]) -> FakeTensor:
        made = torch.empty(0, dtype=self.dtype, device="meta")
        made.set_(inputs[self.place].untyped_storage(), self.offset, self.size, self.stride)  # pyright: ignore[reportCallIssue, reportArgumentType]
        return self.like.wrap(mode, made)


@final
@dataclass(frozen=True, slots=True)
class Same:
    """An input itself, written in place or not."""

    place: int

    def __call__(self, mode: FakeTensorMode, inputs: Sequence[Any]) -> FakeTensor:
        return inputs[self.place]


@final
@dataclass(frozen=True, slots=True)
class Plain:
    """A value that is no tensor."""

    value: Any

    def __call__(self, mode: FakeTensorMode, inputs: Sequence[Any]) -> Any:
        return self.value


@final
@dataclass(frozen=True, slots=True)
class Several:
    """Several values, in a list or tuple of their own kind."""

    kind: type
    parts: tuple[Any, ...]

    def __call__(self, mode: FakeTensorMode, inputs: Sequence[Any]) -> Any:
        return self.kind([part(mode, inputs) for part in self.parts])


Make = New | View | Same | Plain | Several


@final
class Remembered:
    """What the operators that ran made of which shapes, under one kind of modes of fake tensors."""

    def __init__(self) -> None:
        self._makes: dict[Any, Make | None] = {}
        self._fit: dict[Any, bool] = {}

    def key(
        self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], inputs: list[Any]
    ) -> tuple[Any, ...] | None:
        """Say all that the result's shape follows from, and collect the tensors; None where values may matter."""
        fit = self._fit.get(func)
        if fit is None:
            fit = self._fit[func] = not _UNFIT & set(func.tags) and func.overloadpacket not in _NEVER
        if not fit:
            return None
        parts: list[Any] = [func, torch.get_default_dtype(), torch._C._get_mkldnn_enabled()]
        for value in args:
            if not _write(value, parts, inputs):
                return None
        for name, value in kwargs.items():
            parts.append(name)
            if not _write(value, parts, inputs):
                return None
        return tuple(parts) if any(type(leaf) is FakeTensor for leaf in inputs) else None

    def __getitem__(self, key: tuple[Any, ...] | None) -> Make | None:
        return None if key is None else self._makes.get(key)

    def __contains__(self, key: tuple[Any, ...]) -> bool:
        return key in self._makes

    def learn(
        self,
        key: tuple[Any, ...],
        again: tuple[Any, ...] | None,
        inputs: Sequence[Any],
        fakes: Sequence[Any],
        out: Any,
    ) -> None:
        """Remember what came of it, if that can be made again from the shapes alone.

        Args:
            key: of the operator and its arguments.
            again: the same, after it ran.
            inputs: the tensors among its arguments.
            fakes: the same, with the fake of each real one in its place.
            out: its result.
        """
        if len(self._makes) >= _MOST:
            self._makes.clear()
        self._makes[key] = _make(out, inputs, fakes) if key == again else None


def fresh(make: Make, out: Any) -> Iterator[FakeTensor]:
    """Yield the tensors of a result that have a storage of their own."""
    if type(make) is New:
        yield out
    elif type(make) is Several:
        for part, leaf in zip(make.parts, out, strict=True):
            yield from fresh(part, leaf)


_REMEMBERED: dict[type[FakeTensorMode], Remembered] = {}


def remembered(mode: FakeTensorMode) -> Remembered:
    """Return what is remembered of a kind of modes of fake tensors: one prediction goes on where another ended."""
    return _REMEMBERED.setdefault(type(mode), Remembered())


def _write(value: Any, parts: list[Any], inputs: list[Any]) -> bool:
    """Write a value down by what of it decides the shape of a result; False for one that may decide by its data."""
    kind = type(value)
    if kind is FakeTensor or kind in _REAL:
        dtype = value.dtype
        if value.layout is not torch.strided or dtype.is_complex:
            return False
        inputs.append(value)
        parts += (value.shape, value.stride(), value.storage_offset(), dtype)
        if kind is FakeTensor:
            parts.append(value.fake_device)
            return value.constant is None
        parts += (value.device, False)
        return True
    parts.append(kind)
    if kind in _PLAIN:
        parts.append(value)
        return True
    if kind is list or kind is tuple:
        parts.append(len(value))
        return all(_write(item, parts, inputs) for item in value)
    return False


def _make(out: Any, inputs: Sequence[Any], fakes: Sequence[Any]) -> Make | None:
    if type(out) in (tuple, list):
        parts = [_make(item, inputs, fakes) for item in out]
        made = [leaf.untyped_storage()._cdata for leaf, part in zip(out, parts, strict=True) if type(part) is New]
        if None in parts or len(made) != len(set(made)):
            return None
        return Several(type(out), tuple(part for part in parts if part is not None))
    if type(out) in _PLAIN:
        return Plain(out)
    if type(out) is not FakeTensor or out.constant is not None or out.layout is not torch.strided:
        return None
    storage, size, stride, offset = out.untyped_storage(), tuple(out.shape), out.stride(), int(out.storage_offset())
    places = [place for place, leaf in enumerate(fakes) if leaf.untyped_storage()._cdata == storage._cdata]
    if any(inputs[place] is not fakes[place] for place in places):
        return None  # another call has another fake for what is real
    same = [place for place in places if fakes[place] is out]
    if same:
        return Same(same[0])
    if len(places) == 1:
        return View(places[0], size, stride, offset, out.dtype, _Like(out))
    length = 0 if 0 in size else 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if places or offset or storage.nbytes() != length * out.dtype.itemsize:
        return None
    return New(size, stride, out.dtype, _Like(out))
