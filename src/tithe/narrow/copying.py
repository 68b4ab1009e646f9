"""Copy a module that holds what Python's `deepcopy` refuses."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import nn

from tithe.batch import leaves
from tithe.errors import TitheError

Model = TypeVar("Model", bound=nn.Module)
_REGISTERED = ("_parameters", "_buffers", "_modules")


def copy_module(model: Model) -> Model:
    """Return a deep copy, in which what was computed from weights is a constant until the next forward pass.

    Such are weights that a hook makes from others before each forward pass (pruning masks, weight norm), and outputs
    that a module remembers.

    Raises:
        TitheError: when a module holds something that cannot be copied, such as a file or a lock.
    """
    memo: dict[int, object] = {}
    for module in model.modules():
        for value in leaves([value for key, value in vars(module).items() if key not in _REGISTERED]):
            if not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise TitheError(
            _first_failure(model, memo) or type(model).__name__,
            found=f"something that cannot be copied ({str(error).splitlines()[0]})",
            expected="a module that copy.deepcopy copies",
            remedy="keep it outside of the model, or give its class a __deepcopy__",
        ) from error


def _first_failure(model: nn.Module, memo: dict[int, object]) -> str:
    """The path of the first attribute that cannot be copied."""
    for path, module in model.named_modules():
        for key, value in vars(module).items():
            try:
                _ = None if key in _REGISTERED else copy.deepcopy(value, dict(memo))
            except Exception:
                return f"{path}.{key}".lstrip(".")
    return ""
