"""A second derivative is right, or a TitheError says what to do: for every row of the table of rules, and whole models.

A rule is compared with stock's operation of which the selected weights are variables: gradients, the gradients of what is
made of them, and once more.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradgradcheck
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

import tithe
from oracles import Given
from tithe import Channels, TitheError
from tithe.rules import Catch, Leanness, Rule, register, table
from tithe.rules.dispatch import _RULES, Call
from tithe.selection import Coordinates, Selection

D = torch.float64
TOLERANCE = {"rtol": 1e-9, "atol": 1e-10}
FULL, EXACT, CODED = Leanness(), Leanness(exact=True), Leanness(8)


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def derivatives(f: Callable[..., Tensor], inputs: Sequence[Tensor], orders: int = 3) -> Iterator[list[Tensor]]:
    """The gradients of f by its inputs, those of a polynomial of them, and so on; zeros where none depends on them."""
    y = f(*inputs)
    found = [y]
    for _ in range(orders):
        value = sum(((t + 0.1) ** 2).sum() + 0.3 * (t**3).sum() for t in found)
        assert isinstance(value, Tensor)
        if not value.requires_grad:
            return
        found = list(torch.autograd.grad(value, inputs, create_graph=True, allow_unused=True, materialize_grads=True))
        yield [t.detach() for t in found]


def assert_alike(found: Callable[..., Tensor], stock: Callable[..., Tensor], *inputs: Tensor) -> None:
    """All derivatives of both are the same, to the third."""
    with sdpa_kernel(SDPBackend.MATH):  # stock's other kernels have no second derivative
        expected = list(derivatives(stock, inputs))
    assert len(expected) == 3
    for one, two in zip(derivatives(found, inputs), expected, strict=True):
        torch.testing.assert_close(one, two, **TOLERANCE)


def _refused(f: Callable[..., Tensor], *inputs: Tensor) -> TitheError:
    """The error of a second derivative, which a first one, recorded or not, does not raise."""
    y = f(*inputs)
    grads = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
    plain = torch.autograd.grad(f(*inputs).square().sum(), inputs)
    for one, two in zip(grads, plain, strict=True):
        torch.testing.assert_close(one.detach(), two, rtol=1e-6, atol=1e-9)
    with pytest.raises(TitheError, match="second derivative") as error:
        sum((t.square().sum() for t in grads), start=torch.zeros((), dtype=D)).backward()
    return error.value


# --- the sparse wing: every row


class Scale(nn.Module):
    """A vector along the last axis."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x


@dataclass(frozen=True)
class Sparse:
    """A layer, its input, and what is selected of its weight."""

    family: str
    layer: nn.Module
    x: Tensor
    chosen: Selection

    @property
    def key(self) -> tuple[str, str]:
        return self.family, "channels" if isinstance(self.chosen, Channels) else "entries"


def _some(shape: tuple[int, ...], every: int = 3) -> Coordinates:
    return Coordinates(shape, torch.arange(0, math.prod(shape), every))


def _columns(shape: tuple[int, ...], *ids: int, groups: int = 1, transposed: bool = False) -> Channels:
    return Channels(shape, torch.tensor(ids), groups=groups, transposed=transposed)


