"""Which mask, at its own learning rate: MiniLM on three text tasks, beside LoRA and SHiRA of as many weights.

In stages, each finished run kept:

* `screen`: 1,600 sentences of SST-2, one epoch, one seed. Every mask, every peer climbs a grid of learning rates,
  judged on validation examples.
* `small`: the finalists and the peers in the same setting, three seeds, scored on the test set too.
* `finals`: the finalists and the peers on the whole training sets of SST-2, MRPC and CoLA, three seeds, scored on the
  test sets too; at the rate that the screening chose, or the next lower one where that is better on the validation
  examples with the first seed: longer runs and other tasks may bear less.

All masks train as many weights as LoRA of rank 3 on every Linear layer, the head beside them. `--stages`, `--tasks` and
`--poolings` do a part; `--workers 2` trains two at a time, one thread each.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import cells
from benchmarks.encoder import Pooling
from benchmarks.finetune import RATES, Run, best_rate, do
from benchmarks.masks_methods import FINALISTS, METHODS
from benchmarks.records import Store
from benchmarks.text import Task

SEEDS = (0, 1, 2)
KEY = ("task", "pooling", "method", "rate", "seed", "tested")
SCREEN = Task("sst2-1600", "sst2_sentences", "test.tsv", "accuracy", 1600, 872, 1, 48, 16, "dev.tsv")
TASKS = {
    t.name: t
    for t in (
        Task("sst2-full", "sst2_sentences", "test.tsv", "accuracy", 6920, 872, 1, 48, 16, "dev.tsv"),
        Task("mrpc-full", "mrpc", "test.tsv", "accuracy", 3668, 408, 2, 64, 16, "dev.tsv"),
        Task("cola-full", "cola", "dev.tsv", "matthews", 7551, 1000, 1, 32, 32),
    )
}
STAGES = ("screen", "small", "finals")


@dataclass(frozen=True)
class Cell:
    """One method on one task: its climb with the first seed, or one run of the finals."""

    stage: str
    task: str
    pooling: Pooling
    method: str
    seed: int
    data: Path
    results: Path

    def work(self) -> None:
        """Run what is missing."""
        torch.set_num_threads(1)
        if self.stage == "screen":
            self.rate()
        elif self.stage == "small":
            do(self.one(SCREEN, self.rate(), self.seed, test=True), self.store(), self.data)
        else:
            task, screened = TASKS[self.task], self.rate()
            lower = RATES[RATES.index(screened) - 1]

            def quality(rate: float) -> float:
                return do(self.one(task, rate, SEEDS[0]), self.store(), self.data)["validation"]

            do(self.one(task, max(screened, lower, key=quality), self.seed, test=True), self.store(), self.data)

    def one(self, task: Task, rate: float, seed: int, *, test: bool = False) -> Run:
        """A run of this cell's method."""
        return Run(task, METHODS[self.method], rate, seed, test=test, pooling=self.pooling)

    def rate(self) -> float:
        """The rate that the screening chose."""
        return best_rate(SCREEN, METHODS[self.method], self.store(), self.data, pooling=self.pooling)

    def store(self) -> Store:
        """What is finished by now, in the other process too."""
        return Store(self.results / "masks.jsonl", key=KEY)


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing, the decisive runs first."""
    parser = cells.options(__doc__ or "")
    parser.add_argument("--stages", nargs="*", default=list(STAGES), choices=STAGES, help="only these stages")
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), choices=TASKS, help="only these tasks of the finals")
    parser.add_argument("--poolings", nargs="*", default=["mean", "pooler"], help="only these of mean, pooler")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS, help="only these methods")
    args = parser.parse_args(argv)

    def cell(stage: str, task: str, pooling: Pooling, method: str, seed: int) -> Cell:
        return Cell(stage, task, pooling, method, seed, args.data, args.results)

    planned: list[Cell] = []
    for pooling in args.poolings:
        if "screen" in args.stages:
            planned += [cell("screen", SCREEN.name, pooling, m, SEEDS[0]) for m in args.methods]
        finalists = [m for m in FINALISTS if m in args.methods]
        if "small" in args.stages:
            planned += [cell("small", SCREEN.name, pooling, m, s) for s, m in itertools.product(SEEDS, finalists)]
        if "finals" in args.stages:
            product = itertools.product(args.tasks, SEEDS, finalists)
            planned += [cell("finals", task, pooling, m, s) for task, s, m in product]
    cells.run(planned, args.workers)


if __name__ == "__main__":
    main()
