"""Root-mean-square norms that models write themselves (Llama, Qwen, Mistral, T5, Gemma, …).

    y = w x / √(mean x² + ε)        or (1 + w) x / √(mean x² + ε)

They are compositions of torch calls that keep x and more. A module is recognised by what it computes on a few random
numbers; its `forward` is shadowed by an object that runs the module's own forward and keeps the output for backward.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tithe.rules.lean.dispatch import Leanness
from tithe.rules.lean.norm import Norm, lean_norm
from tithe.rules.transforms import transformed


class OwnNorm:
    """Stands for the `forward` of a recognised module; an object of its own, so that the model copies and pickles.

    Args:
        module: the norm.
        leanness: what may be kept.
        eps: added to the mean square.
        offset: added to the scale.
    """

    def __init__(self, module: nn.Module, leanness: Leanness, eps: float, offset: float) -> None:
        self.module, self.leanness, self.eps, self.offset = module, leanness, eps, offset
        self.put()

    def put(self) -> None:
        """Shadow the module's forward."""
        self.module.__dict__["forward"] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own output."""
        own = partial(type(self.module).forward, self.module)
        if len(args) != 1 or kwargs or not isinstance(args[0], Tensor) or not torch.is_grad_enabled() or transformed():
            return own(*args, **kwargs)
        weight = cast(Tensor, self.module.weight)
        norm = Norm("rms", tuple(weight.shape), self.eps, offset=self.offset, own=own)
        out = lean_norm(self.leanness, norm, args[0], weight, None)
        return own(args[0]) if out is NotImplemented else out

    def remove(self) -> None:
        """Give the module its forward back."""
        if self.module.__dict__.get("forward") is self:
            del self.module.__dict__["forward"]


def recognise(model: nn.Module, leanness: Leanness) -> list[OwnNorm]:
    """Shadow the forward of every root-mean-square norm among the modules of `model` that writes its own.

    Args:
        model: its modules are tried out without a trace: no parameter, no buffer and no random state changes.
        leanness: what may be kept.

    Returns:
        What was put on; `remove()` takes it off.
    """
    found: list[OwnNorm] = []
    for module in model.modules():
        eps = _epsilon(module)
        offset = None if eps is None else _offset(module, eps)
        if eps is not None and offset is not None:
            found.append(OwnNorm(module, leanness, eps, offset))
    return found


def _epsilon(module: nn.Module) -> float | None:
    """The ε of a module that may be such a norm: "Norm" in its name, one vector of weights, nothing inside."""
    if "Norm" not in type(module).__name__ or type(module).__module__.startswith("torch.nn"):
        return None
    if "forward" in module.__dict__ or module._modules or module._buffers or list(module._parameters) != ["weight"]:
        return None
    weight = module._parameters["weight"]
    eps = [value for key, value in module.__dict__.items() if "eps" in key and isinstance(value, float)]
    return eps[0] if weight is not None and weight.dim() == 1 and len(eps) == 1 else None


def _offset(module: nn.Module, eps: float) -> float | None:
    """What the module adds to its scale, 0 or 1; None when it computes something else."""
    count = cast(Tensor, module.weight).numel()
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.rand(count, generator=generator) + 0.5, torch.randn(3, count, generator=generator)
    try:
        with torch.no_grad():
            y = functional_call(module, {"weight": weight}, (x,))
    except (TypeError, ValueError, RuntimeError):  # it wants other arguments
        return None
    normal = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    for offset in (0.0, 1.0):
        if isinstance(y, Tensor) and y.shape == x.shape and torch.allclose(y, (weight + offset) * normal, 1e-4, 1e-5):
            return offset
    return None
