"""What a price is asked for: the budget and other terms, and the place where an offer is set up."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn

import tithe
from tithe.app.price.draw import Drawn
from tithe.app.price.subject import Subject
from tithe.errors import TitheError
from tithe.ledger import Blank


@dataclass(frozen=True)
class Optimizer:
    """An optimizer, as far as memory goes.

    Args:
        make: builds it over parameters.
        states: tensors of a parameter's size that it keeps.
        temporaries: tensors of a parameter's size that one of its steps makes on the way.
    """

    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
    states: int
    temporaries: int


OPTIMIZERS: Mapping[str, Optimizer] = {
    "adamw": Optimizer(lambda trained: torch.optim.AdamW(trained, lr=1e-3), 2, 2),
    "adam": Optimizer(lambda trained: torch.optim.Adam(trained, lr=1e-3), 2, 2),
    "sgd": Optimizer(lambda trained: torch.optim.SGD(trained, lr=1e-3), 0, 0),
    "momentum": Optimizer(lambda trained: torch.optim.SGD(trained, lr=1e-3, momentum=0.9), 1, 0),
}


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What is asked for, whatever the method.

    Args:
        budget: what a sparse method may train.
        rank: of LoRA's matrices.
        optimizer: a key of `OPTIMIZERS`.
        checkpoints: that TWA averages.
        bits: of a weight in TWA's basis: 8, 4 or 1.
    """

    budget: tithe.Budget = field(default_factory=lambda: tithe.Budget(fraction=0.01))
    rank: int = 8
    optimizer: str = "adamw"
    checkpoints: int = 100
    bits: int = 8

    @property
    def states(self) -> int:
        """How many tensors of a parameter's size the optimizer keeps."""
        return OPTIMIZERS[self.optimizer].states

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise TitheError(
                "optimizer", found=repr(self.optimizer), expected=" or ".join(OPTIMIZERS), remedy="name one of them"
            )
        if self.rank < 1:
            raise TitheError("rank", found=str(self.rank), expected="at least 1", remedy="--rank 8")
        if self.checkpoints < 1:
            raise TitheError(
                "checkpoints", found=str(self.checkpoints), expected="at least 1", remedy="--checkpoints 100"
            )
        if self.bits not in (8, 4, 1):
            raise TitheError("bits", found=str(self.bits), expected="8, 4 or 1", remedy="--bits 8")


def parse_budget(text: str) -> tithe.Budget:
    """A budget as it is typed: "1%" or "0.01" of the network, "2MB", or a number of elements.

    Raises:
        TitheError: it is none of these.

    Example:
        >>> parse_budget("0.5%").fraction, parse_budget("2MB").bytes, parse_budget("27946").elements
        (0.005, 2000000, 27946)
    """
    plain = text.strip().replace("_", "").replace(",", "")
    try:
        if plain.endswith("%"):
            return tithe.Budget(fraction=float(plain[:-1]) / 100)
        return tithe.Budget(elements=int(plain)) if plain.isdecimal() else tithe.Budget(fraction=float(plain))
    except ValueError:
        return tithe.Budget(text)


@dataclass(frozen=True, kw_only=True)
class Site:
    """Where an offer is set up.

    Args:
        subject: what is priced.
        terms: what is asked for.
        blank: the shapes-only place of all that meets.
        model: the network, as it was built.
        num_samples: of the batch.
        shared: what one row has made and others need too, by name.
    """

    subject: Subject
    terms: Terms
    blank: Blank
    model: nn.Module
    num_samples: int
    shared: dict[str, Any] = field(default_factory=dict[str, Any])

    def copy(self) -> nn.Module:
        """Copy the network, for what changes its modules."""
        memo: dict[int, Any] = {}
        with self.blank:
            for tensor in [*self.model.parameters(), *self.model.buffers()]:
                made = tensor.detach().clone()
                is_parameter = isinstance(tensor, nn.Parameter)
                memo[id(tensor)] = nn.Parameter(made, tensor.requires_grad) if is_parameter else made
            return copy.deepcopy(self.model, memo)

    def mask(self, unit: Literal["entry", "column"] = "entry") -> Drawn:
        """Make the mask that the budget allows.

        Args:
            unit: of single weights, or of as many in whole columns.

        Raises:
            TitheError: the budget counts operations, or leaves nothing beside the head.
        """
        budget, states = self.terms.budget, OPTIMIZERS[self.terms.optimizer].states
        if budget.fraction is not None:
            return Drawn(density=budget.fraction, unit=unit)
        if budget.flops is not None:
            raise TitheError("budget", found="FLOPs", expected="a fraction, elements or bytes", remedy="--budget 1%")
        if budget.bytes is None:
            return Drawn(k=int(budget.of(0)), unit=unit)
        theta = tithe.rules.theta_dtype(self.subject.dtype).itemsize
        head = theta * sum(self.model.get_parameter(n).numel() for n in glob_names(self.model, self.subject.head))
        # A value, its gradient and states, and an index of 8 bytes.
        k = (budget.bytes - head * (1 + states)) // ((2 + states) * theta + 8)
        if k < 1:
            raise TitheError(
                "budget",
                found=f"{budget.bytes:,} bytes",
                expected=f"more than the head's gradient and optimizer state, {head * (1 + states):,} bytes",
                remedy="raise the budget",
            )
        return Drawn(k=k, unit=unit)

    def share(self) -> float:
        """Say the share of the operations that the budget keeps.

        Raises:
            TitheError: the budget is an amount.
        """
        if self.terms.budget.fraction is None:
            raise TitheError(
                "budget",
                found="an amount",
                expected="a fraction: what is kept of the operations of a forward pass",
                remedy="--budget 40%",
            )
        return self.terms.budget.fraction


def glob_names(model: nn.Module, head: Collection[str]) -> set[str]:
    """Return the names of the parameters that any of the globs matches."""
    return {name for name, _ in model.named_parameters() if any(fnmatchcase(name, glob) for glob in head)}


def model_bytes(model: nn.Module) -> int:
    """Count the bytes of a model's parameters and buffers, tied ones once."""
    return unique_bytes([*model.parameters(), *model.buffers()])


def unique_bytes(tensors: Iterable[Tensor]) -> int:
    """Count the bytes of tensors, each storage once."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
