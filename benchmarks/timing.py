"""Cost of training steps, side by side: interleaved CPU seconds, peak of live storages, bytes kept between steps."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

import tithe
from benchmarks.encoder import HEAD
from benchmarks.finetune import step
from benchmarks.methods import Prepared
from benchmarks.records import Record
from benchmarks.text import TASKS, Batch, load


@dataclass
class Contestant:
    """A prepared model with its optimizer: AdamW, fused (as the transformers Trainer) or torch's default."""

    prepared: Prepared
    fused: bool = True
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        fused = True if self.fused else None
        self.optimizer = torch.optim.AdamW(self.prepared.parameters, lr=1e-4, weight_decay=0.0, fused=fused)
        if self.prepared.plan is not None:
            self.prepared.plan.bind(self.optimizer)

    def step(self, batch: Batch) -> None:
        """Forward, backward, clip, optimizer, zero_grad."""
        step(self.prepared, self.optimizer, batch)


def cpu_seconds(
    contestants: Mapping[str, Contestant], batch: Batch, *, rounds: int, skip: int = 2
) -> dict[str, list[float]]:
    """CPU seconds of each contestant's step, one of each in turn; the first `skip` rounds warm up and are dropped."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for i in range(skip + rounds):
        for name, contestant in contestants.items():
            start = time.process_time()
            contestant.step(batch)
            if i >= skip:
                seconds[name].append(time.process_time() - start)
    return seconds


def costs(contestant: Contestant, batch: Batch, seconds: list[float]) -> Record:
    """One row: median CPU milliseconds and bytes."""
    ledger = tithe.measure(lambda: contestant.step(batch), model=contestant.prepared.model)
    gradients, state = kept(contestant, batch)
    return {
        "cpu_ms": 1e3 * statistics.median(seconds),
        "cpu_ms_all": [round(1e3 * s, 2) for s in seconds],
        "trained": contestant.prepared.num_trained,
        "peak_bytes": ledger.peak,
        "saved_bytes": ledger.kept,
        "optimizer_bytes": state,
        "gradient_bytes": gradients,
    }


def kept(contestant: Contestant, batch: Batch) -> tuple[int, int]:
    """Bytes of gradients after a backward, and of the optimizer's state."""
    optimizer = contestant.optimizer
    found: list[int] = []

    def count(*_: object) -> None:
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        found.append(sum(g.numel() * g.element_size() for g in grads))

    handle = optimizer.register_step_pre_hook(count)
    contestant.step(batch)
    handle.remove()
    held = (v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor))
    return found[0], sum(v.numel() * v.element_size() for v in held)


def head_bytes(contestant: Contestant) -> int:
    """Bytes of a gradient and two moments of the head: what a density does not count."""
    stem = HEAD.rstrip("*")
    return 12 * sum(
        p.numel() for name, p in contestant.prepared.model.named_parameters() if stem in name and p.requires_grad
    )


def packed_batch(data: Path, *, size: int = 16, length: int = 128) -> Batch:
    """Real SST-2 sentences joined until every row is `length` tokens long: nothing is padding."""
    split = load(TASKS["sst2"], data)
    tokens = itertools.chain.from_iterable(ids[1:-1] for ids, _, _ in itertools.cycle(split.train))
    rows = [[101, *itertools.islice(tokens, length - 2), 102] for _ in range(size)]
    return {
        "input_ids": torch.tensor(rows),
        "token_type_ids": torch.zeros(size, length, dtype=torch.long),
        "attention_mask": torch.ones(size, length, dtype=torch.long),
        "labels": torch.tensor([label for _, _, label in split.train[:size]]),
    }
