"""Watch a piece of work: every operator, every tensor kept for backward, every module entered."""

import dataclasses
import warnings
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils.hooks import RemovableHandle

from tithe.errors import TitheError
from tithe.ledger.blank import fake_device
from tithe.ledger.log import Block, Event, replay
from tithe.ledger.table import Ledger

# pyright: reportPrivateUsage=false
# torch has no public names for a storage's address, a module's own parameters or "is a backward pass running".

__all__ = ["Recorder", "measure", "recording", "storages", "tensors"]

_aten = torch.ops.aten

# The recorders now running, outermost first. Autograd calls only the innermost saved-tensor hooks: they tell them all.
_running: "list[Recorder]" = []


def tensors(tree: Any) -> list[Tensor]:
    """Return the tensors among an operator's arguments or results: nested tuples, lists and dicts."""
    out: list[Tensor] = []
    _collect(tree, out)
    return out


def _collect(tree: Any, out: list[Tensor]) -> None:
    # Plain recursion: a recorder comes by here several times an operator, and torch's trees cost five times as much.
    if isinstance(tree, Tensor):
        out.append(tree)
    elif isinstance(tree, (tuple, list)):
        for item in tree:
            _collect(item, out)
    elif isinstance(tree, dict):
        for item in tree.values():
            _collect(item, out)


def storages(tensor: Tensor) -> Iterator[torch.UntypedStorage]:
    """Yield the storages of a tensor: one if it is strided, more if it is sparse or a wrapper subclass."""
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            yield from storages(getattr(tensor, name))
    elif tensor.layout is torch.sparse_coo:
        yield from storages(tensor._indices())
        yield from storages(tensor._values())
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        for part in (tensor.crow_indices(), tensor.col_indices(), tensor.values()):
            yield from storages(part)
    elif tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        for part in (tensor.ccol_indices(), tensor.row_indices(), tensor.values()):
            yield from storages(part)
    elif torch._C._has_storage(tensor):  # oneDNN's opaque tensors and functorch's wrappers have none
        yield tensor.untyped_storage()


def _device(tensor: Tensor) -> torch.device:
    # A fake's `.device` is a question to every mode; its own note of it is at hand.
    return tensor.fake_device if isinstance(tensor, FakeTensor) else tensor.device


