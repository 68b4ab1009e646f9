"""Prune trained networks and fine-tune what is left: accuracy at equal seconds, at 70, 50 and 30 % of the FLOPs.

MiniLM on SST-2 and ResNet-20 on CIFAR-10. Every method has the same CPU seconds of one thread, for pruning and
fine-tuning together. Each chooses its setting, then its learning rate, on the validation examples, at 50 % and with the
first seed; the other seeds and shares take both over.

`--networks` and `--shares` do a part; 1 is the whole network, fine-tuned for as long.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import cells
from benchmarks.encoder import num_parameters
from benchmarks.pruning_methods import METHODS, WHOLE, Method, Run
from benchmarks.pruning_networks import NETWORKS
from benchmarks.records import Record, Store

CHOSEN_AT = 0.5
SHARES = (0.5, 1.0, 0.3, 0.7)
SEEDS = (0, 1, 2)
KEY = ("network", "keep", "method", "setting", "rate", "seed")


@dataclass(frozen=True)
class Cell:
    """All runs of a network at a share, and those at 50 % on which their settings depend."""

    network: str
    keep: float
    data: Path
    results: Path
    methods: tuple[str, ...] = tuple(METHODS)

    def work(self) -> None:
        """Run what is missing."""
        torch.set_num_threads(1)
        for name in self.methods:
            method = METHODS[name]
            if (method is WHOLE) == (self.keep == 1):
                setting, rate = self.choice(method)
                for seed in SEEDS:
                    self.run(method, self.keep, setting, rate, seed)

    def choice(self, method: Method) -> tuple[Any, float]:
        """The setting of highest quality at the first rate, then the rate of highest quality at that setting."""
        keep = 1.0 if method is WHOLE else CHOSEN_AT
        first, *others = NETWORKS[self.network].rates

        def at(setting: Any, rate: float) -> tuple[float, float]:
            return quality(self.run(method, keep, setting, rate, SEEDS[0]))

        setting = max(method.settings, key=lambda setting: at(setting, first))
        return setting, max((first, *others), key=lambda rate: at(setting, rate))

    def run(self, method: Method, keep: float, setting: Any, rate: float, seed: int) -> Record:
        """The record of a run: found, or made now."""
        fields = {"network": self.network, "keep": keep, "method": method.name}
        fields |= {"setting": setting, "rate": rate, "seed": seed}
        store = Store(self.results / "pruning.jsonl", key=KEY)
        return store.find(**fields) or store.add({**fields, **measured(method, keep, setting, rate, seed, self)})


def quality(record: Record) -> tuple[float, float]:
    """What a choice goes by: accuracy on the validation examples, then the lower loss."""
    return record["validation"], -record["validation_loss"]


def measured(method: Method, keep: float, setting: Any, rate: float, seed: int, cell: Cell) -> Record:
    """Prune, fine-tune, evaluate."""
    trained = NETWORKS[cell.network]
    run = Run(trained, keep, setting, rate, seed, cell.data)
    model = trained.load(cell.data)
    full = operations(run, model)
    model = method.train(run, model)
    results = {part: trained.evaluate(model, cell.data, part) for part in ("validation", "test")}
    return {
        **{part: accuracy for part, (accuracy, _) in results.items()},
        **{f"{part}_loss": loss for part, (_, loss) in results.items()},
        "prune_seconds": run.pruned,
        "seconds": run.seconds,
        "steps": run.steps,
        "operations": operations(run, model) / full,
        "parameters": num_parameters(model),
        "widths": widths(model),
    }


@torch.no_grad()
def operations(run: Run, model: nn.Module) -> int:
    """FLOPs of a forward pass on the run's first batch."""
    batch = next(run.trained.batches(run.data, run.seed))
    with FlopCounterMode(display=False) as counter:
        run.trained.loss(model.eval(), batch)
    model.train()
    return counter.get_total_flops()


def widths(model: nn.Module) -> dict[str, int]:
    """Output widths of the layers with a weight matrix or kernel, by path."""
    kinds = nn.Linear, nn.Conv2d
    return {path: len(module.weight) for path, module in model.named_modules() if isinstance(module, kinds)}


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing, the share at which settings are chosen first."""
    parser = cells.options(__doc__ or "")
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), help="only these networks")
    parser.add_argument(
        "--shares", nargs="*", type=float, default=list(SHARES), help="only these; 1: the whole network"
    )
    parser.add_argument("--methods", nargs="*", default=list(METHODS), help="only these methods")
    args = parser.parse_args(argv)
    chosen = itertools.product(args.shares, args.networks)
    methods = tuple(args.methods)
    cells.run((Cell(network, share, args.data, args.results, methods) for share, network in chosen), args.workers)


if __name__ == "__main__":
    main()
