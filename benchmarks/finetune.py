"""One fine-tuning run, and the search of a learning rate on the validation examples."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tithe
from benchmarks.encoder import Pooling, encoder, loss_of
from benchmarks.methods import Method, Prepared
from benchmarks.records import Record, Store
from benchmarks.text import Batch, Example, Task, evaluation_batches, load, score, training_batches

RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
CLIP = 1.0
PARTS = {
    "embeddings": "bert.embeddings",
    "attention": ".attention.",
    "feed-forward in": ".intermediate.",
    "feed-forward out": ".output.",
    "pooler": "bert.pooler",
}
"""Part of the encoder -> a piece of its tensors' names."""


@dataclass(frozen=True)
class Run:
    """What a run is told: everything that its result depends on.

    Args:
        task, method: what is learned, and how.
        rate: highest learning rate, of the head too.
        seed: of the head, of the order of the examples, of every draw.
        test: score the test set too.
        pooling: what the head sees.
    """

    task: Task
    method: Method
    rate: float
    seed: int
    test: bool = False
    pooling: Pooling = "pooler"

    @property
    def delta(self) -> Path:
        """Where the trained weights wait for the test set, until the machine clears its temporary files."""
        method = self.method.name.replace(" ", "_")
        name = "-".join(map(str, (self.task.name, self.pooling, method, self.rate, self.seed)))
        return Path(tempfile.gettempdir(), "tithe-benchmarks", f"{name}.safetensors")


def do(run: Run, store: Store, data: Path) -> Record:
    """The record of the run: found in the store, or trained now and added to it."""
    fields = {
        "task": run.task.name,
        "pooling": run.pooling,
        "method": run.method.name,
        "rate": run.rate,
        "seed": run.seed,
        "tested": run.test,
    }
    found = store.find(**fields) or (None if run.test else store.find(**{**fields, "tested": True}))
    if found is not None:
        return found
    earlier = store.find(**{**fields, "tested": False})
    if earlier is not None and run.delta.exists():
        return store.add({**earlier, **fields, **test(run, data)})
    return store.add({**fields, **train(run, data)})


def test(run: Run, data: Path) -> Record:
    """Score the test set with what was trained before, from its file."""
    split = load(run.task, data)
    model = encoder(seed=run.seed, pooling=run.pooling)
    with safe_open(run.delta, "pt") as file:
        of_plan = file.metadata() is not None  # a delta says what it belongs to
    if of_plan:
        tithe.apply(model, run.delta)
    else:
        prepared = run.method.prepare(model, [], run.seed, 0)
        named, values = dict(prepared.model.named_parameters()), load_file(run.delta)
        with torch.no_grad():
            for name, value in values.items():
                named[name].copy_(value)
        model = prepared.model
    metric, loss = evaluate(model, run.task, split.test)
    return {"test": metric, "test_loss": loss}


def keep(run: Run, prepared: Prepared) -> None:
    """Write what was trained to the run's file."""
    run.delta.parent.mkdir(exist_ok=True)
    if prepared.plan is not None:
        prepared.plan.save(run.delta)
        return
    trained = {name: p.detach().contiguous() for name, p in prepared.model.named_parameters() if p.requires_grad}
    save_file(trained, run.delta)


