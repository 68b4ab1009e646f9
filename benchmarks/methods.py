"""Ways to fine-tune, each prepared on a fresh model: the peers here, Tithe's masks beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import peft
from torch import nn

import tithe
from benchmarks.encoder import HEAD, loss_of
from benchmarks.text import Batch

DENSITY = 0.005
RANK = 3  # of LoRA and SHiRA: the rank whose count of trained weights is nearest to 0.5 % (it is 12 % above)


@dataclass
class Prepared:
    """A model ready to train: what the optimizer gets, and the plan when there is one."""

    model: nn.Module
    parameters: list[nn.Parameter]
    plan: tithe.Plan | None = None

    @property
    def num_trained(self) -> int:
        """Numbers that the optimizer moves."""
        return sum(p.numel() for p in self.parameters)


@dataclass(frozen=True)
class Method:
    """A name, a first learning rate to try, and how to prepare a model.

    Args:
        name: what the tables call it.
        start: where the search of the learning rate begins.
        prepare: (model, scoring batches, seed, steps of head warm-up) -> Prepared.
    """

    name: str
    start: float
    prepare: Callable[[nn.Module, Sequence[Batch], int, int], Prepared] = field(compare=False)


def trained(model: nn.Module) -> Prepared:
    """Whatever requires grad."""
    return Prepared(model, [p for p in model.parameters() if p.requires_grad])


def full(model: nn.Module, *_: Any) -> Prepared:
    """Every parameter."""
    return trained(model.requires_grad_())


def bitfit(model: nn.Module, *_: Any) -> Prepared:
    """Every bias, and the head (Ben Zaken, Ravfogel, Goldberg, BitFit, ACL 2022)."""
    for name, p in model.named_parameters():
        p.requires_grad_(name.endswith(".bias") or name.startswith("classifier"))
    return trained(model)


def lora(model: nn.Module, batches: Iterable[Batch], seed: int, _: int = 0, *, rank: int = RANK) -> Prepared:
    """LoRA on every Linear layer, the head in full (PEFT)."""
    config = peft.LoraConfig(task_type="SEQ_CLS", r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    return trained(_peft(model, config))


def shira(model: nn.Module, batches: Iterable[Batch], seed: int, _: int = 0, *, rank: int = RANK) -> Prepared:
    """SHiRA, a random mask in every Linear layer with as many weights as LoRA of that rank, the head in full (PEFT)."""
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and not n.startswith("classifier")]
    config = peft.ShiraConfig(task_type="SEQ_CLS", r=rank, random_seed=seed, target_modules=linear)
    return trained(_peft(model, config))


def _peft(model: nn.Module, config: Any) -> nn.Module:
    wrapped: Any = peft.get_peft_model(model, config)  # pyright: ignore[reportArgumentType]
    return wrapped.train()


@dataclass(frozen=True)
class Mask:
    """One way to choose 0.5 % of the weights, the head charged to it.

    Args:
        score: "fisher", "gradient", "magnitude", "random".
        scope: "global", or "tensor" for the same density in every tensor.
        warm: choose after the head alone has been trained for a quarter of the steps.
        reselect: choose again at the end of every epoch.
        samples: how many training examples are scored.
        embeddings: choose from the embeddings too.
    """

    score: str
    scope: str
    warm: bool = False
    reselect: bool = False
    samples: int = 256
    embeddings: bool = True

    @property
    def name(self) -> str:
        """For example "fisher global loaded static"."""
        moment = "warmed" if self.warm else "loaded"
        where = "" if self.embeddings else " without embeddings"
        return f"{self.score} {self.scope} {moment} {'reselected' if self.reselect else 'static'}{where}"

    def fish(self, warmup: int, density: float = DENSITY) -> tithe.FISH:
        """The recipe of this mask."""
        return tithe.FISH(
            density=density,
            samples=self.samples,
            score=self.score,  # pyright: ignore[reportArgumentType]
            scope=self.scope,  # pyright: ignore[reportArgumentType]
            warmup=warmup if self.warm else 0,
            reselect=tithe.every(1, "epochs") if self.reselect else None,
        )

    def prepare(self, model: nn.Module, batches: Sequence[Batch], seed: int, warmup: int) -> Prepared:
        """Attach the mask to the model."""
        where = "*" if self.embeddings else ("*", "!*embeddings*")
        plan = tithe.attach(model, self.fish(warmup), loss=loss_of, data=batches, where=where, head=[HEAD], seed=seed)
        return Prepared(model, list(plan.parameters()), plan)

    def method(self) -> Method:
        """This mask as a way to fine-tune."""
        start = {"fisher": 3e-3, "gradient": 3e-3, "magnitude": 1e-2, "random": 1e-2}[self.score]
        return Method(self.name, start, self.prepare)


def leaned(method: Method, bits: int | None = None) -> Method:
    """The same way to fine-tune, of a model that is lean once the method is prepared."""

    def prepare(model: nn.Module, batches: Sequence[Batch], seed: int, warmup: int) -> Prepared:
        prepared = method.prepare(model, batches, seed, warmup)
        tithe.lean(prepared.model, bits)
        return prepared

    return Method(f"{method.name}, lean" + ("" if bits is None else f", {bits} bits"), method.start, prepare)


PEERS = {
    m.name: m
    for m in (
        Method("full", 1e-4, full),
        Method("bitfit", 3e-3, bitfit),
        Method("lora", 1e-3, lora),
        Method("shira", 1e-2, shira),
    )
}
