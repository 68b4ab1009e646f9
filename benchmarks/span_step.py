"""A training step in the span of 100 checkpoints beside a plain step of SGD, and the memory that the basis takes.

ResNet-18 with 100 classes for images of 32², 11.2 million weights, batch 128, on random images. Its 100 checkpoints
are made by a random walk and recorded with as many bits as the basis has. Both networks take their steps in turn, each
step everything that it is: forward and backward pass, momentum and weight decay, projection, weights written anew.
Figures are medians of wall-clock times, or with `--threads 1` of the processor's. *Resident* is what another process,
which records nothing, comes to hold beyond what it holds after a plain step: its highest resident size, attaching and
the mapped file included.
"""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import statistics
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from torch import Tensor, nn

import tithe
from benchmarks.records import Store, parse

N, BATCH, SIDE, CLASSES = 100, 128, 32, 100
WARM, ROUNDS = 2, 7
BITS = (8, 4, 1)


class Block(nn.Module):
    """Two 3×3 convolutions and a shortcut (He, Zhang, Ren, Sun, CVPR 2016)."""

    def __init__(self, c: int, d: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c, d, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(d)
        self.conv2 = nn.Conv2d(d, d, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(d)
        same = stride == 1 and c == d
        projection = nn.Sequential(nn.Conv2d(c, d, 1, stride, bias=False), nn.BatchNorm2d(d))
        self.shortcut = nn.Identity() if same else projection

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


def resnet18() -> nn.Module:
    """ResNet-18 whose stem keeps the resolution, as is usual for small images."""
    stages = [(64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2)]
    blocks = [block for c, d, stride in stages for block in (Block(c, d, stride), Block(d, d, 1))]
    stem = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, CLASSES))


def walk(folder: Path, bits: int) -> tithe.History:
    """100 checkpoints of a random walk, recorded where they are not yet."""
    history = tithe.History(folder, bits)
    if len(history) == N:
        return history
    torch.manual_seed(0)
    model = resnet18()
    with torch.no_grad():
        for step in range(N):
            for weight in model.parameters():
                weight.add_(0.02 * weight.std().nan_to_num(0.1) * torch.randn_like(weight))
            if step >= len(history):
                history.record(model, step)
    return history


def highest() -> float:
    """Megabytes of this process's highest resident size."""
    found = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return float(found["VmHWM"].split()[0]) * 1024 / 1e6


def step(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor], plan: tithe.Plan | None
) -> None:
    """One training step, as a user writes it."""

    def loss() -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    if plan is None:
        loss().backward()
    else:
        plan.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    if plan is not None:
        plan.step()


def images() -> tuple[Tensor, Tensor]:
    """A random batch."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, 3, SIDE, SIDE, generator=generator)
    return x, torch.randint(CLASSES, (BATCH,), generator=generator)


def sgd(parameters: Iterable[Tensor]) -> torch.optim.SGD:
    """The optimizer of both."""
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=5e-4)


def timed(bits: int, folder: Path, threads: int) -> dict[str, object]:
    """Seconds and file sizes of one width of codes."""
    torch.set_num_threads(threads)
    history, batch = walk(folder / f"{bits} bits", bits), images()
    plain, model = resnet18(), resnet18()
    theirs = sgd(plain.parameters())
    clock = time.process_time if threads == 1 else time.perf_counter
    start = clock()
    plan = tithe.attach(model, tithe.TWA(history), seed=0)
    attached = clock() - start
    ours = sgd(plan.parameters())
    plan.bind(ours)
    contestants = {"sgd": (plain, theirs, None), "twa": (model, ours, plan)}
    found: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(WARM + ROUNDS):
        for name, (network, optimizer, own) in contestants.items():
            start = clock()
            step(network, optimizer, batch, own)
            found[name].append(clock() - start)
    found = {name: seconds[WARM:] for name, seconds in found.items()}
    return {
        "bits": bits,
        "threads": threads,
        "n": N,
        "weights": sum(p.numel() for p in plain.parameters()),
        "sgd ms": 1e3 * statistics.median(found["sgd"]),
        "twa ms": 1e3 * statistics.median(found["twa"]),
        "ratio": statistics.median(b / a for a, b in zip(found["sgd"], found["twa"], strict=True)),
        "all": {name: [round(1e3 * s, 1) for s in seconds] for name, seconds in found.items()},
        "attach s": attached,
        "clock": "processor" if threads == 1 else "wall",
        "basis MB": plan.basis.nbytes / 1e6,
        "history MB": sum(path.stat().st_size for path in history.folder.glob("*.safetensors")) / 1e6,
    }


def held(bits: int, folder: Path, threads: int) -> dict[str, object]:
    """Memory of one width of codes, whose checkpoints are there."""
    torch.set_num_threads(threads)
    batch, model = images(), resnet18()
    optimizer = sgd(model.parameters())
    step(model, optimizer, batch, None)
    before = highest()
    plan = tithe.attach(model, tithe.TWA(folder / f"{bits} bits"), seed=0)
    optimizer = sgd(plan.parameters())
    plan.bind(optimizer)
    for _ in range(WARM):
        step(model, optimizer, batch, plan)
    return {"bits": bits, "threads": threads, "resident MB": highest() - before}


def main(args: argparse.Namespace) -> None:
    """Measure each width of codes; checkpoints are kept in a folder beside the results until all is measured."""
    torch.set_num_threads(args.threads)  # what the records say
    times = Store(args.results / "span_step.jsonl", key=("bits", "threads"))
    memory = Store(args.results / "span_memory.jsonl", key=("bits", "threads"))
    folder = args.results / "span_step"
    for bits in BITS:
        for store, measure in ((times, timed), (memory, held)):
            if store.find(bits=bits, threads=args.threads) is None:
                # each in a process of its own, which holds nothing of the one before
                with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                    pool.submit(walk, folder / f"{bits} bits", bits).result()
                with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                    store.add(pool.submit(measure, bits, folder, args.threads).result())
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(parse(__doc__ or "", threads=2))
