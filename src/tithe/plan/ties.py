"""Finds modules outside of a model that hold one of its parameters: an output layer tied to the embedding of a body."""

from __future__ import annotations

import gc
import sys
from collections import Counter
from collections.abc import Iterable, Mapping

from torch import nn

from tithe.errors import TitheError
from tithe.living import living


def holders_outside(model: nn.Module) -> list[nn.Module]:
    """Return the modules of this process that hold a parameter of the model, and are not in it.

    The collector knows all modules. It is asked only where a parameter has more references than the model's own: call
    this before others are made.
    """
    inside = set(model.modules())
    places = Counter(number for module in inside for number in map(id, module._parameters.values()))
    if not any(_shared(module._parameters, places) for module in inside):
        return []
    if _holders(model, inside):
        gc.collect()  # some may be waiting for it alone
    return _holders(model, inside)


def _holders(model: nn.Module, inside: set[nn.Module]) -> list[nn.Module]:
    held = {id(parameter) for parameter in model.parameters()}
    outside = (module for module in living(nn.Module) if module not in inside)
    return [module for module in outside if any(id(p) in held for p in vars(module).get("_parameters", {}).values())]


def _shared(parameters: Mapping[str, nn.Parameter | None], places: Mapping[int, int]) -> bool:
    """Whether something besides modules of the model, and those who look here, refers to a parameter."""
    for parameter in parameters.values():
        if parameter is not None and sys.getrefcount(parameter) - _LOOKING > places[id(parameter)]:
            return True
    return False


_LOOKING = 2
"""References that looking takes: the loop's variable, and the argument of `getrefcount`."""


def check_untied(model: nn.Module, outside: Iterable[nn.Module], purpose: str) -> None:
    """Check that no module outside of the model holds a parameter of it.

    Args:
        model: the model.
        outside: as `holders_outside` finds them.
        purpose: what its weights do, as the error says.

    Raises:
        TitheError: naming the parameter and the module outside.
    """
    ids = {id(parameter): name for name, parameter in model.named_parameters()}
    for module in outside:
        for parameter in module._parameters.values():
            if id(parameter) in ids:
                raise TitheError(
                    ids[id(parameter)],
                    found=f"the same Parameter in a {type(module).__name__} outside of what is attached",
                    expected=f"weights that {purpose} inside of it alone",
                    remedy="attach the module that holds both",
                )
