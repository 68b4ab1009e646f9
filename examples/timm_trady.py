"""Fine-tune a timm model under a budget of memory, with channels drawn in each epoch until it is spent: half a minute.

A MobileNetV2 of timm, built without a download, learns the digits 0 to 4 and then the digits 5 to 9. Stock training
keeps every activation; TraDy keeps the channels that it drew, and lean layers keep little else. Images come with the
package. timm needs a torchvision that matches the installed torch.
"""

import copy
import tempfile
from pathlib import Path

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tithe
from tithe.app.demo.digits import tasks

BUDGET, BATCH, PRETRAINING, EPOCHS = tithe.Budget("2MB"), 32, 8, 8

Batch = tuple[Tensor, Tensor]


def make() -> nn.Module:
    """MobileNetV2 of width 0.35 for one channel of 32 × 32 pixels, and five classes."""
    torch.manual_seed(0)
    return timm.create_model("mobilenetv2_035", pretrained=False, in_chans=1, num_classes=5, drop_rate=0.0)


def batches(part: Batch, seed: int) -> list[Batch]:
    images, labels = part
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    larger = F.interpolate(images[order], size=(32, 32), mode="bilinear")
    return list(zip(larger.split(BATCH), labels[order].split(BATCH), strict=True))


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def accuracy(model: nn.Module, part: Batch) -> float:
    model.eval()
    with torch.no_grad():
        right = [(model(images).argmax(1) == labels).sum() for images, labels in batches(part, 0)]
    return float(sum(right)) / len(part[1])


def pretrain(model: nn.Module, part: Batch) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    for epoch in range(PRETRAINING):
        for batch in batches(part, epoch):
            loss_fn(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()


def main() -> None:
    (first, second), delta = tasks(), Path(tempfile.mkdtemp()) / "delta.safetensors"
    base = make()
    pretrain(base, first.train)
    model, data = copy.deepcopy(base), batches(second.train, 0)
    whole = copy.deepcopy(base).train()
    stock = tithe.measure(lambda: loss_fn(whole, data[0]).backward()).kept

    head = ["classifier.*"]
    plan = tithe.attach(model, tithe.TraDy(BUDGET, optimizer_states=2), loss=loss_fn, data=data, head=head)
    print(f"before     {accuracy(model, second.test):.3f}   a step of full training keeps {stock / 1e6:.1f} MB")
    optimizer = torch.optim.AdamW(plan.parameters(), lr=1e-2)
    for epoch in range(EPOCHS):
        model.train()
        for batch in batches(second.train, epoch):
            loss_fn(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
        plan.end_epoch()
    kept, spending = tithe.measure(lambda: loss_fn(model.train(), data[0]).backward()).kept, plan.spending()
    assert spending is not None
    print(f"trained    {accuracy(model, second.test):.3f}   a step keeps {kept / 1e6:.1f} MB")
    print(f"spent      {spending.spent:,.0f} of {spending.limit:,.0f} {spending.measure} in {spending.layers} layers")

    plan.save(delta)
    shipped = tithe.apply(base, delta)
    print(f"shipped    {accuracy(shipped, second.test):.3f}   {delta.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
