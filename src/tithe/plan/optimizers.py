"""Whether an optimizer updates each value on its own: only then does it mean the same on a flat list of weights."""

from __future__ import annotations

import inspect
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from tithe.errors import TitheError

_trying = [False]


@contextmanager
def _trial() -> Generator[None]:
    """Inside, steps are those of optimizers that are tried out."""
    _trying[0] = True
    try:
        yield
    finally:
        _trying[0] = False


def is_trial() -> bool:
    """Return whether an optimizer is being tried out, whose steps are no plan's business."""
    return _trying[0]


def num_states(optimizer: torch.optim.Optimizer) -> int:
    """Return how many tensors of its size a class keeps for each parameter: 0 for SGD, 2 for Adam.

    Tried out on a few numbers with the optimizer's settings; 2 when it cannot be tried.
    """
    value = nn.Parameter(torch.ones(3, dtype=torch.float64))
    try:
        trial = type(optimizer)([value], **_settings(optimizer))
        with _trial():
            for _ in range(2):
                value.grad = torch.ones_like(value)
                trial.step()
    except Exception:  # whatever a stranger's class raises, the answer is the same
        return 2
    return sum(isinstance(kept, torch.Tensor) and kept.shape == value.shape for kept in trial.state[value].values())


def _settings(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    accepted = inspect.signature(type(optimizer).__init__).parameters
    return {key: value for key, value in optimizer.param_groups[0].items() if key in accepted and key != "params"}


def check_elementwise(optimizer: torch.optim.Optimizer) -> None:
    """Try the optimizer's class on a few numbers: six together have to move as the same six in two threes.

    Raises:
        TitheError: when they do not, or the class cannot be tried.
    """
    kind = type(optimizer)
    settings = _settings(optimizer)
    start = torch.tensor([0.5, -1.0, 2.0, 30.0, -40.0, 50.0], dtype=torch.float64)
    # In the last step one half moves more than before and the other less: a limit on what a whole tensor moves by
    # (Adafactor's) shows in nothing else.
    grads = [start.sin() * scale for scale in (1.0, 0.3, torch.tensor([-9.0, -8.0, -7.0, 0.1, 0.2, 0.3]))]
    try:
        together = _run(kind, settings, [start], [[grad] for grad in grads])
        apart = _run(kind, settings, list(start.split(3)), [list(grad.split(3)) for grad in grads])
        agree = torch.allclose(together - start, apart - start, rtol=1e-4, atol=1e-12)
        found = "an update that depends on the other values of the tensor"
    except Exception as error:  # whatever a stranger's class raises, the answer is the same
        agree, found = False, f"an optimizer that cannot be tried on a vector ({type(error).__name__}: {error})"
    if not agree:
        raise TitheError(
            kind.__name__,
            found=found,
            expected="an elementwise optimizer, such as SGD, Adam, AdamW, RMSprop or Adagrad",
            remedy="use one of those, or bind(optimizer, elementwise=True) if you know it is elementwise",
        )


def _run(
    kind: Any, settings: dict[str, Any], start: list[torch.Tensor], grads: list[list[torch.Tensor]]
) -> torch.Tensor:
    values = [nn.Parameter(part.clone()) for part in start]
    optimizer = kind(values, **settings)
    for step in grads:
        for value, grad in zip(values, step, strict=True):
            value.grad = grad.clone()
        with _trial():
            optimizer.step()
    return torch.cat([value.detach() for value in values])
