"""Watch one forward pass to see which positions of the model's weights meet each other."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from tithe.coupling.assemble import Atoms, assemble
from tithe.coupling.call import Call, Operand, Work, operands
from tithe.coupling.extents import entrywise
from tithe.coupling.groups import Coupling
from tithe.coupling.labels import Classes, Label, Labels
from tithe.coupling.moves import masks
from tithe.coupling.operations import OPERATIONS
from tithe.errors import TitheError

# Their forward passes work out sizes from settings, whatever the weights are.
_WHOLE = (nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)


def couple(model: nn.Module, run: Callable[[], Any], cut: Collection[str], samples: int) -> Coupling:
    """Run the model once and return which positions of its weights exist or are absent together.

    The model runs as it is, in its present mode; random numbers and buffers are put back afterwards.

    Args:
        model: any module.
        run: one forward of `model` and its loss, on a small real batch.
        cut: names of the parameters whose positions may be absent; every other tensor keeps all of its positions.
        samples: how many samples the batch has.

    Raises:
        TitheError: when the model's course depends on values computed from its weights, or an operation is unknown.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> x = torch.randn(2, 4)
        >>> coupling = couple(model, lambda: model(x).sum(), dict(model.named_parameters()), samples=2)
        >>> [(group.name, group.num_units, group.members) for group in coupling.groups]
        [('0', 3, (('0.weight', 0), ('0.bias', 0), ('2.weight', 1)))]
    """
    trace = _Trace(model, cut)
    devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    fast = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=list(devices)))
        stack.enter_context(_buffers_kept(model))
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        torch.backends.mha.set_fastpath_enabled(False)  # its fused kernels hide what they do
        stack.enter_context(torch.no_grad())
        stack.enter_context(_places(model, trace))
        stack.enter_context(trace)
        run()
    if not trace.ran:
        raise TitheError(
            type(model).__name__,
            found="no forward pass of it",
            expected="a loss that runs the model",
            remedy="check loss=",
        )
    parameters = dict(model.named_parameters())
    return assemble(trace.classes, trace.atoms, trace.work, trace.made, parameters, trace.whole, samples)


@contextmanager
def _buffers_kept(model: nn.Module) -> Generator[None]:
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)


@contextmanager
def _places(model: nn.Module, trace: _Trace) -> Generator[None]:
    """While inside, the trace knows which module runs."""
    with ExitStack() as stack:
        for path, module in model.named_modules():
            stack.callback(module.register_forward_pre_hook(_entering(trace, path)).remove)
            stack.callback(module.register_forward_hook(trace.leave, always_call=True).remove)
        yield


def _entering(trace: _Trace, path: str) -> Callable[[nn.Module, Any], None]:
    def enter(module: nn.Module, args: Any) -> None:
        trace.places.append(path or type(module).__name__)
        trace.ran = True

    return enter


@dataclass(frozen=True)
class _Known:
    labels: Labels = ()
    depends: bool = False
    loose: bool = False


class _Trace(TorchDispatchMode):
    """Follows labels from weights to what is computed from them."""

    def __init__(self, model: nn.Module, cut: Collection[str]) -> None:
        super().__init__()
        self.classes = Classes()
        self.work: list[Work] = []
        self.made: list[Label] = []
        self.atoms: list[Atoms] = []
        self.places: list[str] = []
        self.ran = False
        self.whole: dict[str, str] = {}
        self._known = WeakTensorKeyDictionary()
        self._leaves: dict[tuple[Any, ...], _Known] = {}
        kept = self._keep_whole(model, cut)
        for name, parameter in model.named_parameters():
            self._start(name, parameter, name in cut and name not in kept, depends=True)
        for path, module in model.named_modules():
            if isinstance(module, _NormBase):
                prefix = f"{path}." if path else ""
                may = not module.affine or (f"{prefix}weight" in cut and f"{prefix}weight" not in kept)
                for name, buffer in module.named_buffers(prefix=path, recurse=False):
                    self._start(name, buffer, may, depends=False)

    def _keep_whole(self, model: nn.Module, cut: Collection[str]) -> set[str]:
        kept: set[str] = set()
        for path, module in model.named_modules():
            if isinstance(module, _WHOLE):
                names = {name for name, _ in module.named_parameters(prefix=path)}
                if names & set(cut) - kept:
                    self.whole[path] = f"{type(module).__name__} works out its sizes from its settings"
                kept |= names
        return kept

    def _start(self, name: str, tensor: Tensor, cut: bool, *, depends: bool) -> None:
        """Give every position of a tensor an atom, unless the tensor is known under another name."""
        if _key(tensor) in self._leaves or not tensor.numel():
            return
        labels: list[Label] = []
        for axis, size in enumerate(tensor.shape):
            if cut and size > 1:
                atoms = self.classes.add(size)
                self.atoms.append(Atoms(name, axis, atoms))
                labels.append(atoms.view([-1 if dim == axis else 1 for dim in range(tensor.dim())]))
        self._leaves[_key(tensor)] = _Known(tuple(labels), depends)

    @property
    def place(self) -> str:
        """Path of the module that runs."""
        return self.places[-1] if self.places else ""

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook of every module: what the outermost one returns is seen from outside, and stays."""
        place = self.places.pop()
        if not self.places:
            for one in operands(self._operands(output)):
                for label in one.labels:
                    self.classes.pin(label, f"an output of {place}")

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the operation and label what it returns."""
        kwargs = kwargs or {}
        arguments = self._bind(func, args, kwargs)
        met = list(operands(arguments))
        self._refuse_reading(func, arguments, met)
        out = func(*args, **kwargs)
        returned = _tensors(out)
        if not returned:
            return out
        name = func._schema.name.split("::")[1]
        name = name.removesuffix("_") if func._schema.is_mutable else name
        call = Call(
            name,
            lambda label: func(label, *args[1:], **kwargs),
            arguments,
            [tuple(tensor.shape) for tensor in returned],
            self.place,
            self.classes,
            self.work,
            self.made,
        )
        depends = any(one.depends for one in met)
        noise = name in ("bernoulli", "normal", "uniform", "exponential")
        loose = noise or (bool(met) and all(one.loose or not one.shape for one in met))
        for tensor, labels in zip(returned, self._labels(func, call, met), strict=True):
            if labels or depends or loose:
                self._known[tensor] = _Known(labels, depends, loose and not labels)
        return out

    def _labels(self, func: Any, call: Call, met: Sequence[Operand]) -> list[Labels]:
        handler = OPERATIONS.get(call.name) if func.namespace == "aten" else None
        if handler is None and _is_entrywise(func):
            handler = entrywise
        if handler is not None:
            return handler(call)
        if any(self.classes.dies(label) for one in met for label in one.labels):
            raise TitheError(
                call.place or call.name,
                found=f"{func.name()}, of which it is not known how it treats absent channels",
                expected="operations that the tables of tithe.coupling know",
                remedy=f'keep what it works on whole with where="!{self._source(met)}"',
            )
        return [() for _ in call.shapes]

    def _source(self, met: Sequence[Operand]) -> str:
        """A glob over the parameters of a layer whose channels are met here."""
        atoms = next(label for one in met for label in one.labels if self.classes.dies(label)).unique()
        first = next(int(atom) for atom in atoms if self.classes.dies(atom))
        tensor = next(one.tensor for one in reversed(self.atoms) if int(one.atoms[0]) <= first)
        owner = tensor.rpartition(".")[0]
        return f"{owner}.*" if owner else tensor

    def _refuse_reading(self, func: Any, arguments: Mapping[str, Any], met: Sequence[Operand]) -> None:
        """Values that depend on the weights must not decide what runs, or in which shape."""
        reads = torch.Tag.data_dependent_output in func.tags
        shapes = torch.Tag.dynamic_output_shape in func.tags and ("indices" not in arguments or masks(arguments))
        # Outside of every module a loss may be read, to be logged for example.
        if (reads or shapes) and self.places and any(one.depends for one in met):
            raise TitheError(
                self.place,
                found=f"values computed from the weights that decide what runs ({func.name()})",
                expected="a course that is the same for every narrow network",
                remedy="decide on the inputs alone, or compute both branches and choose with torch.where",
            )

    def _bind(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments by name, with each tensor as an operand."""
        found: dict[str, Any] = {}
        for k, argument in enumerate(func._schema.arguments):
            value = args[k] if k < len(args) else kwargs.get(argument.name, argument.default_value)
            found[argument.name] = self._operands(value)
        return found

    def _operands(self, tree: Any) -> Any:
        if isinstance(tree, Tensor):
            known = self._known.get(tree) or self._leaves.get(_key(tree), _Known())
            stretched = (dim for dim in range(tree.dim()) if tree.shape[dim] > 1 and tree.stride(dim) == 0)
            return Operand(tuple(tree.shape), known.labels, frozenset(stretched), tree, known.depends, known.loose)
        if isinstance(tree, (tuple, list)):
            return [self._operands(item) for item in tree]
        if isinstance(tree, Mapping):
            return {key: self._operands(item) for key, item in tree.items()}
        return tree


def _key(tensor: Tensor) -> tuple[Any, ...]:
    """A weight is known by its storage, which it has without data too: tied ones are one, and so are views of it."""
    storage = tensor.untyped_storage()._cdata
    return storage, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype


def _tensors(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    return [tensor for item in tree for tensor in _tensors(item)] if isinstance(tree, (tuple, list)) else []


def _is_entrywise(func: Any) -> bool:
    """Whether torch has any version of the operation marked as entrywise; those that write in place are not always."""
    if func.namespace not in ("aten", "prims"):
        return torch.Tag.pointwise in func.tags
    name = func._schema.name.split("::")[1]
    packet = getattr(torch.ops.aten, name.removesuffix("_"), func.overloadpacket)
    return any(torch.Tag.pointwise in getattr(packet, overload).tags for overload in packet.overloads())
