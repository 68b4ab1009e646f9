"""How a rule reaches an operation without a weight of its own: a mode around the model's forward catches the call.

    F.relu, torch.relu, Tensor.relu_, nn.ReLU  ──>  one entry of the table  ──>  its lean version

The table is open, like the table of carried weights: one entry an operation serves modules, functions and methods.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils.checkpoint import _CheckpointFrame

from tithe.rules.dispatch import plain
from tithe.rules.table import LEAN, WINGS, Handler, state
from tithe.rules.transforms import transformed

_LEAN = WINGS[LEAN]
_top_hooks = cast(Any, torch._C)._autograd._top_saved_tensors_default_hooks


@dataclass(frozen=True)
class Leanness:
    """How much a lean layer may keep.

    Args:
        bits: None keeps what attention and norms need in full; 8 codes it in 8 bits a value.
        exact: keep the inputs of smooth activations instead of an 8-bit code of their derivatives.
    """

    bits: int | None = None
    exact: bool = False


IN_FULL = (
    "call tithe.lean(model, exact=True) without bits, attach the method with lean=False, or release() what is lean,"
    " before the forward pass"
)
"""What to do where codes do not tell a second derivative."""

_KIN: dict[Handler, tuple[bool, bool, bool]] = {}


def catch(
    *operations: Callable[..., Any],
    keeps: str = "",
    stock: str = "",
    family: str = "",
    note: str = "",
    like: Handler | None = None,
    asked: bool = False,
    approximate: bool = False,
    captured: bool = True,
) -> Callable[[Handler], Handler]:
    """Send `operations` to a handler while a model is lean, and say in the table what it keeps.

        handler(leanness, *args, **kwargs)

    The handler has the operation's own signature after its first argument, and may return NotImplemented to leave the
    call as it is. While it runs nothing is caught, so it may call the operation itself.

    Args:
        operations: torch functions and methods.
        keeps: what the lean version keeps.
        stock: what PyTorch keeps without it.
        family: the name of the row; by default the handler's.
        note: how the gradient compares with stock's.
        like: a handler registered before: these operations join its row and take over all that it says.
        asked: calls whose first argument `asks` nothing are left as they are.
        approximate: calls of a model that is lean with `exact=True` are left as they are.
        captured: whether calls are served inside of `torch.compile`.

    Raises:
        TitheError: `like` is no handler that was registered.

    Example:
        >>> @catch(torch.nn.functional.softsign, keeps="n", stock="4 n")
        ... def softsign(leanness, input):
        ...     return NotImplemented
        >>> _ = _LEAN.pop(torch.nn.functional.softsign)
    """

    def enter(handler: Handler) -> Handler:
        state(LEAN, operations, handler, family=family, keeps={"": keeps}, stock=stock, note=note, like=like)
        _KIN[handler] = (asked, approximate, captured) if like is None else _KIN[like]
        asks_first, differs, captures = _KIN[handler]

        def serve(leanness: Leanness, *args: Any, **kwargs: Any) -> Any:
            if (differs and leanness.exact) or (not captures and torch.compiler.is_compiling()):
                return NotImplemented
            if asks_first and not asks(args[0] if args else kwargs.get("input")):
                return NotImplemented
            return handler(leanness, *args, **kwargs)

        _LEAN.update(dict.fromkeys(operations, serve if any((asks_first, differs, not captures)) else handler))
        return handler

    return enter


def ordinary(x: Any) -> bool:
    """Whether x is a floating-point tensor of torch's own kind: no carrier, nested, sparse or distributed one."""
    return plain(x) and x.is_floating_point()


def asks(x: Any) -> bool:
    """Whether x is ordinary and a gradient is asked for it."""
    return ordinary(x) and x.requires_grad


class Catch(TorchFunctionMode):
    """Sends caught operations to their lean versions, where a gradient may be asked for."""

    def __init__(self, leanness: Leanness) -> None:
        super().__init__()
        self.leanness = leanness
        self.served: dict[Callable[..., Any], int] = {}

    def __reduce__(self) -> Any:  # a copy of a model starts with nothing served, and operations do not all pickle
        return Catch, (self.leanness,)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """The lean version's result, or the operation's own."""
        kwargs = kwargs or {}
        handler = _LEAN.get(func)
        if handler is None:
            return func(*args, **kwargs)
        if torch.is_grad_enabled() and not transformed():
            if not torch.compiler.is_compiling():
                self.follow()
            out = handler(self.leanness, *args, **kwargs)
            if out is not NotImplemented:
                self._count(func)
                return out
        return func(*args, **kwargs)

    def _count(self, func: Callable[..., Any]) -> None:
        """Note a call that was served, unless a graph is captured or backward computes the call again."""
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() == -1:
            self.served[func] = self.served.get(func, 0) + 1

    @property
    def running(self) -> bool:
        """Whether this thread's calls are caught now."""
        return any(mode is self for mode in _get_current_function_mode_stack())

    def follow(self) -> None:
        """See that a checkpointed function is caught again when backward computes it again.

        It may call operations outside of any module, where no hook would start catching, and checkpointing refuses
        what keeps other tensors the second time. Its frame is in the closure of the hook that packs saved tensors.
        """
        hooks = _top_hooks(False)
        for cell in getattr(hooks[0], "__closure__", None) or () if hooks else ():
            frame = cell.cell_contents
            if isinstance(frame, _CheckpointFrame) and not isinstance(frame.recompute_fn, _Again):
                frame.recompute_fn = _Again(frame.recompute_fn, self)


class _Again:
    """A checkpointed function that is caught when it runs again."""

    def __init__(self, run: Callable[..., Any], mode: Catch) -> None:
        self.run, self.mode = run, mode

    def __call__(self, *args: Any) -> Any:
        if self.mode.running:
            return self.run(*args)
        with self.mode:
            return self.run(*args)
