"""Held-out loss of a small Llama moved from one text to another: full, LoRA, FISH, and FISH on bfloat16 weights.

The model is trained once on sentences of news and of linguists (MRPC, CoLA), then fine-tuned on film reviews (SST-2).
Every row takes as many steps on the same batches. Its learning rate is the best on validation rows, found with the
first seed, and serves three seeds, of which the test rows are reported.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tithe
from benchmarks.records import Record, Store, parse

VOCABULARY, LENGTH, BATCH = 1024, 64, 8
PRETRAINING, STEPS = (300, 2e-3), 60  # steps and rate; steps of a row
NUM_VALIDATION, NUM_TEST = 96, 192  # rows of LENGTH tokens
SAMPLES = 64  # that a mask is scored on
RANK = 2
SEEDS = (0, 1, 2)
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
SOURCES = (("mrpc", ("sentence1", "sentence2")), ("cola", ("sentence",)))
FULL, LORA, FISH = "full", "LoRA", "FISH"
HALF, ALL_HALF = "FISH, bf16 weights, θ float32", "FISH, bf16 weights, θ bf16"


@dataclass(frozen=True)
class Row:
    """A way to fine-tune.

    Args:
        name: of the row.
        start: the rate that the search of its own begins at.
        rate_of: the row whose rate it takes instead.
        weights: dtype of the model.
        theta: `dtype=` of attach.
    """

    name: str
    start: float = 1e-3
    rate_of: str | None = None
    weights: torch.dtype = torch.float32
    theta: torch.dtype | None = None


ROWS = (
    Row(FISH, 3e-3),
    Row(LORA, 3e-3),
    Row(FULL, 1e-3),
    Row(HALF, rate_of=FISH, weights=torch.bfloat16),
    Row(ALL_HALF, rate_of=FISH, weights=torch.bfloat16, theta=torch.bfloat16),
)


def _sentences(path: Path, columns: tuple[str, ...]) -> list[str]:
    header, *rows = (line.split("\t") for line in path.read_text().splitlines())
    at = [header.index(column) for column in columns]
    return list(dict.fromkeys(row[i] for row in rows for i in at))  # a sentence is in several pairs


@cache
def _source(data: Path) -> tuple[str, ...]:
    """The sentences that the model is first trained on, in an order drawn once."""
    found = [s for name, columns in SOURCES for s in _sentences(data / "text" / name / "train.tsv", columns)]
    return tuple(found[i] for i in np.random.default_rng(0).permutation(len(found)))


@cache
def _tokenizer(data: Path) -> Any:
    """Byte-level BPE, made from the first text alone."""
    from tokenizers import ByteLevelBPETokenizer

    made = ByteLevelBPETokenizer()
    made.train_from_iterator(_source(data), vocab_size=VOCABULARY, show_progress=False)
    return made


def _rows(sentences: tuple[str, ...] | list[str], data: Path) -> Tensor:
    """All sentences after one another, a line each, cut into rows of LENGTH tokens."""
    ids = _tokenizer(data).encode("\n".join(sentences)).ids
    return torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)


@cache
def texts(data: Path) -> dict[str, Tensor]:
    """The rows of every split: "source", and of the film reviews "train", "validation", "test"."""
    folder = data / "text" / "sst2_sentences"
    splits = {split: _sentences(folder / f"{split}.tsv", ("sentence",)) for split in ("train", "dev", "test")}
    rows = {split: _rows(found, data) for split, found in splits.items()}
    return {
        "source": _rows(_source(data), data),
        "train": rows["train"],
        "validation": rows["dev"][:NUM_VALIDATION],
        "test": rows["test"][:NUM_TEST],
    }


def llama() -> nn.Module:
    """A Llama of 5.5 M weights: six layers, two key-value heads to eight, embeddings tied."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=288,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)


def loss_fn(model: nn.Module, rows: Tensor) -> Tensor:
    """Cross-entropy of the next token, the mean over rows of one length."""
    return model(input_ids=rows, labels=rows).loss


