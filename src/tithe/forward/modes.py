"""Switch to training or evaluation mode during a forward pass; afterwards each module has its own mode again."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from torch import nn


@contextmanager
def training(model: nn.Module) -> Generator[None]:
    """Put the model into training mode inside the block; a model in training mode stays as it is."""
    with _modes_kept(model):
        if not model.training:
            model.train()
        yield


@contextmanager
def evaluating(model: nn.Module) -> Generator[None]:
    """Put the model into evaluation mode inside the block: no random draws, no change of running statistics."""
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
