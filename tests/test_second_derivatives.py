"""A second derivative is right, or a TitheError says what to do: for every row of the table of rules, and whole models.

A rule is compared with stock's operation of which the selected weights are variables: gradients, the gradients of what
is made of them, and once more.
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
from tithe.rules.sparse.sparse_gradient import Sampled, Touch
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


@pytest.mark.parametrize("transposed", [False, True])
def test_a_sampled_product_is_differentiated_too(transposed: bool) -> None:
    """The way of a large scattered selection, whose operator autograd does not know."""
    way = Sampled(Touch.of(torch.tensor([0, 3, 7, 13]), (4, 5)), transposed)
    left = _randn(6, 5 if transposed else 4).requires_grad_()
    right = _randn(6, 4 if transposed else 5, seed=1).requires_grad_()
    with torch.no_grad():
        expected = way.grad(left, right)
    torch.testing.assert_close(way.grad(left, right), expected)
    assert gradgradcheck(way.grad, (left, right), fast_mode=True)


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
FROZEN, AFFINE = "convolution with a frozen kernel", "batch norm with a frozen scale in evaluation mode"
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
    Lean(AFFINE, lambda x: F.batch_norm(x, MEAN, SPREAD, CHANNELS), (IMAGES,)),
    Lean(NORMS, lambda x, w, b: F.layer_norm(x, (5,), w, b), (ROWS, SCALE, SHIFT)),
    Lean(NORMS, lambda x: F.layer_norm(x, (5,)), (ROWS,)),
    Lean(NORMS, lambda x: F.layer_norm(x, (5,), SCALE * torch.tensor([1, 0, 1, 1, 1])), (ROWS,)),  # kept in part
    Lean(NORMS, lambda x: F.layer_norm(x, (5,), SCALE * 0), (ROWS,)),  # kept normalised
    Lean(NORMS, lambda x, w: F.rms_norm(x, (5,), w), (ROWS, SCALE)),
    Lean(NORMS, lambda x: F.layer_norm(x, (5,), SCALE), (ROWS,), CODED, "norm"),
    Lean("group norm", lambda x: F.group_norm(x, 2, CHANNELS), (IMAGES,), CODED, "norm"),
    Lean("cross entropy", lambda x: F.cross_entropy(x, torch.arange(16), label_smoothing=0.1), (_randn(16, 256),)),
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


# --- a rule of a stranger's own


class Cubes(nn.Module):
    """The product x w³, as `torch.fmod` stands for it while a rule says so."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(_randn(5).abs() + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.fmod(x, self.weight)


class Cubed(Rule):
    """Keeps the square of x, and nothing says what that has to do with x; the first 4 of 5 are selected."""

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        return x * weight**3, ()

    def keep(self, x: Tensor, extra: tuple[Tensor, ...], need_x: bool) -> tuple[Tensor, ...]:
        return (x.square(),)

    def kept(self, kept: tuple[Tensor, ...]) -> Tensor:
        return kept[0].sqrt()

    def backward(
        self, gy: Tensor, weight: Tensor, kept: tuple[Tensor, ...], need_x: bool, need_bias: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        return gy * weight**3, None, (3 * weight**2 * gy * self.kept(kept)).sum(0)[:4], None


class CubedTwice(Cubed):
    """Keeps the columns of x."""

    twice = True

    def keep(self, x: Tensor, extra: tuple[Tensor, ...], need_x: bool) -> tuple[Tensor, ...]:
        return (x[:, :4].clone(),)

    def kept(self, kept: tuple[Tensor, ...]) -> Tensor:
        return F.pad(kept[0], (0, 1))


@pytest.fixture
def cubes() -> Iterator[tuple[Cubes, Tensor, list[type[Rule]]]]:
    """A layer under a plan, its θ, and the kind of rule that it runs by."""
    kind: list[type[Rule]] = [Cubed]
    register(torch.fmod, keeps="x²", stock="x")(
        lambda input, other: Call(lambda x, weight, bias: kind[0](), input, other)
    )
    layer = Cubes()
    plan = tithe.attach(layer, Given({"weight": torch.arange(4)}))
    yield layer, dict(plan.named_parameters())["weight"], kind
    _RULES.pop(torch.fmod)


def test_a_strangers_rule_is_refused_until_it_says_that_it_may_be_differentiated(
    cubes: tuple[Cubes, Tensor, list[type[Rule]]],
) -> None:
    layer, theta, kind = cubes
    x = (_randn(6, 5).abs() + 0.5).requires_grad_()
    error = _refused(lambda x: layer(x), x)
    assert error.place == "weight"
    assert "twice = True" in error.remedy
    (grad,) = torch.autograd.grad(layer(x).sum(), theta, create_graph=True)
    for asked in (x, theta):
        with pytest.raises(TitheError, match="second derivative"):
            torch.autograd.grad(grad.sum(), asked, retain_graph=True)
    kind[0] = CubedTwice
    last = layer.get_parameter("weight").detach()[4:]
    assert_alike(lambda theta, x: layer(x), lambda theta, x: x * torch.cat([theta, last]) ** 3, theta, x)
