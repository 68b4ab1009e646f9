"""Training or evaluation mode for the time of a forward pass; afterwards each module has its own mode again."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from torch import nn


@contextmanager
def training(model: nn.Module) -> Generator[None]:
    """Inside, the model is in training mode; one that is already stays as it is, frozen norms included."""
    with _modes_kept(model):
        if not model.training:
            model.train()
        yield


@contextmanager
def evaluating(model: nn.Module) -> Generator[None]:
    """Inside, the model is in evaluation mode: nothing is drawn at random and no running statistic moves."""
    with _modes_kept(model):
        model.eval()
        yield


@contextmanager
def _modes_kept(model: nn.Module) -> Generator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, was in modes:
            module.training = was
