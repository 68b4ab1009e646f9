"""What one training step of a causal language model costs: peak beyond the weights, bytes kept, CPU time.

A Llama-like model of 109.5 million bf16 parameters (12 layers, 768 wide, 32,000 tokens, tied embeddings, random
weights), 8 sequences of 512 tokens of real SST-2 text, AdamW. LoRA of rank 8 is on every linear layer of the blocks;
FISH trains as many of their weights, by Fisher scores of the batch. Steps are taken in turn, one of each method; CPU
seconds are medians. Then the loss alone: 512 rows of hidden states, head and cross-entropy.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import tithe
from benchmarks.records import Store, parse
from benchmarks.text import Batch
from benchmarks.timing import packed_batch

SIZE, LENGTH, VOCABULARY, RANK, ROUNDS = 8, 512, 32_000, 8, 3
ALONE = 512
BLOCKS = (32, 64, 128, 1024)
BLOCK_WEIGHTS = ["*_proj.weight"]


def llama(num_layers: int = 12) -> LlamaForCausalLM:
    """The model in bf16; the same weights at each call."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=num_layers,
        num_attention_heads=12,
        num_key_value_heads=12,
        tie_word_embeddings=True,
        use_cache=False,
    )
    model: Any = LlamaForCausalLM(config)
    return model.to(torch.bfloat16).train()


def own_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The model's own loss, as every trainer takes it."""
    return model(**batch).loss


@dataclass
class Trainee:
    """A model ready to train.

    Args:
        model: the model.
        parameters: what the optimizer gets.
        loss: of a model and a batch.
    """

    model: nn.Module
    parameters: list[nn.Parameter]
    loss: Callable[[nn.Module, Batch], Tensor]
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5)

    def step(self, batch: Batch) -> None:
        """Forward, backward, optimizer, zero_grad."""
        self.loss(self.model, batch).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    @property
    def num_trained(self) -> int:
        """Numbers that the optimizer moves."""
        return sum(parameter.numel() for parameter in self.parameters)


def full() -> Trainee:
    """Every weight."""
    model = llama()
    return Trainee(model, list(model.parameters()), own_loss)


def lora(
    loss: Callable[[nn.Module, Batch], Tensor] = own_loss,
    *,
    lean: bool = False,
    checkpointing: bool = False,
    half: bool = False,
) -> Trainee:
    """LoRA on every linear layer but the head, PEFT's defaults; `half`: adapters in bf16 instead of float32."""
    model = llama()
    config = peft.LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(model, config, autocast_adapter_dtype=not half)
    if checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    if lean:
        tithe.lean(wrapped)
    return Trainee(wrapped, [p for p in wrapped.parameters() if p.requires_grad], loss)


_scored: list[dict[str, Any]] = []


def fish(batch: Batch, num_weights: int, *, bits: int | None = None) -> Trainee:
    """As many weights of the blocks as LoRA trains, by their Fisher information over the batch, scored once."""
    model = llama()
    method = tithe.FISH(k=num_weights, samples=SIZE)
    state = _scored[0] if _scored else None
    plan = tithe.attach(model, method, loss=tithe.causal_loss, data=[batch], where=BLOCK_WEIGHTS, state=state)
    _scored[:] = [plan.state_dict()]
    tithe.lean(model, bits)
    return Trainee(model, list(plan.parameters()), tithe.causal_loss)


def trainees(batch: Batch) -> dict[str, Callable[[], Trainee]]:
    """Every contestant, by its name in the tables."""
    made = lora()
    num_weights = made.num_trained
    del made
    return {
        "full": full,
        "LoRA": lora,
        "LoRA, bf16 adapters": partial(lora, half=True),
        "LoRA, checkpointing": partial(lora, checkpointing=True),
        "LoRA, lean, causal_loss": partial(lora, tithe.causal_loss, lean=True),
        "FISH, lean, causal_loss": partial(fish, batch, num_weights),
        "FISH, lean 8 bits, causal_loss": partial(fish, batch, num_weights, bits=8),
    }


def steps(store: Store, batch: Batch) -> None:
    """Measure steps of every method in turn: bytes and CPU seconds, whose counting takes a thousandth of a step."""
    makers = trainees(batch)
    ready: dict[str, Trainee] = {}
    for number in range(ROUNDS):
        for name, make in makers.items():
            if store.find(what="step", method=name, number=number) is not None:
                continue
            if name not in ready:
                ready[name] = make()
                gc.collect()
            trainee = ready[name]
            start = time.process_time()
            ledger = tithe.measure(lambda t=trainee: t.step(batch), model=trainee.model)
            seconds = time.process_time() - start
            row = {"what": "step", "method": name, "number": number, "cpu_s": seconds, "trained": trainee.num_trained}
            row |= {"peak_bytes": ledger.peak, "saved_bytes": ledger.kept, "by_kind": dict(ledger.by_kind)}
            store.add(row)


def alone(store: Store, batch: Batch) -> None:
    """Measure head and cross-entropy of one sequence: a model without layers, whose input is what the head is given."""
    model = llama(0)
    states = torch.randn(1, ALONE, 768).to(torch.bfloat16)
    labels = batch["input_ids"][:1]
    ways: dict[str, Callable[[nn.Module, Batch], Tensor]] = {"stock": own_loss}
    ways |= {f"causal_loss, rows={rows}": partial(tithe.causal_loss, rows=rows) for rows in BLOCKS}
    for head in ("frozen", "trained"):
        model.requires_grad_(False)
        model.lm_head.weight.requires_grad_(head == "trained")
        for name, loss in ways.items():
            if store.find(what=f"loss, head {head}", method=name, number=-1) is not None:
                continue

            def work(loss: Callable[[nn.Module, Batch], Tensor] = loss) -> None:
                model.zero_grad()
                loss(model, {"inputs_embeds": states.clone().requires_grad_(), "labels": labels}).backward()

            work()
            seconds: list[float] = []
            for _ in range(ROUNDS):
                start = time.process_time()
                work()
                seconds.append(time.process_time() - start)
            ledger = tithe.measure(work, model=model)
            store.add(
                {
                    "what": f"loss, head {head}",
                    "method": name,
                    "number": -1,
                    "peak_bytes": ledger.peak,
                    "saved_bytes": ledger.kept,
                    "cpu_s": sorted(seconds)[ROUNDS // 2],
                }
            )


def main(args: argparse.Namespace) -> None:
    """Measure what is missing, and append it."""
    torch.set_num_threads(args.threads)
    store = Store(args.results / "causal.jsonl", key=("what", "method", "number"))
    packed = packed_batch(args.data, size=SIZE, length=LENGTH)
    batch = {"input_ids": packed["input_ids"], "labels": packed["input_ids"]}
    alone(store, batch)
    steps(store, batch)


if __name__ == "__main__":
    main(parse(__doc__ or ""))