class Mixed(nn.Module):
    """A linear map written x w + b."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(5, 4)), nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


ROWS, IMAGES, IDS = _randn(6, 5), _randn(2, 4, 5, 5), torch.randint(7, (3, 4))
LINEAR, CONV, BACK = "linear map", "convolution", "transposed convolution"
SPARSE = [
    Sparse(LINEAR, nn.Linear(5, 4), ROWS, _some((4, 5))),
    Sparse(LINEAR, nn.Linear(5, 4), ROWS, Coordinates((4, 5), torch.tensor([2, 7]))),
    Sparse(LINEAR, Mixed(), ROWS, _some((5, 4))),
    Sparse(LINEAR, nn.Linear(5, 4), ROWS, _columns((4, 5), 0, 3)),
    Sparse(LINEAR, Mixed(), ROWS, _columns((5, 4), 1, 2, transposed=True)),
    Sparse(CONV, nn.Conv2d(4, 6, 3, padding=1), IMAGES, _some((6, 4, 3, 3), 17)),
    Sparse(CONV, nn.Conv2d(4, 6, 3, stride=2), IMAGES, _some((6, 4, 3, 3), 2)),
    Sparse(CONV, nn.Conv2d(4, 6, 3, groups=2), IMAGES, Coordinates((6, 2, 3, 3), torch.tensor([1, 5, 20]))),
    Sparse(CONV, nn.Conv1d(4, 4, 3, groups=4), IMAGES[..., 0], _some((4, 1, 3))),
    Sparse(CONV, nn.Conv2d(4, 6, 3, padding=1), IMAGES, Coordinates.nothing((6, 4, 3, 3))),
    Sparse(CONV, nn.Conv2d(4, 6, 3, padding=1), IMAGES, _columns((6, 4, 3, 3), 0, 2)),
    Sparse(CONV, nn.Conv2d(4, 6, 3, groups=2), IMAGES, _columns((6, 2, 3, 3), 0, 2, 3, groups=2)),
    Sparse(BACK, nn.ConvTranspose2d(4, 3, 3, stride=2), IMAGES, _some((4, 3, 3, 3), 7)),
    Sparse(BACK, nn.ConvTranspose2d(4, 3, 3), IMAGES, Coordinates.nothing((4, 3, 3, 3))),
    Sparse(BACK, nn.ConvTranspose2d(4, 3, 3), IMAGES, _columns((4, 3, 3, 3), 1, 3, transposed=True)),
    Sparse("embedding", nn.Embedding(7, 5, padding_idx=1), IDS, _some((7, 5))),
    Sparse("layer norm", nn.LayerNorm(5), ROWS, _some((5,))),
    Sparse("RMS norm", nn.RMSNorm(5), ROWS, _some((5,))),
    Sparse("batch norm in evaluation mode", nn.BatchNorm2d(4).eval(), IMAGES, _some((4,))),
    Sparse("vector along the last axis", Scale(5), ROWS, _some((5,))),
]


def _pair(case: Sparse) -> tuple[Callable[..., Tensor], Callable[..., Tensor], list[Tensor]]:
    """The layer under a plan and stock's as functions of θ of its weight and its bias, and of x where that has any."""
    layer, plain = copy.deepcopy(case.layer).to(D), copy.deepcopy(case.layer).to(D)
    generator = torch.Generator().manual_seed(3)
    for one, two in zip([*layer.parameters(), *layer.buffers()], [*plain.parameters(), *plain.buffers()], strict=True):
        if one.is_floating_point():
            one.data.uniform_(0.4, 1.4, generator=generator)
            two.data.copy_(one.data)
    chosen: dict[str, Selection] = {"weight": case.chosen}
    if "bias" in dict(layer.named_parameters()):
        chosen["bias"] = _some((layer.get_parameter("bias").numel(),), 2)
    plan = tithe.attach(layer, Given(chosen))
    named = dict(plan.named_parameters())
    thetas = {name: named[name] for name, selection in chosen.items() if selection.size}
    places = {
        name: chosen[name].gather(torch.arange(p.numel(), dtype=D).view(p.shape)).long().reshape(-1)
        for name, p in plain.named_parameters()
        if name in thetas
    }
    base = {name: p.detach() for name, p in plain.named_parameters()}

    def stock(*inputs: Tensor) -> Tensor:
        values = dict(zip(thetas, inputs, strict=False))
        moved = {
            name: base[name].reshape(-1).index_copy(0, at, values[name].reshape(-1)).view(base[name].shape)
            for name, at in places.items()
        }
        return functional_call(plain, base | moved, (inputs[-1] if case.x.is_floating_point() else case.x,))

    def ours(*inputs: Tensor) -> Tensor:
        return layer(inputs[-1] if case.x.is_floating_point() else case.x)

    x = [case.x.detach().clone().requires_grad_()] if case.x.is_floating_point() else []
    return ours, stock, [*thetas.values(), *x]


