"""How the cost of a step grows: hidden sizes 384, 768, 1024 and densities 0.1, 0.5, 2, 10 %.

A BERT-like encoder from a config (2 layers, heads of 64, 4 × wider inside, 2,000 words, no dropout), 8 sequences of
128 tokens; Fisher masks from 64 samples of the same random text. Untrained weights and random text: this shows how the
cost grows with width and density, not what a pretrained network costs (`benchmarks.step` does).
"""

from __future__ import annotations

import argparse

import torch
import transformers
from torch import nn

import tithe
from benchmarks.encoder import HEAD, loss_of, num_parameters
from benchmarks.methods import Prepared, full
from benchmarks.records import Store, parse
from benchmarks.text import Batch
from benchmarks.timing import Contestant, costs, cpu_seconds

HIDDEN = (384, 768, 1024)
DENSITIES = (0.001, 0.005, 0.02, 0.1)
LAYERS, WORDS, ROWS, LENGTH, ROUNDS = 2, 2000, 8, 128, 7


def network(hidden: int) -> nn.Module:
    """A BERT-like classifier with untrained weights."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=WORDS,
        hidden_size=hidden,
        num_hidden_layers=LAYERS,
        num_attention_heads=hidden // 64,
        intermediate_size=4 * hidden,
        max_position_embeddings=LENGTH,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return transformers.BertForSequenceClassification(config).train()


def text(seed: int) -> Batch:
    """One batch of random words."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "input_ids": torch.randint(0, WORDS, (ROWS, LENGTH), generator=generator),
        "labels": torch.randint(0, 2, (ROWS,), generator=generator),
    }


def main(args: argparse.Namespace) -> None:
    """Measure each hidden size, all densities in turn, and append the rows."""
    torch.set_num_threads(args.threads)
    store = Store(args.results / "growth.jsonl", key=("hidden", "density"))
    batches = [text(i) for i in range(8)]
    for hidden in HIDDEN:
        if store.find(hidden=hidden, density=1.0) is not None:
            continue
        contestants = {1.0: Contestant(full(network(hidden)))}
        for density in DENSITIES:
            model = network(hidden)
            method = tithe.FISH(density=density, samples=64)
            plan = tithe.attach(model, method, loss=loss_of, data=batches, head=[HEAD], seed=0)
            contestants[density] = Contestant(Prepared(model, list(plan.parameters()), plan))
        named = {str(density): contestant for density, contestant in contestants.items()}
        seconds = cpu_seconds(named, text(0), rounds=ROUNDS)
        for density, contestant in reversed(contestants.items()):
            row = costs(contestant, text(0), seconds[str(density)])
            total = num_parameters(network(hidden))
            store.add({"hidden": hidden, "density": density, "parameters": total, **row})


if __name__ == "__main__":
    main(parse(__doc__ or ""))
