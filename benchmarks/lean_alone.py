"""`tithe.lean(model)` alone, no method attached: kept bytes, peak, CPU time and loss of a BERT trained whole.

`BertForSequenceClassification` from its configuration: 4 layers, 256 wide, 4 heads, 1000 tokens in the vocabulary,
random weights; 8 samples of 128 tokens. Everything is trained, by fused AdamW, gradients clipped at 1. Attention is
F.scaled_dot_product_attention. Once with the configuration's own dropout of 0.1, once without. Every model takes one
step in turn for the CPU time. The losses of all steps are compared with those of the stock model: the random numbers
start at the same seed before each step.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import transformers
from torch import nn

import tithe
from benchmarks.methods import full
from benchmarks.records import Store, parse
from benchmarks.text import Batch
from benchmarks.timing import Contestant, costs

ROUNDS, SKIP = 21, 2
SAMPLES, TOKENS, WIDTH, LAYERS, HEADS, VOCABULARY = 8, 128, 256, 4, 4, 1000
STOCK = "stock"
WAYS: dict[str, int | None] = {"tithe.lean(model)": None, "tithe.lean(model, bits=8)": 8}


def bert(dropout: float) -> nn.Module:
    """A freshly drawn classifier, the same weights at each call."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=4 * WIDTH,
        vocab_size=VOCABULARY,
        max_position_embeddings=TOKENS,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return transformers.BertForSequenceClassification(config).train()


def tokens() -> Batch:
    """A random batch in which nothing is padding."""
    ids = torch.randint(1, VOCABULARY, (SAMPLES, TOKENS))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.randint(2, (SAMPLES,))}


def loss_and_seconds(contestant: Contestant, batch: Batch, seed: int) -> tuple[float, float]:
    """Loss before the step, and CPU seconds of the step."""
    losses: list[torch.Tensor] = []
    handle = contestant.prepared.model.register_forward_hook(lambda _module, _args, out: losses.append(out.loss))
    torch.manual_seed(seed)
    start = time.process_time()
    contestant.step(batch)
    seconds = time.process_time() - start
    handle.remove()
    return losses[0].item(), seconds


def main(args: argparse.Namespace) -> None:
    """Measure the stock model and the lean ones in turn and append the rows."""
    torch.set_num_threads(args.threads)
    store = Store(args.results / "lean_alone.jsonl", key=("dropout", "way"))
    for dropout in (0.1, 0.0):
        if store.find(dropout=dropout, way=STOCK) is not None:
            continue
        contestants = {name: Contestant(full(bert(dropout))) for name in (STOCK, *WAYS)}
        for name, bits in WAYS.items():
            tithe.lean(contestants[name].prepared.model, bits)
        batch = tokens()
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
        for i in range(SKIP + ROUNDS):
            for name, contestant in contestants.items():
                taken[name].append(loss_and_seconds(contestant, batch, i))
        stock = [seconds for _, seconds in taken[STOCK][SKIP:]]
        for name, contestant in reversed(contestants.items()):  # stock last: it says that all are there
            losses, seconds = zip(*taken[name], strict=True)
            gaps = [abs(loss - other) for loss, (other, _) in zip(losses, taken[STOCK], strict=True)]
            ratio = statistics.median(s / t for s, t in zip(seconds[SKIP:], stock, strict=True))
            row = costs(contestant, batch, list(seconds[SKIP:]))
            store.add(
                {
                    "dropout": dropout,
                    "way": name,
                    "time_of_stock": ratio,
                    "first_loss": losses[0],
                    "last_loss": losses[-1],
                    "first_loss_gap": gaps[0],
                    "largest_loss_gap": max(gaps),
                    **row,
                }
            )


if __name__ == "__main__":
    main(parse(__doc__ or ""))
