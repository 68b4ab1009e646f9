"""The optimizer of a run: how it is made, what of its state is saved, and how much is trained."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import tithe
from tithe.app.train.lr_schedule import highest
from tithe.app.train.sections import OptimizerSection

SUGGESTED_BY = 4
"""Steps whose batches a learning rate is suggested by: of one alone it comes out too high."""


def make_optimizer(
    section: OptimizerSection, parameters: Iterable[nn.Parameter], suggested: float | None = None
) -> torch.optim.Optimizer:
    """The recipe's optimizer over these parameters, at the rate that was suggested where the recipe names none."""
    lr = highest(section, suggested)
    trained = [{"params": list(parameters), "initial_lr": lr}]  # as torch's own schedulers note it
    if section.name == "sgd":
        return torch.optim.SGD(trained, lr, momentum=section.momentum, weight_decay=section.weight_decay)
    kind = torch.optim.AdamW if section.name == "adamw" else torch.optim.Adam
    return kind(trained, lr, weight_decay=section.weight_decay)


def optimizer_state(optimizer: torch.optim.Optimizer, trainee: tithe.Plan) -> dict[str, dict[str, Any]]:
    """The optimizer's state by parameter name; its settings are the recipe's.

    By name and not by number: a plan that was resumed after its warm-up no longer lists the tensors it left out.
    """
    states = {id(parameter): dict(state) for parameter, state in optimizer.state.items()}
    return {name: states[id(parameter)] for name, parameter in trainee.named_parameters() if id(parameter) in states}


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, trainee: tithe.Plan, state: Mapping[str, Mapping[str, Any]]
) -> None:
    """Undo `optimizer_state` on an optimizer that has not stepped yet."""
    names = {id(parameter): name for name, parameter in trainee.named_parameters()}
    order = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
    numbered = {number: dict(state[name]) for number, name in enumerate(order) if name in state}
    optimizer.load_state_dict({"state": numbered, "param_groups": optimizer.state_dict()["param_groups"]})


def trained_counts(trainee: tithe.Plan, head: Iterable[str], num_weights: int) -> dict[str, Any]:
    """How many numbers are trained: in all, of the head, and as a share of the model's.

    Args:
        trainee: what is trained.
        head: names of the head's parameters.
        num_weights: of the model at full width.
    """
    counts = {name: parameter.numel() for name, parameter in trainee.named_parameters()}
    total, names = sum(counts.values()), set(head)
    return {
        "total": total,
        "head": sum(count for name, count in counts.items() if name in names),
        "model": num_weights,
        "fraction": total / num_weights,
    }


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the tensors of an optimizer's state."""
    values = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return sum(value.nbytes for value in values)
