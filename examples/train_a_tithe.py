"""Fine-tune a small network from Python by training 5 % of it, and ship the difference: a few seconds on one core.

A network learns to tell six clusters of points apart. Then the points are turned in space, and it is fine-tuned to the
new task in two ways: all of its weights, or the 5 % with the most Fisher information.
"""

import copy
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tithe

CLASSES, WIDTH, BATCH = 6, 16, 32


def points(num: int, seed: int, turn: Tensor) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centres = 2 * torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(0))
    y = torch.randint(CLASSES, (num,), generator=generator)
    x = centres[y] + torch.randn(num, WIDTH, generator=generator)
    return x @ turn, y


def batches(x: Tensor, y: Tensor) -> list[dict[str, Tensor]]:
    return [{"x": a, "y": b} for a, b in zip(x.split(BATCH), y.split(BATCH), strict=True)]


def loss_fn(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"])


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float((model(x).argmax(1) == y).float().mean())


def train_all(model: nn.Module, data: list[dict[str, Tensor]], epochs: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(epochs):
        for batch in data:
            optimizer.zero_grad()
            loss_fn(model, batch).backward()
            optimizer.step()


def train_part(model: nn.Module, data: list[dict[str, Tensor]], epochs: int, delta: Path) -> int:
    plan = tithe.attach(model, tithe.FISH(density=0.05), loss=loss_fn, data=data, head=["4.*"])
    optimizer = torch.optim.AdamW(plan.parameters(), lr=1e-2)
    plan.bind(optimizer)
    for _ in range(epochs):
        for batch in data:
            optimizer.zero_grad()
            plan.backward(lambda batch=batch: loss_fn(model, batch))
            optimizer.step()
            plan.step()
        plan.end_epoch()
    plan.save(delta)
    num_trained = sum(parameter.numel() for parameter in plan.parameters())
    plan.release()
    return num_trained


def main() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(WIDTH, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, CLASSES))
    train_all(base, batches(*points(1024, 1, torch.eye(WIDTH))), epochs=3)
    turn = torch.linalg.qr(torch.randn(WIDTH, WIDTH)).Q
    data, test = batches(*points(1024, 2, turn)), points(1000, 3, turn)
    size = sum(parameter.numel() for parameter in base.parameters())
    print(f"before fine-tuning   {accuracy(base, *test):.3f}")

    full = copy.deepcopy(base)
    train_all(full, data, epochs=5)
    print(f"all weights          {accuracy(full, *test):.3f}   {size:,} trained")

    part = copy.deepcopy(base)
    delta = Path(tempfile.mkdtemp()) / "delta.safetensors"
    num_trained = train_part(part, data, epochs=5, delta=delta)
    print(f"the chosen 5 %       {accuracy(part, *test):.3f}   {num_trained:,} trained")

    shipped = tithe.apply(base, delta)
    assert all(torch.equal(value, part.state_dict()[name]) for name, value in shipped.state_dict().items())
    print(f"base + delta         {accuracy(shipped, *test):.3f}   {delta.stat().st_size:,} bytes of {4 * size:,}")


if __name__ == "__main__":
    main()
