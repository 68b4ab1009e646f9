"""Test accuracy, and the seconds it takes, of networks trained with a third or a tenth of the FLOPs.

CIFAR-10 at 16², VGG-7 and ResNet-20 from fresh weights. Tithe trains for 8 epochs. Every other sparse method trains as
many CPU seconds of one thread as Tithe took with the same seed, the dense network for 8 epochs. Each method chooses its
own learning rate for each network and ratio: the highest accuracy on the validation images, first seed, in full length.

Cuts came later, on another machine: beside each of their runs a uniformly narrow network trains once more for as many
seconds, run after run, at the rate that it had chosen.

`--workers 2` trains two networks at a time, one thread each; `--networks` and `--ratios` do a part.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import cells
from benchmarks.course import Course
from benchmarks.narrow_networks import VGG7, resnet
from benchmarks.records import Record, Store
from benchmarks.small_images import SIDE, load
from benchmarks.sparse_methods import METHODS, Method

EPOCHS = 8
SEEDS = (0, 1, 2)
RATIOS = (0.36, 0.1)
NETWORKS = {a.name: a for a in (VGG7, resnet(3, SIDE))}
KEY = ("network", "ratio", "method", "rate", "seed", "end")
PACE, DENSE, CUTS, EVEN = METHODS["Tithe"], METHODS["dense"], METHODS["cuts"], METHODS["uniformly narrow"]
AGAIN = "seconds, beside cuts"  # the end of a uniformly narrow network's run on the machine that cuts ran on


@dataclass(frozen=True)
class Cell:
    """All runs of a network at a FLOPs ratio, 1 for the dense network; they depend on each other's choices."""

    network: str
    ratio: float
    data: Path
    results: Path

    def work(self) -> None:
        """Run what is missing."""
        torch.set_num_threads(1)
        if self.ratio == 1:
            self.seeds(DENSE)
            return
        limits = [record["seconds"] for record in self.seeds(PACE)]
        for method in METHODS.values():
            if method not in (PACE, DENSE, CUTS):
                self.seeds(method, limits)
        for seed, limit in enumerate(limits):
            self.beside(seed, limit)

    def beside(self, seed: int, limit: float) -> tuple[Record, Record]:
        """Cuts, and then a uniformly narrow network, for as many seconds."""
        mine = self.run(CUTS, self.best(CUTS, limit), seed, limit)
        return mine, self.run(EVEN, self.best(EVEN, limit), seed, limit, AGAIN)

    def seeds(self, method: Method, limits: Sequence[float | None] = (None,) * len(SEEDS)) -> list[Record]:
        """The method at its best rate, with every seed."""
        rate = self.best(method, limits[0])
        return [self.run(method, rate, seed, limit) for seed, limit in zip(SEEDS, limits, strict=True)]

    def best(self, method: Method, limit: float | None) -> float:
        """The rate of highest validation accuracy."""
        return max(method.rates, key=lambda rate: self.run(method, rate, SEEDS[0], limit)["validation"])

    def run(self, method: Method, rate: float, seed: int, limit: float | None = None, end: str = "seconds") -> Record:
        """The record of a run: found, or made now."""
        fields = {"network": self.network, "ratio": self.ratio, "method": method.name, "rate": rate, "seed": seed}
        fields["end"] = "epochs" if limit is None else end
        store = Store(self.results / "sparse.jsonl", key=KEY)
        found = store.find(**fields)
        if found is not None:
            return found
        course = Course(load(self.data), rate, seed, epochs=EPOCHS if limit is None else None, limit=limit)
        model, flops = method.train(course, NETWORKS[self.network], self.ratio)
        return store.add({**fields, "flops": flops, **course.record(model)})


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing, the longest cells first."""
    parser = cells.options(__doc__ or "")
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), help="only these networks")
    parser.add_argument("--ratios", nargs="*", type=float, default=[0.36, 0.1, 1.0], help="only these; 1: dense")
    args = parser.parse_args(argv)
    chosen = itertools.product(args.ratios, args.networks)
    cells.run((Cell(network, ratio, args.data, args.results) for ratio, network in chosen), args.workers)


if __name__ == "__main__":
    main()
