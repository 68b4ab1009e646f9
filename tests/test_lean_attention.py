"""Attention of lean models: stock's bits where it says so, the code's bound elsewhere, and the bytes kept."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tithe
from tithe.rules import Catch, Leanness

SHAPES = {"square": (2, 4, 4, 16, 16), "shared": (2, 4, 2, 16, 16), "more keys": (2, 4, 4, 5, 24)}
MASKS = ["none", "padding", "bias", "causal"]
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


def _inputs(shape: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """q, k, v as projections give them: heads beside their entries in memory."""
    samples, heads, key_heads, queries, keys = SHAPES[shape]
    sizes = ((heads, queries), (key_heads, keys), (key_heads, keys))
    return [torch.randn(samples, length, count, 8).to(dtype).transpose(1, 2) for count, length in sizes]


def _settings(shape: str, mask: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    samples, heads, key_heads, queries, keys = SHAPES[shape]
    settings: dict[str, Any] = {"enable_gqa": heads != key_heads}
    if mask == "padding":
        settings["attn_mask"] = torch.rand(samples, 1, 1, keys) > 0.3
    elif mask == "bias":
        settings["attn_mask"] = torch.randn(samples, heads, queries, keys).to(dtype)
    elif mask == "causal":
        settings["is_causal"] = True
    return settings


def _run(inputs: list[Tensor], leanness: Leanness | None, **settings: Any) -> tuple[Tensor, Tensor, list[Tensor], str]:
    """Output, the next random number, gradients, the node's name."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    torch.manual_seed(7)
    if leanness is None:
        y = F.scaled_dot_product_attention(*leaves, **settings)
    else:
        with Catch(leanness):
            y = F.scaled_dot_product_attention(*leaves, **settings)
    after = torch.rand(1)
    assert y.grad_fn is not None
    gy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    return y.detach(), after, list(torch.autograd.grad(y, leaves, gy)), y.grad_fn.name()


CALLS = list(itertools.product(SHAPES, MASKS, DTYPES))


