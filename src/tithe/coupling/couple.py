"""Watch one forward pass to see which positions of the model's weights meet each other."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from tithe.batch import leaves
from tithe.coupling.assemble import Atoms, assemble
from tithe.coupling.call import Call, Operand, Work, operands
from tithe.coupling.extents import entrywise
from tithe.coupling.groups import Coupling
from tithe.coupling.labels import Classes, Label, Labels
from tithe.coupling.moves import MOVES, masks
from tithe.coupling.operations import OPERATIONS
from tithe.errors import TitheError
from tithe.forward import untouched

# Their forward passes work out sizes from settings, whatever the weights are.
_WHOLE = (nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)


def couple(
    model: nn.Module,
    run: Callable[[], Any],
    cut: Collection[str],
    samples: int,
    *,
    also: Iterable[nn.Parameter] = (),
) -> Coupling:
    """Run the model once and return which positions of its weights exist or are absent together.

    The model runs as it is, in its present mode; what it draws and writes is put back afterwards.

    Args:
        model: any module.
        run: one forward of `model` and its loss, on a small real batch.
        cut: names of the parameters whose positions may be absent; every other tensor keeps all of its positions.
        samples: how many samples the batch has.
        also: parameters that a forward pass of this model writes; they are put back too.

    Raises:
        TitheError: when the model's course depends on values computed from its weights, or an operation is unknown.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> x = torch.randn(2, 4)
        >>> coupling = couple(model, lambda: model(x).sum(), dict(model.named_parameters()), samples=2)
        >>> [(group.name, group.num_units, group.members) for group in coupling.groups]
        [('0', 3, (('0.weight', 0), ('0.bias', 0), ('2.weight', 1)))]
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.enter_context(untouched(model, also=also))
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        torch.backends.mha.set_fastpath_enabled(False)  # its fused kernels hide what they do
        stack.enter_context(torch.no_grad())
        trace = _Trace(model, cut)
        stack.enter_context(_places(model, trace))
        stack.enter_context(trace)
        stack.enter_context(_Exits(trace))
        run()
    if not trace.ran:
        raise TitheError(
            type(model).__name__,
            found="no forward pass of it",
            expected="a loss that runs the model",
            remedy="check loss=",
        )
    parameters = dict(model.named_parameters())
    products = trace.work, trace.made, trace.read_by_weights
    coupling = assemble(trace.classes, trace.atoms, *products, parameters, trace.whole, samples)
    trace.check_readings()
    return coupling


class Unfollowed(TitheError):
    """A forward pass whose course, or an operation of it, cannot be followed.

    Args:
        place: as `TitheError`, like what follows.
        found: what is there.
        expected: what should be there.
        remedy: what helps where `suspects` are left whole.
        suspects: globs over the parameters that make what was met there.
    """

    def __init__(self, place: str, *, found: str, expected: str, remedy: str, suspects: Sequence[str] = ()) -> None:
        super().__init__(place, found=found, expected=expected, remedy=remedy)
        self.suspects = tuple(suspects)


@contextmanager
def _places(model: nn.Module, trace: _Trace) -> Generator[None]:
    """While inside, the trace knows which module runs."""
    with ExitStack() as stack:
        for path, module in model.named_modules():
            enter = partial(trace.enter, path or type(module).__name__)
            stack.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(trace.leave, always_call=True).remove)
        yield


@dataclass(eq=False)
class _Frame:
    """A module that runs, and what its forward pass can reach.

    Args:
        path: of the module.
        labels: of the tensors that it was given.
        cut: whether something of its own parameters may be absent.
        closed: whether it has returned, and nothing but tensors: then no value it has read gets out of it.
    """

    path: str
    labels: Labels
    cut: bool
    closed: bool = False


@dataclass(frozen=True)
class _Reading:
    """A value computed from the weights that the program has looked at, and the modules that ran, outermost first."""

    operation: str
    frames: tuple[_Frame, ...]


@dataclass(frozen=True)
class _Known:
    labels: Labels = ()
    depends: bool = False
    loose: bool = False
    weight: bool = False


