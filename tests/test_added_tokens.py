"""A user's method of ten lines trains the rows of added tokens and nothing else, in tied and in separate tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import tithe
from tithe.testing import check_method

OLD, NEW, WIDTH = 60, 1000, 16


@dataclass(frozen=True)
class AddedTokens(tithe.SparseMethod):
    """As on the page of own methods."""

    old: int
    new: int

    def choose(self, context: tithe.SelectionContext) -> Mapping[str, tithe.Selection]:
        rows = torch.arange(self.old, self.old + self.new)
        tables = [name for name, shape in context.shapes.items() if shape[0] == self.old + self.new]
        return {name: tithe.Grid(context.shapes[name], {0: rows}) for name in tables}


def make(architecture: str, tied: bool) -> nn.Module:
    torch.manual_seed(0)
    tokens: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": tied, "vocab_size": OLD}
    if architecture == "GPT-2":
        dropout = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
        model: Any = GPT2LMHeadModel(GPT2Config(**tokens, **dropout, n_embd=WIDTH, n_layer=1, n_head=2, n_positions=32))
    else:
        sizes = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(**tokens, **sizes))
    model.resize_token_embeddings(OLD + NEW, mean_resizing=False)
    return model


def loss_fn(model: Any, batch: Tensor) -> Tensor:
    return model(input_ids=batch, labels=batch, use_cache=False).loss


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(OLD + NEW, (4, 16), generator=generator) for _ in range(3)]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "apart"])
@pytest.mark.parametrize("architecture", ["GPT-2", "Llama"])
def test_the_rows_of_added_tokens_are_trained_and_paid_for_alone(architecture: str, tied: bool, tmp_path: Path) -> None:
    model = make(architecture, tied)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plan = tithe.attach(model, AddedTokens(OLD, NEW), loss=loss_fn, data=batches())
    tables = 1 if tied else 2
    rows = tables * NEW * WIDTH * 4
    assert [tuple(parameter.shape) for parameter in plan.parameters()] == [(NEW, WIDTH)] * tables
    predicted = plan.predict(batches()[0])
    assert (predicted.theta, predicted.gradients, predicted.optimizer) == (rows, rows, 2 * rows)

    optimizer = torch.optim.AdamW(plan.parameters(), lr=0.01, weight_decay=0.1)
    for batch in batches():
        loss_fn(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    moments = [s for state in optimizer.state.values() for s in state.values() if s.dim()]
    assert sum(moment.nbytes for moment in moments) == predicted.optimizer
    for name, value in model.state_dict().items():
        is_table = value.dim() == 2 and value.shape[0] == OLD + NEW
        assert torch.equal(value[:OLD] if is_table else value, before[name][:OLD] if is_table else before[name]), name
        assert not is_table or not torch.equal(value[OLD:], before[name][OLD:])

    plan.save(tmp_path / "tokens.safetensors")
    plan.release()
    fresh = make(architecture, tied)
    tithe.apply(fresh, tmp_path / "tokens.safetensors")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in fresh.state_dict().items())


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "apart"])
def test_the_gradient_of_a_row_is_the_whole_models(tied: bool) -> None:
    model, whole = make("Llama", tied), make("Llama", tied)
    plan = tithe.attach(model, AddedTokens(OLD, NEW), loss=loss_fn, data=batches())
    loss_fn(model, batches()[0]).backward()
    loss_fn(whole, batches()[0]).backward()
    expected = dict(whole.named_parameters())
    for name, theta in plan.named_parameters():
        torch.testing.assert_close(theta.grad, expected[name].grad[OLD:], rtol=1e-5, atol=1e-7)


def test_the_method_keeps_its_contract() -> None:
    check_method(AddedTokens(OLD, NEW), lambda: make("GPT-2", True), loss_fn, batches())
