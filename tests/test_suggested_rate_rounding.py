"""Suggested rates where numbers are coarse: half precision, autocast, lean layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tithe
from models import CASES, Batch
from test_suggested_rate import F64, assert_leaves_no_trace
from tithe import FISH


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_it_is_near(dtype: torch.dtype) -> None:
    case = CASES["bert"]
    batch = case.batch(8)
    rates: list[float] = []
    for model in (case.model().to(dtype).float(), case.model().to(dtype)):
        plan = tithe.attach(model, FISH(density=0.2, score="random"), loss=case.loss, head=case.head)
        rates.append(plan.suggest_lr(batch))
    assert rates[1] == pytest.approx(rates[0], rel=0.3)


def test_under_autocast_it_is_near() -> None:
    case = CASES["bert"]
    model, batch = case.model().to(torch.bfloat16).float(), case.batch(8)  # weights that autocast does not round
    plan = tithe.attach(model, FISH(density=0.2, score="random"), loss=case.loss, head=case.head)
    rate = plan.suggest_lr(batch)
    with torch.autocast("cpu", torch.bfloat16):
        assert plan.suggest_lr(batch) == pytest.approx(rate, rel=0.3)


@pytest.mark.parametrize("name", ["bert", "resnet_basic"])
def test_autocast_inside_of_the_loss_counts_as_much_as_around_the_call(name: str) -> None:
    case = CASES[name]
    model, batch = case.model(), case.batch(8)

    def loss(given: nn.Module, batch: Batch) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return case.loss(given, batch)

    plan = tithe.attach(model, FISH(density=0.2, score="random"), loss=loss, head=case.head)
    rate = plan.suggest_lr(batch)
    with torch.autocast("cpu", torch.bfloat16):
        assert plan.suggest_lr(batch) == rate


class Rounding(nn.Module):
    """Linear layers in half precision, whose norms are trained in float32."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(3))
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        for layer in self.layers.parameters():
            layer.data = torch.randn(layer.shape, generator=generator).mul(0.4).bfloat16().to(dtype)
            layer.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = layer(norm(x.float()).to(layer.weight.dtype)).tanh()  # pyright: ignore
        return x.float().square().mean() + (x.float().mean() - 2).square()


def test_what_is_computed_in_half_precision_counts_though_what_is_trained_is_not() -> None:
    x, rates = torch.randn(64, 16, generator=torch.Generator().manual_seed(0)), list[float]()
    for dtype in (torch.float32, torch.bfloat16):
        plan = tithe.attach(Rounding(dtype), FISH(k=96, score="magnitude"), loss=lambda m, x: m(x))
        rates.append(plan.suggest_lr(x))
    assert rates[1] == pytest.approx(rates[0], rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("settings", [{}, {"bits": 8}])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "convnext"])
def test_lean_layers_keep_nothing_in_codes_meanwhile(name: str, settings: Any, dtype: torch.dtype) -> None:
    """A code's error does not shrink with the step, whose difference of gradients would be all error."""
    case = CASES[name]
    batch = case.batch(dtype=dtype)
    rates: list[float] = []
    for lean in (False, True):
        model = case.model(dtype=dtype)
        if lean:
            tithe.lean(model, **settings)
        plan = tithe.attach(model, FISH(density=0.3, score="random"), loss=case.loss, head=case.head)
        rates.append(plan.suggest_lr(batch))
    assert rates[1] == pytest.approx(rates[0], rel=1e-2)


def test_parts_that_are_lean_apart_count_and_are_lean_again_afterwards() -> None:
    case = CASES["bert"]
    model, batch = case.model(), case.batch()
    exact = tithe.attach(case.model(), FISH(density=0.3, score="random"), loss=case.loss).suggest_lr(batch)
    layers = [m for m in model.modules() if type(m).__name__ == "BertLayer"]
    assert len(layers) > 1
    for layer in layers:
        tithe.lean(layer, 8)
    plan = tithe.attach(model, FISH(density=0.3, score="random"), loss=case.loss)
    kept = tithe.measure(lambda: case.loss(model, batch).backward()).kept
    assert plan.suggest_lr(batch) == pytest.approx(exact, rel=1e-2)
    assert tithe.measure(lambda: case.loss(model, batch).backward()).kept == kept


def test_under_autocast_no_cast_of_the_weights_is_left() -> None:
    """autocast casts a weight once in a region; two calls and a forward pass in one have to see three values."""
    case = CASES["bert"]
    model, batch = case.model(), case.batch(8)
    plan = tithe.attach(model, FISH(density=0.2, score="random"), loss=case.loss, head=case.head)
    with torch.autocast("cpu", torch.bfloat16):
        before = case.loss(model, batch)
        assert plan.suggest_lr(batch) == plan.suggest_lr(batch)
        assert torch.equal(case.loss(model, batch), before)


def test_a_weight_with_a_head_in_half_precision_has_masters_for_both() -> None:
    case = CASES["bert"]
    model, batch = case.model().bfloat16(), case.batch(8)
    plan = tithe.attach(model, FISH(density=0.2, score="random"), loss=case.loss, head=case.head)
    optimizer = torch.optim.AdamW(plan.parameters(), lr=1e-4)
    plan.backward(lambda: case.loss(model, batch))
    optimizer.step()
    optimizer.zero_grad()
    assert_leaves_no_trace(plan, batch, optimizer)