class Recorder(TorchDispatchMode):
    """A log of the birth, growth and death of every storage that an operator creates, by weak references only.

    Args:
        fake: whether fake tensors count as memory. They do in a prediction, where they stand for real ones.
    """

    def __init__(self, *, fake: bool = False) -> None:
        super().__init__()
        self.events: list[Event] = []
        self._fake = fake
        self._blocks: dict[int, tuple[Block, weakref.ref[torch.UntypedStorage]]] = {}  # by address of the storage
        self._leaves: dict[int, weakref.ref[Tensor]] = {}
        self._handles: list[RemovableHandle] = []
        self._stack: list[nn.Module] = []
        self._paths: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()
        self._rooted = False

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the operator and write down what it created."""
        kwargs = kwargs or {}
        if (device := fake_device(func, args)) is not None:
            return device
        inputs = tensors((args, kwargs))
        if any(is_traceable_wrapper_subclass(leaf) for leaf in inputs):
            return NotImplemented  # the subclass first: its own operators come by here one by one
        for leaf in inputs:
            self.watch(leaf)
        inputs, out = self.run(func, args, kwargs)
        # `torch.tensor` builds its result out of our sight and shows it here for the first time.
        seen = () if func is _aten.lift_fresh.default else inputs
        older = {storage._cdata for leaf in seen for storage in storages(leaf)}
        for leaf in tensors(out):
            self.note(leaf, older)
        return out

    def run(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[list[Tensor], Any]:
        """Run the operator, and return the tensors it was given and its result."""
        return tensors((args, kwargs)), func(*args, **kwargs)

    def note(self, tensor: Tensor, older: set[int]) -> None:
        """Write down the storages of an operator's result that are not among those of its inputs, the `older`."""
        fake = isinstance(tensor, FakeTensor)
        if (fake and not self._fake) or _device(tensor).type == "meta":
            return
        for storage in storages(tensor):
            if storage._cdata in self._blocks:
                self.resize(storage)
            elif storage._cdata not in older:
                self._enter(tensor, storage)

    def born(self, tensor: Tensor) -> None:
        """Write down the one storage of a result that is known to be new."""
        if _device(tensor).type != "meta":
            self._enter(tensor, tensor.untyped_storage())

    def _enter(self, tensor: Tensor, storage: torch.UntypedStorage) -> None:
        device = _device(tensor)
        block = Block(storage.nbytes(), device.index if device.type == "cuda" else None)
        self._blocks[storage._cdata] = block, weakref.ref(storage, self._death(storage._cdata))
        self.events.append(Event(block, block.num_bytes, None))

    def _death(self, address: int) -> Callable[[object], None]:
        recorder = weakref.ref(self)

        def died(_: object) -> None:
            this = recorder()
            if this is not None:
                block, _ = this._blocks.pop(address)
                this.events.append(Event(block, -block.num_bytes, None))

        return died

    def born_here(self, storage: torch.UntypedStorage) -> bool:
        """Return whether the storage is one that the work created."""
        return storage._cdata in self._blocks

    def resize(self, storage: torch.UntypedStorage) -> None:
        """Write down that a storage changed its size, if it was born here and did."""
        block, _ = self._blocks.get(storage._cdata, (None, None))
        if block is not None and block.num_bytes != storage.nbytes():
            change, block.num_bytes = storage.nbytes() - block.num_bytes, storage.nbytes()
            self.events.append(Event(block, change, None))

    def save(self, tensor: Tensor) -> None:
        """Write down that autograd keeps this tensor, in the module now running."""
        path = self.place()
        for storage in storages(tensor):
            block, _ = self._blocks.get(storage._cdata, (None, None))
            if block is not None:
                self.events.append(Event(block, 0, path))

    def place(self) -> str:
        """Return the path of the module now running, or "" outside every module."""
        if not self._stack:
            return ""
        return self._paths.get(self._stack[-1], type(self._stack[-1]).__name__)

    def watch(self, tensor: Tensor) -> bool:
        """Mark the coming gradient of this leaf; return False if it is no leaf or was watched already."""
        if not (tensor.requires_grad and tensor.grad_fn is None):
            return False
        known = self._leaves.get(id(tensor))
        if known is not None and known() is tensor:
            return False
        self._leaves[id(tensor)] = weakref.ref(tensor)
        with torch._C.DisableTorchFunctionSubclass():
            self._handles.append(tensor.register_post_accumulate_grad_hook(self._accumulated))
        return True

    def _accumulated(self, leaf: Tensor) -> None:
        if leaf.grad is not None:
            for storage in storages(leaf.grad):
                block, _ = self._blocks.get(storage._cdata, (None, None))
                if block is not None:
                    block.gradient = True

    def name(self, root: nn.Module) -> None:
        """Use the names in this module's tree as paths."""
        self._rooted = True
        for path, module in root.named_modules():
            self._paths.setdefault(module, path)

    def enter(self, module: nn.Module, args: object) -> None:
        """Note that a module begins: the forward pre-hook of every module."""
        if not self._stack and module not in self._paths:
            if self._rooted:
                kind = type(module).__name__
                for path, child in module.named_modules():
                    self._paths.setdefault(child, f"{kind}.{path}" if path else kind)
            else:
                self.name(module)
        self._stack.append(module)
        for parameter in module._parameters.values():
            if parameter is not None:
                self.watch(parameter)

    def leave(self, module: nn.Module, args: object, output: object) -> None:
        """Note that a module ends: the forward hook of every module, called after exceptions too."""
        while self._stack and self._stack.pop() is not module:
            pass

    def close(self) -> None:
        """Take every hook off the leaves."""
        for handle in self._handles:
            handle.remove()

    @property
    def devices(self) -> set[int]:
        """Return the GPUs on which a storage was created."""
        return {event.block.cuda for event in self.events if event.block.cuda is not None}


def _pack(tensor: Tensor) -> Tensor:
    # What runs during backward (recomputation, second derivatives) is not kept between forward and backward.
    if torch._C._current_graph_task_id() == -1:
        for recorder in _running:
            recorder.save(tensor)
    # A node that saves its own output through a hook would own itself for ever: it gets the data without the history.
    with torch._C.DisableTorchFunctionSubclass():
        return tensor if tensor.grad_fn is None else tensor.detach()