@pytest.mark.parametrize("case", SPARSE, ids=lambda case: f"{case.key[0]}-{case.key[1]}".replace(" ", "_"))
def test_a_rule_is_differentiated_as_stock_is(case: Sparse) -> None:
    ours, stock, inputs = _pair(case)
    assert_alike(ours, stock, *inputs)
    x = inputs[-1]
    if case.x.is_floating_point():  # by the input alone, as a gradient penalty is
        assert_alike(lambda x: ours(x), lambda x: stock(*inputs[:-1], x), x)
        assert_alike(lambda x: ours(x.tanh()), lambda x: stock(*inputs[:-1], x.tanh()), x)  # which nobody else keeps


@pytest.mark.parametrize("case", SPARSE, ids=lambda case: f"{case.key[0]}-{case.key[1]}".replace(" ", "_"))
def test_a_gradient_asks_for_one_where_stock_does(case: Sparse) -> None:
    """Also with a gradient of the output that is a constant; a gradient of zero is one."""
    ours, stock, inputs = _pair(case)
    if not case.x.is_floating_point():
        return
    (one,), (two,) = (torch.autograd.grad(f(*inputs).sum(), inputs[-1], create_graph=True) for f in (ours, stock))
    assert one.requires_grad or not two.requires_grad


# --- the lean wing: every row


@dataclass(frozen=True)
class Lean:
    """An operation and its inputs; `names`: what an error says it is where it is refused, "" where it is right."""

    family: str
    run: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    leanness: Leanness = FULL
    names: str = ""

    def lean(self, *inputs: Tensor) -> Tensor:
        with Catch(self.leanness) as mode:
            y = self.run(*inputs)
        assert mode.served
        return y


