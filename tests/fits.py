"""A LightningModule, its data, trainers that are quiet, and the plain loop to compare them with."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

import lightning
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import tithe
from tithe.integrations.lightning import Tithe

EPOCHS, BATCHES, SIZE = 3, 4, 8
HEAD = "head.*"
METHODS: dict[str, Callable[[], Any]] = {
    "FISH": lambda: tithe.FISH(k=100),
    "FISH, again": lambda: tithe.FISH(k=100, reselect=tithe.every(3)),
    "FISH, each epoch": lambda: tithe.FISH(k=100, reselect=tithe.every(1, "epochs")),
    "FISH, warm-up": lambda: tithe.FISH(k=100, warmup=6),
    "TraDy": lambda: tithe.TraDy(tithe.Budget(fraction=0.5)),
}


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    size = BATCHES * SIZE
    return TensorDataset(torch.randn(size, 6, generator=generator), torch.randint(3, (size,), generator=generator))


def loader(**settings: Any) -> DataLoader[Any]:
    return DataLoader(data(), **{"batch_size": SIZE, **settings})


class Module(lightning.LightningModule):
    """A network with a norm that keeps statistics; it logs, and counts what it is asked."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 16), nn.Tanh()
        )
        self.head = nn.Linear(16, 3)
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net(x))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = loss_fn(self, batch)
        self.seen.append(batch_idx)
        self.log("loss", loss)
        return {"loss": loss}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("validation", loss_fn(self, batch))

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.1)


def loss_fn(module: Any, batch: Any) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


def plain(method: Any, *, accumulate: int = 1, clip: float | None = None) -> nn.Module:
    """The loop of the README."""
    module = Module()
    plan = tithe.attach(module, method, loss=loss_fn, data=loader(), head=HEAD)
    optimizer = torch.optim.AdamW(plan.parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(EPOCHS):
        for number, batch in enumerate(loader()):
            (loss_fn(module, batch) / accumulate).backward()
            if (number + 1) % accumulate == 0:
                if clip is not None:
                    torch.nn.utils.clip_grad_norm_(plan.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
        plan.end_epoch()
    plan.release()
    return module


def trainer(*callbacks: Any, package: Any = lightning, **settings: Any) -> Any:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    checkpoints = any(type(callback).__name__ == "ModelCheckpoint" for callback in callbacks)
    defaults = {"max_epochs": EPOCHS, "accelerator": "cpu", "devices": 1, "logger": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": checkpoints}
    return package.Trainer(callbacks=list(callbacks), **{**defaults, **quiet, **settings})


def fit(trainer: Any, module: nn.Module, *args: Any, **settings: Any) -> None:
    """Lightning's own warnings are of workers, and of logs that are short."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", tithe.TitheWarning)
        trainer.fit(module, *args, **settings)


def same(one: nn.Module, other: nn.Module) -> bool:
    found, expected = one.state_dict(), other.state_dict()
    return list(found) == list(expected) and all(torch.equal(found[name], expected[name]) for name in expected)


class ByHand(Module):
    """Optimizes by hand, as a method with two forward passes a step needs."""

    def __init__(self, callback: Tithe) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.tithe = [callback]  # no module's copy takes it along
        self.widths: list[int] = []

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.tithe[0].plan.parameters(), lr=0.01, weight_decay=0.1)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        self.tithe[0].plan.backward(lambda: loss_fn(self, batch))
        optimizer.step()
        optimizer.zero_grad()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        handle = self.net[0].register_forward_hook(lambda module, args, output: self.widths.append(output.shape[1]))
        self(batch[0])
        handle.remove()
