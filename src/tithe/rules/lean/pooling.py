"""Pooling that keeps where in its window a maximum was, or nothing but the input's shape.

    stock: the input, and for a maximum its place in the plane as int64      lean: one byte an output, or nothing

The place of a maximum is base + offset: the base belongs to the output's position, the offset to the position in the
window. The code is the number of that position, so windows of up to 256 positions have one.

Shapes: x (N, C, *plane), y (N, C, *out). One axis is treated as two, the first of length 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._prims_common import suggest_memory_format

from tithe.rules.double_backward import mark, marked
from tithe.rules.lean.dispatch import Leanness, catch
from tithe.rules.transforms import each_row

# pyright: reportIncompatibleMethodOverride=false, reportUntypedFunctionDecorator=false

_aten = torch.ops.aten
_MOST = 256
Sizes = int | Sequence[int]

torch.library.define("tithe::window_codes", "(Tensor places, Tensor base, Tensor offsets) -> Tensor")
torch.library.define("tithe::window_places", "(Tensor codes, Tensor base, Tensor offsets) -> Tensor")


@torch.library.impl("tithe::window_codes", "default")
def _window_codes(places: Tensor, base: Tensor, offsets: Tensor) -> Tensor:
    codes = torch.empty_like(places, dtype=torch.uint8)
    number = torch.zeros(int(offsets.max()) + 1, dtype=torch.uint8, device=places.device)
    number[offsets] = torch.arange(offsets.numel(), device=places.device).to(torch.uint8)
    for place, code in zip(places, codes, strict=True):  # a sample at a time: int64 takes eight times a code
        code.copy_(number[place - base])
    return codes


@torch.library.register_fake("tithe::window_codes")
def _(places: Tensor, base: Tensor, offsets: Tensor) -> Tensor:
    return torch.empty_like(places, dtype=torch.uint8)


@torch.library.impl("tithe::window_places", "default")
def _window_places(codes: Tensor, base: Tensor, offsets: Tensor) -> Tensor:
    places = torch.empty_like(codes, dtype=torch.int64)
    for place, code in zip(places, codes, strict=True):
        torch.add(offsets[code.int()], base, out=place)
    return places


@torch.library.register_fake("tithe::window_places")
def _(codes: Tensor, base: Tensor, offsets: Tensor) -> Tensor:
    return torch.empty_like(codes, dtype=torch.int64)


class Window(NamedTuple):
    """The settings of a maximum: of sliding windows in the order of `max_pool2d`, or of `adaptive` output sizes."""

    kernel: list[int]
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    ceil_mode: bool
    adaptive: list[int] | None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The maxima and their places."""
        three = len(self.kernel) == 3
        if self.adaptive is not None:
            return (_aten.adaptive_max_pool3d if three else _aten.adaptive_max_pool2d).default(x, self.adaptive)
        return (_aten.max_pool3d_with_indices if three else _aten.max_pool2d_with_indices).default(x, *self[:5])

    def backward(self, gy: Tensor, x: Tensor, places: Tensor) -> Tensor:
        """The gradient of x: gy at the place of each maximum."""
        three = len(self.kernel) == 3
        if self.adaptive is not None:
            run = _aten.adaptive_max_pool3d_backward if three else _aten.adaptive_max_pool2d_backward
            return run.default(gy, x, places)
        run = _aten.max_pool3d_with_indices_backward if three else _aten.max_pool2d_with_indices_backward
        return run.default(gy, x, *self[:5], places)

    def places(self, plane: Sequence[int], out: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """Base of each output position (*out), offset of each position in a window (K,); int64."""
        base, offsets = torch.zeros((), dtype=torch.int64, device=device), torch.zeros(1, dtype=torch.int64).to(device)
        for axis, (size, count) in enumerate(zip(plane, out, strict=True)):
            steps, row = torch.arange(count, device=device), math.prod(plane[axis + 1 :])
            if self.adaptive is None:
                start = steps * self.stride[axis] - self.padding[axis]
            else:
                start = torch.div(steps * size, count, rounding_mode="floor")
            base = base[..., None] + start * row
            window = torch.arange(self.kernel[axis], device=device) * self.dilation[axis] * row
            offsets = (offsets[:, None] + window).reshape(-1)
        return base, offsets


def _like(gy: Tensor, shape: Sequence[int], memory_format: torch.memory_format) -> Tensor:
    """A stand-in for an input of which stock reads shape and layout only."""
    if memory_format == torch.contiguous_format:
        return gy.new_empty(1).expand(shape)
    return torch.empty(shape, dtype=gy.dtype, device=gy.device, memory_format=memory_format)


@each_row
class MaxPooled(torch.autograd.Function):
    """A maximum over windows: `apply(x, window)`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, window: Window) -> Tensor:
        """Stock's output, and a byte for the place of each maximum in its window."""
        y, places = window.forward(x)
        ctx.window, ctx.shape, ctx.memory_format, ctx.mark = window, x.shape, suggest_memory_format(x), mark(x)
        base, offsets = window.places(x.shape[2:], y.shape[2:], x.device)
        ctx.save_for_backward(torch.ops.tithe.window_codes.default(places, base, offsets))
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        """Stock's gradient, bit for bit, on places that are made again."""
        (codes,), gy = ctx.saved_tensors, grads[0]
        base, offsets = ctx.window.places(ctx.shape[2:], codes.shape[2:], gy.device)
        places = torch.ops.tithe.window_places.default(codes, base, offsets)
        return marked(ctx.window.backward(gy, _like(gy, ctx.shape, ctx.memory_format), places), ctx.mark), None


@each_row
class Averaged(torch.autograd.Function):
    """A mean over windows: `apply(x, run, back, settings)` with stock's kernels; keeps the input's shape."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, run: Any, back: Any, settings: tuple[Any, ...]) -> Tensor:
        """Stock's output; of x only the shape is kept."""
        ctx.back, ctx.shape, ctx.memory_format, ctx.mark = back, x.shape, suggest_memory_format(x), mark(x)
        ctx.settings = settings if back in (_aten.avg_pool2d_backward, _aten.avg_pool3d_backward) else ()
        return run.default(x, *settings)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        """Stock's gradient, bit for bit: gy spread evenly over each window."""
        like = _like(grads[0], ctx.shape, ctx.memory_format)
        return marked(ctx.back.default(grads[0], like, *ctx.settings), ctx.mark), None, None, None


def _per_axis(value: Sizes, axes: int) -> list[int]:
    if isinstance(value, int):
        return [value] * axes
    return list(value) * axes if len(value) == 1 else list(value)


def _on_planes(x: Tensor, axes: int, pool: Callable[[Tensor], Tensor]) -> Tensor:
    """`pool` of (N, C, *plane) on an x of `axes` axes that may lack N."""
    batched = x if x.dim() == axes + 2 else x.unsqueeze(0)
    y = pool(batched.unsqueeze(2)).squeeze(2) if axes == 1 else pool(batched)
    return y if x.dim() == axes + 2 else y.squeeze(0)


def _serves(x: Tensor, axes: int) -> bool:
    return x.dim() in (axes + 1, axes + 2) and x.numel() > 0


def _maximum(x: Tensor, axes: int, window: Window) -> Any:
    if math.prod(window.kernel) > _MOST:
        return NotImplemented
    return _on_planes(x, axes, lambda planes: MaxPooled.apply(planes, window))


def _register(
    axes: int, maximum: Any, adaptive_maximum: Any, mean: Any, adaptive_mean: Any, like: tuple[Any, Any] = (None, None)
) -> tuple[Any, Any]:
    """Handlers for operations of so many axes, in the rows of the handlers `like`; those of maxima and of means."""
    lead = 1 if axes == 1 else 0  # settings of the axis that is put in front

    def settings(value: Sizes, front: int) -> list[int]:
        return [front] * lead + _per_axis(value, axes)

    def sizes(output_size: Any, x: Tensor) -> list[int]:
        asked = [output_size] * axes if output_size is None or isinstance(output_size, int) else list(output_size)
        return [1] * lead + [n if a is None else a for a, n in zip(asked, x.shape[-axes:], strict=True)]

    @catch(
        *maximum,
        keeps="m, for windows of up to 256 places",
        stock="4 n + 8 m",
        family="maximum over windows",
        note="=",
        like=like[0],
        asked=True,
    )
    def max_pool(
        leanness: Leanness,
        input: Tensor,
        kernel_size: Sizes,
        stride: Sizes | None = None,
        padding: Sizes = 0,
        dilation: Sizes = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> Any:
        """The map y = max of x over each window; gx = gy at its place, which the number in the window gives back."""
        if return_indices or not _serves(input, axes):
            return NotImplemented
        kernel = settings(kernel_size, 1)
        strides = settings(stride, 1) if stride is not None and stride != [] else kernel
        return _maximum(
            input, axes, Window(kernel, strides, settings(padding, 0), settings(dilation, 1), ceil_mode, None)
        )

    @catch(adaptive_maximum, like=max_pool)
    def adaptive_max_pool(leanness: Leanness, input: Tensor, output_size: Any, return_indices: bool = False) -> Any:
        """The same over windows that divide x into so many outputs: y = max of x, gx = gy at its place."""
        if return_indices or not _serves(input, axes):
            return NotImplemented
        out, ones = sizes(output_size, input), [1] * (axes + lead)
        plane = [1] * lead + list(input.shape[-axes:])
        if 0 in out:
            return NotImplemented
        kernel = [-(-n // o) + (n % o != 0) for n, o in zip(plane, out, strict=True)]
        return _maximum(input, axes, Window(kernel, ones, ones, ones, False, out))

    @catch(mean, keeps="nothing", stock="4 n", family="mean over windows", note="=", like=like[1], asked=True)
    def avg_pool(
        leanness: Leanness,
        input: Tensor,
        kernel_size: Sizes,
        stride: Sizes | None = None,
        padding: Sizes = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> Any:
        """The map y = mean of x over each window of n; gx = Σ gy / n over the windows, which needs no value of x."""
        if not _serves(input, axes):
            return NotImplemented
        kernel = settings(kernel_size, 1)
        strides = settings(stride, 1) if stride is not None and stride != [] else kernel
        given = (kernel, strides, settings(padding, 0), ceil_mode, count_include_pad, divisor_override)
        run, back = (
            (_aten.avg_pool3d, _aten.avg_pool3d_backward)
            if axes == 3
            else (_aten.avg_pool2d, _aten.avg_pool2d_backward)
        )
        return _on_planes(input, axes, lambda planes: Averaged.apply(planes, run, back, given))

    @catch(adaptive_mean, like=avg_pool)
    def adaptive_avg_pool(leanness: Leanness, input: Tensor, output_size: Any) -> Any:
        """The same over windows that divide x into so many outputs: y = mean of x, gx = Σ gy / n."""
        if not _serves(input, axes):
            return NotImplemented
        out = sizes(output_size, input)
        if math.prod(out) <= 1:  # stock takes the mean, which keeps nothing
            return NotImplemented
        run, back = (
            (_aten._adaptive_avg_pool3d, _aten._adaptive_avg_pool3d_backward)
            if axes == 3
            else (_aten._adaptive_avg_pool2d, _aten._adaptive_avg_pool2d_backward)
        )
        return _on_planes(input, axes, lambda planes: Averaged.apply(planes, run, back, (out,)))

    return max_pool, avg_pool


_kin = _register(1, (F.max_pool1d, torch.max_pool1d), F.adaptive_max_pool1d, F.avg_pool1d, F.adaptive_avg_pool1d)
_register(2, (F.max_pool2d, torch.max_pool2d), F.adaptive_max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, _kin)
_register(3, (F.max_pool3d, torch.max_pool3d), F.adaptive_max_pool3d, F.avg_pool3d, F.adaptive_avg_pool3d, _kin)
