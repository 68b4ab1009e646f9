"""Each activation, dropout and pooling alone: stock's outputs, stock's gradients or the bound, and what is kept."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import tithe
from tithe.rules import Catch, Leanness
from tithe.rules.lean.derivative_codes import SLOPES

Run = Callable[[Tensor], Tensor]

GATES: dict[str, Run] = {
    "F.relu": F.relu,
    "torch.relu": torch.relu,
    "Tensor.relu": Tensor.relu,
    "ReLU": nn.ReLU(),
    "F.relu_": lambda x: F.relu_(x * 1),
    "Tensor.relu_": lambda x: (x * 1).relu_(),
    "ReLU in place": lambda x: nn.ReLU(inplace=True)(x * 1),
    "ReLU6": nn.ReLU6(),
    "ReLU6 in place": lambda x: nn.ReLU6(inplace=True)(x * 1),
    "Hardtanh": nn.Hardtanh(-0.7, 0.3),
    "F.hardtanh_": lambda x: F.hardtanh_(x * 1),
    "clamp": lambda x: x.clamp(-0.5, 0.5),
    "clamp below": lambda x: torch.clamp(x, min=0.1),
    "clamp_min": lambda x: x.clamp_min(0),
    "clamp_max": lambda x: torch.clamp_max(x, 0.5),
    "clamp_": lambda x: (x * 1).clamp_(0, 1),
    "clip": lambda x: torch.clip(x, -1, 1),
    "LeakyReLU": nn.LeakyReLU(0.2),
    "LeakyReLU in place": lambda x: nn.LeakyReLU(0.2, inplace=True)(x * 1),
    "LeakyReLU of negative slope": nn.LeakyReLU(-0.5),
    "Hardsigmoid": nn.Hardsigmoid(),
    "Hardsigmoid in place": lambda x: nn.Hardsigmoid(inplace=True)(x * 1),
}
CODED: dict[str, tuple[Run, str, float]] = {
    "gelu": (F.gelu, "gelu", 1.0),
    "gelu_tanh": (nn.GELU(approximate="tanh"), "gelu_tanh", 1.0),
    "silu": (F.silu, "silu", 1.0),
    "silu in place": (lambda x: nn.SiLU(inplace=True)(x * 1), "silu", 1.0),
    "hardswish": (nn.Hardswish(), "hardswish", 1.0),
    "hardswish in place": (lambda x: F.hardswish(x * 1, inplace=True), "hardswish", 1.0),
    "mish": (nn.Mish(), "mish", 1.0),
    "elu": (F.elu, "elu", 1.0),
    "elu of 1.5": (nn.ELU(1.5), "elu", 1.5),
    "elu_": (lambda x: F.elu_(x * 1, 0.3), "elu", 0.3),
}
POOLS: dict[str, tuple[int, Run]] = {
    "max 1d": (1, lambda x: F.max_pool1d(x, 2)),
    "max 2d": (2, nn.MaxPool2d(3, 2, 1)),
    "max 2d dilated": (2, lambda x: F.max_pool2d(x, 3, 1, 1, 2)),
    "max 2d ceil": (2, lambda x: F.max_pool2d(x, 3, 2, 1, ceil_mode=True)),
    "max 3d": (3, lambda x: F.max_pool3d(x, 2)),
    "adaptive max 1d": (1, nn.AdaptiveMaxPool1d(3)),
    "adaptive max 2d": (2, lambda x: F.adaptive_max_pool2d(x, (3, None))),
    "adaptive max 3d": (3, lambda x: F.adaptive_max_pool3d(x, 2)),
    "avg 1d": (1, lambda x: F.avg_pool1d(x, 3, 2, 1)),
    "avg 2d": (2, lambda x: F.avg_pool2d(x, 3, 2, 1, True, False)),
    "avg 3d": (3, nn.AvgPool3d(2)),
    "adaptive avg 1d": (1, nn.AdaptiveAvgPool1d(3)),
    "adaptive avg 2d": (2, nn.AdaptiveAvgPool2d((2, 3))),
    "adaptive avg 3d": (3, nn.AdaptiveAvgPool3d((2, None, 3))),
}
each_gate = pytest.mark.parametrize("run", GATES.values(), ids=GATES)
each_code = pytest.mark.parametrize(("run", "kind", "alpha"), CODED.values(), ids=CODED)
each_pool = pytest.mark.parametrize(("axes", "run"), POOLS.values(), ids=POOLS)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])


def passes(
    run: Run, x: Tensor, gy: Tensor | None = None, *, lean: bool, exact: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, output gradient and input gradient, with the random numbers of a fixed seed."""
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    torch.manual_seed(2)
    if lean:
        with Catch(Leanness(exact=exact)):
            y = run(leaf)
        assert "Backward0" not in y.grad_fn.name() or exact or "Squeeze" in y.grad_fn.name()
    else:
        y = run(leaf)
    if gy is None:
        gy = torch.empty_like(y, requires_grad=False).normal_(generator=torch.Generator().manual_seed(0))
    return y.detach(), gy, torch.autograd.grad(y, leaf, gy)[0]


