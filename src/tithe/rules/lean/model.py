"""Frozen and parameter-free layers that keep for backward what backward needs, and no more.

    every module:  enter ──> the outermost pushes the mode `Catch` ──> forward ──> leave pops it

Every module has the two hooks, not the root alone, so that activation checkpointing recomputes what it first computed:
it calls inner modules again during backward, outside the root's forward.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.overrides import _pop_mode, _push_mode
from torch.utils.hooks import RemovableHandle

from tithe.errors import TitheError, TitheWarning
from tithe.rules import Catch, Leanness
from tithe.rules.lean.custom_norm import OwnNorm, recognise
from tithe.rules.table import LEAN, family, table


class _Entry(NamedTuple):
    """A module that runs: whether it is a norm held in evaluation mode, and whether catching began with it."""

    module: nn.Module
    held: bool
    began: bool


class _Running(threading.local):
    """What runs in this thread, outermost first; a copy starts with nothing."""

    def __init__(self) -> None:
        self.entries: list[_Entry] = []

    def __deepcopy__(self, memo: Any) -> _Running:
        return _Running()

    def __reduce__(self) -> Any:
        return _Running, ()


class _Watch:
    """Before any module's forward: the outermost of a thread starts catching, and stops when it leaves.

    An object rather than closures, so that a deep copy of the model has hooks and handles of its own.
    """

    def __init__(self, model: nn.Module, leanness: Leanness) -> None:
        self.model = model
        self.mode = Catch(leanness)
        self.running = _Running()
        self.handles: list[RemovableHandle | OwnNorm] = []
        self.warned = self.paused = False

    def __call__(self, module: nn.Module, args: Any) -> None:
        if self.paused:
            return
        entries = self.running.entries
        if entries and entries[0].module is module:  # an interrupt (KeyboardInterrupt calls no hook) left these here
            self.stop()
        held = module.training and isinstance(module, _NormBase) and self.holds(module)
        if held:
            if not self.warned and not torch.compiler.is_compiling():
                self.warn()
            module.training = False
        began = not entries and torch.is_grad_enabled() and (torch.compiler.is_compiling() or not self.mode.running)
        if began:
            if module is self.model and not torch.compiler.is_compiling():
                self.mode.served.clear()
            _push_mode(self.mode)
        entries.append(_Entry(module, held, began))

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """After any module's forward, failed ones included."""
        entries = self.running.entries
        if entries and entries[-1].module is module:
            self.undo(entries.pop())

    def stop(self) -> None:
        """Leave every module of this thread."""
        while self.running.entries:
            self.undo(self.running.entries.pop())

    def undo(self, entry: _Entry) -> None:
        """Give a norm its flag back, and stop catching, where that began with this module."""
        if entry.held:
            entry.module.training = True
        if entry.began:
            _pop_mode()

    def holds(self, norm: _NormBase) -> bool:
        """Whether a norm is frozen, and evaluated whatever `model.train()` says.

        A plan, under which modules read other tensors than their parameters, holds its own frozen norms. One without
        parameters is frozen where a part of the model is.
        """
        if not norm.track_running_stats or _planned(norm):
            return False
        if norm.affine:
            return not any(parameter.requires_grad for parameter in norm.parameters(recurse=False))
        if any(map(_planned, self.model.modules())):
            return False
        return not all(parameter.requires_grad for parameter in self.model.parameters())

    def warn(self) -> None:
        """Say once which norms are held."""
        self.warned = True
        names = [
            path or "model"
            for path, module in self.model.named_modules()
            if isinstance(module, _NormBase) and module.training and self.holds(module)
        ]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        warnings.warn(
            f"{', '.join(names[:3])}{more}: frozen batch norms run in evaluation mode while the model is lean, because "
            "batch statistics need the whole input in backward. To keep batch statistics, set requires_grad on their "
            "weight or bias; to accept this in silence, call eval() on them",
            TitheWarning,
            stacklevel=2,
        )


def _planned(module: nn.Module) -> bool:
    """Whether a module reads another tensor in place of one of its parameters."""
    return any(isinstance(module.__dict__.get(key), Tensor) for key in module._parameters)


