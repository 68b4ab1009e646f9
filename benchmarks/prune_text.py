"""Prune a pretrained encoder while it is fine-tuned: heads and FFN units of all-MiniLM-L6-v2, on SST-2.

Full fine-tuning · heads and units drawn at random and fixed from the start · Tithe: the share of the operations falls
from 1 to `keep` between 16 and 60 % of the steps, the structure is settled at 75 %, its weights are trained to the end.
All see the same batches and as many steps; each chooses its learning rate on the validation examples, with the first
seed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

import tithe
from benchmarks.encoder import HEAD, encoder, loss_of, num_parameters
from benchmarks.finetune import evaluate
from benchmarks.records import Record, Store, parse
from benchmarks.text import TASKS, Batch, load, training_batches

TASK = replace(TASKS["sst2"], num_train=1152, num_epochs=4)
KEEPS = (0.75, 0.5)
RATES = (1e-4, 3e-4)
SEEDS = (0, 1, 2)
HELD = 128  # training examples that settle the structure; they are trained on by none of the methods
KEY = ("method", "keep", "rate", "seed")


@dataclass(frozen=True)
class Way:
    """A row of the table.

    Args:
        name: of the row.
        keeps: shares of the operations it is run at; 1 is the whole network.
        gradual: whether the share falls during the run; otherwise the structure is fixed at once.
    """

    name: str
    keeps: tuple[float, ...]
    gradual: bool = False


WAYS = (Way("full", (1.0,)), Way("random heads and units", KEEPS), Way("Tithe", KEEPS, gradual=True))


def train(way: Way, keep: float, rate: float, seed: int, data: Path) -> Record:
    """One run: AdamW, linear decay, gradients clipped at 1."""
    split = load(TASK, data)
    examples, held = split.train[:-HELD], split.train[-HELD:]
    model = encoder(seed=seed)
    per_epoch = -(-len(examples) // TASK.batch)
    total = per_epoch * TASK.num_epochs
    start, stop = round(0.16 * total), round(0.6 * total)
    method = tithe.VRPGE(keep, cost="flops", gradual=(start, stop) if way.gradual else None)
    settling = training_batches(held, TASK.batch, seed=seed, epoch=0)
    plan = tithe.attach(model, method, loss=loss_of, data=settling, head=[HEAD], seed=seed)
    if not way.gradual:
        shuffle(plan, seed)
        plan.settle(settling, draws=0)
    optimizer = torch.optim.AdamW(plan.parameters(), lr=rate, weight_decay=0.0)
    plan.bind(optimizer)
    for group in optimizer.param_groups:
        group["initial_lr"] = rate
    clock, done = time.process_time(), 0
    seconds: list[float] = []
    for epoch in range(TASK.num_epochs):
        for batch in training_batches(examples, TASK.batch, seed=seed, epoch=epoch):
            if way.gradual and done == round(0.75 * total):
                plan.settle(settling)
            began = time.process_time()
            for group in optimizer.param_groups:
                group["lr"] = rate * (1 - done / total)
            step(plan, model, optimizer, batch)
            seconds.append(time.process_time() - began)
            done += 1
        plan.end_epoch()
    spent = time.process_time() - clock
    narrow = plan.export()
    validation, validation_loss = evaluate(narrow, TASK, split.validation)
    test, _ = evaluate(narrow, TASK, split.test)
    return {
        "validation": validation,
        "validation_loss": validation_loss,
        "test": test,
        "train_seconds": spent,
        "last_epoch_seconds": sum(seconds[-per_epoch:]),
        "operations": plan.structure.spent(),
        "parameters": num_parameters(narrow),
        "heads": widths(narrow, "attention.self.query"),
        "units": widths(narrow, "intermediate.dense"),
    }


def shuffle(plan: tithe.NarrowPlan, seed: int) -> None:
    """Random probabilities, so that the likeliest network of the share is one drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    for chances in plan.structure_parameters():
        chances.data.copy_(torch.rand(chances.shape, generator=generator))


def step(plan: tithe.NarrowPlan, model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
    """One training step, as a user writes it."""
    plan.backward(lambda: loss_of(model, batch))
    torch.nn.utils.clip_grad_norm_(plan.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    plan.step()


def widths(model: nn.Module, suffix: str) -> list[int]:
    """Output widths of the layers whose path ends so."""
    return [m.out_features for path, m in model.named_modules() if path.endswith(suffix) and isinstance(m, nn.Linear)]


def quality(record: Record) -> tuple[float, float]:
    """What a rate is chosen by: accuracy on the validation examples, then the lower loss."""
    return record["validation"], -record["validation_loss"]


def runs(ways: Sequence[Way], do: Callable[[Way, float, float, int], Record]) -> None:
    """Every way at every share: each rate with the first seed, then the best rate with the others."""
    for way in ways:
        for keep in way.keeps:
            found = {rate: do(way, keep, rate, SEEDS[0]) for rate in RATES}
            best = max(RATES, key=lambda rate: quality(found[rate]))
            for seed in SEEDS[1:]:
                do(way, keep, best, seed)


def main() -> None:
    """Run what is missing."""
    options = parse(__doc__ or "")
    torch.set_num_threads(options.threads)
    store = Store(options.results / "prune_text.jsonl", key=KEY)

    def do(way: Way, keep: float, rate: float, seed: int) -> Record:
        fields = {"method": way.name, "keep": keep, "rate": rate, "seed": seed}
        return store.find(**fields) or store.add({**fields, **train(way, keep, rate, seed, options.data)})

    runs(WAYS, do)


if __name__ == "__main__":
    main()
