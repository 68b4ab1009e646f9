"""How a rule reaches an operation without a weight of its own: a mode around the model's forward catches the call.

    F.relu, torch.relu, Tensor.relu_, nn.ReLU  ──>  one entry of the table  ──>  its lean version

The table is open, like the table of carried weights: one entry an operation serves modules, functions and methods.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode

Handler = Callable[..., Any]

_LEAN: dict[Callable[..., Any], Handler] = {}
_ORDINARY = (Tensor, nn.Parameter, FakeTensor)


@dataclass(frozen=True)
class Leanness:
    """How much a lean layer may keep.

    Args:
        bits: None keeps what attention and norms need in full; 8 codes it in 8 bits a value.
        exact: keep the inputs of smooth activations instead of an 8-bit code of their derivatives.
    """

    bits: int | None = None
    exact: bool = False


def catch(*operations: Callable[..., Any]) -> Callable[[Handler], Handler]:
    """Send `operations` to `handler(leanness, *args, **kwargs)` while a lean model runs forward.

    The handler has the operation's own signature after its first argument, and may return NotImplemented to leave the
    call as it is. While it runs nothing is caught, so it may call the operation itself.

    Example:
        >>> @catch(torch.nn.functional.softsign)
        ... def softsign(leanness, input):
        ...     return NotImplemented
    """

    def keep(handler: Handler) -> Handler:
        _LEAN.update(dict.fromkeys(operations, handler))
        return handler

    return keep


def ordinary(x: Any) -> bool:
    """Whether x is a floating-point tensor of torch's own kind: no carrier, nested, sparse or distributed one."""
    return type(x) in _ORDINARY and x.is_floating_point() and x.layout == torch.strided and not x.is_nested


def asks(x: Any) -> bool:
    """Whether x is ordinary and a gradient is asked for it."""
    return ordinary(x) and x.requires_grad


class Catch(TorchFunctionMode):
    """Sends caught operations to their lean versions, where a gradient may be asked for."""

    def __init__(self, leanness: Leanness) -> None:
        super().__init__()
        self.leanness = leanness

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """The lean version's result, or the operation's own."""
        kwargs = kwargs or {}
        handler = _LEAN.get(func)
        if handler is not None and torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active():
            out = handler(self.leanness, *args, **kwargs)
            if out is not NotImplemented:
                return out
        return func(*args, **kwargs)
