"""Bytes of narrow training: the peak of one step beside the dense one's, and what is left as channels die over a run.

A step keeps 20 % of the channels; peak is the highest sum of live storages during the step beyond what stands before
it, standing is weights, statistics, gradients, optimizer state and what the plan keeps. The run is VGG-7 of
`benchmarks.sparse` on CIFAR-10 at 16², 10 % of the FLOPs, and its steps are measured at the end of each epoch.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
from torch import Tensor

import tithe
from benchmarks.course import Course
from benchmarks.narrow_networks import VGG7, loss_of
from benchmarks.records import Record, Store, parse
from benchmarks.small_images import apart, evaluation_batches, load, training_batches
from benchmarks.speed import SUBJECTS, Case, Contestant, attached, images

KEEP = 0.2
RATIO, EPOCHS, RATE = 0.1, 8, 0.1
SETTLED = 0.75  # part of the run after which the structure is fixed


def bytes_of(tensors: list[Tensor]) -> int:
    """Bytes of the storages behind these tensors, each counted once."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def state_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The tensors that an optimizer keeps."""
    return [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]


def standing(contestant: Contestant) -> int:
    """Bytes that stay between steps."""
    model, plan = contestant.model, contestant.plan
    held = [*model.parameters(), *model.buffers(), *state_of(contestant.optimizer)]
    held += [p.grad for p in model.parameters() if p.grad is not None]
    if plan is not None:
        held += [*plan.parameters(), *plan.structure_parameters()]
    return bytes_of(held) + (plan.index_bytes if plan is not None else 0)


def step_rows(store: Store) -> None:
    """One row a network, dense and narrow."""
    for name, subject in SUBJECTS.items():
        batch = images(subject.batch)
        for keep in (1.0, KEEP):
            if store.find(network=name, keep=keep) is not None:
                continue
            narrow = keep < 1
            contestant = (
                attached(Case(name, keep, "channels"), batch) if narrow else Contestant(subject.build(), subject.order)
            )
            for _ in range(2):
                contestant.step(batch)
            peaks = [tithe.measure(partial(contestant.step, batch)).peak for _ in range(5 if narrow else 1)]
            row = {"network": name, "keep": keep, "batch": subject.batch, "peak_bytes": max(peaks)}
            store.add({**row, "peak_bytes_all": peaks, "standing_bytes": standing(contestant)})


def run(store: Store, args: argparse.Namespace) -> None:
    """A training run, its bytes at the end of each epoch."""
    split = load(args.data)
    training, held = apart(split.train)
    course = Course(split, RATE, 0, epochs=EPOCHS)
    torch.manual_seed(0)
    model = VGG7.full().to(memory_format=torch.channels_last).train()
    first = next(evaluation_batches(held, 2))
    plan = tithe.attach(model, tithe.VRPGE(keep=RATIO, cost="flops"), loss=loss_of, data=[first], seed=0)
    optimizer = course.sgd(plan.parameters())
    plan.bind(optimizer)
    num_units = sum(s.numel() for s in plan.structure_parameters())
    batch = next(training_batches(training, seed=1))

    def step(batch: tuple[Tensor, Tensor]) -> None:
        plan.backward(lambda: loss_of(model, batch))
        optimizer.step()
        optimizer.zero_grad()
        plan.step()

    def note(when: str) -> None:
        alive = sum(int((s > 0).sum()) for s in plan.structure_parameters())
        row: Record = {"when": when, "alive": alive, "units": num_units}
        row |= {"weight_bytes": bytes_of(list(model.parameters())), "optimizer_bytes": bytes_of(state_of(optimizer))}
        store.add({**row, "peak_bytes": tithe.measure(lambda: step(batch)).peak})

    step(batch)
    note("start")
    for epoch in range(EPOCHS):
        if epoch == round(SETTLED * EPOCHS):
            plan.settle(list(evaluation_batches(held, 128)), draws=10)
            note("settled")
        for part in course.batches(model, optimizer, until=(epoch + 1) / EPOCHS, images=training):
            step(part)
        plan.end_epoch()
        note(f"epoch {epoch + 1}")


def main(args: argparse.Namespace) -> None:
    """Measure what is missing; the run is made whole or not at all."""
    torch.set_num_threads(args.threads)
    step_rows(Store(args.results / "narrow_memory.jsonl", key=("network", "keep")))
    path = args.results / "shrinking.jsonl"
    if Store(path, key=("when",)).find(when=f"epoch {EPOCHS}") is None:
        path.unlink(missing_ok=True)
        run(Store(path, key=("when",)), args)


if __name__ == "__main__":
    main(parse(__doc__ or ""))
