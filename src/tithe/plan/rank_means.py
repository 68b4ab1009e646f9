"""What a plan averages over ranks itself: gradients and running statistics where no wrapper does, and prices."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase  # pyright: ignore[reportPrivateUsage]

from tithe import distributed
from tithe.narrow import Stage, unit_metric
from tithe.scoring import Loss


def mean_gradients(place: str, parameters: Sequence[nn.Parameter], norms: Sequence[_NormBase] = ()) -> None:
    """Average gradients over ranks, and the statistics of the norms that train.

    A parameter that has a gradient on some ranks alone counts as zero on the others.

    Args:
        place: where ranks meet before.
        parameters: the same on every rank.
        norms: those that train.

    Raises:
        TitheError: as `tithe.distributed.meet`.
    """
    if distributed.world_size() == 1:
        return
    distributed.meet(place)
    with torch.no_grad():
        has = torch.tensor([float(p.grad is not None) for p in parameters], device=parameters[0].device)
        reached = [p for p, count in zip(parameters, distributed.sum_(has).tolist(), strict=True) if count]
        for parameter in reached:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [p.grad for p in reached if p.grad is not None]
        distributed.mean_all_([*gradients, *_statistics(norms)])


def mean_statistics(norms: Sequence[_NormBase], count: int) -> None:
    """Average the statistics of norms that were estimated anew, each rank's by its number of batches.

    Args:
        norms: the same on every rank.
        count: batches on this rank.

    Raises:
        TitheError: as `tithe.distributed.meet`.
    """
    if distributed.world_size() == 1:
        return
    with torch.no_grad():
        found = _statistics(norms)
        counts = [int(note) for note in distributed.exchange("the statistics of norms", str(count))]
        if not sum(counts):
            return
        for tensor in found:
            tensor.mul_(count * len(counts) / sum(counts))
        distributed.mean_all_(found)
        for norm in norms:
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked.fill_(sum(counts))


def _statistics(norms: Sequence[_NormBase]) -> list[Tensor]:
    found = [buffer for norm in norms for buffer in (norm.running_mean, norm.running_var)]
    return [buffer for buffer in found if buffer is not None]


def agreed_stage(stage: Stage) -> Stage:
    """Return the same stage on every rank: a forward pass costs what it costs on the mean of their batches.

    Raises:
        TitheError: on every rank, when what is absent together differs.
    """
    if distributed.world_size() == 1:
        return stage
    coupling = stage.coupling
    groups = [f"{group.name}: {group.num_units}" for group in coupling.groups]
    axes = [term.axes for term in coupling.flops]
    distributed.compare(
        "attach", {"what is absent together": ", ".join(groups), "its operations": f"{len(axes)}, on axes {axes}"}
    )
    told = json.dumps([term.coefficient for term in coupling.flops])
    costs = [json.loads(note) for note in distributed.exchange("attach: operations", told)]
    flops = tuple(
        dataclasses.replace(term, coefficient=sum(each) / len(each))
        for term, each in zip(coupling.flops, zip(*costs, strict=True), strict=True)
    )
    return Stage(stage.model, dataclasses.replace(coupling, flops=flops), stage.counts, stage.written)


def summed_metric(name: str, stage: Stage, loss: Loss, data: Iterable[Any]) -> Tensor:
    """Return a metric of the units, (n,), summed over the ranks' data.

    Raises:
        TitheError: as `tithe.narrow.metrics.unit_metric`.
    """
    metric = unit_metric(name, stage, loss, data)
    if distributed.world_size() > 1:
        distributed.meet(f"init={name!r}")
        metric = distributed.sum_(metric.to(next(stage.model.parameters()).device)).to(metric)
    return metric