def batches(rows: Tensor, num_steps: int, *, seed: int) -> Iterator[Tensor]:
    """Batches in random order, each row once before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    rounds = 1 + num_steps * BATCH // len(rows)
    order = torch.cat([torch.randperm(len(rows), generator=generator) for _ in range(rounds)])
    for step in range(num_steps):
        yield rows[order[step * BATCH : (step + 1) * BATCH]]


def train(model: nn.Module, parameters: list[nn.Parameter], rows: Tensor, rate: float, steps: int, seed: int) -> None:
    """AdamW without weight decay, linear decay to zero after a rise over a tenth, clipped at 1."""
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    model.train()
    for step, batch in enumerate(batches(rows, steps, seed=seed)):
        for group in optimizer.param_groups:
            group["lr"] = rate * min((step + 1) / (steps / 10), 1 - step / steps)
        loss_fn(model, batch).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def evaluate(model: nn.Module, rows: Tensor) -> float:
    """Nats a token."""
    model.eval()
    losses = [float(loss_fn(model, part)) * len(part) for part in rows.split(4 * BATCH)]
    return sum(losses) / len(rows)


def pretrained(data: Path) -> nn.Module:
    """The model after the first text; trained once and kept among the machine's temporary files."""
    steps, rate = PRETRAINING
    path = Path(tempfile.gettempdir(), "tithe-benchmarks", f"language-{VOCABULARY}-{LENGTH}-{steps}-{rate}.safetensors")
    model = llama()
    if not path.exists():
        train(model, list(model.parameters()), texts(data)["source"], rate, steps, 0)
        path.parent.mkdir(exist_ok=True)
        state = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
        save_file(state, path)
    model.load_state_dict(load_file(path), strict=False)
    return model


def run(row: Row, rate: float, seed: int, data: Path) -> Record:
    """Fine-tune in one way and score the held-out rows."""
    split, model = texts(data), pretrained(data).to(row.weights)
    start, plan = time.process_time(), None
    torch.manual_seed(seed)
    if row.name == FULL:
        parameters = list(model.parameters())
    elif row.name == LORA:
        model = _lora(model)
        parameters = [p for p in model.parameters() if p.requires_grad]
    else:
        k = sum(p.numel() for p in _lora(llama()).parameters() if p.requires_grad)
        scored = list(batches(split["train"], SAMPLES // BATCH, seed=seed))
        method = tithe.FISH(k=k, samples=SAMPLES)
        plan = tithe.attach(model, method, loss=loss_fn, data=scored, seed=seed, dtype=row.theta)
        parameters = list(plan.parameters())
    train(model, parameters, split["train"], rate, STEPS, seed)
    result: Record = {
        "trained": sum(p.numel() for p in parameters),
        "seconds": time.process_time() - start,
        "validation": evaluate(model, split["validation"]),
        "test": evaluate(model, split["test"]),
    }
    if plan is not None:
        plan.release()
    return result


def _lora(model: nn.Module) -> nn.Module:
    import peft

    projections = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return peft.get_peft_model(model, peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=projections))


def do(row: Row, rate: float, seed: int, store: Store, data: Path) -> Record:
    """The record of a run: found, or made now."""
    fields = {"row": row.name, "rate": rate, "seed": seed}
    return store.find(**fields) or store.add({**fields, **run(row, rate, seed, data)})


def best_rate(row: Row, store: Store, data: Path) -> float:
    """The rate whose two neighbours are no better on the validation rows, found with the first seed."""
    if row.rate_of is not None:
        return best_rate(next(other for other in ROWS if other.name == row.rate_of), store, data)

    def loss(rate: float) -> float:
        found = do(row, rate, SEEDS[0], store, data)["validation"]
        return found if found == found else float("inf")

    rate = row.start
    while True:
        i = RATES.index(rate)
        best = min((RATES[j] for j in (i - 1, i + 1) if 0 <= j < len(RATES)), key=loss)
        if loss(best) >= loss(rate):
            return rate
        rate = best


def main(args: argparse.Namespace) -> None:
    """Find each row's rate, then score it with every seed."""
    torch.set_num_threads(args.threads)
    store = Store(args.results / "language.jsonl", key=("row", "rate", "seed"))
    if store.find(row="as loaded", rate=0.0, seed=0) is None:
        model, split = pretrained(args.data), texts(args.data)
        losses = {name: evaluate(model, split[name]) for name in ("validation", "test")}
        held = {"row": "as loaded", "rate": 0.0, "seed": 0, "trained": 0}
        store.add({**held, **losses, "parameters": sum(p.numel() for p in model.parameters())})
    for row in ROWS:
        rate = best_rate(row, store, args.data)
        for seed in SEEDS:
            do(row, rate, seed, store, args.data)


if __name__ == "__main__":
    main(parse(__doc__ or ""))