@pytest.mark.parametrize(("shape", "mask", "dtype"), CALLS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_attention_is_stock(shape: str, mask: str, dtype: str, dropout: float) -> None:
    """With dropout always bit for bit, random numbers included; without it when asked for."""
    inputs, settings = _inputs(shape, DTYPES[dtype]), _settings(shape, mask, DTYPES[dtype])
    y, after, grads, _ = _run(inputs, None, dropout_p=dropout, **settings)
    lean_y, lean_after, lean_grads, name = _run(inputs, Leanness(exact=not dropout), dropout_p=dropout, **settings)
    assert name in ("FusedBackward", "ComposedBackward")
    assert torch.equal(y, lean_y)
    assert torch.equal(after, lean_after)
    for ours, theirs in zip(lean_grads, grads, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("shape", "mask", "dtype"), CALLS)
def test_short_attention_is_stock_within_roundings(shape: str, mask: str, dtype: str) -> None:
    inputs, settings = _inputs(shape, DTYPES[dtype]), _settings(shape, mask, DTYPES[dtype])
    y, _, grads, _ = _run(inputs, None, **settings)
    lean_y, _, lean_grads, _ = _run(inputs, Leanness(), **settings)
    assert torch.equal(y, lean_y)
    bound = {"float32": 3e-6, "float64": 1e-14, "bfloat16": 2e-2}[dtype]
    for ours, theirs in zip(lean_grads, grads, strict=True):
        assert float((ours - theirs).abs().max()) <= bound * float(theirs.abs().max())


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("mask", MASKS)
def test_gradients_from_codes_are_those_at_the_coded_point(mask: str, dropout: float) -> None:
    """q, k and v are kept to 1/254 of the largest of their block; from there on nothing is approximated."""
    inputs, settings = _inputs("square"), _settings("square", mask)
    y, _, grads, _ = _run(inputs, None, dropout_p=dropout, **settings)
    lean_y, _, lean_grads, _ = _run(inputs, Leanness(bits=8), dropout_p=dropout, **settings)
    assert torch.equal(y, lean_y)
    near: list[Tensor] = []
    for t in inputs:
        blocks = t.transpose(1, 2).reshape(-1, 128)
        step = blocks.abs().amax(1, keepdim=True) / 127
        coded = ((blocks / step).round() * step).view(t.transpose(1, 2).shape).transpose(1, 2)
        assert float((coded - t).abs().max()) <= float(t.abs().max()) / 254 * 1.001
        near.append(coded)
    _, _, at_codes, _ = _run(near, None, dropout_p=dropout, **settings)
    for ours, there, theirs in zip(lean_grads, at_codes, grads, strict=True):
        torch.testing.assert_close(ours, there, rtol=1e-4, atol=1e-5)
        assert float((ours - theirs).norm()) <= 0.02 * float(theirs.norm())


@pytest.mark.parametrize("settings", [{"scale": 0.7}, {"scale": -0.5}, {"scale": 0.0}], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_other_scales(settings: dict[str, float], dropout: float) -> None:
    inputs = _inputs("square")
    y, _, grads, _ = _run(inputs, None, dropout_p=dropout, **settings)
    lean_y, _, lean_grads, _ = _run(inputs, Leanness(), dropout_p=dropout, **settings)
    torch.testing.assert_close(lean_y, y, rtol=0, atol=0, equal_nan=True)
    for ours, theirs in zip(lean_grads, grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("order", ["heads, queries", "queries, heads"])
def test_long_rows_are_worked_on_head_by_head(order: str) -> None:
    """Products have stock's strides whatever the order in memory: its bits, where one thread multiplies each matrix.

    With several, stock shares six matrices out among them; of the one that is multiplied here a thread gets a part, and
    its sums may be rounded otherwise: by a few units in the last place of the largest.
    """
    inputs = [torch.randn(2, 3, 600, 4) for _ in range(3)]
    if order == "queries, heads":
        inputs = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in inputs]
    alone = torch.get_num_threads() == 1
    for dropout in (0.0, 0.2):
        y, _, grads, _ = _run(inputs, None, dropout_p=dropout)
        lean_y, _, lean_grads, name = _run(inputs, Leanness(bits=None if dropout else 8), dropout_p=dropout)
        assert name == ("ComposedBackward" if dropout else "FusedBackward")
        bound = 0.0 if alone or not dropout else 3e-6
        assert float((y - lean_y).abs().max()) <= bound * float(y.abs().max())
        for ours, theirs in zip(lean_grads, grads, strict=True):
            if dropout:
                assert float((ours - theirs).abs().max()) <= bound * float(theirs.abs().max())
            else:
                assert (ours - theirs).norm() <= 0.02 * theirs.norm()


def test_a_query_that_sees_nothing_has_no_gradient() -> None:
    inputs = _inputs("square")
    mask = torch.ones(2, 1, 16, 16, dtype=torch.bool)
    mask[0, 0, 3] = False
    y, _, (gq, gk, gv), _ = _run(inputs, Leanness(), attn_mask=mask, dropout_p=0.3)
    assert torch.equal(y, _run(inputs, None, attn_mask=mask, dropout_p=0.3)[0])
    assert not y[0, :, 3].any()
    assert not gq[0, :, 3].any()
    assert all(g.isfinite().all() for g in (gq, gk, gv))


def test_only_what_is_asked_for_gets_a_gradient() -> None:
    q, k, v = _inputs("square")
    for dropout in (0.0, 0.3):
        for asked in itertools.product((False, True), repeat=3):
            leaves = [t.clone().requires_grad_(need) for t, need in zip((q, k, v), asked, strict=True)]
            with Catch(Leanness()):
                y = F.scaled_dot_product_attention(*leaves, dropout_p=dropout)
            assert y.requires_grad == any(asked)
            if any(asked):
                y.sum().backward()
            assert [leaf.grad is not None for leaf in leaves] == list(asked)


def test_what_is_left_to_stock() -> None:
    q, k, v = (t.requires_grad_() for t in _inputs("square"))
    learned = torch.zeros(1, 4, 16, 16, requires_grad=True)
    with Catch(Leanness()):
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=learned)
        three = F.scaled_dot_product_attention(q[0], k[0], v[0])
        long = F.scaled_dot_product_attention(*(t.repeat(1, 1, 4, 1) for t in (q, k, v)))  # 64 keys, 4 × 8 entries
    assert all("FusedBackward" not in str(t.grad_fn) and "Composed" not in str(t.grad_fn) for t in (y, three, long))
    y.sum().backward()
    assert learned.grad is not None


class _Pool(nn.Module):
    """A learned query and a learned bias of the scores."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.bias = nn.Parameter(torch.randn(2, 4, 1, 8)), nn.Parameter(torch.randn(1, 4, 1, 16))
        self.keys = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        keys = self.keys(x).unsqueeze(1).expand(-1, 4, -1, -1)
        pooled = F.scaled_dot_product_attention(self.query, keys, keys)
        return F.scaled_dot_product_attention(pooled, keys, keys, attn_mask=self.bias)


def test_a_plan_trains_learned_queries_and_biases() -> None:
    model, x = _Pool(), torch.randn(2, 16, 8)

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).square().mean()

    found: list[dict[str, Tensor]] = []
    for lean in (False, True):
        plan = tithe.attach(model, tithe.FISH(k=60, score="random"), loss=loss, data=[x])
        handle = tithe.lean(model) if lean else None
        plan.backward(lambda: loss(model, x))
        found.append({name: p.grad.clone() for name, p in plan.named_parameters() if p.grad is not None})
        if handle is not None:
            handle.release()
        plan.release()
    assert {"query", "bias"} <= found[0].keys() == found[1].keys()
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-4, atol=1e-6)


class _Attend(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q + 0, k + 0, v + 0, dropout_p=self.dropout)


def test_bytes_kept() -> None:
    """q, k, v; with dropout a bit for each of their products besides; in codes a byte and 1/32."""
    inputs = [torch.randn(2, 4, 32, 8, requires_grad=True) for _ in range(3)]
    tensor, products = 2 * 4 * 32 * 8, 2 * 4 * 32 * 32

    def kept(dropout: float, **lean: Any) -> int:
        model = _Attend(dropout)
        handle = tithe.lean(model, **lean)
        saved = tithe.measure(lambda: model(*inputs).sum().backward()).kept
        handle.release()
        return saved

    assert kept(0.0) == kept(0.0, exact=True) == 3 * 4 * tensor
    assert kept(0.3) == 3 * 4 * tensor + products // 8
    assert kept(0.0, bits=8) == 3 * (tensor + 4 * tensor // 128)
    assert kept(0.3, bits=8) == 3 * (tensor + 4 * tensor // 128) + products // 8
    stock = tithe.measure(lambda: _Attend(0.3)(*inputs).sum().backward()).kept
    assert stock >= 3 * 4 * products


def test_under_autocast_it_runs_in_the_lower_precision() -> None:
    inputs = [torch.randn(2, 4, 16, 8, requires_grad=True) for _ in range(3)]
    for dropout in (0.0, 0.3):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y, _, grads, _ = _run(inputs, None, dropout_p=dropout)
            lean_y, _, lean_grads, _ = _run(inputs, Leanness(), dropout_p=dropout)
        assert lean_y.dtype == y.dtype == torch.bfloat16
        assert torch.equal(y, lean_y)
        for ours, theirs in zip(lean_grads, grads, strict=True):
            assert ours.dtype == theirs.dtype
            assert float((ours - theirs).abs().max()) <= 0.02 * float(theirs.abs().max())
