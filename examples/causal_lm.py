"""Fine-tune a small language model on a text by training a part of it: `python examples/causal_lm.py [file.txt]`.

A Llama-like network reads bytes. It is built from a configuration and trained whole on a text for a start; then 5 % of
it, chosen by Fisher information, is trained on another text. Its layers are lean, and the loss runs in blocks of rows,
so that the logits never stand whole. About ten seconds on one core.
"""

import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import tithe

LENGTH, BATCH = 64, 8
BEFORE = "the north wind and the sun argued about which of them was the stronger when a traveller came along. " * 40
AFTER = (
    """Now this is the law of the library: what is borrowed is returned, and what is written is read again.
A tenth of the shelf is open at a time, and the rest of it sleeps behind glass, exactly as it was.
Whoever changes a page signs for it, and the page goes back to its place.
"""
    * 16
)


def batches(text: str) -> list[dict[str, Tensor]]:
    ids = torch.tensor(list(text.encode()))
    rows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    return [{"input_ids": part, "labels": part} for part in rows.split(BATCH)]


def loss_fn(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return tithe.causal_loss(model, batch, rows=128)


@torch.no_grad()
def mean_loss(model: nn.Module, data: list[dict[str, Tensor]]) -> float:
    return sum(float(loss_fn(model, batch)) for batch in data) / len(data)


def train(model: nn.Module, parameters: list[nn.Parameter], data: list[dict[str, Tensor]], lr: float) -> None:
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    for _ in range(3):
        for batch in data:
            loss_fn(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()


def main() -> None:
    torch.manual_seed(0)
    text = Path(sys.argv[1]).read_text("utf-8") if len(sys.argv) > 1 else AFTER
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    train(model, list(model.parameters()), batches(BEFORE), lr=3e-3)
    base = {name: value.clone() for name, value in model.state_dict().items()}

    data = batches(text)
    print(f"before fine-tuning   {mean_loss(model, data):.3f}")
    plan = tithe.attach(model, tithe.FISH(density=0.05), loss=loss_fn, data=data)
    lean = tithe.lean(model)
    train(model, list(plan.parameters()), data, lr=1e-2)
    print(f"5 % of the weights   {mean_loss(model, data):.3f}")
    ledger = plan.predict(data[0])
    print(f"one step             {ledger.peak / 1e6:.1f} MB at its peak, {ledger.kept / 1e6:.1f} MB kept")

    delta = Path(tempfile.mkdtemp()) / "delta.safetensors"
    plan.save(delta)
    plan.release()
    lean.release()
    shipped = LlamaForCausalLM(config)
    shipped.load_state_dict(base)
    tithe.apply(shipped, delta)
    print(f"base + delta         {mean_loss(shipped, data):.3f}   {delta.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
