"""Frozen and parameter-free layers that keep for backward what backward needs, and no more.

    every module:  enter ──> the outermost pushes the mode `Catch` ──> forward ──> leave pops it

Every module has the two hooks, not the root alone, so that activation checkpointing recomputes what it first computed:
it calls inner modules again during backward, outside the root's forward.
"""

from __future__ import annotations

import threading
from typing import Any

from torch import nn
from torch.overrides import _pop_mode, _push_mode
from torch.utils.hooks import RemovableHandle

from tithe.errors import TitheError
from tithe.rules import Catch, Leanness
from tithe.rules.own_norm import OwnNorm, recognise


class _Running(threading.local):
    """The modules running in this thread, outermost first; a copy starts with none."""

    def __init__(self) -> None:
        self.modules: list[nn.Module] = []

    def __deepcopy__(self, memo: Any) -> _Running:
        return _Running()

    def __reduce__(self) -> Any:
        return _Running, ()


class _Watch:
    """Before any module's forward: the outermost of a thread starts catching, and stops when it leaves.

    An object rather than closures, so that a deep copy of the model has hooks and handles of its own.
    """

    def __init__(self, leanness: Leanness) -> None:
        self.mode = Catch(leanness)
        self.running = _Running()
        self.handles: list[RemovableHandle | OwnNorm] = []

    def __call__(self, module: nn.Module, args: Any) -> None:
        running = self.running.modules
        if running and running[0] is module:  # an interrupt (KeyboardInterrupt calls no hook) left its modules here
            self.stop()
        if not running:
            _push_mode(self.mode)
        running.append(module)

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """After any module's forward, failed ones included."""
        running = self.running.modules
        if running and running[-1] is module:
            running.pop()
            if not running:
                _pop_mode()

    def stop(self) -> None:
        """Leave every module of this thread."""
        if self.running.modules:
            self.running.modules.clear()
            _pop_mode()


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
        for module in model.modules():
            for hook in module._forward_pre_hooks.values():
                if isinstance(hook, _Watch):
                    return cls(hook)
        return None

    def release(self) -> None:
        """Take every hook off; a second call does nothing."""
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
            derivative; their gradients are then stock's, bit for bit.

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
    watch = _Watch(Leanness(bits, exact))
    for module in model.modules():
        watch.handles.append(module.register_forward_pre_hook(watch))
        watch.handles.append(module.register_forward_hook(watch.leave, always_call=True))
    watch.handles += recognise(model, watch.mode.leanness)
    return Lean(watch)
