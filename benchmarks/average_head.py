"""TWA in the place of the second half of a run: ResNet-20 on CIFAR-10 and CIFAR-100 at 16².

*SGD*: E epochs, the rate up over 5 % of them and down along a cosine. *TWA*: E/2 epochs at a constant rate, then E/10
epochs on the coefficients of their checkpoints (SGD, momentum 0.9, weight decay 1e-5, the rate divided by ten at one
half and at four fifths). *Mean*: the uniform average of the same checkpoints. *8, 4, 1 bits*: TWA on coded differences,
in the longer course.

Two courses: E = 20 with all images and a checkpoint every half epoch, and E = 80 with 5,000 of them and a checkpoint
every epoch, which comes nearer to the paper's, E = 200: half of it reaches the plateau of its constant rate.

SGD chooses its rate, and TWA both of its own, by validation accuracy with the first seed. Every run estimates running
statistics over 50 training batches where it averages.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import tithe
from benchmarks import cells
from benchmarks.averaging import Stretch, constant, milestones
from benchmarks.records import Record, Store

SEEDS = (0, 1, 2)
SETS = ("cifar10", "cifar100")
RATES = (0.1, 0.3)
SPAN_RATES = (0.5, 2.0)
WARM_UP = 0.05
KEY = ("set", "epochs", "method", "rate", "span rate", "seed")


@dataclass(frozen=True)
class Course:
    """How long, and on how much.

    Args:
        epochs: E.
        num_images: for training; None for all that there are.
        each: epochs between checkpoints.
        bits: of the codes that are compared with exact differences.
    """

    epochs: int
    num_images: int | None
    each: float
    bits: tuple[int, ...]


COURSES = (Course(20, None, 0.5, ()), Course(80, 5_000, 1.0, (8, 4, 1)))


def cosine(part: float) -> float:
    """Up to 1 and down to 0."""
    return min(1.0, max(part, 0.01) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * part))


@dataclass(frozen=True)
class Cell:
    """One course on one set of images; checkpoints are kept in a folder beside the results while they are needed."""

    name: str
    course: Course
    data: Path
    results: Path

    def work(self) -> None:
        """Run what is missing."""
        torch.set_num_threads(1)
        best = max(RATES, key=lambda rate: self.sgd(rate, SEEDS[0])["validation"])
        for seed in SEEDS[1:]:
            self.sgd(best, seed)
        for rate in RATES:
            self.averages(rate, SEEDS[0], [("TWA", span, None) for span in SPAN_RATES])
        found = {(r, s): self.store().find(**self.fields("TWA", r, s, SEEDS[0])) for r in RATES for s in SPAN_RATES}
        rate, span = max(found, key=lambda pair: (found[pair] or {})["validation"])
        coded = [(f"{bits} bits", span, bits) for bits in self.course.bits]
        for seed in SEEDS:
            self.averages(rate, seed, [("mean", 0.0, None), ("TWA", span, None), *coded])

    def store(self) -> Store:
        """The records so far."""
        return Store(self.results / "average_head.jsonl", key=KEY)

    def fields(self, method: str, rate: float, span: float, seed: int) -> Record:
        """What tells a run apart."""
        return {
            "set": self.name,
            "epochs": self.course.epochs,
            "method": method,
            "rate": rate,
            "span rate": span,
            "seed": seed,
        }

    def sgd(self, rate: float, seed: int) -> Record:
        """The whole course in the ordinary way."""
        fields = self.fields("SGD", rate, 0.0, seed)
        found = self.store().find(**fields)
        if found is not None:
            return found
        run = Stretch(self.data, self.name, seed, num_images=self.course.num_images)
        run.train(self.course.epochs, lambda part: rate * cosine(part))
        return self.store().add({**fields, **run.record()})

    def averages(self, rate: float, seed: int, wanted: Sequence[tuple[str, float, int | None]]) -> None:
        """Half a course at a constant rate, and from its checkpoints what is wanted and missing.

        Args:
            rate: of the half course.
            seed: of everything.
            wanted: method, learning rate of the coefficients, bits.
        """
        missing = [w for w in wanted if self.store().find(**self.fields(w[0], rate, w[1], seed)) is None]
        if not missing:
            return
        epochs, num_images = self.course.epochs, self.course.num_images
        with tempfile.TemporaryDirectory(dir=self.results) as folder:
            head = Stretch(self.data, self.name, seed, num_images=num_images)
            history = tithe.History(Path(folder) / "history")
            head.train(epochs / 2, constant(rate, WARM_UP), history=history, each=self.course.each)
            for method, span, bits in missing:
                run = Stretch(self.data, self.name, seed, head.seconds, head.epochs, num_images)
                if method == "mean":
                    run.average(history, [1 / len(history)] * len(history))
                else:
                    run.twa(history, epochs / 10, milestones(span), decay=1e-5, start="mean", bits=bits)
                self.store().add({**self.fields(method, rate, span, seed), **run.record(), "n": len(history)})


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing, a process for each course and set of images."""
    args = cells.options(__doc__ or "").parse_args(argv)
    cells.run((Cell(name, course, args.data, args.results) for course in COURSES for name in SETS), args.workers)


if __name__ == "__main__":
    main()
