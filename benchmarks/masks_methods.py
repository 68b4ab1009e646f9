"""The masks that the benchmark `masks` compares, all with as many weights as LoRA has, and the peers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

import tithe
from benchmarks.encoder import HEAD, loss_of
from benchmarks.methods import PEERS, RANK, Method, Prepared, trained
from benchmarks.text import Batch

SAMPLES = 256
EVERYWHERE, ENCODER, UPPER = ("*",), ("*", "!*embeddings*"), ("*", "!*embeddings*", "!*layer.[01].*")
PLACES: dict[tuple[str, ...], str] = {EVERYWHERE: ", embeddings too", ENCODER: "", UPPER: ", upper layers"}
STARTS = {
    "fisher": 1e-3,
    "snr": 3e-3,
    "saliency": 3e-3,
    "principal": 3e-3,
    "magnitude": 3e-3,
    "random": 1e-2,
}


@dataclass(frozen=True)
class Mask:
    """One way to choose as many weights as LoRA of rank 3 trains; the head is trained beside them.

    Args:
        score: a score of `tithe.FISH`.
        scope: "global", or "tensor" for each tensor its share.
        unit: "entry" or "column".
        where: which tensors to choose from.
        times: how many times LoRA's count.
    """

    score: str
    scope: str = "tensor"
    unit: Literal["entry", "column"] = "entry"
    where: tuple[str, ...] = ENCODER
    times: int = 1

    @property
    def name(self) -> str:
        """For example "fisher tensor" or "fisher columns global, ×4"."""
        columns = " columns" if self.unit == "column" else ""
        more = "" if self.times == 1 else f", ×{self.times}"
        return f"{self.score}{columns} {self.scope}{more}{PLACES[self.where]}"

    def fish(self, k: int) -> tithe.FISH:
        """The recipe of this mask."""
        options: dict[str, Any] = {"score": self.score, "scope": self.scope, "unit": self.unit}
        return tithe.FISH(k=k, samples=SAMPLES, **options)

    def prepare(self, model: nn.Module, batches: Sequence[Batch], seed: int, _: int = 0) -> Prepared:
        """Attach the mask to the model."""
        recipe = self.fish(self.times * num_lora(model))
        plan = tithe.attach(model, recipe, loss=loss_of, data=batches, where=self.where, head=[HEAD], seed=seed)
        return Prepared(model, list(plan.parameters()), plan)

    def method(self) -> Method:
        """This mask as a way to fine-tune."""
        return Method(self.name, STARTS[self.score], self.prepare)


def num_lora(model: nn.Module, rank: int = RANK) -> int:
    """Weights of LoRA on every Linear layer but the head: rank · (inputs + outputs) of each."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and not n.startswith("classifier")}
    return sum(rank * (m.in_features + m.out_features) for m in layers.values())


def head_only(model: nn.Module, *_: Any) -> Prepared:
    """The head on the features of the frozen encoder."""
    model.requires_grad_(False).get_submodule("classifier").requires_grad_()
    return trained(model)


PAPER = Mask("fisher", "global", where=EVERYWHERE)
MASKS = (
    PAPER,
    Mask("random"),
    Mask("magnitude", "global"),
    Mask("fisher"),
    Mask("saliency"),
    Mask("snr", "global"),
    Mask("principal"),
    Mask("fisher", unit="column"),
    Mask("fisher", unit="column", times=4),
    Mask("fisher", unit="column", times=8),
    Mask("fisher", unit="column", times=4, where=UPPER),
    Mask("fisher", "global", "column"),
    Mask("random", unit="column"),
)
METHODS = {
    m.name: m
    for m in (
        PEERS["full"],
        PEERS["lora"],
        PEERS["shira"],
        *(mask.method() for mask in MASKS),
        Method("head only", 1e-2, head_only),
    )
}
FINALISTS = (
    "fisher columns tensor, ×4",
    "fisher columns tensor, ×4, upper layers",
    "lora",
    "random tensor",
    "full",
    "shira",
    PAPER.name,
    "head only",
)
"""What is scored on test sets: the peers, the paper's mask, the best mask of single weights, the best of columns, and,
added last for what a step of it costs, the cheapest of columns."""
