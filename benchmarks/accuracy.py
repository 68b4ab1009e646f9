"""Test accuracy of fine-tuning ways that train as many weights, each at its own learning rate.

Full fine-tuning, BitFit, LoRA and SHiRA beside the masks that `which_mask` chose: same data, batches, schedule and
seeds. Learning rates are climbed on validation examples of SST-2 with one seed, and serve the other tasks too; then
three seeds are scored on the test set of each task.
"""

from __future__ import annotations

import argparse

import torch

from benchmarks.finetune import Run, best_rate, do
from benchmarks.methods import PEERS
from benchmarks.records import Store, parse
from benchmarks.text import TASKS

SEEDS = (0, 1, 2)
KEY = ("task", "method", "rate", "seed", "tested")


def main(args: argparse.Namespace) -> None:
    """Run what is missing of the peers; the masks' rows come from which_mask.jsonl."""
    torch.set_num_threads(args.threads)
    store = Store(args.results / "accuracy.jsonl", key=KEY)
    for task in (TASKS[name] for name in args.tasks or TASKS):
        for method in PEERS.values():
            rate = best_rate(TASKS["sst2"], method, store, args.data)
            for seed in SEEDS:
                do(Run(task, method, rate, seed, test=True), store, args.data)


if __name__ == "__main__":
    main(parse(__doc__ or "", tasks=True))
