"""Train by accelerate under a memory budget, stop in the middle of an epoch, go on to the same bits: seconds.

A small convolutional network learns the digits 0 to 4, then the digits 5 to 9 with the channels that TraDy draws anew
in each epoch. Images come with the package.
"""

import copy
import itertools
import tempfile
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import tithe
from tithe.app.demo.digits import tasks

EPOCHS, STOP = 12, 45


def make() -> nn.Module:
    layers = [nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(64, 5))


def loss_fn(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return float((model(images).argmax(1) == labels).float().mean())


def pretrain(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(40):
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()


def fine_tune(base: nn.Module, rows: Any, *, save: Path | None = None, load: Path | None = None) -> tithe.Plan:
    """Train from the start and write a state after STOP batches, or go on from that state."""
    accelerator, model = Accelerator(cpu=True), copy.deepcopy(base)
    loader = DataLoader(TensorDataset(*rows), batch_size=32)
    method = tithe.TraDy(tithe.Budget(fraction=0.1))
    plan = tithe.attach(model, method, loss=loss_fn, data=loader, head="6.*")
    prepared, optimizer, loader = accelerator.prepare(model, torch.optim.AdamW(plan.parameters(), lr=3e-3), loader)
    start = 0
    if load is not None:
        accelerator.load_state(str(load))
        start = STOP
    number = start
    for epoch in range(start // len(loader), EPOCHS):
        for batch in itertools.islice(loader, number - epoch * len(loader), None):
            accelerator.backward(loss_fn(prepared, batch))
            optimizer.step()
            optimizer.zero_grad()
            number += 1
            if save is not None and number == STOP:
                accelerator.save_state(str(save))
        plan.end_epoch()
    return plan


def main() -> None:
    torch.manual_seed(0)
    (first, second), folder = tasks(), Path(tempfile.mkdtemp())
    base = make()
    pretrain(base, *first.train)
    print(f"before     {accuracy(base, *second.test):.3f}")
    whole = fine_tune(base, second.train, save=folder / "state")
    print(f"trained    {accuracy(whole.model, *second.test):.3f}   {whole!r}")

    resumed = fine_tune(base, second.train, load=folder / "state")
    same = all(torch.equal(resumed.model.state_dict()[name], t) for name, t in whole.model.state_dict().items())
    print(f"resumed    {accuracy(resumed.model, *second.test):.3f}   the same bits: {same}")

    whole.save(folder / "delta.safetensors")
    tithe.apply(base, folder / "delta.safetensors")
    size = (folder / "delta.safetensors").stat().st_size
    print(f"shipped    {accuracy(base, *second.test):.3f}   {size:,} bytes")


if __name__ == "__main__":
    main()
