"""What shards or wraps a model, by its name.

A plan needs whole weights: a part of a shard means nothing to a choice among all of them. And a wrapper that was made
before a plan does not know θ: it reduces the gradients of the parameters that it found when it was made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tithe.errors import TitheError
from tithe.living import living

_FSDP = ("torch.distributed.fsdp", "torch.distributed._composable")
_WHOLE = (
    "attach to the whole model and wrap it in DistributedDataParallel afterwards; gradients and state of θ are small"
)
_FIRST = "call tithe.attach(model, …) on the model inside, and wrap it afterwards"


def kind_of_module(module: nn.Module) -> str | None:
    """Return the name of what wraps or shards a module; None for an ordinary one."""
    if isinstance(module, (DistributedDataParallel, nn.DataParallel)):
        return type(module).__name__
    for kind in type(module).__mro__:
        if kind.__module__.startswith(_FSDP):
            return "FullyShardedDataParallel" if kind.__name__ == "FullyShardedDataParallel" else "fully_shard"
        if kind.__name__ == "DeepSpeedEngine":
            return "DeepSpeedEngine"
    return "FullyShardedDataParallel" if module.__dict__.get("_is_fsdp_managed_module") else None


def kind_of_tensor(tensor: Tensor) -> str | None:
    """Return the name of what shards a tensor; None for a whole one."""
    if cast(Any, tensor).__dict__.get("_is_flat_param"):
        return "FlatParameter of FullyShardedDataParallel"
    for kind in type(tensor).__mro__:
        if kind.__module__.startswith("torch.distributed") and kind.__name__ in {"DTensor", "ShardedTensor"}:
            return f"{kind.__name__}, as parallelize_module and fully_shard make them"
    return None


def refuse_wrapper(place: str, kind: str) -> TitheError:
    """Make the error for a model that is wrapped or sharded.

    Args:
        place: the module or parameter.
        kind: as `kind_of_module` or `kind_of_tensor` names it.
    """
    wraps = kind in {"DistributedDataParallel", "DataParallel"}
    return TitheError(
        place or "model",
        found=kind,
        expected="a model that nothing wraps yet" if wraps else "whole weights on every rank",
        remedy=(
            _FIRST.replace("wrap it afterwards", "run one process for each device under DistributedDataParallel")
            if kind == "DataParallel"
            else _FIRST
            if wraps
            else _WHOLE
        ),
    )


def check_whole(model: nn.Module, *, wrapped: bool = False) -> None:
    """Check that nothing wraps or shards the model or a part of it.

    Args:
        model: the model.
        wrapped: whether parts of it may be wrapped, as they may after a plan was attached.

    Raises:
        TitheError: naming the module or the parameter, and the wrapper.
    """
    for path, module in model.named_modules():
        kind = kind_of_module(module)
        if kind is not None and not (wrapped and isinstance(module, DistributedDataParallel)):
            raise refuse_wrapper(path, kind)
    for named in (model.named_parameters, model.named_buffers):
        for name, tensor in cast(Callable[[], Iterable[tuple[str, Tensor]]], named)():
            kind = kind_of_tensor(tensor)
            if kind is not None:
                raise refuse_wrapper(name, kind)


def active_wrapper() -> nn.Module | None:
    """Return the DistributedDataParallel whose forward pass runs now, or None."""
    return cast(Any, DistributedDataParallel)._active_ddp_module


def is_joining(wrapper: nn.Module) -> bool:
    """Return whether a DistributedDataParallel is used inside its `join()`, which lets ranks run out of batches."""
    return bool(cast(Any, wrapper)._join_config.enable)


def is_replica(module: nn.Module) -> bool:
    """Return whether `nn.DataParallel` made this module, for a part of a batch."""
    return bool(module.__dict__.get("_is_replica"))


def reduces(wrapper: nn.Module, parameters: Iterable[Tensor]) -> bool:
    """Return whether a DistributedDataParallel was made when these parameters were there."""
    known = {id(parameter) for parameter in cast(Any, wrapper)._module_parameters}
    return all(id(parameter) in known for parameter in parameters)


def wrappers_of(model: nn.Module) -> list[nn.Module]:
    """Return every DistributedDataParallel around a model, by asking the garbage collector: for error messages."""
    found = living(DistributedDataParallel)
    return [each for each in found if any(module is model for module in each.modules())]