class _Trace(TorchDispatchMode):
    """Follows labels from weights to what is computed from them."""

    def __init__(self, model: nn.Module, cut: Collection[str]) -> None:
        super().__init__()
        self.classes = Classes()
        self.work: list[Work] = []
        self.made: list[Label] = []
        self.read_by_weights: list[Label] = []
        self.atoms: list[Atoms] = []
        self.ran = False
        self.whole: dict[str, str] = {}
        self._frames: list[_Frame] = []
        self._readings: list[_Reading] = []
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
        self._leaves[_key(tensor)] = _Known(tuple(labels), depends, weight=depends)

    @property
    def place(self) -> str:
        """Path of the module that runs."""
        return self._frames[-1].path if self._frames else ""

    def enter(self, path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Forward pre-hook of every module."""
        given = [self.operand(tensor) for tensor in leaves([args, kwargs])]
        cut = any(self._leaves.get(_key(parameter), _Known()).labels for parameter in module.parameters())
        self._frames.append(_Frame(path, tuple(label for one in given for label in one.labels), cut))
        self.ran = True

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook of every module: what the outermost one returns is seen from outside, and stays."""
        frame = self._frames.pop()
        frame.closed = _only_tensors(output)
        if not self._frames:
            for tensor in leaves(output):
                for label in self.operand(tensor).labels:
                    self.classes.pin(label, f"an output of {frame.path}")

    def check_readings(self) -> None:
        """Refuse readings that may have decided about channels, once it is known which ones can be absent.

        What a module that was left whole decides about tensors that are always whole, and tells nobody, is its own
        affair.

        Raises:
            TitheError: naming the module that has read a value.
        """
        for reading in self._readings:
            if not any(map(self._apart, reading.frames)):
                labels = [label for label in reading.frames[-1].labels if self.classes.dies(label)]
                raise self._decided(reading.frames[-1].path, reading.operation, labels)

    def _apart(self, frame: _Frame) -> bool:
        return frame.closed and not frame.cut and not any(map(self.classes.dies, frame.labels))

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
            self.read_by_weights,
        )
        depends = any(one.depends for one in met)
        noise = name in ("bernoulli", "normal", "uniform", "exponential")
        loose = noise or (bool(met) and all(one.loose or not one.shape for one in met))
        weight = len(met) == 1 and met[0].weight and name in MOVES
        for tensor, labels in zip(returned, self._labels(func, call, met), strict=True):
            if labels or depends or loose:
                self._known[tensor] = _Known(labels, depends, loose and not labels, weight)
        return out

    def _labels(self, func: Any, call: Call, met: Sequence[Operand]) -> list[Labels]:
        handler = OPERATIONS.get(call.name) if func.namespace == "aten" else None
        if handler is None and _is_entrywise(func):
            handler = entrywise
        if handler is not None:
            try:
                return handler(call)
            except TitheError:
                raise
            except Exception:  # a form of the operation that the table does not know is an unknown operation
                pass
        labels = [label for one in met for label in one.labels if self.classes.dies(label)]
        if labels:
            sources = self._sources(labels)
            raise Unfollowed(
                call.place or call.name,
                found=f"{func.name()}, of which it is not known how it treats absent channels",
                expected="operations that the tables of tithe.coupling know",
                remedy=f'keep what it works on whole with where="!{sources[0]}"',
                suspects=sources,
            )
        return [() for _ in call.shapes]

    def _sources(self, labels: Iterable[Label]) -> list[str]:
        """Globs over the parameters of the layers whose channels these are."""
        atoms = torch.cat([label.flatten() for label in labels]).unique()
        found: dict[str, None] = {}
        for one in self.atoms:
            if any(self.classes.dies(atom) for atom in atoms[(atoms >= one.atoms[0]) & (atoms <= one.atoms[-1])]):
                owner = one.tensor.rpartition(".")[0]
                found[f"{owner}.*" if owner else one.tensor] = None
        return list(found)

    def _refuse_reading(self, func: Any, arguments: Mapping[str, Any], met: Sequence[Operand]) -> None:
        """Values that depend on the weights must not decide what runs, or in which shape."""
        reads = torch.Tag.data_dependent_output in func.tags
        shapes = torch.Tag.dynamic_output_shape in func.tags and ("indices" not in arguments or masks(arguments))
        if reads or shapes:
            self.read(func.name(), met)

    def read(self, operation: str, met: Sequence[Operand]) -> None:
        """Note that the program looks at values.

        Raises:
            Unfollowed: when they are of channels that can be absent.
        """
        # Outside of every module a loss may be read, to be logged for example.
        if not self._frames or not any(one.depends for one in met):
            return
        labels = [label for one in met for label in one.labels if self.classes.dies(label)]
        if labels:
            raise self._decided(self.place, operation, labels)
        self._readings.append(_Reading(operation, tuple(self._frames)))

    def _decided(self, place: str, operation: str, labels: Sequence[Label]) -> Unfollowed:
        return Unfollowed(
            place,
            found=f"values computed from the weights that decide what runs ({operation})",
            expected="a course that is the same for every narrow network",
            remedy="decide on the inputs alone, or compute both branches and choose with torch.where",
            suspects=self._sources(labels) if labels else (),
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
            return self.operand(tree)
        if isinstance(tree, (tuple, list)):
            return [self._operands(item) for item in tree]
        if isinstance(tree, Mapping):
            return {key: self._operands(item) for key, item in tree.items()}
        return tree

    def operand(self, tensor: Tensor) -> Operand:
        """Return what is known of a tensor."""
        known = self._known.get(tensor) or self._leaves.get(_key(tensor), _Known())
        stretched = (dim for dim in range(tensor.dim()) if tensor.shape[dim] > 1 and tensor.stride(dim) == 0)
        return Operand(
            tuple(tensor.shape), known.labels, frozenset(stretched), tensor, known.depends, known.loose, known.weight
        )


class _Exits(TorchFunctionMode):
    """Sees how values leave torch without an operator: to lists, and to NumPy."""

    def __init__(self, trace: _Trace) -> None:
        super().__init__()
        self._trace = trace

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Note it, and go on."""
        if func in (Tensor.tolist, Tensor.numpy, Tensor.__array__):
            self._trace.read(func.__name__, [self._trace.operand(args[0])])
        return func(*args, **(kwargs or {}))


def _only_tensors(tree: Any) -> bool:
    """Whether a module's output says nothing but tensors, and which of them there are."""
    if isinstance(tree, Mapping):
        tree = list(cast("Mapping[Any, Any]", tree).values())
    if isinstance(tree, (tuple, list)):
        return all(map(_only_tensors, cast("list[Any]", tree)))
    return tree is None or isinstance(tree, Tensor)


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
