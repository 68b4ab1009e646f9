"""What one training step costs: CPU time, peak bytes beyond the weights, gradients and optimizer state.

MiniLM, 16 sequences of 128 tokens of real SST-2 text, AdamW, gradients clipped at 1. The masks have 0.5 % of the
weights, scored on real SST-2 sentences. Every method takes one step in turn, so that a busy machine slows all of them
alike; medians, and ratios to full fine-tuning and to LoRA. AdamW is the fused one, the default of the transformers
Trainer; "full, plain AdamW" is torch's own default. Once without dropout, once with the model's own.
"""

from __future__ import annotations

import argparse

import torch

from benchmarks.encoder import encoder, tokenizer
from benchmarks.methods import Mask, Prepared, bitfit, full, lora, shira
from benchmarks.records import Store, parse
from benchmarks.text import TASKS, load, training_batches
from benchmarks.timing import Contestant, costs, cpu_seconds, head_bytes, packed_batch

ROUNDS = 11
RANK = 4
MASKS = (Mask("fisher", "global"), Mask("fisher", "tensor"), Mask("random", "global"))
PLAIN = "full, plain AdamW"


def main(args: argparse.Namespace) -> None:
    """Measure every method once and append the rows."""
    torch.set_num_threads(args.threads)
    assert tokenizer().cls_token_id == 101
    store = Store(args.results / "step.jsonl", key=("method", "dropout"))
    batches = training_batches(load(TASKS["sst2"], args.data).train, 16, seed=0, epoch=0)
    batch = packed_batch(args.data)
    for dropout in (0.0, 0.1):
        if store.find(method="full", dropout=dropout) is not None:
            continue

        def fresh(dropout: float = dropout) -> torch.nn.Module:
            return encoder(seed=0, dropout=dropout)

        prepared: dict[str, Prepared] = {
            "full": full(fresh()),
            PLAIN: full(fresh()),
            "bitfit": bitfit(fresh()),
            f"lora r{RANK}": lora(fresh(), batches, 0, rank=RANK),
            f"shira r{RANK}": shira(fresh(), batches, 0, rank=RANK),
            **{f"tithe {m.score} {m.scope}": m.prepare(fresh(), batches, 0, 0) for m in MASKS},
        }
        contestants = {name: Contestant(p, fused=name != PLAIN) for name, p in prepared.items()}
        seconds = cpu_seconds(contestants, batch, rounds=ROUNDS)
        for name, contestant in reversed(contestants.items()):  # "full" last: it says that all are there
            row = costs(contestant, batch, seconds[name])
            store.add({"method": name, "dropout": dropout, **row, "head_bytes": head_bytes(contestant)})


if __name__ == "__main__":
    main(parse(__doc__ or ""))
