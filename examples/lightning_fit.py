"""Fine-tune with Lightning by training 5 % of a network, resume from a checkpoint, and ship the difference: seconds.

A small convolutional network learns the digits 0 to 4, then the digits 5 to 9. `Trainer` and `LightningModule` know
nothing of it: the callback attaches when `fit` begins. Images come with the package.
"""

import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import tithe
from tithe.app.demo.digits import Task, tasks
from tithe.integrations.lightning import Tithe


class Digits(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.AdaptiveMaxPool2d(1)]
        self.body, self.head = nn.Sequential(*layers, nn.Flatten()), nn.Linear(64, 5)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def loader(part: tuple[Tensor, Tensor]) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*part), batch_size=32)


def trainer(epochs: int, *callbacks: lightning.Callback, **settings: Any) -> lightning.Trainer:
    return lightning.Trainer(
        max_epochs=epochs, callbacks=list(callbacks), accelerator="cpu", devices=1, logger=False,
        enable_progress_bar=False, enable_model_summary=False, **settings,
    )  # fmt: skip


def accuracy(module: Digits, task: Task) -> float:
    return trainer(1, enable_checkpointing=False).test(module, loader(task.test), verbose=False)[0]["accuracy"]


def main() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    torch.manual_seed(0)
    first, second = tasks()
    base, folder = Digits(), Path(tempfile.mkdtemp())
    trainer(4, enable_checkpointing=False).fit(base, loader(first.train))

    def fresh() -> Digits:
        module = Digits()
        module.load_state_dict(base.state_dict())
        return module

    module, callback = fresh(), Tithe(tithe.FISH(density=0.05), head="head.*")
    print(f"before     {accuracy(module, second):.3f}")
    trainer(6, callback, ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)).fit(module, loader(second.train))
    print(f"trained    {accuracy(module, second):.3f}   {callback.plan!r}")
    callback.plan.save(folder / "delta.safetensors")

    resumed = fresh()
    again = trainer(6, Tithe(tithe.FISH(density=0.05), head="head.*"), enable_checkpointing=False)
    again.fit(resumed, loader(second.train), ckpt_path=folder / "epoch=2.ckpt")
    same = all(torch.equal(resumed.state_dict()[name], value) for name, value in module.state_dict().items())
    print(f"resumed    {accuracy(resumed, second):.3f}   the same bits: {same}")

    tithe.apply(base, folder / "delta.safetensors")
    size = (folder / "delta.safetensors").stat().st_size
    print(f"shipped    {accuracy(base, second):.3f}   {size:,} bytes")


if __name__ == "__main__":
    main()