def train(run: Run, data: Path) -> Record:
    """Fine-tune a fresh model and score it on the validation examples (and on the test set when told)."""
    task, split = run.task, load(run.task, data)
    start = time.process_time()
    model = encoder(seed=run.seed, pooling=run.pooling)
    per_epoch = -(-len(split.train) // task.batch)
    num_steps = per_epoch * task.num_epochs
    batches = training_batches(split.train, task.batch, seed=run.seed, epoch=0)
    prepared = run.method.prepare(model, batches, run.seed, num_steps // 4)
    prepared_at = time.process_time()
    losses = _epochs(run, prepared, split.train, num_steps)
    trained_at = time.process_time()
    validation, validation_loss = evaluate(prepared.model, task, split.validation)
    result: Record = {
        "validation": validation,
        "validation_loss": validation_loss,
        "training_loss": sum(losses[-16:]) / len(losses[-16:]),
        "trained": prepared.num_trained,
        "steps": num_steps,
        "prepare_seconds": prepared_at - start,
        "train_seconds": trained_at - prepared_at,
    }
    keep(run, prepared)
    if run.test:
        result["test"], result["test_loss"] = evaluate(prepared.model, task, split.test)
    if prepared.plan is not None:
        result["selected"] = shares({name: s.size for name, s in prepared.plan.selections.items() if s.size})
    return result


def shares(sizes: Mapping[str, int]) -> dict[str, int]:
    """How many selected weights lie in each part of the encoder, and how many are biases or belong to norms."""
    found = {"tensors": len(sizes)}
    for name, size in sizes.items():
        part = next(part for part, piece in PARTS.items() if piece in name)
        found[part] = found.get(part, 0) + size
        if name.endswith("bias") or "LayerNorm" in name:
            found["biases and norms"] = found.get("biases and norms", 0) + size
    return found


def _epochs(run: Run, prepared: Prepared, examples: Sequence[Example], num_steps: int) -> list[float]:
    """AdamW without weight decay, linear decay to zero, clipped at 1: the setting of the FISH paper."""
    dense = prepared.plan is None
    parameters = prepared.parameters
    optimizer = torch.optim.AdamW(parameters, lr=run.rate, weight_decay=0.0, fused=True if dense else None)
    if prepared.plan is not None:
        prepared.plan.bind(optimizer)
    losses: list[float] = []
    for epoch in range(run.task.num_epochs):
        for batch in training_batches(examples, run.task.batch, seed=run.seed, epoch=epoch):
            for group in optimizer.param_groups:
                group["lr"] = run.rate * (1 - len(losses) / num_steps)
            losses.append(step(prepared, optimizer, batch))
        if prepared.plan is not None and epoch + 1 < run.task.num_epochs:
            prepared.plan.end_epoch()
    return losses


def step(prepared: Prepared, optimizer: torch.optim.Optimizer, batch: Batch) -> float:
    """One training step, as a user writes it."""

    def closure() -> Tensor:
        return loss_of(prepared.model, batch)

    if prepared.plan is None:
        loss = closure()
        loss.backward()
    else:
        loss = prepared.plan.backward(closure)
    torch.nn.utils.clip_grad_norm_(prepared.parameters, CLIP)
    optimizer.step()
    optimizer.zero_grad()
    if prepared.plan is not None:
        prepared.plan.step()
    return float(loss.detach())


@torch.no_grad()
def evaluate(model: nn.Module, task: Task, examples: Sequence[Example]) -> tuple[float, float]:
    """The task's metric and the mean cross-entropy, in evaluation mode."""
    model.eval()
    logits, labels = [], []
    for batch in evaluation_batches(examples):
        output: Any = model(**{name: value for name, value in batch.items() if name != "labels"})
        logits.append(output.logits)
        labels.append(batch["labels"])
    model.train()
    every, label = torch.cat(logits), torch.cat(labels)
    return score(task.metric, every.argmax(-1), label), float(nn.functional.cross_entropy(every, label))


def best_rate(
    task: Task, method: Method, store: Store, data: Path, *, seed: int = 0, pooling: Pooling = "pooler"
) -> float:
    """The rate with the best validation metric (ties: the lower loss), from runs in full with one seed.

    The climb starts at the method's start: a step is a factor of about three, and it ends at a rate whose two
    neighbours are no better, or at an end of the grid.
    """
    seen: dict[float, tuple[float, float]] = {}

    def quality(rate: float) -> tuple[float, float]:
        if rate not in seen:
            record = do(Run(task, method, rate, seed, pooling=pooling), store, data)
            loss = record["validation_loss"]
            seen[rate] = (record["validation"], -loss if loss == loss else float("-inf"))
        return seen[rate]

    rate = method.start
    while True:
        i = RATES.index(rate)
        best = max((RATES[j] for j in (i - 1, i + 1) if 0 <= j < len(RATES)), key=quality)
        if quality(best) <= quality(rate):
            return rate
        rate = best
