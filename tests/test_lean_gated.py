"""Gated units and touched columns of lean models: codes within their bound, and the bytes kept."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tithe
from tithe.rules import Catch, Leanness

ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "hardswish": F.hardswish}


def _unit(name: str, g: Tensor, u: Tensor, turned: bool) -> Tensor:
    a = ACTIVATIONS[name](g)
    return u * a if turned else a * u


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_gated_unit_is_within_its_bound(name: str, dtype: torch.dtype, turned: bool) -> None:
    """gu within |gy| max|a| / 254 of a block; gg within |gy| (max|u| / 254 · max|act′| + |u| times act′'s own code)."""
    g, u, gy = (2 * torch.randn(6, 256).to(dtype) for _ in range(3))
    leaves = [t.clone().requires_grad_() for t in (g, u)]
    y = _unit(name, leaves[0], leaves[1], turned)
    gg, gu = torch.autograd.grad(y, leaves, gy)
    with Catch(Leanness()):
        lean_y = _unit(name, leaves[0], leaves[1], turned)
    assert lean_y.grad_fn is not None
    assert lean_y.grad_fn.name() == "ProductBackward"
    lean_gg, lean_gu = torch.autograd.grad(lean_y, leaves, gy)
    assert torch.equal(y, lean_y)

    def largest(t: Tensor) -> Tensor:
        return t.double().view(6, 2, 128).abs().amax(2, keepdim=True).expand(6, 2, 128).reshape(6, 256)

    slack = 1.01 if dtype != torch.bfloat16 else 1.5
    rounding = 2.0**-7 if dtype == torch.bfloat16 else 1e-6
    size = gy.double().abs()
    bound = size * largest(ACTIVATIONS[name](g)) / 254
    assert bool(((lean_gu - gu).double().abs() <= slack * bound + rounding * gu.double().abs() + 1e-6).all())
    steep, own = (1.5, 0.5 / 126) if name == "hardswish" else (1.13, 0.5 / 201)
    bound = size * (largest(u) / 254 * steep + (u.double().abs() + largest(u) / 254) * own)
    assert bool(((lean_gg - gg).double().abs() <= slack * bound + 4 * rounding * gg.double().abs() + 1e-6).all())


def test_three_bytes_an_element_are_kept() -> None:
    class Unit(nn.Module):
        def forward(self, g: Tensor, u: Tensor) -> Tensor:
            return F.silu(g + 0) * (u + 0)

    g, u, model = torch.randn(8, 256, requires_grad=True), torch.randn(8, 256, requires_grad=True), Unit()

    def saved() -> int:
        return tithe.measure(lambda: model(g, u).sum().backward()).kept

    assert saved() == 3 * 4 * 8 * 256
    handle = tithe.lean(model)
    assert saved() == 3 * 8 * 256 + 2 * 4 * 8 * 256 // 128
    handle.release()
    handle = tithe.lean(model, exact=True)
    assert saved() == 3 * 4 * 8 * 256
    handle.release()


def test_other_products_are_left_to_stock() -> None:
    g, u = torch.randn(4, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)
    with Catch(Leanness()):
        products = [g * u, torch.tanh(g) * u, F.silu(g) * u[:1], F.silu(g) * 2.0, F.silu(g) * u.detach(), F.relu(g) * u]
        exact = F.silu(g)
    with Catch(Leanness(exact=True)):
        products.append(exact * u)
    assert [y.grad_fn.name() for y in products if y.grad_fn is not None] == ["MulBackward0"] * len(products)


# --- touched columns


def test_touched_columns_of_what_is_kept_anyway_cost_nothing() -> None:
    """The columns of a lean norm's output are not copied; those of a coded activation's are coded."""
    model = nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 4))
    x, y = torch.randn(128, 32), torch.randint(4, (128,))

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    found: dict[Any, list[Tensor]] = {}
    bytes_of: dict[Any, dict[str, int]] = {}
    for settings in (None, {"exact": True}, {}, {"bits": 8}):
        key = "stock" if settings is None else str(settings)
        copied = copy.deepcopy(model)
        plan = tithe.attach(copied, tithe.FISH(k=600, score="random"), loss=loss, data=[(x, y)], seed=3)
        if settings is not None:
            tithe.lean(copied, **settings)
        predicted = plan.predict((x, y))
        ledger = tithe.measure(lambda: plan.backward(lambda: loss(copied, (x, y))), model=copied)  # noqa: B023
        assert (predicted.kept, predicted.peak) == (ledger.kept, ledger.peak)
        assert predicted.kept_by_module == ledger.kept_by_module
        found[key] = [p.grad.clone() for p in plan.parameters() if p.grad is not None]
        bytes_of[key] = ledger.kept_by_module
    assert bytes_of["{}"].get("2", 0) == 0
    assert bytes_of["stock"]["2"] == 128 * 32 * 4
    assert bytes_of["{}"]["4"] < bytes_of["stock"]["4"] / 3
    assert bytes_of["{'bits': 8}"]["1"] < bytes_of["{}"]["1"] / 3
    for ours, theirs in zip(found["{'exact': True}"], found["stock"], strict=True):
        assert torch.equal(ours, theirs)
    for key in ("{}", "{'bits': 8}"):
        for ours, theirs in zip(found[key], found["stock"], strict=True):
            assert float((ours - theirs).norm()) <= 0.02 * float(theirs.norm())
