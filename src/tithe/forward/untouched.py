"""Let a model run further times than its loop asked for, and leave no trace of that in it."""

from __future__ import annotations

import random
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from tithe.forward.modes import training
from tithe.forward.rng import RandomStates

_CONTAINERS = (list, dict, set, deque)
_PLAIN = frozenset([bool, int, float, str, tuple, OrderedDict, type(None)])
"""Most of what is in a module, and nothing that is copied: a step asks each of some thousand attributes."""


@contextmanager
def untouched(
    model: nn.Module, *, but: Collection[nn.Module] = (), also: Iterable[nn.Parameter] = ()
) -> Generator[None]:
    """Put back, after the block, what forward passes in it drew and wrote.

    That is the random states, buffers of any kind (statistics, counters, queues, codebooks), and what modules keep
    without registering it: numbers, tensors, lists, generators. Parameters are left out, unless `also` names them.

    Buffers are replaced by copies meanwhile, so that the real ones are not even written to.

    Args:
        model: any module.
        but: modules whose own buffers and attributes may change.
        also: parameters that a forward pass of this model writes (`written_weights`).
    """
    weights = [(weight, weight.data, _memory(weight), weight.detach().clone()) for weight in also]
    left = {id(module) for module in but}  # torchmetrics has its own idea of what is equal
    modules = [module for module in model.modules() if id(module) not in left]
    states = RandomStates()
    undo = [restore for module in modules for restore in _generators_and_containers(module)]
    own = [(vars(module), dict(vars(module)), module._buffers, dict(module._buffers)) for module in modules]
    copies: dict[int, Tensor] = {}  # one for each tensor: two modules may share it
    for attributes, before, buffers, registered in own:
        for holder, entries in ((buffers, registered), (attributes, before)):
            for key, value in entries.items():
                if isinstance(value, Tensor) and (holder is buffers or type(value) is Tensor) and value.is_leaf:
                    holder[key] = copies.setdefault(id(value), value.detach().clone())
    try:
        yield
    finally:
        for attributes, before, buffers, registered in own:
            for holder, entries in ((buffers, registered), (attributes, before)):
                if any(holder.get(key) is not value for key, value in entries.items()) or len(holder) != len(entries):
                    holder.clear()
                    holder.update(entries)
        for restore in undo:
            restore()
        for weight, data, memory, values in weights:
            if _memory(weight) != memory:
                weight.data = data
            weight.data.copy_(values)
        states.restore()


def written_weights(model: nn.Module, run: Callable[[], object]) -> list[nn.Parameter]:
    """Return the frozen parameters that a forward pass writes in training mode, such as a teacher's moving averages.

    Nothing of the model changes. Where the forward pass fails, what it wrote before counts.

    Args:
        model: any module.
        run: one forward pass.
    """
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    if not frozen:
        return []
    before = [parameter.detach().clone() for parameter in frozen]
    with torch.no_grad(), training(model), untouched(model, also=frozen):
        with suppress(Exception):
            run()
        return [p for p, value in zip(frozen, before, strict=True) if not _same(p, value)]


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _same(one: Tensor, other: Tensor) -> bool:
    fake = isinstance(one, FakeTensor) or isinstance(other, FakeTensor)
    return fake or (one.shape == other.shape and torch.equal(one, other))


def _generators_and_containers(module: nn.Module) -> Iterator[Callable[[], object]]:
    """What puts back each attribute of a module that a forward pass may change inside."""
    for key, value in vars(module).items():
        if type(value) in _PLAIN:
            continue
        if isinstance(value, torch.Generator):
            yield _bound(value.set_state, value.get_state())
        elif isinstance(value, random.Random):
            yield _bound(value.setstate, value.getstate())
        elif isinstance(value, np.random.Generator):
            yield _bound(value.bit_generator.__setattr__, "state", value.bit_generator.state)
        elif type(value) in _CONTAINERS and key not in ("_buffers", "_parameters", "_modules"):
            yield _bound(_refill, value, value.copy())


def _bound(function: Callable[..., object], *arguments: Any) -> Callable[[], object]:
    return lambda: function(*arguments)


def _refill(container: Any, content: Any) -> None:
    container.clear()
    container.extend(content) if isinstance(container, (list, deque)) else container.update(content)
