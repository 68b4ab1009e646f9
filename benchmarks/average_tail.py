"""What to make of the checkpoints of a constant learning rate: ResNet-20 on CIFAR-10 at 16².

10 epochs of SGD in which the rate falls from 0.1 along a cosine to the rate of the tail, then 10 epochs at that rate
(0.05 or 0.2), a checkpoint every half epoch: 20 of them. From these: the *last*; *SWA*, their mean; *EMA* with decay
0.5, 0.8 or 0.9; *LAWA*, the mean of the last 3, 5 or 10; *TWA*, their coefficients trained from the last one on for two
epochs (SGD, momentum 0.9, weight decay 5e-5, the rate divided by ten at one half and at four fifths), and the same on
coded differences. Each but the last has its running statistics estimated over the same 50 training batches. Decay,
length and TWA's rate are chosen by validation accuracy with the first seed.
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

WARM, TAIL, EXTRA = 10, 10, 2  # epochs
FIRST = 0.1
RATES = (0.05, 0.2)
SEEDS = (0, 1, 2)
SETS = ("cifar10",)
GRIDS: dict[str, tuple[float, ...]] = {
    "last": (0.0,),
    "SWA": (0.0,),
    "EMA": (0.5, 0.8, 0.9),
    "LAWA": (3, 5, 10),
    "TWA": (0.5, 2.0),
}
BITS = (8, 4, 1)
KEY = ("set", "rate", "method", "setting", "seed")


def fixed(method: str, setting: float, n: int) -> list[float]:
    """The weights of the checkpoints, first to last."""
    if method == "EMA":
        weights = [setting ** (n - 1)] + [(1 - setting) * setting ** (n - 1 - i) for i in range(1, n)]
    elif method == "LAWA":
        weights = [float(i >= n - setting) for i in range(n)]
    else:
        weights = [float(method == "SWA" or i == n - 1) for i in range(n)]
    return [weight / sum(weights) for weight in weights]


def falling(part: float) -> float:
    """Up over a tenth of the stretch, then down from 1 to 0 along a cosine."""
    return min(1.0, max(part, 0.01) / 0.1) * 0.5 * (1 + math.cos(math.pi * part))


@dataclass(frozen=True)
class Cell:
    """All runs on one set of images with one rate of the tail."""

    name: str
    rate: float
    data: Path
    results: Path

    def work(self) -> None:
        """Run what is missing."""
        torch.set_num_threads(1)
        self.runs(SEEDS[0], [(method, setting, None) for method, grid in GRIDS.items() for setting in grid])
        chosen = {method: self.best(method) for method in GRIDS}
        coded = [(f"TWA, {bits} bits", chosen["TWA"], bits) for bits in BITS]
        for seed in SEEDS:
            self.runs(seed, [*((method, setting, None) for method, setting in chosen.items()), *coded])

    def store(self) -> Store:
        """The records so far."""
        return Store(self.results / "average_tail.jsonl", key=KEY)

    def fields(self, method: str, setting: float, seed: int) -> Record:
        """What tells a run apart."""
        return {"set": self.name, "rate": self.rate, "method": method, "setting": setting, "seed": seed}

    def best(self, method: str) -> float:
        """The setting of highest validation accuracy with the first seed."""
        found = {s: self.store().find(**self.fields(method, s, SEEDS[0])) or {} for s in GRIDS[method]}
        return max(found, key=lambda setting: found[setting]["validation"])

    def runs(self, seed: int, wanted: Sequence[tuple[str, float, int | None]]) -> None:
        """One training run, and from its checkpoints what is wanted and missing.

        Args:
            seed: of everything.
            wanted: method, its setting, bits.
        """
        missing = [w for w in wanted if self.store().find(**self.fields(w[0], w[1], seed)) is None]
        if not missing:
            return
        with tempfile.TemporaryDirectory(dir=self.results) as folder:
            trunk = Stretch(self.data, self.name, seed)
            history = tithe.History(Path(folder) / "history")
            trunk.train(WARM, lambda part: self.rate + (FIRST - self.rate) * falling(part))
            trunk.train(TAIL, constant(self.rate), history=history)
            for method, setting, bits in missing:
                run = Stretch(self.data, self.name, seed, trunk.seconds, trunk.epochs)
                if method.startswith("TWA"):
                    run.twa(history, EXTRA, milestones(setting), decay=5e-5, start="last", bits=bits)
                elif method == "last":
                    run.model.load_state_dict(history[-1])
                else:
                    run.average(history, fixed(method, setting, len(history)))
                self.store().add({**self.fields(method, setting, seed), **run.record(), "n": len(history)})


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing."""
    args = cells.options(__doc__ or "").parse_args(argv)
    cells.run((Cell(name, rate, args.data, args.results) for name in SETS for rate in RATES), args.workers)


if __name__ == "__main__":
    main()