def _again(seed: int, run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same random numbers at each call."""

    def seeded(*inputs: Tensor) -> Tensor:
        torch.manual_seed(seed)
        return run(*inputs)

    return seeded


KERNEL, BACK_KERNEL, MEAN, SPREAD = _randn(3, 4, 3, 3), _randn(4, 3, 3, 3), _randn(4), _randn(4).square() + 0.5
HEADS = _randn(2, 2, 4, 3)
SEEN = torch.zeros(4, 4, dtype=D).masked_fill_(_randn(4, 4, seed=5) > 0.4, -math.inf)
SCALE, SHIFT, CHANNELS = _randn(5) + 3, _randn(5), _randn(4) + 3
TWO, SMOOTH = "two derivatives, in place too", "smooth activation, in place too"
NORMS = "layer norm, RMS norm (also those that models write themselves)"
PRODUCT = "product of such an activation and a tensor (SwiGLU, GeGLU)"
FROZEN = "convolution with a frozen kernel"
MAXIMUM, MEANS = "maximum over windows", "mean over windows"
MAPS = "linear map with a plan's columns of an input in codes"


def _sdpa(**settings: Any) -> Callable[..., Tensor]:
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **settings)


def _planned(leanness: Leanness = FULL) -> Callable[[Tensor], Tensor]:
    layer = nn.Linear(5, 4, dtype=D)
    tithe.attach(layer, Given({"weight": _columns((4, 5), 0, 3)}))
    return layer


LEAN = [
    *(
        Lean(TWO, run, (ROWS,))
        for run in (
            F.relu,
            lambda x: torch.relu_(x * 1.5),
            F.relu6,
            F.hardtanh,
            lambda x: F.leaky_relu(x, 0.2),
            lambda x: F.leaky_relu(x * 1.5, 0.2, inplace=True),
        )
    ),
    *(Lean(SMOOTH, run, (ROWS,), names=name) for run, name in ((F.gelu, "gelu"), (F.silu, "silu"), (F.elu, "elu"))),
    Lean(SMOOTH, lambda x: F.silu(x * 1.5, inplace=True), (ROWS,), names="silu"),
    Lean(SMOOTH, lambda x: F.hardswish(x), (ROWS,), names="hardswish"),
    Lean(PRODUCT, lambda x, u: F.silu(x).detach().requires_grad_() * u + F.silu(x) * u, (ROWS, ROWS + 1), names="in a"),
    Lean("dropout", _again(1, lambda x: F.dropout(x, 0.5).square()), (ROWS,)),
    Lean("dropout", _again(1, lambda x: F.dropout(x * 1.5, 0.5, inplace=True).square()), (ROWS,)),
    Lean(MAXIMUM, lambda x: F.max_pool2d(x, 2), (IMAGES,)),
    Lean(MAXIMUM, lambda x: F.max_pool1d(x, 3, 2, 1), (IMAGES[0],)),
    Lean(MAXIMUM, lambda x: F.max_pool3d(x, 2), (IMAGES,)),
    Lean(MAXIMUM, lambda x: F.adaptive_max_pool2d(x, 2), (IMAGES,)),
    Lean(MEANS, lambda x: F.avg_pool2d(x, 2), (IMAGES,)),
    Lean(MEANS, lambda x: F.avg_pool3d(x, 2), (IMAGES,)),
    Lean(MEANS, lambda x: F.adaptive_avg_pool2d(x, (2, 3)), (IMAGES,)),
    Lean(MEANS, lambda x: F.adaptive_avg_pool3d(x, 2), (IMAGES,)),
    Lean(FROZEN, lambda x: F.conv2d(x, KERNEL, padding=1), (IMAGES,)),
    Lean(FROZEN, lambda x, b: F.conv2d(x, KERNEL, b, stride=2), (IMAGES, _randn(3))),
    Lean(FROZEN, lambda x: F.conv_transpose2d(x, BACK_KERNEL, stride=2), (IMAGES,)),
    Lean(
        "batch norm with a frozen scale in evaluation mode", lambda x: F.batch_norm(x, MEAN, SPREAD, CHANNELS), (IMAGES,)
    ),
    Lean(NORMS, lambda x, w, b: F.layer_norm(x, (5,), w, b), (ROWS, SCALE, SHIFT)),
    Lean(NORMS, lambda x: F.layer_norm(x, (5,)), (ROWS,)),
    Lean(NORMS, lambda x: F.layer_norm(x, (5,), SCALE * torch.tensor([1, 0, 1, 1, 1])), (ROWS,)),  # kept in part
    Lean(NORMS, lambda x: F.layer_norm(x, (5,), SCALE * 0), (ROWS,)),  # kept normalised
    Lean(NORMS, lambda x, w: F.rms_norm(x, (5,), w), (ROWS, SCALE)),
    Lean(NORMS, lambda x: F.layer_norm(x, (5,), SCALE), (ROWS,), CODED, "norm"),
    Lean("group norm", lambda x: F.group_norm(x, 2, CHANNELS), (IMAGES,), CODED, "norm"),
    Lean("attention", _sdpa(), (HEADS, HEADS + 1, HEADS.sin())),
    Lean("attention", lambda q: _sdpa()(q, q, q), (HEADS,)),
    Lean("attention", _sdpa(is_causal=True), (HEADS, HEADS + 1, HEADS.sin())),
    Lean("attention", _sdpa(attn_mask=SEEN), (HEADS, HEADS + 1, HEADS.sin())),
    Lean("attention", _sdpa(enable_gqa=True), (HEADS, HEADS[:, :1], HEADS[:, 1:].sin())),
    Lean("attention", _again(2, _sdpa(dropout_p=0.4)), (HEADS, HEADS + 1, HEADS.sin())),
    Lean("attention", _sdpa(), (HEADS, HEADS + 1, HEADS.sin()), EXACT),
    Lean("attention", _sdpa(), (HEADS, HEADS + 1, HEADS.sin()), CODED, "attention"),
    Lean(MAPS, _planned(), (ROWS,), CODED, "weight"),
]  # fmt: skip


def _named(case: Lean) -> str:
    return f"{case.family}-{'refused' if case.names else 'right'}".replace(" ", "_")


@pytest.mark.parametrize("case", [case for case in LEAN if not case.names], ids=_named)
def test_a_lean_operation_is_differentiated_as_stock_is(case: Lean) -> None:
    inputs = [t.clone().requires_grad_() for t in case.inputs]
    assert_alike(case.lean, case.run, *inputs)
    assert_alike(
        lambda *t: case.lean(*(1.1 * one for one in t)), lambda *t: case.run(*(1.1 * one for one in t)), *inputs
    )
    assert gradgradcheck(case.lean, inputs, fast_mode=True)


@pytest.mark.parametrize("case", [case for case in LEAN if case.names], ids=_named)
def test_codes_refuse_a_second_derivative_and_no_first_one(case: Lean) -> None:
    inputs = [t.clone().requires_grad_() for t in case.inputs]
    error = _refused(case.lean, *inputs)
    assert case.names in error.place
    assert "exact=True" in error.remedy
    # Along the gradient of the output nothing is missing: that is how a forward derivative is computed.
    gy = torch.zeros_like(case.run(*inputs), requires_grad=True)
    grads = torch.autograd.grad(case.lean(*inputs), inputs, gy, create_graph=True)
    if case.family != MAPS:
        torch.autograd.grad(grads, [gy], [torch.ones_like(g) for g in grads])


@pytest.mark.parametrize("case", [case for case in LEAN if case.names], ids=_named)
def test_the_remedy_of_codes_is_true(case: Lean) -> None:
    """With `exact=True` and without bits, or with nothing lean."""
    inputs = [t.clone().requires_grad_() for t in case.inputs]

    def exact(*inputs: Tensor) -> Tensor:
        with Catch(EXACT):
            return case.run(*inputs)

    if case.family != PRODUCT:  # a sum of two products of which one is cut off from x
        assert_alike(exact, case.run, *inputs)


def test_every_row_of_the_table_has_a_case() -> None:
    """A rule that nobody has differentiated twice does not get into the table."""
    rows = {(row.family, row.selected) for row in table() if row.handler.startswith("tithe.rules.")}
    assert rows == {case.key for case in SPARSE} | {(case.family, "") for case in LEAN}


# --- whole models


def penalty(model: Callable[..., Any], batch: Any) -> Tensor:
    """A loss with a penalty on the gradient by the input, as of WGAN-GP."""
    x, y = batch
    x = x.clone().requires_grad_()
    out = model(x)
    (grad,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    return F.mse_loss(out, y) + (grad.flatten(1).norm(dim=1) - 1).square().mean()


class Forces(nn.Module):
    """An energy, and forces as its gradient, taken inside of the forward pass."""

    def __init__(self, energy: nn.Module) -> None:
        super().__init__()
        self.energy = energy

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        positions = positions.clone().requires_grad_()
        energy = self.energy(positions).sum()
        (grad,) = torch.autograd.grad(energy, positions, create_graph=True)
        return energy, -grad


def forces(model: nn.Module, batch: Any) -> Tensor:
    energy, found = model(batch[0])
    return (found - batch[0].roll(1, 0)).square().mean() + 0.01 * energy.square()


class Block(nn.Module):
    """A block of a transformer that is checkpointed or not."""

    def __init__(self, size: int, *, checkpointed: bool) -> None:
        super().__init__()
        self.norm, self.inner, self.out = nn.LayerNorm(size), nn.Linear(size, 3 * size), nn.Linear(size, size)
        self.drop, self.checkpointed = nn.Dropout(0.3), checkpointed

    def _run(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.inner(self.norm(x)).chunk(3, -1))
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)
        return x + self.drop(F.leaky_relu(self.out(attended), 0.3))

    def forward(self, x: Tensor) -> Tensor:
        if not self.checkpointed:
            return self._run(x)
        return torch.utils.checkpoint.checkpoint(self._run, x, use_reentrant=False)


def _dense() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 16), nn.LeakyReLU(0.2), nn.LayerNorm(16), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3)
    )


def _encoder(*, checkpointed: bool = False) -> nn.Module:
    blocks = [Block(8, checkpointed=checkpointed) for _ in range(2)]
    return nn.Sequential(nn.Linear(6, 8), *blocks, nn.RMSNorm(8), nn.Linear(8, 3))


def _images() -> nn.Module:
    convolutions = [nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU6(), nn.MaxPool2d(2)]
    deeper = [nn.Conv2d(4, 6, 3, groups=2, padding=1), nn.Tanh(), nn.ConvTranspose2d(6, 4, 2), nn.AdaptiveAvgPool2d(2)]
    return nn.Sequential(*convolutions, *deeper, nn.Flatten(), nn.Linear(16, 3)).eval()


class Recurrent(nn.Module):
    """A map that is used at each step, and a table that is used in a loss too."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = nn.Linear(6 + 4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(len(x), 4)
        for _ in range(3):
            state = torch.relu_(self.cell(torch.cat([x, state], 1)))
        return self.out(state) + self.cell.weight.square().sum()


DENSE = _randn(7, 6), _randn(7, 3, seed=1)
TOKENS = _randn(3, 4, 6), _randn(3, 4, 3, seed=1)
PICTURES = _randn(3, 2, 6, 6), _randn(3, 3, seed=1)
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[..., Tensor], tuple[Tensor, Tensor]]] = {
    "dense": (_dense, penalty, DENSE),
    "encoder": (_encoder, penalty, TOKENS),
    "checkpointed": (lambda: _encoder(checkpointed=True), penalty, TOKENS),
    "images": (_images, penalty, PICTURES),
    "recurrent": (Recurrent, penalty, DENSE),
    "forces": (lambda: Forces(_dense()), forces, DENSE),
    "forces of an encoder": (lambda: Forces(_encoder()), forces, TOKENS),
}
WAYS: dict[str, Callable[[nn.Module, Any, Any], tithe.Plan]] = {
    "FISH": lambda model, loss, data: tithe.attach(model, tithe.FISH(density=0.2, score="random")),
    "FISH, lean": lambda model, loss, data: (tithe.lean(model), WAYS["FISH"](model, loss, data))[1],
    "FISH by score": lambda model, loss, data: tithe.attach(model, tithe.FISH(density=0.2), loss=loss, data=[data]),
    "TraDy": lambda model, loss, data: tithe.attach(
        model, tithe.TraDy(tithe.Budget(fraction=0.4)), loss=loss, data=[data]
    ),
    "TraDy, not lean": lambda model, loss, data: tithe.attach(
        model, tithe.TraDy(tithe.Budget(fraction=0.4), lean=False), loss=loss, data=[data]
    ),
    "bottom alone": lambda model, loss, data: (
        tithe.lean(model),
        tithe.attach(model, Given({next(n for n, p in model.named_parameters() if p.dim() > 1): torch.arange(5)})),
    )[1],
}


def _model(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name][0]().to(D)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_a_penalty_on_a_gradient_trains_as_stock_does(name: str, way: str) -> None:
    """Every θ has Sᵀ of stock's gradient, whose loss holds a derivative."""
    _, loss, data = MODELS[name]
    stock, model = _model(name), _model(name)
    with sdpa_kernel(SDPBackend.MATH):
        torch.manual_seed(1)
        expected = loss(stock, data)
        expected.backward()
    attending = "encoder" in name or name == "checkpointed"
    with sdpa_kernel(SDPBackend.MATH if attending and "FISH" in way or "not" in way else SDPBackend.FLASH_ATTENTION):
        plan = WAYS[way](model, loss, data)
        torch.manual_seed(1)
        found = loss(model, data)
        found.backward()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    dense = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in stock.named_parameters()}
    scale = max(float(grad.abs().max()) for grad in dense.values())
    checked = 0
    for key, theta in plan.named_parameters():
        if theta.numel():
            want = plan.selections[key].gather(dense[key])
            got = torch.zeros_like(want) if theta.grad is None else theta.grad
            torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10 * scale)
            checked += 1
    assert checked