@contextmanager
def _watching_resize(recorder: Recorder) -> Generator[None]:
    # `UntypedStorage.resize_` is no operator, and the only other way by which a storage changes its size.
    original = torch.UntypedStorage.resize_
    own = "resize_" in vars(torch.UntypedStorage)

    def resize_(self: torch.UntypedStorage, *args: Any, **kwargs: Any) -> Any:
        out = original(self, *args, **kwargs)
        recorder.resize(self)
        return out

    torch.UntypedStorage.resize_ = resize_
    try:
        yield
    finally:
        if own:
            torch.UntypedStorage.resize_ = original
        else:
            del torch.UntypedStorage.resize_


@contextmanager
def recording(recorder: Recorder, *inner: AbstractContextManager[Any]) -> Generator[Recorder]:
    """Record the operators that run inside the block; every hook is removed afterwards, whatever happened."""
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings(
            "ignore", "Using `torch.compile.module.` when there are global hooks"
        )  # ours, and harmless
        stack.callback(recorder.close)
        for handle in (
            register_module_forward_pre_hook(recorder.enter),
            register_module_forward_hook(recorder.leave, always_call=True),
        ):
            stack.callback(handle.remove)
        _running.append(recorder)
        stack.callback(_running.remove, recorder)
        stack.enter_context(_watching_resize(recorder))
        for manager in inner:
            stack.enter_context(manager)
        stack.enter_context(saved_tensors_hooks(_pack, lambda tensor: tensor))
        stack.enter_context(recorder)
        try:
            yield recorder
        except RuntimeError as error:
            if "saved tensor hooks" not in str(error):
                raise
            raise TransformError(
                "torch.func",
                found="a transform inside of what is measured, which runs only while nobody looks at saved tensors",
                expected="torch.autograd in its place",
                remedy="write torch.autograd.grad(y, x, create_graph=True) for torch.func.grad, or do not measure",
            ) from error


class TransformError(TitheError):
    """Raised where a transform of `torch.func` meets what watches saved tensors."""


def measure(fn: Callable[[], object], *, model: nn.Module | None = None) -> Ledger:
    """Run `fn()` and return its ledger: the peak of live storages it created, and the most it kept for backward.

    It counts every storage that an operator creates while `fn` runs, on any device, from its creation until nothing
    refers to it: views and aliases cost nothing, a resized storage counts at its new size, and storages that existed
    before do not count. It holds no tensor, so it keeps none alive.

    It cannot see scratch memory inside one kernel, tensors that a compiled graph (`torch.compile`) keeps internally,
    tensors on an autograd context outside `save_for_backward`, or tensors that saved-tensor hooks inside `fn` take
    over (activation checkpointing, offloading): the last two are in `peak`, not in `kept`.

    Watching has side effects: autograd adds gradients out of place where it would otherwise reuse one of the two, so
    where branches join the peak may be higher by one tensor than unwatched; the check that no kept tensor was modified
    in place is off; function transforms (`torch.func.grad`) refuse to run; a GPU allocator's peak statistics are reset.

    Args:
        fn: the work, for example one training step. Its result is dropped.
        model: gives the module paths; without it the first outermost module called does.

    Raises:
        TitheError: when `fn` uses a transform of `torch.func`.
        Whatever else `fn` raises.

    Example:
        >>> layer, x = nn.Linear(8, 4), torch.zeros(2, 8)
        >>> ledger = measure(lambda: layer(x).relu().sum().backward())
        >>> ledger.kept  # what ReLU keeps, its output: 2 × 4 float32
        32
    """
    recorder = Recorder()
    if model is not None:
        recorder.name(model)
        for parameter in model.parameters():
            recorder.watch(parameter)
    before = _start_allocators()
    with recording(recorder):
        fn()
    return _with_allocators(replay(recorder.events), recorder.devices, before)


def _start_allocators() -> dict[int, int]:
    if not torch.cuda.is_available():
        return {}
    torch.cuda.init()
    before: dict[int, int] = {}
    for device in range(torch.cuda.device_count()):
        torch.cuda.reset_peak_memory_stats(device)
        before[device] = torch.cuda.memory_allocated(device)
    return before


def _with_allocators(ledger: Ledger, devices: set[int], before: Mapping[int, int]) -> Ledger:
    used = [device for device in devices if device in before]
    if not used:
        return ledger
    beyond = sum(torch.cuda.max_memory_allocated(device) - before[device] for device in used)
    return dataclasses.replace(ledger, allocator_peak=beyond)
