"""What lean layers save: bytes kept for backward, peak and CPU time of one step, on Hugging Face encoders.

BERT, ViT and a Llama with a classifier, built from their configurations: 6 layers, 384 wide, 12 heads, 16 samples of
128 tokens (ViT: 128 patches and its class token), random weights and inputs; and MiniLM with its own weights on real
SST-2 text. Attention runs through F.scaled_dot_product_attention; once without dropout, once with 0.1. The peer is
PEFT's LoRA of rank 4 on every Linear layer. FISH and TraDy train as many weights as that LoRA, the head included, none
of them in embeddings. AdamW, gradients clipped at 1. On MiniLM every method takes one step in turn for the CPU time;
the others take one step to warm up and are measured at the second.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peft
import torch
import transformers
from torch import nn

import tithe
from benchmarks.encoder import encoder, loss_of
from benchmarks.methods import Prepared, full
from benchmarks.records import Store, parse
from benchmarks.text import Batch
from benchmarks.timing import Contestant, costs, cpu_seconds, packed_batch

ROUNDS = 11
RANK = 4
SAMPLES, TOKENS, WIDTH, LAYERS, HEADS = 16, 128, 384, 6, 12
SHAPE: dict[str, Any] = dict(hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS)
EMBEDDINGS = ("*", "!*embed*")


@dataclass(frozen=True)
class Network:
    """A model, a batch for it, and its head.

    Args:
        make: dropout → model.
        batch: draws the batch.
        head: glob of the head's parameters.
        timed: whether CPU time is taken.
    """

    make: Callable[[float], nn.Module]
    batch: Callable[[], Batch]
    head: str
    timed: bool = False


def _bert(dropout: float) -> nn.Module:
    config = transformers.BertConfig(
        **SHAPE,
        vocab_size=1000,
        intermediate_size=4 * WIDTH,
        max_position_embeddings=TOKENS,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return transformers.BertForSequenceClassification(config)


def _vit(dropout: float) -> nn.Module:
    config = transformers.ViTConfig(
        **SHAPE,
        intermediate_size=4 * WIDTH,
        image_size=(128, 256),  # pyright: ignore[reportArgumentType]
        patch_size=16,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return transformers.ViTForImageClassification(config)


def _llama(dropout: float) -> nn.Module:
    config = transformers.LlamaConfig(
        **SHAPE,
        vocab_size=1000,
        intermediate_size=1024,
        max_position_embeddings=TOKENS,
        attention_dropout=dropout,
        pad_token_id=0,
    )
    return transformers.LlamaForSequenceClassification(config)


def _tokens() -> Batch:
    ids = torch.randint(1, 1000, (SAMPLES, TOKENS))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.randint(2, (SAMPLES,))}


def _pixels() -> Batch:
    return {"pixel_values": torch.randn(SAMPLES, 3, 128, 256), "labels": torch.randint(2, (SAMPLES,))}


def networks(args: argparse.Namespace) -> dict[str, Network]:
    """The four, by name."""
    return {
        "MiniLM": Network(
            lambda dropout: encoder(seed=0, dropout=dropout),
            lambda: packed_batch(args.data),
            "classifier.*",
            timed=True,
        ),
        "BERT": Network(_bert, _tokens, "classifier.*"),
        "ViT": Network(_vit, _pixels, "classifier.*"),
        "Llama": Network(_llama, _tokens, "score.*"),
    }


def prepared(network: Network, dropout: float, batch: Batch) -> dict[str, Prepared]:
    """Every method on a model of its own."""

    def fresh() -> nn.Module:
        torch.manual_seed(0)
        return network.make(dropout).train()

    def lora(*, lean: bool, bits: int | None = None) -> Prepared:
        config = peft.LoraConfig(task_type="SEQ_CLS", r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
        model = peft.get_peft_model(fresh(), config).train()  # pyright: ignore[reportArgumentType]
        if lean:
            tithe.lean(model, bits)
        return Prepared(model, [p for p in model.parameters() if p.requires_grad])

    peer = lora(lean=False)
    count = peer.num_trained

    def attached(method: tithe.FISH | tithe.TraDy, *, lean: bool = True, bits: int | None = None) -> Prepared:
        model = fresh()
        plan = tithe.attach(model, method, loss=loss_of, data=[batch], where=EMBEDDINGS, head=[network.head], seed=0)
        if lean:
            tithe.lean(model, bits)
        return Prepared(model, list(plan.parameters()), plan)

    stem = network.head.rstrip("*")
    head = sum(p.numel() for name, p in fresh().named_parameters() if name.startswith(stem))
    fish = tithe.FISH(k=count - head, samples=SAMPLES)

    def trady(elements: int) -> tithe.TraDy:
        return tithe.TraDy(tithe.Budget(elements=elements), layers="all", lean=False)

    # The budget counts kept inputs and the optimizer's state besides: the one that trains as many follows from a trial.
    trial = attached(trady(count), lean=False)
    Contestant(trial)
    drawn = trady(count * (count - head) // (trial.num_trained - head))
    return {
        "full": full(fresh()),
        "LoRA": peer,
        "LoRA, lean": lora(lean=True),
        "LoRA, lean, 8 bits": lora(lean=True, bits=8),
        "FISH": attached(fish, lean=False),
        "FISH, lean": attached(fish),
        "FISH, lean, 8 bits": attached(fish, bits=8),
        "TraDy, lean": attached(drawn),
        "TraDy, lean, 8 bits": attached(drawn, bits=8),
    }


def main(args: argparse.Namespace) -> None:
    """Measure every network once and append the rows."""
    torch.set_num_threads(args.threads)
    store = Store(args.results / "saved.jsonl", key=("network", "dropout", "method"))
    for dropout in (0.0, 0.1):
        for name, network in networks(args).items():
            if store.find(network=name, dropout=dropout, method="full") is not None:
                continue
            torch.manual_seed(0)
            batch = network.batch()
            contestants = {method: Contestant(p) for method, p in prepared(network, dropout, batch).items()}
            rounds, skip = (ROUNDS, 2) if network.timed else (1, 0)
            seconds = cpu_seconds(contestants, batch, rounds=rounds, skip=skip)
            for method, contestant in reversed(contestants.items()):  # "full" last: it says that all are there
                row = costs(contestant, batch, seconds[method])
                store.add({"network": name, "dropout": dropout, "method": method, **row})


if __name__ == "__main__":
    main(parse(__doc__ or ""))
