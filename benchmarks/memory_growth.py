"""How bytes and seconds of a training step grow: batch 1 … 64 at 224², and 96² … 384² at batch 8.

MobileNetV2, full fine-tuning, LoRA, TraDy with 5 % of the channels, whole and in micro-batches of 1. A step whose
predicted peak is above 3 GiB is not measured: its row holds the prediction, says so, and has no seconds.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial

import torch

import tithe
from benchmarks.memory_methods import RANK, Trainee, attached, budget_for, full, images, lora, ranking, trady
from benchmarks.records import Store, parse
from benchmarks.timing import cpu_seconds

BATCHES, SIDES = (1, 2, 4, 8, 16, 32, 64), (96, 128, 160, 192, 224, 256, 320, 384)
BATCH, SIDE, SHARE = 8, 224, 0.05
SETTINGS = tuple(dict.fromkeys([*((batch, SIDE) for batch in BATCHES), *((BATCH, side) for side in SIDES)]))
FIT = 3 << 30


def rounds(batch: int, side: int) -> int:
    """Fewer where a step takes seconds."""
    return 5 if batch * side**2 <= 8 * 224**2 else 3


def main(args: argparse.Namespace) -> None:
    """Measure each setting, all methods in turn, and append the rows."""
    torch.set_num_threads(args.threads)
    store = Store(args.results / "memory_growth.jsonl", key=("method", "batch", "side"))
    ranking()
    for size, side in SETTINGS:
        if store.find(method="full", batch=size, side=side) is not None:
            continue
        batch, single = images(size, side), images(1, side)
        elements = budget_for(SHARE, side)
        trainees: dict[str, Trainee] = {
            "full": full(),
            f"LoRA r{RANK}": lora(),
            f"TraDy, {100 * SHARE:g} %": attached(trady(elements), size, side),
            f"TraDy, {100 * SHARE:g} %, micro-batches of 1": attached(trady(elements), size, side, micro=1),
        }
        predicted = {name: trainee.predict(batch) for name, trainee in trainees.items()}
        fitting = {name: t for name, t in trainees.items() if predicted[name].peak <= FIT}
        seconds = cpu_seconds(fitting, batch, rounds=rounds(size, side), skip=1)
        for name, trainee in reversed(trainees.items()):
            row = {"method": name, "batch": size, "side": side, "channels": trainee.num_channels}
            if name in fitting:
                ledger = tithe.measure(partial(trainee.step, batch), model=trainee.model)
                row |= {"measured": True, "cpu_ms": 1e3 * statistics.median(seconds[name])}
            else:
                ledger = predicted[name]
                row |= {"measured": False}
            row |= {"saved_bytes": ledger.kept, "peak_bytes": ledger.peak}
            store.add({**row, "standing_bytes": trainee.standing_bytes(single)})


if __name__ == "__main__":
    main(parse(__doc__ or ""))
