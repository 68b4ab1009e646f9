"""Gradient checkpointing by the switch that a model has itself: of transformers, or of timm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from tithe.errors import TitheError


@dataclass(frozen=True)
class _Switch:
    """Methods of a model: what turns checkpointing on, with which arguments, and what turns it off."""

    on: str
    settings: dict[str, Any]
    off: str
    arguments: tuple[Any, ...] = ()
    besides: tuple[str, ...] = field(default=())


_WAY = {"use_reentrant": False}
_INPUTS = ("disable_input_require_grads",)  # what turning on has enabled, and turning off leaves
_SWITCHES = (
    _Switch(
        "activation_checkpointing_enable",
        {"activation_checkpointing_kwargs": _WAY},
        "activation_checkpointing_disable",
        besides=_INPUTS,
    ),
    _Switch(  # of transformers before 5.20
        "gradient_checkpointing_enable",
        {"gradient_checkpointing_kwargs": _WAY},
        "gradient_checkpointing_disable",
        besides=_INPUTS,
    ),
    _Switch("set_grad_checkpointing", {"enable": True}, "set_grad_checkpointing", (False,)),
)


def checkpoint(model: nn.Module) -> Callable[[], None]:
    """Turn a model's own gradient checkpointing on, without reentrance; returns what turns it off.

    Raises:
        TitheError: the model has no such switch, or it does nothing there.
    """
    switch = next((switch for switch in _SWITCHES if getattr(model, switch.on, None) is not None), None)
    if switch is None:
        raise _refused("a model without a switch for it")
    try:
        getattr(model, switch.on)(**switch.settings)
    except (AssertionError, ValueError) as error:
        raise _refused(str(error).strip() or "a switch that does nothing") from error
    config: Any = getattr(model, "config", None)
    cached = getattr(config, "use_cache", None)
    if cached:  # as transformers' Trainer does: a layer that runs twice cannot fill a cache
        config.use_cache = False

    def give_back() -> None:
        getattr(model, switch.off)(*switch.arguments)
        for name in switch.besides:
            getattr(model, name)()
        if cached:
            config.use_cache = cached

    return give_back


def _refused(found: str) -> TitheError:
    return TitheError(
        "gradient checkpointing",
        found=found,
        expected="gradient_checkpointing_enable (transformers) or set_grad_checkpointing (timm)",
        remedy="leave this row out",
    )
