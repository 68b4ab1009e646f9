"""Three text tasks, cut to a size that one core can train: tokens, splits, batches and metrics."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.encoder import tokenizer

Example = tuple[list[int], list[int], int]  # token ids, token types, label
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Task:
    """One task and how much of it is used.

    Args:
        name: short name.
        folder: folder under `text/`.
        test: file whose labels are the test set; never used for a choice.
        metric: "accuracy" or "matthews".
        num_train, num_validation: examples, both taken from train.tsv, disjoint, unless `held` says otherwise.
        num_epochs: passes over the training examples.
        max_length: tokens an example is cut to.
        batch: examples to a step.
        held: file of the validation examples; none takes them from train.tsv.
    """

    name: str
    folder: str
    test: str
    metric: str
    num_train: int
    num_validation: int
    num_epochs: int
    max_length: int
    batch: int
    held: str | None = None


TASKS = {
    "sst2": Task("sst2", "sst2_sentences", "test.tsv", "accuracy", 768, 768, 2, 48, 16),
    "cola": Task("cola", "cola", "dev.tsv", "matthews", 1536, 1024, 2, 32, 16),
    "mrpc": Task("mrpc", "mrpc", "test.tsv", "accuracy", 768, 512, 2, 64, 8),
}


@dataclass(frozen=True)
class Split:
    """The examples of a task: the test set is for the final table only."""

    train: list[Example]
    validation: list[Example]
    test: list[Example]


@cache
def load(task: Task, data: Path) -> Split:
    """Read and tokenise a task; which rows train and which validate is drawn once, with a fixed seed."""
    folder = data / "text" / task.folder
    examples = _read(folder / "train.tsv", task.max_length)
    order = np.random.default_rng(0).permutation(len(examples))
    cut = 0 if task.held else task.num_validation
    held = _read(folder / task.held, task.max_length)[: task.num_validation] if task.held else None
    return Split(
        train=[examples[i] for i in order[cut : cut + task.num_train]],
        validation=held or [examples[i] for i in order[:cut]],
        test=_read(folder / task.test, task.max_length),
    )


def _read(path: Path, max_length: int) -> list[Example]:
    header, *rows = (line.split("\t") for line in path.read_text().splitlines())
    label = header.index("label")
    texts = [tuple(row[:label]) if label > 1 else row[0] for row in rows]
    coded = tokenizer()(texts, truncation=True, max_length=max_length, return_token_type_ids=True)
    columns = zip(coded["input_ids"], coded["token_type_ids"], rows, strict=True)
    return [(ids, types, int(row[label])) for ids, types, row in columns]


def batch_of(examples: Sequence[Example]) -> Batch:
    """Pad to the longest example of the batch."""
    longest = max(len(ids) for ids, _, _ in examples)

    def padded(rows: Sequence[list[int]]) -> Tensor:
        return torch.tensor([row + [0] * (longest - len(row)) for row in rows])

    return {
        "input_ids": padded([ids for ids, _, _ in examples]),
        "token_type_ids": padded([types for _, types, _ in examples]),
        "attention_mask": padded([[1] * len(ids) for ids, _, _ in examples]),
        "labels": torch.tensor([label for _, _, label in examples]),
    }


def training_batches(examples: Sequence[Example], size: int, *, seed: int, epoch: int) -> list[Batch]:
    """One epoch in random order; runs of 8 batches are sorted by length first, so that little is padded."""
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(len(examples))
    groups: list[np.ndarray] = []
    for start in range(0, len(order), 8 * size):
        near = sorted(order[start : start + 8 * size], key=lambda i: len(examples[i][0]))
        groups += [np.asarray(near[i : i + size]) for i in range(0, len(near), size)]
    return [batch_of([examples[i] for i in groups[j]]) for j in rng.permutation(len(groups))]


def evaluation_batches(examples: Sequence[Example], size: int = 32) -> Iterator[Batch]:
    """All examples, shortest first."""
    ordered = sorted(examples, key=lambda example: len(example[0]))
    for start in range(0, len(ordered), size):
        yield batch_of(ordered[start : start + size])


def score(metric: str, predicted: Tensor, label: Tensor) -> float:
    """Accuracy or Matthews correlation, in points of a hundred."""
    if metric == "accuracy":
        return 100 * float((predicted == label).double().mean())
    p, t = predicted.double(), label.double()
    covariance = ((p - p.mean()) * (t - t.mean())).mean()
    spread = p.std(correction=0) * t.std(correction=0)
    return 100 * float(covariance / spread) if spread > 0 else 0.0
