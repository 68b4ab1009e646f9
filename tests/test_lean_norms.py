"""Norms of lean models: from their output within a few roundings, from codes within half a step of the code."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import tithe
from tithe.rules import Catch, Leanness

U = {torch.float32: 2.0**-24, torch.float64: 2.0**-53, torch.bfloat16: 2.0**-8}
DTYPES = pytest.mark.parametrize("dtype", list(U), ids=["float32", "float64", "bfloat16"])
Run = tuple[Tensor, Tensor, list[Tensor]]


def _run(module: nn.Module, x: Tensor, gy: Tensor, leanness: Leanness | None) -> Run:
    """Output, input gradient, gradients of the trained parameters."""
    x = x.detach().clone().requires_grad_()
    module.zero_grad()
    if leanness is None:
        y = module(x)
    else:
        with Catch(leanness):
            y = module(x)
    y.backward(gy)
    assert x.grad is not None
    return y.detach(), x.grad, [p.grad.clone() for p in module.parameters() if p.grad is not None]


def _drawn(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(torch.rand_like(p) + 0.5 if name == "weight" else 0.3 * torch.randn_like(p))
    return module


def _close(a: Tensor, b: Tensor, bound: float) -> None:
    """Within `bound` of the largest."""
    assert float((a.double() - b.double()).abs().max()) <= bound * float(b.double().abs().max()) + 1e-30


NORMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "layer": (lambda: nn.LayerNorm(96), (4, 5, 96)),
    "two axes": (lambda: nn.LayerNorm((6, 8)), (5, 6, 8)),
    "no shift": (lambda: nn.LayerNorm(96, bias=False), (7, 96)),
    "no scale": (lambda: nn.LayerNorm(96, elementwise_affine=False), (7, 96)),
    "rms": (lambda: nn.RMSNorm(96), (4, 5, 96)),
    "rms, own epsilon": (lambda: nn.RMSNorm(96, eps=1e-3), (4, 5, 96)),
    "group": (lambda: nn.GroupNorm(3, 12), (3, 12, 4, 5)),
}


@DTYPES
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("name", NORMS)
def test_a_norm_from_its_output_is_stock_within_roundings(name: str, trained: bool, dtype: torch.dtype) -> None:
    make, shape = NORMS[name]
    module = _drawn(make()).to(dtype).requires_grad_(trained)
    x, gy = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    y, gx, grads = _run(module, x, gy, None)
    lean_y, lean_gx, lean_grads = _run(module, x, gy, Leanness())
    assert torch.equal(y, lean_y)
    _close(lean_gx, gx, 64 * U[dtype])
    for ours, theirs in zip(lean_grads, grads, strict=True):
        _close(ours, theirs, (64 if dtype != torch.bfloat16 else 12) * U[dtype])


@given(shift=st.floats(0, 100), seed=st.integers(0, 99), dtype=st.sampled_from(list(U)))
def test_the_normalised_value_taken_from_the_output_is_within_its_bound(
    shift: float, seed: int, dtype: torch.dtype
) -> None:
    """With one row and gy = 1 the gradient of the scale is x̂; the bound counts stock's own rounding too."""
    generator = torch.Generator().manual_seed(seed)
    width = 64
    weight = (torch.randn(width, generator=generator) * 0.5).to(dtype)
    bias = (shift * torch.randn(width, generator=generator)).to(dtype)
    x = torch.randn(1, width, generator=generator).to(dtype).requires_grad_()
    leaf = weight.clone().requires_grad_()
    with Catch(Leanness()):
        F.layer_norm(x, (width,), leaf, bias).sum().backward()
    exact = F.layer_norm(x.detach().double(), (width,))[0]
    ratio = torch.where(weight == 0, torch.inf, bias.double() / weight.double()).abs()
    most = 8.0 if dtype == torch.bfloat16 else 256.0
    ratio = ratio.where(ratio <= most, 0.0)  # beyond, x̂ is kept
    assert leaf.grad is not None
    assert bool(((leaf.grad.double() - exact).abs() <= 8 * U[dtype] * (exact.abs() + ratio) + 4 * U[dtype]).all())


