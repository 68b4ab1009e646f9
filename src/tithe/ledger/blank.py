"""Build networks without data: a model of any size fits into the memory of its small tensors."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_iter, tree_map

from tithe.errors import TitheError
from tithe.ledger.remembered import remembered

# pyright: reportPrivateUsage=false
# torch keeps the pieces of fake tensors that a mode of one's own needs under names with an underscore.

__all__ = ["Blank", "fake_device", "fake_mode"]

_aten = torch.ops.aten
_device = torch.ops.prim.device.default
_FEW = 4096


def _is_few(tensor: Tensor) -> bool:
    """Return whether a tensor is made for real: constructors read their own short lists, masks and position tables."""
    return tensor.numel() <= (_FEW if tensor.is_floating_point() or tensor.is_complex() else _FEW**2)


class _Mode(FakeTensorMode):
    """A mode that remembers what operators make of shapes."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here; the wrapper that sees to that costs as much as a look-up

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.cache_enabled = False  # torch's own takes longer to ask, and longer still to fill
        self._known = remembered(self)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, object] | None = None
    ) -> Any:
        def otherwise() -> Any:
            return super(_Mode, self).__torch_dispatch__(func, types, args, kwargs or {})

        inside = self.in_kernel_invocation or func is _device
        return otherwise() if inside else self.run(func, args, kwargs or {}, otherwise)

    def run(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], otherwise: Callable[[], Any]) -> Any:
        """Make what the operator made of such shapes before; otherwise run it."""
        given: list[Any] = []
        key = self._known.key(func, args, kwargs, given)
        make = self._known[key]
        if make is not None:
            return make(self, given)
        out = otherwise()
        if key is not None and key not in self._known and all(isinstance(leaf, FakeTensor) for leaf in given):
            self._known.learn(key, self._known.key(func, args, kwargs, []), given, given, out)
        return out

    def __deepcopy__(self, memo: dict[int, Any]) -> _Mode:
        return self  # a copy of a tensor stays in the mode of the original: two modes cannot meet in one operator


class Blank(TorchDispatchMode):
    """A mode in which tensors are made without data, as if they were on the CPU, so that a model can be priced.

    Whole numbers, and floating-point tensors of at most 4,096 values that are no parameters, are made for real, so that
    a constructor may read what it just computed. `predict` takes such a model; nothing can be computed with it
    otherwise. Build what meets in one prediction under one `Blank`.

    Raises:
        TitheError: from inside, when the code asks for the values of a tensor that has none.

    Example:
        >>> with Blank():
        ...     layer = nn.Linear(10**6, 10**6)  # 4 TB
        >>> layer.weight.device, layer.weight.numel()
        (device(type='cpu'), 1000000000000)
    """

    def __init__(self) -> None:
        super().__init__()
        self.fake_mode = _Mode()
        self._parameters: dict[int, tuple[Tensor, nn.Parameter]] = {}
        self._entered: list[ExitStack] = []

    def __enter__(self) -> Blank:
        """Listen to parameters being registered; keep quiet about addresses, which copying a module asks for."""
        stack = ExitStack()
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        stack.callback(register_module_parameter_registration_hook(self._registered).remove)
        self._entered.append(stack)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        """Stop."""
        super().__exit__(*error)
        self._entered.pop().close()
        if not self._entered:
            self._parameters.clear()  # a plan looks for whatever else holds a weight

    def _registered(self, module: nn.Module, name: str, parameter: nn.Parameter | None) -> Any:
        # A parameter has no data however small it is: a plan joins parts of many, which have to be of one kind.
        return parameter if parameter is None else self._emptied(parameter)

    def _emptied(self, parameter: nn.Parameter) -> nn.Parameter:
        if isinstance(parameter, FakeTensor) or parameter.numel() <= 1 or not parameter.is_floating_point():
            return parameter
        if id(parameter) not in self._parameters:
            fake = nn.Parameter(self._fake(parameter.detach()), parameter.requires_grad)
            self._parameters[id(parameter)] = parameter, fake
        return self._parameters[id(parameter)][1]

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the operator for real when all it sees and makes is small, else on shapes."""
        kwargs = kwargs or {}
        if (device := fake_device(func, args)) is not None:
            return device
        return self.fake_mode.run(func, args, kwargs, lambda: self._run(func, args, kwargs))

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        inputs = list(_tensors((args, kwargs)))
        if any(is_traceable_wrapper_subclass(leaf) for leaf in inputs):
            return NotImplemented
        real = not any(isinstance(leaf, FakeTensor) for leaf in inputs)
        if func is _aten._local_scalar_dense.default and not real and inputs[0].dtype is torch.bool:
            return False  # `trunc_normal_` draws again while any value is out of bounds
        try:
            if real and (torch.Tag.dynamic_output_shape in func.tags or torch.Tag.data_dependent_output in func.tags):
                return func(*args, **kwargs)
            fakes: tuple[Any, Any] = tree_map(self._fake, (args, kwargs))
            with self.fake_mode:
                out = func(*fakes[0], **fakes[1])
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise TitheError(
                "the model's constructor",
                found=f"{func} on a tensor that has a shape and no data",
                expected="code that reads no weights while it builds the network",
                remedy="build the network for real and use plan.predict",
            ) from error
        finally:
            # What the converter remembers it refers to weakly, and `module.to` swaps no tensor that is referred to.
            self.fake_mode.fake_tensor_converter.meta_converter.tensor_memo.clear()
        return func(*args, **kwargs) if real and all(map(_is_few, _tensors(out))) else out

    def _fake(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or isinstance(value, FakeTensor):
            return value
        return FakeTensor(self.fake_mode, value.detach(), torch.device("cpu")) if value.is_meta else _known(self, value)

    def adopt(self, model: nn.Module) -> None:
        """Take a model's parameters and buffers on the meta device as if they lay on the CPU, in place."""
        for module in model.modules():
            for key, parameter in module._parameters.items():
                if parameter is not None and parameter.is_meta:
                    module._parameters[key] = self._emptied(parameter)
            for key, buffer in module._buffers.items():
                if buffer is not None and buffer.is_meta:
                    module._buffers[key] = self._fake(buffer)


def _known(blank: Blank, value: Tensor) -> FakeTensor:
    return blank.fake_mode.fake_tensor_converter.from_real_tensor(blank.fake_mode, value)


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_iter(tree) if isinstance(leaf, Tensor))


def fake_device(func: Any, args: tuple[Any, ...]) -> torch.device | None:
    """Return what a fake's `.device` is, which every operator asks for; None for any other operator.

    Left to the modes, the question passes each of them in Python: half the time of a prediction.
    """
    if func is not _device or not isinstance(args[0], FakeTensor):
        return None
    return torch.device("meta") if args[0].fake_mode.in_kernel_invocation else args[0].fake_device


def fake_mode(tree: Any) -> FakeTensorMode:
    """Return the mode of the first fake tensor in a tree, or a new one."""
    found = (leaf.fake_mode for leaf in _tensors(tree) if isinstance(leaf, FakeTensor))
    return next(found, None) or FakeTensorMode()
