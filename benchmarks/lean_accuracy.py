"""Whether lean layers change what FISH learns: test accuracy with and without them, seed by seed.

The paper's mask on SST-2, at the rate that `which_mask` chose for it; data, batches, schedule and seeds are those of
`accuracy`. The mask is scored before the model is made lean, so that all train the same weights.
"""

from __future__ import annotations

import argparse

import torch

from benchmarks.accuracy import KEY, SEEDS
from benchmarks.finetune import Run, do
from benchmarks.methods import leaned
from benchmarks.records import Store, parse
from benchmarks.text import TASKS
from benchmarks.which_mask import PAPER, rate_of

WITHOUT = PAPER.method()
METHODS = (WITHOUT, leaned(WITHOUT), leaned(WITHOUT, 8))


def main(args: argparse.Namespace) -> None:
    """Run what is missing."""
    torch.set_num_threads(args.threads)
    rate = rate_of(PAPER, Store(args.results / "which_mask.jsonl", key=KEY), args.data)
    store = Store(args.results / "lean_accuracy.jsonl", key=KEY)
    for seed in SEEDS:
        for method in METHODS:
            do(Run(TASKS["sst2"], method, rate, seed, test=True), store, args.data)


if __name__ == "__main__":
    main(parse(__doc__ or ""))
