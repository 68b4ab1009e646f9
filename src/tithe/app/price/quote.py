"""What pricing finds: figures in bytes and operations, for each method."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import tithe
from tithe.ledger.flops import Flops

FULL = "full"
"""The row that others are compared with."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What fits into a given memory.

    Args:
        micro_batch: the most samples in one forward and backward, up to the whole batch; 0 when not even one fits.
        steps: how many of those make one step of the batch.
        peak: bytes at the highest moment with that micro-batch; with one sample when none fits.
        fraction: of the network, the largest of a few round ones that fits too; None where nothing can be chosen.
    """

    micro_batch: int
    steps: int
    peak: int
    fraction: float | None = None


@dataclass(frozen=True, kw_only=True)
class Quote:
    """What one method takes for one step; bytes unless it says otherwise.

    `peak` = weights + batch + theta + index + optimizer + the values of `at_peak`.

    Args:
        method: its name.
        trained: values that are trained, head included.
        weights: the model's parameters and buffers.
        batch: the inputs of the step.
        theta: trained values that do not lie among the weights.
        index: where they belong.
        optimizer: the optimizer's state.
        gradients: of all trained values, as they stand when backward ends.
        sent: what data-parallel ranks exchange in a step, one way.
        kept: the most that is kept for backward.
        peak: everything at the highest moment of a step.
        at_peak: "gradients", "kept" and "transient" (the working set of the operation then running) at that moment.
        moment: "forward and backward" or "optimizer step".
        flops: floating-point operations.
        file: size of what is saved of the result.
        basis: bytes of a mapped file that a step reads, in no column of the peak.
        layers: parts of `kept` by path of the module.
        fit: what fits into the memory that was asked about.
    """

    method: str
    trained: int
    weights: int
    batch: int
    theta: int
    index: int
    optimizer: int
    gradients: int
    sent: int
    kept: int
    peak: int
    at_peak: Mapping[str, int]
    moment: str
    flops: Flops | None
    file: int
    basis: int
    layers: Mapping[str, int]
    fit: Fit | None = None

    @property
    def parts(self) -> dict[str, int]:
        """What adds up to the peak."""
        always = {"weights": self.weights, "batch": self.batch, "theta": self.theta + self.index}
        return {**always, "optimizer": self.optimizer, **self.at_peak}


@dataclass(frozen=True, kw_only=True)
class Quotes:
    """The quotes of every method for one network.

    Args:
        subject: the network's name.
        dtype: of its parameters.
        batch: samples in a step.
        budget: what sparse methods may train.
        optimizer: its name.
        checkpoints: that TWA averages.
        bits: of a weight in TWA's basis.
        memory: bytes to fit into, or None.
        rows: a quote for each method.
        left_out: method → why it has none.
    """

    subject: str
    dtype: str
    batch: int
    budget: tithe.Budget
    optimizer: str
    checkpoints: int
    bits: int
    memory: int | None
    rows: tuple[Quote, ...]
    left_out: Mapping[str, str]

    def times_less(self, row: Quote) -> float | None:
        """How many times less a row's peak is than that of full training; None where that is not priced."""
        full = next((quote.peak for quote in self.rows if quote.method == FULL), None)
        return None if full is None else full / row.peak

    def as_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers, ready for JSON."""
        plain = dataclasses.asdict(self)
        rows = [
            {**made, "times_less": self.times_less(row)} for made, row in zip(plain["rows"], self.rows, strict=True)
        ]
        return {**plain, "rows": rows}
