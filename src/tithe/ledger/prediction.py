"""Predict a measurement on tensors that have a shape and no data: the price before paying."""

import logging
import random
import sys
import weakref
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)

from tithe.batch import map_batch
from tithe.errors import TitheError
from tithe.ledger.blank import fake_device, fake_mode
from tithe.ledger.flops import tell
from tithe.ledger.log import replay
from tithe.ledger.recorder import Recorder, recording, storages, tensors
from tithe.ledger.remembered import fresh, remembered
from tithe.ledger.table import Ledger

# pyright: reportPrivateUsage=false
# torch keeps the pieces of fake tensors that a mode of one's own needs under names with an underscore.

__all__ = ["predict"]

_aten = torch.ops.aten


def _is_small(tensor: Tensor) -> bool:
    """Return whether a tensor has data in a prediction: whole numbers, which models branch on, and single numbers."""
    return not (tensor.is_floating_point() or tensor.is_complex()) or tensor.numel() <= 1


class _FakeRecorder(Recorder):
    """Runs operators on fake tensors, except where whole numbers (token ids, masks) or single numbers are all they see.

    So `if attention_mask.all()` has an answer, and nothing that has the size of an activation is allocated or computed.
    A real parameter that meets an operator is replaced by its fake for that operator only: autograd sees the parameter.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # `_eager` keeps the compiler away once; else each operator would

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__(fake=True)
        self.grads: list[tuple[Tensor, Tensor | None]] = []
        self._mode = mode
        self._known = remembered(mode)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the operator and write down what it created; where it ran on such shapes before, make the same again."""
        kwargs = kwargs or {}
        if (device := fake_device(func, args)) is not None:
            return device
        given: list[Any] = []
        key = self._known.key(func, args, kwargs, given)
        make = self._known[key]
        if make is None:
            out = super().__torch_dispatch__(func, types, args, kwargs)
            if key is not None and key not in self._known:
                again = self._known.key(func, args, kwargs, [])
                self._known.learn(key, again, given, [*map(self.fake, given)], out)
            given = tensors((args, kwargs))
        else:
            for leaf in given:
                if leaf.requires_grad:
                    self.watch(leaf)
            out = make(self._mode, given)
            for leaf in fresh(make, out):
                self.born(leaf)
        tell(func, args, kwargs, given, out)
        return out

    def run(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[list[Tensor], Any]:
        """Run the operator for real if all it sees and makes is small, else on fakes."""
        inputs = tensors((args, kwargs))
        try:
            known = all(not isinstance(leaf, FakeTensor) and _is_small(leaf) for leaf in inputs)
            if known and (_needs_data(func) or all(map(_is_small, tensors(self._run_fake(func, args, kwargs)[1])))):
                return inputs, func(*args, **kwargs)
            if func.overloadpacket in (_aten.index, _aten.index_put, _aten.index_put_, _aten._index_put_impl_):
                args = (args[0], _positions(args[1]), *args[2:])
            return self._run_fake(func, args, kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise TitheError(
                self.place() or "the loss function",
                found=f"{func}, whose result depends on the values of an activation",
                expected="shapes and branches that follow from the batch's shapes, whole numbers and masks",
                remedy="measure a real step with tithe.measure, or take this operator out of the forward pass",
            ) from error

    def _run_fake(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[list[Tensor], Any]:
        fakes = self._fakes(args), self._fakes(kwargs)
        try:
            with self._mode:
                return tensors(fakes), func(*fakes[0], **fakes[1])
        except (UnsupportedFakeTensorException, UnsupportedOperatorException) as error:
            raise TitheError(
                self.place() or "the loss function",
                found=f"{func}, which does not run on fake tensors ({error})",
                expected="operators with a shape-only implementation",
                remedy="measure a real step with tithe.measure, or register a fake: torch.library.register_fake",
            ) from error
        except (DataDependentOutputException, DynamicOutputShapeException):
            raise
        except RuntimeError as error:  # what stands for a kernel may ask for more than the kernel does
            raise TitheError(
                self.place() or "the loss function",
                found=f"{func}, which fails on shapes alone ({error})",
                expected="an operator that runs there as it does on numbers",
                remedy="run a real step: if that fails too, the model does; else measure it with tithe.measure",
            ) from error

    def _fakes(self, tree: Any) -> Any:
        if isinstance(tree, (tuple, list)):
            return type(tree)([self._fakes(item) for item in tree])
        if isinstance(tree, dict):
            return {key: self._fakes(item) for key, item in tree.items()}
        return self.fake(tree)

    def fake(self, value: Any) -> Any:
        """Return the fake that stands for a real tensor; anything else as it is."""
        if not isinstance(value, Tensor) or isinstance(value, FakeTensor):
            return value
        with torch._C.DisableTorchFunctionSubclass():
            known = value.grad_fn is None and type(value) in (Tensor, nn.Parameter, nn.Buffer)
            plain = value if known else value.detach().as_subclass(Tensor)
        try:
            fake = self._mode.fake_tensor_converter.from_real_tensor(self._mode, plain)
        except UnsupportedFakeTensorException as error:
            raise TitheError(
                self.place() or "the model",
                found=f"a tensor that cannot be one of shapes alone ({error})",
                expected="dense or sparse tensors",
                remedy="measure a real step with tithe.measure",
            ) from error
        for storage in storages(value):
            if self.born_here(storage):
                # What a view of the fake keeps alive, a view of the real one would have.
                weakref.finalize(fake.untyped_storage(), _release, storage).atexit = False
        return fake

    def watch(self, tensor: Tensor) -> bool:
        """Lay aside the gradient that a real leaf has, besides marking the coming one."""
        fresh = super().watch(tensor)
        if fresh and not isinstance(tensor, FakeTensor):
            self.lay_aside(tensor)
        return fresh

    def lay_aside(self, leaf: Tensor) -> None:
        """Keep a leaf's gradient until the prediction is done."""
        self.grads.append((leaf, leaf.grad))
        leaf.grad = None


def _release(storage: torch.UntypedStorage) -> None:
    """Let go of a storage: by being called, its only reference ends."""


def _needs_data(func: Any) -> bool:
    # `nonzero`, `item`: a fake cannot tell what they return.
    return torch.Tag.dynamic_output_shape in func.tags or torch.Tag.data_dependent_output in func.tags


def _positions(indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Write masks among indices as positions, as indexing itself does: only then is the result's shape known."""
    out: list[Tensor | None] = []
    for index in indices:
        known = index is not None and not isinstance(index, FakeTensor) and index.dtype is torch.bool
        out += index.nonzero(as_tuple=True) if index is not None and known else [index]
    return out


@contextmanager
def _untouched(model: nn.Module) -> Generator[None]:
    """Put everything back that a forward pass changes: small buffers in place, replaced attributes, random states."""
    small = [t for t in [*model.buffers(), *model.parameters()] if _is_small(t) and not isinstance(t, FakeTensor)]
    before = [tensor.detach().clone() for tensor in small]
    attributes = [(module, dict(vars(module)), dict(module._buffers)) for module in model.modules()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        torch.clear_autocast_cache()  # it may hold fakes of the parameters
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])
        for module, own, buffers in attributes:
            module._buffers.clear()
            module._buffers.update(buffers)
            for key in [key for key, value in vars(module).items() if isinstance(value, FakeTensor)]:
                del vars(module)[key]
                if key in own:
                    vars(module)[key] = own[key]
        with torch.no_grad():
            for tensor, value in zip(small, before, strict=True):
                if not torch.equal(tensor, value):  # an unneeded write would spoil the version counter
                    tensor.copy_(value)


def _eager() -> AbstractContextManager[Any]:
    """Compiled functions run as they were written: a compiler would take the fake tensors for its own."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def predict(
    model: nn.Module,
    closure: Callable[[Any], Tensor],
    batch: Any,
    *,
    inside: AbstractContextManager[Any] | None = None,
    backward: bool = True,
) -> Ledger:
    """Return what `closure(batch).backward()` will spend, without allocating or computing anything of that size.

    Equal to `measure` of the same call when no parameter has a gradient yet, with the same blind spots. The model, its
    gradients and buffers, the batch and the random states stay as they are.

    Only whole numbers (token ids, masks, positions) and single numbers are computed for real, so that models may branch
    on them. `weights` is filled in; the plan, which knows what is trained, fills in the rest.

    Args:
        model: gives the paths, and what must not change. Its parameters may have no data (`Blank`).
        closure: runs the forward pass on a batch and returns the loss, a scalar.
        batch: any tree of tensors; its floating-point tensors are only looked at for their shape, dtype and device.
        inside: a context for the work, for example a dispatch mode that counts operators.
        backward: whether `closure` is followed by a backward pass.

    Raises:
        TitheError: when the forward pass branches on the values of an activation, has an operator without a shape-only
            implementation, or returns a loss that is not a scalar or is detached.

    Example:
        >>> layer = nn.Linear(8, 4)
        >>> predict(layer, lambda x: layer(x).relu().sum(), torch.zeros(2, 8)).kept
        32
    """
    recorder = _FakeRecorder(fake_mode([list(model.parameters()), batch]))
    recorder.name(model)
    own = {storage._cdata: storage.nbytes() for t in [*model.parameters(), *model.buffers()] for storage in storages(t)}
    with _untouched(model), _eager(), _silent():
        fakes = map_batch(lambda leaf: leaf.detach().clone() if _is_small(leaf) else recorder.fake(leaf), batch)
        try:
            for parameter in model.parameters():
                if recorder.watch(parameter) and isinstance(parameter, FakeTensor):
                    recorder.lay_aside(parameter)
            with recording(recorder), inside or nullcontext():
                loss = closure(fakes)
                if backward:
                    _check(loss)
                    loss.backward()
        except RuntimeError as error:
            said = str(error).lower()  # as torch says when a fake is asked for `.numpy()`, or meets an operator
            if "tensor subclass" not in said and "no fake impl" not in said:
                raise
            raise TitheError(
                "the forward pass",
                found=f"what a tensor that has only a shape cannot do ({error})",
                expected="torch operators from the batch to the loss",
                remedy="measure a real step with tithe.measure, or stay in torch",
            ) from error
        finally:
            for leaf, grad in recorder.grads:
                leaf.grad = grad
    return replace(replay(recorder.events), weights=sum(own.values()))


@contextmanager
def _silent() -> Generator[None]:
    """Keep torch from printing the traceback of an operator that fails on fakes: the error itself says it."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def _check(loss: Tensor) -> None:
    if loss.numel() != 1 or not loss.requires_grad:
        raise TitheError(
            "loss",
            found=f"a tensor of shape {tuple(loss.shape)}"
            + ("" if loss.requires_grad else ", detached from the graph"),
            expected="a scalar that depends on the trained parameters",
            remedy="return the mean loss over the samples, without .detach() or .item()",
        )
