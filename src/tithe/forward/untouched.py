"""Let a model run further times than its loop asked for, and leave no trace of that in it."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tithe.forward.rng import RandomStates

_CONTAINERS = (list, dict, set, deque)


@contextmanager
def untouched(model: nn.Module, *, but: Collection[nn.Module] = ()) -> Generator[None]:
    """Put back, after the block, what forward passes in it drew and wrote.

    That is the random states, buffers of any kind (statistics, counters, queues, codebooks), and what modules keep
    without registering it: numbers, tensors, lists, generators. Parameters are the block's own business.

    Buffers are replaced by copies meanwhile, so that the real ones are not even written to.

    Args:
        model: any module.
        but: modules whose own buffers and attributes may change.
    """
    modules = [module for module in model.modules() if module not in but]
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
        states.restore()


def _generators_and_containers(module: nn.Module) -> Iterator[Callable[[], object]]:
    """What puts back each attribute of a module that a forward pass may change inside."""
    for key, value in vars(module).items():
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
