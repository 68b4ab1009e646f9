"""Ways to fine-tune a small network under a memory budget, each prepared on a fresh model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

import tithe
from benchmarks.images import Batch
from benchmarks.vision import Network


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy."""
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


@dataclass
class Prepared:
    """A model ready to train: the head's parameters, the body's, and the plan when there is one."""

    model: nn.Module
    head: list[nn.Parameter]
    body: list[nn.Parameter]
    plan: tithe.Plan | None = None


@dataclass(frozen=True)
class Setting:
    """What a method may look at when it is prepared.

    Args:
        network: the architecture, with its budget and its sparse-update scheme.
        batches: training batches to score.
        ranking: file of the architecture's ranking of layers.
        seed: of every draw.
    """

    network: Network
    batches: Sequence[Batch]
    ranking: Path
    seed: int


@dataclass(frozen=True)
class Method:
    """A name, a first learning rate of the body to try (None: there is no body), and how to prepare a model."""

    name: str
    start: float | None
    prepare: Callable[[nn.Module, Setting], Prepared] = field(compare=False)


def head_only(model: nn.Module, _: Setting) -> Prepared:
    """The head on frozen features."""
    model.requires_grad_(False)
    head = [p for name, p in model.named_parameters() if name.startswith("classifier")]
    for parameter in head:
        parameter.requires_grad_()
    return Prepared(model, head, [])


def full(model: nn.Module, _: Setting) -> Prepared:
    """Every parameter."""
    named = list(model.named_parameters())
    head = [p for name, p in named if name.startswith("classifier")]
    return Prepared(model, head, [p for name, p in named if not name.startswith("classifier")])


METHODS = {
    m.name: m
    for m in (
        Method("head only", None, head_only),
        Method("full", 0.01, full),
    )
}