class Lean:
    """The handle of a lean model: `release()` gives the model back as it was.

    Args:
        watch: the hooks.
    """

    def __init__(self, watch: _Watch) -> None:
        self._watch = watch

    @classmethod
    def of(cls, model: nn.Module) -> Lean | None:
        """The handle of a model that is lean (a deep copy or an unpickled one, say), or None.

        Example:
            >>> Lean.of(nn.ReLU()) is None
            True
        """
        return next(iter(cls.all_of(model)), None)

    @classmethod
    def all_of(cls, model: nn.Module) -> list[Lean]:
        """The handles of a model and of its parts, which may have been made lean apart."""
        hooks = (hook for module in model.modules() for hook in module._forward_pre_hooks.values())
        return [cls(watch) for watch in {id(hook): hook for hook in hooks if isinstance(hook, _Watch)}.values()]

    def __repr__(self) -> str:
        """Say what the last forward pass served, and what that keeps against stock, for n elements in and m out.

        `tithe.measure` has the bytes.

        Example:
            >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
            >>> handle = lean(model)
            >>> _ = model(torch.ones(1, 4))
            >>> handle
            lean: 1 call served in the last forward pass
                 1 × two derivatives, in place too: keeps n / 8: a bit an element; stock keeps 4 n
        """
        if not self._watch.handles:
            return "lean: released"
        calls: dict[str, int] = {}
        for operation, count in self._watch.mode.served.items():
            name = family(LEAN, operation)
            calls[name] = calls.get(name, 0) + count
        own = sum(isinstance(handle, OwnNorm) for handle in self._watch.handles)
        total = sum(calls.values())
        lines = [f"lean: {total} call{'s' * (total != 1)} served in the last forward pass"]
        rows = {row.family: row for row in table().wing(LEAN)}
        for name, count in sorted(calls.items(), key=lambda item: -item[1]):
            lines.append(f"  {count:>4} × {name}: keeps {rows[name].keeps}; stock keeps {rows[name].stock}")
        lines += [f"  and {own} norms that the model writes itself"] if own else []
        return "\n".join(lines)

    @contextmanager
    def paused(self) -> Generator[None]:
        """Let the model run, inside, as it would without this handle."""
        own = [handle for handle in self._watch.handles if isinstance(handle, OwnNorm)]
        for norm in own:
            norm.remove()
        self._watch.paused = True
        try:
            yield
        finally:
            self._watch.paused = False
            for norm in own:
                norm.put()

    @contextmanager
    def exactly(self) -> Generator[None]:
        """Let gradients be stock's inside: nothing is kept in codes, and the rest is as lean as otherwise."""
        holders = [self._watch.mode, *(handle for handle in self._watch.handles if isinstance(handle, OwnNorm))]
        before = self._watch.mode.leanness
        try:
            for holder in holders:
                holder.leanness = Leanness(exact=True)
            yield
        finally:
            for holder in holders:
                holder.leanness = before

    def release(self) -> None:
        """Take every hook off the model; a second call does nothing."""
        self._watch.stop()
        for handle in self._watch.handles:
            handle.remove()
        self._watch.handles.clear()


def lean(model: nn.Module, bits: int | None = None, *, exact: bool = False) -> Lean:
    """Let the frozen and parameter-free layers of `model` keep for backward what backward needs, and no more.

    Args:
        model: any module; nothing of it is wrapped or renamed, and it may have a plan attached, before or after.
        bits: None keeps what attention and norms need in full; 8 codes it in 8 bits a value.
        exact: keep the input of smooth activations (GELU, SiLU, …) as stock does, instead of an 8-bit code of their
            derivative; their gradients are then stock's, bit for bit, because stock's own kernels make them.

    A batch norm whose scale and shift are frozen runs in evaluation mode while the model is lean, also after
    `model.train()`: batch statistics need the whole input. A norm that is trained stays as it is.

    Returns:
        The handle; `release()` takes everything off again.

    Raises:
        TitheError: the model is lean already, or `bits` is neither None nor 8.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> handle = lean(model)
        >>> handle.release()
    """
    if bits not in (None, 8):
        raise TitheError("lean", found=f"bits={bits!r}", expected="None or 8", remedy="leave bits out, or pass bits=8")
    if Lean.of(model) is not None:
        raise TitheError(
            "lean",
            found="a model that is lean already",
            expected="one that is not",
            remedy="call release() on the first handle; tithe.Lean.of(model) finds it",
        )
    watch = _Watch(model, Leanness(bits, exact))
    for module in model.modules():
        watch.handles.append(module.register_forward_pre_hook(watch))
        watch.handles.append(module.register_forward_hook(watch.leave, always_call=True))
    watch.handles += recognise(model, watch.mode.leanness)
    return Lean(watch)