def stock_equals_lean(run: Run, x: Tensor, gy: Tensor | None = None) -> None:
    y, gy, gx = passes(run, x, gy, lean=False)
    lean_y, _, lean_gx = passes(run, x, gy, lean=True)
    for expected, found in ((y, lean_y), (gx, lean_gx)):
        assert torch.equal(expected.isnan(), found.isnan())
        assert torch.equal(expected.nan_to_num(), found.nan_to_num())
        assert found.stride() == expected.stride() or not found.numel()


def kept(run: Run, x: Tensor) -> int:
    """Bytes that one call keeps for backward, in a module that is lean."""

    class Alone(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return run(x)

    model = Alone()
    tithe.lean(model)
    return tithe.measure(lambda: model(x).sum().backward()).kept


# --- gates: one bit


@each_dtype
@each_gate
def test_gates_are_stock_at_edges_and_beyond(run: Run, dtype: torch.dtype) -> None:
    edges = torch.tensor([0.0, -0.0, 6.0, -0.7, 0.3, 0.5, -0.5, 1.0, -1.0, 3.0, -3.0, math.inf, -math.inf, 1e-30])
    x = torch.cat([edges, torch.randn(3, 33).flatten() * 3]).to(dtype)
    gy = torch.randn(x.shape).to(dtype)
    gy[1:3] = torch.tensor([math.inf, math.nan], dtype=dtype)
    stock_equals_lean(run, x, gy)


@pytest.mark.parametrize("name", ["ReLU", "clamp", "LeakyReLU", "Hardsigmoid"])
def test_what_is_not_a_number_passes_or_drops_as_in_stock(name: str) -> None:
    stock_equals_lean(GATES[name], torch.full((64,), math.nan), torch.ones(64))


@each_gate
def test_gates_in_every_layout(run: Run) -> None:
    whole = torch.randn(2, 6, 5, 4)
    last = whole.to(memory_format=torch.channels_last)
    for x in (whole, last, whole[:, ::2], whole.permute(3, 1, 0, 2), whole[..., :0], whole[0, 0, 0, 0]):
        y = run(x)
        for gy in (None, torch.randn(y.shape), torch.randn(()).expand(y.shape)):
            stock_equals_lean(run, x, gy)


@given(shape=st.lists(st.integers(0, 9), max_size=4), seed=st.integers(0, 99))
def test_relu_of_any_shape(shape: list[int], seed: int) -> None:
    stock_equals_lean(F.relu, torch.randn(shape, generator=torch.Generator().manual_seed(seed)))


@each_gate
def test_gates_keep_one_bit(run: Run) -> None:
    x = torch.randn(33, 31, requires_grad=True)
    assert kept(run, x) == (33 * 31 + 7) // 8


def test_more_than_a_chunk() -> None:
    stock_equals_lean(F.relu6, torch.randn(3, 70_001))
    stock_equals_lean(lambda x: F.dropout(x, 0.3), torch.randn(3, 70_001))


# --- slopes: eight bits


@each_dtype
@each_code
def test_codes_keep_their_bound(run: Run, kind: str, alpha: float, dtype: torch.dtype) -> None:
    x = (torch.linspace(-12, 12, 4001)).to(dtype).reshape(1, -1)
    y, gy, gx = passes(run, x, lean=False)
    lean_y, _, found = passes(run, x, gy, lean=True)
    assert torch.equal(y, lean_y)
    rounding = 2 * torch.finfo(dtype).eps if dtype != torch.float64 else 1e-6
    bound = SLOPES[kind].bound(alpha) + rounding * 1.5
    assert bool(((found - gx).abs() <= bound * gy.abs()).all())
    assert SLOPES[kind].bound() < 0.004


@each_code
def test_slopes_zero_and_one_are_exact(run: Run, kind: str, alpha: float) -> None:
    x = torch.tensor([-90.0, 90.0])
    _, gy, gx = passes(run, x, lean=True)
    assert torch.equal(gx, gy * torch.tensor([0.0, 1.0]))


@each_code
def test_slopes_are_stock_where_asked_for(run: Run, kind: str, alpha: float) -> None:
    x = torch.randn(5, 7)
    y, gy, gx = passes(run, x, lean=False)
    lean_y, _, found = passes(run, x, gy, lean=True, exact=True)
    assert torch.equal(y, lean_y)
    assert torch.equal(gx, found)


@each_code
def test_slopes_keep_a_byte(run: Run, kind: str, alpha: float) -> None:
    assert kept(run, torch.randn(33, 31, requires_grad=True)) == 33 * 31


@each_code
def test_slopes_in_every_layout(run: Run, kind: str, alpha: float) -> None:
    whole = torch.randn(2, 6, 5, 4)
    for x in (whole.to(memory_format=torch.channels_last), whole[:, ::2], whole[..., :0]):
        for given_gy in (None, torch.randn(x.shape)):
            _, gy, gx = passes(run, x, given_gy, lean=False)
            _, _, found = passes(run, x, gy, lean=True)
            assert found.stride() == gx.stride()
            assert torch.allclose(found, gx, atol=SLOPES[kind].bound(alpha) * float(gy.abs().max() if x.numel() else 0))


# --- dropout


@each_dtype
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("inplace", [False, True])
def test_dropout_is_stock_for_a_seed(dtype: torch.dtype, p: float, inplace: bool) -> None:
    def run(x: Tensor) -> Tensor:
        return F.dropout(x * 1 if inplace else x, p, True, inplace)

    whole = torch.randn(4, 6, 5, 3).to(dtype)
    for x in (whole, whole.to(memory_format=torch.channels_last), whole[:, ::2]):
        stock_equals_lean(run, x)
        stock_equals_lean(run, x, torch.randn(x.shape).to(dtype))
    state = torch.random.get_rng_state()
    passes(run, x, lean=False)
    after = torch.random.get_rng_state()
    torch.random.set_rng_state(state)
    passes(run, x, lean=True)
    assert torch.equal(after, torch.random.get_rng_state())


@pytest.mark.parametrize("last", [False, True])
def test_the_fused_dropout_of_other_devices(last: bool) -> None:
    x, gy = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 4)
    _, mask = torch.native_dropout(x.to(memory_format=torch.channels_last) if last else x, 0.3, True)
    bits = torch.ops.tithe.kept_bits.default(mask)
    expected = torch.ops.aten.native_dropout_backward.default(gy, mask, 1 / 0.7)
    assert torch.equal(torch.ops.tithe.dropout_grad.default(gy, bits, 0.3, True, mask.stride()), expected)