def test_scales_next_to_zero_keep_the_normalised_value() -> None:
    for zeros in ([3], list(range(96))):
        module = _drawn(nn.LayerNorm(96))
        with torch.no_grad():
            module.weight[zeros] = 0.0
            module.weight[5] = 1e-30
        x, gy = torch.randn(20, 96), torch.randn(20, 96)
        _, gx, grads = _run(module, x, gy, None)
        _, lean_gx, lean_grads = _run(module, x, gy, Leanness())
        torch.testing.assert_close(lean_gx, gx, rtol=1e-5, atol=1e-6)
        for ours, theirs in zip(lean_grads, grads, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        with torch.no_grad():
            module.weight.fill_(1.0)  # another version: looked at again
        x = x.clone().requires_grad_()
        ledger = tithe.measure(lambda: _run(module, x, gy, Leanness()))  # noqa: B023
        assert ledger.kept == 20 * 96 * 4 + 20 * 4  # the output and 1/σ


@pytest.mark.parametrize("name", ["layer", "rms", "group"])
def test_the_normalised_value_in_codes_is_within_half_a_step(name: str) -> None:
    make, shape = NORMS[name]
    module = _drawn(make())
    x = torch.randn(1, *shape[1:]) if name == "group" else torch.randn(1, shape[-1])
    gy = torch.randn(x.shape)
    y, gx, (gw, *_) = _run(module, x, gy, None)
    lean_y, lean_gx, (lean_gw, *_) = _run(module, x, gy, Leanness(bits=8))
    assert torch.equal(y, lean_y)
    normal = {"layer": F.layer_norm(x, x.shape[1:]), "rms": F.rms_norm(x, x.shape[1:]), "group": F.group_norm(x, 3)}[
        name
    ]
    error = float(normal.abs().max()) / 254 * 1.001
    assert float((lean_gw - gw).abs().max()) <= error * float(
        gy.flatten(2).abs().sum(-1).max() if name == "group" else gy.abs().max()
    )
    h = gy * (module.weight.view(-1, 1, 1) if name == "group" else module.weight)
    rows = (3, -1) if name == "group" else (1, -1)
    h, normal, difference = (t.reshape(rows) for t in (h, normal, lean_gx - gx))
    deviation = (
        x.reshape(rows).square().mean(1, keepdim=True)
        if name == "rms"
        else x.reshape(rows).var(1, correction=0, keepdim=True)
    ).sqrt()
    mean, size = (h * normal).mean(1, keepdim=True).abs(), h.abs().mean(1, keepdim=True)
    bound = error * (mean + normal.abs() * size + error * size) / deviation
    assert bool((difference.abs() <= 1.01 * bound + 1e-6).all())


def test_the_output_is_shared_with_the_layer_that_keeps_it() -> None:
    """LayerNorm and a trained Linear behind it: the norm's own input is not kept."""
    norm, linear = nn.LayerNorm(64).requires_grad_(False), nn.Linear(64, 8)
    x = torch.randn(32, 64, requires_grad=True)
    model = nn.Sequential(norm, linear)

    def step() -> None:
        model(x + 0).sum().backward()

    stock = tithe.measure(step).kept
    handle = tithe.lean(model)
    lean = tithe.measure(step).kept
    handle.release()
    coded = tithe.lean(model, bits=8)
    codes = tithe.measure(step).kept
    coded.release()
    tensor, row = 32 * 64 * 4, 32 * 4
    assert stock == 2 * tensor + 2 * row
    assert lean == tensor + row
    assert codes == tensor + row + 32 * 64 + 32 * 64 // 128 * 4


def test_exact_leaves_the_norm_to_stock() -> None:
    x = torch.randn(3, 8, requires_grad=True)
    with Catch(Leanness(exact=True)):
        y = F.layer_norm(x, (8,))
    assert y.grad_fn is not None
    assert y.grad_fn.name() == "NativeLayerNormBackward0"
    with Catch(Leanness()):
        assert F.layer_norm(x.detach(), (8,)).grad_fn is None
    with Catch(Leanness(bits=8, exact=True)):  # exact is about activations where norms are to be coded
        y = F.layer_norm(x, (8,))
    assert "NativeLayerNorm" not in str(y.grad_fn)
    with Catch(Leanness()):
        assert F.layer_norm(x[:0], (8,)).shape == (0, 8)


def test_an_output_changed_in_place_is_named() -> None:
    x = torch.randn(3, 8, requires_grad=True)
    with Catch(Leanness()):
        y = F.layer_norm(x, (8,))
    y.mul_(2)
    with pytest.raises(tithe.TitheError, match="changed in place"):
        y.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_frozen_batch_norm_in_evaluation_mode_keeps_no_activation(dtype: torch.dtype) -> None:
    """Also where autocast hands bfloat16 to a norm in float32."""
    model = nn.BatchNorm2d(6).eval().requires_grad_(False)
    model.running_mean.normal_()
    model.running_var.uniform_(0.5, 2)
    x, gy = torch.randn(4, 6, 5, 5).to(dtype), torch.randn(4, 6, 5, 5).to(dtype)
    y, gx, _ = _run(model, x, gy, None)
    lean_y, lean_gx, _ = _run(model, x, gy, Leanness())
    assert torch.equal(y, lean_y)
    assert lean_gx.dtype == dtype
    torch.testing.assert_close(lean_gx, gx, rtol=4 * U[dtype], atol=U[dtype])
    handle = tithe.lean(model)
    assert tithe.measure(lambda: model(x.clone().requires_grad_()).sum().backward()).kept == 6 * 4
    handle.release()


# --- norms that models write themselves


def _own() -> dict[str, nn.Module]:
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
    from transformers.models.t5.modeling_t5 import T5LayerNorm

    return {kind.__name__: _drawn(kind(48)) for kind in (LlamaRMSNorm, Qwen2RMSNorm, T5LayerNorm, GemmaRMSNorm)}


@DTYPES
@pytest.mark.parametrize("name", ["LlamaRMSNorm", "Qwen2RMSNorm", "T5LayerNorm", "GemmaRMSNorm"])
def test_norms_that_models_write_are_recognised(name: str, dtype: torch.dtype) -> None:
    module = _own()[name].to(dtype)
    before = dict(module.__dict__)
    x, gy = torch.randn(4, 5, 48).to(dtype), torch.randn(4, 5, 48).to(dtype)
    y, gx, (gw,) = _run(module, x, gy, None)
    handle = tithe.lean(module)
    for lean in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        lean_y, lean_gx, (lean_gw,) = _run(lean, x, gy, Leanness())
        assert torch.equal(y, lean_y)
        wide = torch.float32 if dtype == torch.float64 else dtype  # they compute in float32
        _close(lean_gx, gx, 64 * U[wide])
        _close(lean_gw, gw, (64 if dtype != torch.bfloat16 else 12) * U[wide])
    size, rows = x.numel() * x.element_size(), 20 * (8 if dtype == torch.float64 else 4)
    assert tithe.measure(lambda: module(x.clone().requires_grad_()).sum().backward()).kept == size + rows
    handle.release()
    assert module.__dict__.keys() == before.keys()
    assert not module._forward_hooks
    assert not module._forward_pre_hooks


def test_other_modules_keep_their_forward() -> None:
    class HalfRMSNorm(nn.Module):
        """Twice the norm of half of the input."""

        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-6

        def forward(self, x: Tensor) -> Tensor:
            return 2 * F.rms_norm(x, (8,), self.weight, self.eps)

    class Two(HalfRMSNorm):
        """Wants a second argument."""

        def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
            return F.rms_norm(x * gate, (8,), self.weight, self.eps)

    model = nn.ModuleList([HalfRMSNorm(), Two(), nn.RMSNorm(8), nn.LayerNorm(8)])
    handle = tithe.lean(model)
    assert not any("forward" in module.__dict__ for module in model.modules())
    handle.release()


def test_selected_scales_and_shifts_get_their_gradient_from_the_output() -> None:
    model = nn.Sequential(nn.Linear(16, 32), _drawn(nn.LayerNorm(32)), nn.Linear(32, 3))
    x, y = torch.randn(9, 16), torch.randint(3, (9,))

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    found: list[list[Tensor]] = []
    for lean in (False, True):
        plan = tithe.attach(model, tithe.FISH(k=400, score="random"), loss=loss, data=[(x, y)], seed=1)
        assert plan.selections["1.weight"].size
        assert plan.selections["1.bias"].size
        handle = tithe.lean(model) if lean else None
        plan.backward(lambda: loss(model, (x, y)))
        found.append([p.grad.clone() for p in plan.parameters() if p.grad is not None])
        if handle is not None:
            handle.release()
        plan.release()
    for ours, theirs in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
