"""Ways to fine-tune a small network under a memory budget, each prepared on a fresh model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

import tithe
from benchmarks.images import Batch
from benchmarks.vision import HEAD, Network
from benchmarks.vision import sparse_update as scheme_of

SAMPLES = 128  # that the oracle scores before each epoch


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
        lean: let the other layers keep only what backward needs. It changes no result here (a clamp's bit is exact),
            and costs some time.
    """

    network: Network
    batches: Sequence[Batch]
    ranking: Path
    seed: int
    lean: bool = False


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


def attached(model: nn.Module, method: Any, setting: Setting) -> Prepared:
    """A plan's parameters: the head's apart from the others."""
    plan = tithe.attach(model, method, loss=loss_of, data=setting.batches, head=[HEAD], seed=setting.seed)
    named = list(plan.named_parameters())
    head = [p for name, p in named if name.startswith("classifier")]
    return Prepared(model, head, [p for name, p in named if not name.startswith("classifier")], plan)


def sparse_update(model: nn.Module, setting: Setting) -> Prepared:
    """The published scheme: chosen columns of a few convolutions, and the last biases."""
    ratios, biases = scheme_of(model, setting.network.scheme)
    trained = [name for name in biases if not name.startswith("classifier")]
    return attached(model, tithe.SparseUpdate(ratios, trained, lean=setting.lean), setting)


@dataclass(frozen=True)
class Drawn:
    """TraDy or one of its variants, at the network's tight budget."""

    layers: Literal["topk", "all"] = "topk"
    score: Literal["uniform", "rgn"] = "uniform"
    dynamic: bool = True
    budget: str = "tight"

    def __call__(self, model: nn.Module, setting: Setting) -> Prepared:
        """Attach it."""
        method = tithe.TraDy(
            tithe.Budget(elements=setting.network.budgets[self.budget]),
            setting.ranking if self.layers == "topk" else None,
            layers=self.layers,
            dynamic=self.dynamic,
            lean=setting.lean,
            score=self.score,
            samples=SAMPLES,
            optimizer_states=0,
        )
        return attached(model, method, setting)


METHODS = {
    m.name: m
    for m in (
        Method("head only", None, head_only),
        Method("full", 0.003, full),
        Method("SU", 0.03, sparse_update),
        Method("TraDy", 0.03, Drawn()),
        Method("TraDy static", 0.03, Drawn(dynamic=False)),
        Method("RGN", 0.03, Drawn("all", "rgn")),
        Method("RGN static", 0.03, Drawn("all", "rgn", dynamic=False)),
        Method("all layers", 0.03, Drawn("all")),
        Method("all layers static", 0.03, Drawn("all", dynamic=False)),
    )
}
TWINS = {name: f"{name} static" for name in ("TraDy", "all layers", "RGN")}