def test_dropout_keeps_one_bit() -> None:
    assert kept(nn.Dropout(0.1), torch.randn(33, 31, requires_grad=True)) == 128


@pytest.mark.parametrize("run", [nn.Dropout(0.5).eval(), nn.Dropout(0.0), nn.Dropout(1.0), nn.AlphaDropout(0.5)])
def test_other_dropout_is_stock(run: Run) -> None:
    x = torch.randn(4, 5, requires_grad=True)
    torch.manual_seed(0)
    expected = torch.autograd.grad((run(x) * 1).sum(), x)[0]
    torch.manual_seed(0)
    with Catch(Leanness()):
        y = run(x)
    assert torch.equal(torch.autograd.grad((y * 1).sum(), x)[0], expected)


# --- pooling


@each_dtype
@each_pool
def test_pools_are_stock(axes: int, run: Run, dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and axes == 3:
        pytest.skip("stock has no such kernel")
    whole = torch.randn(2, 3, *[9, 7, 8][:axes]).round(decimals=1).to(dtype)  # with ties
    for x in (whole, whole[0], whole.to(memory_format=torch.channels_last) if axes == 2 else whole[:, ::2]):
        stock_equals_lean(run, x)


@pytest.mark.parametrize("name", POOLS)
def test_pools_keep_a_byte_an_output_or_nothing(name: str) -> None:
    axes, run = POOLS[name]
    x = torch.randn(2, 3, *[9, 7, 8][:axes], requires_grad=True)
    assert kept(run, x) == (run(x).numel() if "max" in name else 0)


def test_indices_that_are_asked_for_are_stock() -> None:
    x = torch.randn(1, 2, 6, 6, requires_grad=True)
    with Catch(Leanness()):
        y, places = F.max_pool2d(x, 2, return_indices=True)
    assert torch.equal(places, F.max_pool2d(x, 2, return_indices=True)[1])
    assert y.grad_fn.name() == "MaxPool2DWithIndicesBackward0"


# --- in place


def test_in_place_errors_are_those_of_stock() -> None:
    x = torch.randn(3, requires_grad=True)
    with Catch(Leanness()):
        with pytest.raises(RuntimeError, match="leaf"):
            F.relu_(x)
        squared = x.exp()  # keeps its output
        F.relu_(squared)
        with pytest.raises(RuntimeError, match="modified by an inplace"):
            squared.sum().backward()


@pytest.mark.parametrize("run", [Tensor.relu_, lambda v: v.clamp_(0, 0.5), lambda v: F.dropout(v, 0.5, True, True)])
def test_in_place_on_a_part(run: Run) -> None:
    found: list[tuple[Tensor, Tensor | None]] = []
    for mode in (nullcontext(), Catch(Leanness())):
        torch.manual_seed(0)
        x = torch.randn(4, 6, requires_grad=True)
        whole = x * 2
        with mode:
            run(whole[:, 1:4])
        (whole * torch.arange(6.0)).sum().backward()
        found.append((whole.detach(), x.grad))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_an_input_without_gradient_is_stock() -> None:
    with Catch(Leanness()):
        assert F.relu(torch.randn(3)).grad_fn is None
        assert torch.equal(torch.clamp(torch.tensor([1, 5]), max=2), torch.tensor([1, 2]))
        x = torch.randn(3, requires_grad=True)
        assert torch.clamp(x, torch.zeros(3)).grad_fn.name() == "ClampBackward0"
        with torch.no_grad():
            assert F.gelu(x).grad_fn is None
