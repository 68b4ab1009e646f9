"""LoRA keeps less for backward with one line: the same adapters, the same loss, fewer bytes; seconds on one core.

A small Llama, made from its configuration, learns to count: LoRA on all its linear layers, by peft. The same
training with `tithe.lean(model)` keeps a part of the activations, whatever is trained.
"""

import warnings

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import tithe

VOCABULARY, LENGTH, STEPS = 64, 48, 30


def make() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=172,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    lora = LoraConfig(r=8, lora_alpha=32, target_modules="all-linear")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of peft's, about transformers
        return get_peft_model(LlamaForCausalLM(config), lora)


def batches() -> list[Tensor]:
    """Sequences that count by one, two or three, from anywhere."""
    generator = torch.Generator().manual_seed(1)
    found: list[Tensor] = []
    for _ in range(STEPS):
        start = torch.randint(VOCABULARY, (8, 1), generator=generator)
        stride = torch.randint(1, 4, (8, 1), generator=generator)
        found.append((start + stride * torch.arange(LENGTH)) % VOCABULARY)
    return found


def loss_fn(model: nn.Module, tokens: Tensor) -> Tensor:
    return model(input_ids=tokens, labels=tokens, use_cache=False).loss


def train(*, lean: bool, bits: int | None = None) -> tuple[list[float], tithe.Ledger]:
    """Train, and return the losses and what one step needs."""
    model = make()
    if lean:
        tithe.lean(model, bits=bits)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses: list[float] = []
    for tokens in batches():
        loss = loss_fn(model, tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses, tithe.measure(lambda: loss_fn(model, batches()[0]).backward())


def main() -> None:
    print("                 first    last    kept       peak")
    for name, lean, bits in (("LoRA", False, None), ("LoRA + lean", True, None), ("LoRA + lean, 8", True, 8)):
        losses, needs = train(lean=lean, bits=bits)
        first, last = losses[0], sum(losses[-5:]) / 5
        print(f"{name:15}  {first:.3f}   {last:.3f}   {needs.kept / 1e6:.2f} MB    {needs.peak / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
