"""Seconds of a whole training step of narrow training, beside the stock dense step and the same narrow network alone.

A step is everything: draws, slices, both forward passes, backward, optimizer, projection, commit; SGD with momentum
and weight decay. All contestants take their steps in turn, on the same random batch; figures are medians of wall-clock
times, or with `--threads 1` of the processor's, which other programs on the machine hardly change. *Alone* is the
network that `plan.export` gives, trained by itself, once in the ordinary way and once with the second forward pass.
*Stock* is the dense network in torch's default memory order; all others are in channels-last order where the dense
network is faster in it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import tithe
from benchmarks.narrow_networks import CLASSES, VGG16, Batch, SmallMobileNetV2, loss_of, resnet, vit_small
from benchmarks.records import Store, parse

SIDE, ROUNDS, WARM = 32, 15, 3
COUNTED = 16  # steps whose FLOPs are counted, after which the probabilities differ enough to tell units apart


@dataclass(frozen=True)
class Subject:
    """A network that is timed, its batch size, and the memory order that suits it."""

    build: Callable[[], nn.Module]
    batch: int
    order: torch.memory_format = torch.channels_last


@dataclass(frozen=True)
class Case:
    """What is kept of which network, and the speed-up to reach, where there is one."""

    network: str
    keep: float
    cost: str = "flops"
    reach: float | None = None


SUBJECTS = {
    "VGG-16": Subject(VGG16.full, 128, torch.contiguous_format),
    "ResNet-20": Subject(resnet(3, SIDE).full, 128),
    "ResNet-32": Subject(resnet(5, SIDE).full, 128),
    "MobileNetV2": Subject(SmallMobileNetV2, 64),
    "ViT-small, 6 layers": Subject(vit_small, 32, torch.contiguous_format),
}
PLOTTED = ("VGG-16", "ResNet-20")
CASES = (
    Case("VGG-16", 0.5, "channels", 2.4),
    Case("VGG-16", 0.2, "channels", 7.5),
    Case("VGG-16", 0.1, "channels", 13.5),
    *(Case(name, keep, reach=r) for name in SUBJECTS if name != "VGG-16" for keep, r in ((0.36, 1.8), (0.1, 4))),
    *(Case("VGG-16", keep) for keep in (0.36, 0.1)),
    *(Case(name, keep) for name in PLOTTED for keep in (0.7, 0.5, 0.2, 0.05)),
)


@dataclass
class Contestant:
    """A network in training.

    Args:
        model: the network.
        order: of the memory of its weights and images.
        plan: of Tithe, or None.
        twice: take a second forward pass without gradients, as the estimator does.
    """

    model: nn.Module
    order: torch.memory_format
    plan: tithe.Plan | None = None
    twice: bool = False
    optimizer: torch.optim.Optimizer = field(init=False)
    counts: list[int] | None = None  # where the FLOPs of each forward pass go while they are counted

    def __post_init__(self) -> None:
        self.model.train().to(memory_format=self.order)
        parameters = self.model.parameters() if self.plan is None else self.plan.parameters()
        self.optimizer = torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=5e-4)
        if self.plan is not None:
            self.plan.bind(self.optimizer)

    def loss(self, batch: Batch) -> Tensor:
        """The loss of a batch."""
        if self.counts is None:
            return loss_of(self.model, batch)
        with FlopCounterMode(display=False) as counter:
            loss = loss_of(self.model, batch)
        self.counts.append(counter.get_total_flops())
        return loss

    def step(self, batch: Batch) -> None:
        """One training step, as a user writes it."""
        batch = batch[0].contiguous(memory_format=self.order), batch[1]
        if self.plan is not None:
            self.plan.backward(lambda: self.loss(batch))
        else:
            if self.twice:
                with torch.no_grad():
                    self.loss(batch)
            self.loss(batch).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.plan is not None:
            self.plan.step()

    def flops(self, batch: Batch, num_steps: int = 1) -> float:
        """Mean FLOPs of a forward pass, over the passes of some steps."""
        self.counts = counts = []
        for _ in range(num_steps):
            self.step(batch)
        self.counts = None
        return statistics.fmean(counts)


def images(size: int) -> Batch:
    """A batch of random images and classes."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size, 3, SIDE, SIDE, generator=generator)
    return x, torch.randint(CLASSES, (size,), generator=generator)


def attached(case: Case, batch: Batch) -> Contestant:
    """The network with a plan."""
    torch.manual_seed(0)
    subject = SUBJECTS[case.network]
    model = subject.build().train().to(memory_format=subject.order)
    method = tithe.VRPGE(keep=case.keep, cost=case.cost)
    small = (batch[0][:2], batch[1][:2])
    return Contestant(model, subject.order, tithe.attach(model, method, loss=loss_of, data=[small], seed=0))


def turns(
    contestants: Mapping[str, Contestant], batch: Batch, rounds: int
) -> dict[str, tuple[list[float], list[float]]]:
    """Wall and CPU seconds of each contestant's steps, one of each in turn after a few that warm up."""
    seconds: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in contestants}
    for i in range(WARM + rounds):
        for name, contestant in contestants.items():
            start = time.perf_counter(), time.process_time()
            contestant.step(batch)
            if i >= WARM:
                seconds[name][0].append(time.perf_counter() - start[0])
                seconds[name][1].append(time.process_time() - start[1])
    return seconds


def main(args: argparse.Namespace) -> None:
    """Measure each case and append its row."""
    torch.set_num_threads(args.threads)
    store = Store(args.results / "speed.jsonl", key=("network", "cost", "keep"))
    for case in CASES:
        if store.find(network=case.network, cost=case.cost, keep=case.keep) is not None:
            continue
        subject = SUBJECTS[case.network]
        batch = images(subject.batch)
        narrow = attached(case, batch)
        assert narrow.plan is not None
        counted = {"tithe": narrow.flops(batch, COUNTED)}
        contestants = {
            "dense": Contestant(subject.build(), subject.order),
            "tithe": narrow,
            "alone": Contestant(narrow.plan.export(batch), subject.order),
            "alone twice": Contestant(narrow.plan.export(batch), subject.order, twice=True),
        }
        if subject.order != torch.contiguous_format:
            contestants["stock"] = Contestant(subject.build(), torch.contiguous_format)
        counted |= {name: c.flops(batch) for name, c in contestants.items() if c is not narrow}
        seconds = turns(contestants, batch, ROUNDS)
        row = {"network": case.network, "cost": case.cost, "keep": case.keep, "batch": subject.batch}
        for name, (wall, cpu) in seconds.items():
            times = cpu if args.threads == 1 else wall
            row[f"{name} ms"] = 1e3 * statistics.median(times)
            row[f"{name} cpu ms"] = 1e3 * statistics.median(cpu)
            row[f"{name} flops"] = counted[name]
            row[f"{name} all"] = [round(1e3 * s, 2) for s in times]
        row |= {"stock ms": row.get("stock ms", row["dense ms"]), "clock": "processor" if args.threads == 1 else "wall"}
        store.add(row)


if __name__ == "__main__":
    main(parse(__doc__ or "", threads=2))
