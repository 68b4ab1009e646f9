"""Which mask? Four scores, two scopes, two moments, two schedules: 32 ways to choose 0.5 % of MiniLM, on three tasks.

In four stages, each finished run kept:

1. on SST-2, each score and scope (as loaded, static) climbs the grid of learning rates with one seed, judged on
   validation examples; its other six variants take that rate;
2. on SST-2, all 32 variants with one seed, judged on the same validation examples;
3. on all three tasks, the finalists with three seeds, scored on the test sets too, at the same rates. Finalists: the
   paper's mask, the best of each score on the validation examples.
4. on SST-2, what stage 2 suggests: the same density in every tensor but none in the embeddings, whose rows mostly
   belong to words that a small data set never uses; at a rate climbed anew, with three seeds, the better of the two on
   the other tasks too. And the best mask of stage 2 at a second rate: one validation example separates the two rates.

No rate and no finalist is chosen on a test set. Stage 4 was added when test results of stage 3 and of the peers were
known: its rates and its rank come from validation examples, the idea to try it does not.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import torch

from benchmarks.accuracy import KEY, SEEDS
from benchmarks.finetune import Run, best_rate, do
from benchmarks.methods import Mask
from benchmarks.records import Store, parse
from benchmarks.text import TASKS

SCORES = ("fisher", "gradient", "magnitude", "random")
SCOPES = ("global", "tensor")
STATIC = tuple(Mask(s, c, warm=w) for w, s, c in itertools.product((False, True), SCORES, SCOPES))
AGAIN = tuple(Mask(s, c, warm=w, reselect=True) for w, s, c in itertools.product((False, True), SCORES, SCOPES))
PAPER = Mask("fisher", "global")
FOLLOW_UP = tuple(Mask(score, "tensor", embeddings=False) for score in ("random", "fisher"))

SECOND_RATE = (Mask("random", "tensor"), 1e-2)


def rate_of(mask: Mask, store: Store, data: Path) -> float:
    """The rate climbed on SST-2 by this score and scope, as loaded and static."""
    climbing = Mask(mask.score, mask.scope, embeddings=mask.embeddings)
    return best_rate(TASKS["sst2"], climbing.method(), store, data)


def order(store: Store, data: Path) -> list[Mask]:
    """The 32 variants, best first by the validation metric of the first seed on SST-2 (ties: the lower loss)."""

    def quality(mask: Mask) -> tuple[float, float]:
        record = do(Run(TASKS["sst2"], mask.method(), rate_of(mask, store, data), SEEDS[0]), store, data)
        return record["validation"], -record["validation_loss"]

    return sorted(STATIC + AGAIN, key=quality, reverse=True)


def finalists(ordered: list[Mask]) -> list[Mask]:
    """The paper's mask and the best of each score, best first."""
    kept = {PAPER, *(next(m for m in ordered if m.score == score) for score in SCORES)}
    return [mask for mask in ordered if mask in kept]


def main(args: argparse.Namespace) -> None:
    """Run what is missing; with `--scores` the first two stages alone, of those scores."""
    torch.set_num_threads(args.threads)
    store = Store(args.results / "which_mask.jsonl", key=KEY)
    for mask in STATIC + AGAIN:
        if mask.score in (args.scores or SCORES):
            do(Run(TASKS["sst2"], mask.method(), rate_of(mask, store, args.data), SEEDS[0]), store, args.data)
    if args.scores:
        return
    chosen = finalists(order(store, args.data))
    for seed in SEEDS:
        mask, rate = SECOND_RATE
        do(Run(TASKS["sst2"], mask.method(), rate, seed, test=True), store, args.data)
    for task in TASKS.values():
        for mask in (*chosen, *FOLLOW_UP) if task.name == "sst2" else (*chosen, FOLLOW_UP[0]):
            for seed in SEEDS:
                do(Run(task, mask.method(), rate_of(mask, store, args.data), seed, test=True), store, args.data)


if __name__ == "__main__":
    main(parse(__doc__ or "", scores=True))
