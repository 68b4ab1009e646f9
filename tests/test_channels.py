"""Whole input channels: the selection, the rule against graft and autograd, and the bytes that are kept."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tithe
from oracles import Given
from tithe import Channels, Coordinates, TitheError
from tithe.rules import Binding, Carrier, graft
from tithe.selection import restore
from tithe.testing import check_selection

D = torch.float64
FEW = settings(max_examples=25, deadline=None)
pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel"),
    # torch 2.13's own capture of any autograd.Function raises these two
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]


def _x(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=D)


# --- the selection


@st.composite
def channels(draw: st.DrawFn) -> Channels:
    groups, transposed = draw(st.sampled_from([(1, False), (1, True), (2, False), (3, False), (2, True)]))
    num_out, num_in = groups * draw(st.integers(1, 3)), draw(st.integers(1, 4))
    kernel = draw(st.lists(st.integers(1, 3), max_size=3))
    shape = (num_in * groups, num_out // groups, *kernel) if transposed else (num_out, num_in, *kernel)
    picked = draw(st.sets(st.integers(0, num_in * groups - 1)))
    ids = torch.tensor(sorted(picked), dtype=torch.int64)
    return Channels(shape, ids, groups=groups, transposed=transposed)


@given(channels())
def test_the_contract_holds_for_channels(selection: Channels) -> None:
    check_selection(selection)


@given(channels(), st.sampled_from([torch.float32, torch.bfloat16, torch.float64]), st.booleans())
def test_channels_are_the_coordinates_of_their_columns(selection: Channels, dtype: torch.dtype, strided: bool) -> None:
    """Also in a weight that is not contiguous, as one in channels-last is not."""
    weight = torch.randn(selection.shape).to(dtype)
    if strided:
        weight = weight.mT.contiguous().mT
    values = selection.gather(weight)
    assert values.dtype == dtype
    assert sorted(values.flatten().tolist()) == sorted(weight.flatten()[selection.indices].tolist())
    there = torch.zeros_like(weight)
    selection.scatter_(there, values)
    expected = torch.zeros(selection.num_weights, dtype=dtype)
    expected[selection.indices] = weight.flatten()[selection.indices]
    assert torch.equal(there.flatten(), expected)


@given(channels())
def test_each_row_of_by_item_holds_one_channel(selection: Channels) -> None:
    values = torch.randn(selection.theta_shape)
    rows = selection.by_item(values)
    assert rows.shape == (selection.items.numel(), selection.num_weights // selection.num_channels)
    for row, channel in zip(rows, selection.items, strict=True):
        alone = selection.take(channel[None])
        spread = torch.zeros(selection.shape)
        selection.scatter_(spread, values)
        assert torch.equal(alone.by_item(alone.gather(spread))[0], row)


@given(channels(), st.data())
def test_unions_copies_and_saved_states(selection: Channels, data: st.DataObject) -> None:
    other = selection.take(
        torch.tensor(sorted(data.draw(st.sets(st.integers(0, selection.num_channels - 1)))), dtype=torch.int64)
    )
    assert selection.alike(other)
    both = selection.union(other)
    assert set(both.items.tolist()) == set(selection.items.tolist()) | set(other.items.tolist())
    single = Coordinates(selection.shape, torch.tensor([0]))
    mixed = selection.union(single)
    assert set(mixed.indices.tolist()) == set(selection.indices.tolist()) | {0}
    assert not selection.alike(single)
    back = restore(selection.shape, selection.state())
    assert isinstance(back, Channels)
    assert back.alike(selection)
    assert torch.equal(back.items, selection.items)
    assert back.full == selection.full == (selection.items.numel() == selection.num_channels)


def test_the_same_channels_in_another_layout_are_others() -> None:
    ids = torch.tensor([0])
    one, two = Channels((4, 4), ids), Channels((4, 4), ids, transposed=True)
    assert not one.alike(two)
    assert set(one.union(two).indices.tolist()) == {0, 1, 2, 3, 4, 8, 12}
    assert not one.alike(Channels((4, 4), ids, groups=2))


@pytest.mark.parametrize(
    ("shape", "ids", "settings"),
    [
        ((4, 3), [0, 3], {}),
        ((4, 3), [-1], {}),
        ((4, 3), [1, 0], {}),
        ((4, 3), [1, 1], {}),
        ((4,), [0], {}),
        ((4, 1, 3, 3), [4], {"groups": 4}),
        ((5, 1, 3, 3), [0], {"groups": 2}),
        ((4, 3), [4], {"transposed": True}),
    ],
)
def test_bad_channels_are_refused(shape: tuple[int, ...], ids: list[int], settings: dict[str, int]) -> None:
    with pytest.raises(TitheError):
        Channels(shape, torch.tensor(ids), **settings)


# --- the rule: equal to graft, equal to autograd


class Conv1D(nn.Module):
    """As in Hugging Face's GPT-2: the weight is stored input first."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


def _every(layer: nn.Module) -> Channels:
    """All channels of a layer's weight."""
    groups = getattr(layer, "groups", 1)
    transposed = isinstance(layer, (Conv1D, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d))
    shape = tuple(layer.weight.shape)
    count = shape[0] if transposed else shape[1] * groups
    return Channels(shape, torch.arange(count), groups=groups, transposed=transposed)


def _some(layer: nn.Module) -> Iterator[Channels]:
    """One channel, the last, a ragged few, all but one, all, none."""
    every = _every(layer)
    order = torch.randperm(every.num_channels, generator=torch.Generator().manual_seed(1))
    for ids in (order[:1], every.items[-1:], order[: len(order) // 2 + 1], order[1:], order, order[:0]):
        yield every.take(ids.sort().values)


def _bind(layer: nn.Module, chosen: Channels, *, by_graft: bool, path: str = "") -> tuple[nn.Module, Binding]:
    """Shadow each parameter by its carrier, as a plan does; the weight at `path` has `chosen` selected."""
    bound = copy.deepcopy(layer)
    found: list[Binding] = []
    for name, weight in list(bound.named_parameters()):
        weight.requires_grad_(False)
        binding = Binding(name, weight, weight.dtype)
        where, _, key = name.rpartition(".")
        if where == path and key == "weight":
            binding.select(chosen)
            found.append(binding)
        owner = bound.get_submodule(where)
        carrier: Tensor = Carrier(binding, owner, key)
        owner.__dict__[key] = graft(carrier) if by_graft else carrier
    return bound, found[0]


def _differentiate(layer: nn.Module, x: Tensor, theta: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = layer(leaf)
    (y * torch.linspace(-1, 1, y.numel(), dtype=D).view(y.shape).to(y.dtype)).sum().backward()
    grad = torch.zeros_like(theta) if theta.grad is None else theta.grad
    return y.detach(), grad.clone(), leaf.grad


def check(layer: nn.Module, x: Tensor, *, rtol: float = 1e-9, atol: float = 1e-11, path: str = "") -> None:
    """Rule and graft give autograd's output, input gradient, and Sᵀ of its weight gradient."""
    inner = layer.get_submodule(path)
    dense = copy.deepcopy(layer)
    y, gw, gx = _differentiate(dense, x, dense.get_submodule(path).weight)
    for chosen in _some(inner):
        for by_graft in (False, True):
            bound, binding = _bind(layer, chosen, by_graft=by_graft, path=path)
            found = _differentiate(bound, x, binding.theta)
            expected = (y, chosen.gather(gw), gx)
            for a, b in zip(found, expected, strict=True):
                if chosen.size or a is not found[1]:
                    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)
            assert binding.weight.grad is None


@given(st.lists(st.integers(0, 4), max_size=3), st.integers(1, 9), st.integers(1, 9), st.booleans())
@FEW
def test_linear(lead: list[int], i: int, o: int, bias: bool) -> None:
    check(nn.Linear(i, o, bias=bias, dtype=D), _x(*lead, i))


@given(st.integers(0, 4), st.integers(1, 9), st.integers(1, 9))
@FEW
def test_conv1d_of_hugging_face(n: int, i: int, o: int) -> None:
    check(Conv1D(o, i).to(D), _x(n, 3, i))


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    axes, groups = draw(st.integers(1, 3)), draw(st.sampled_from([1, 1, 2, 3, 4]))
    num_in, num_out = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    padding = draw(st.sampled_from([0, 1, 2, "same", "valid"]))
    mode = draw(st.sampled_from(["zeros", "zeros", "circular"]))
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1](
        num_in,
        num_out,
        draw(st.integers(1, 3)),
        stride=1 if padding == "same" else draw(st.integers(1, 2)),
        padding=padding,
        dilation=draw(st.integers(1, 2)),
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=mode,
        dtype=D,
    )
    batched = draw(st.booleans()) or mode == "circular"
    x = _x(*([draw(st.integers(1, 3))] if batched else []), num_in, *[draw(st.integers(5, 6))] * axes)
    if axes == 2 and batched and draw(st.booleans()):
        x = x.to(memory_format=torch.channels_last)
        layer = layer.to(memory_format=torch.channels_last) if draw(st.booleans()) else layer
    return layer, x


@given(convolutions())
@settings(max_examples=60, deadline=None)
def test_convolutions(drawn: tuple[nn.Module, Tensor]) -> None:
    check(*drawn)


BY_HAND = {
    "grouped": nn.Conv2d(8, 12, 3, groups=4, dtype=D),
    "depthwise": nn.Conv2d(8, 8, 3, padding=1, groups=8, dtype=D),
    "depthwise with a multiplier": nn.Conv2d(8, 24, 3, stride=2, groups=8, bias=False, dtype=D),
    "stretched": nn.Conv2d(8, 4, (1, 3), padding=(0, 1), stride=(2, 1), dtype=D),
    "even kernel": nn.Conv2d(8, 3, 2, padding="same", dtype=D),
    "pointwise": nn.Conv2d(8, 6, 1, dtype=D),
    "transposed": nn.ConvTranspose2d(8, 6, 3, stride=2, padding=1, output_padding=1, dtype=D),
    "transposed and grouped": nn.ConvTranspose2d(8, 12, 3, dilation=2, groups=4, dtype=D),
    "transposed and depthwise": nn.ConvTranspose2d(8, 16, (1, 3), stride=(2, 1), groups=8, bias=False, dtype=D),
}


@pytest.mark.parametrize("samples", [0, 1, 3])
@pytest.mark.parametrize("name", BY_HAND)
def test_convolutions_by_hand(name: str, samples: int) -> None:
    check(BY_HAND[name], _x(samples, 8, 5, 6))


@pytest.mark.parametrize(
    "view", [lambda x: x.transpose(0, 1), lambda x: x.flip(0)[::2], lambda x: x[:1].expand(4, -1, -1)]
)
def test_inputs_that_are_not_contiguous(view: object) -> None:
    x = view(_x(4, 6, 6))
    check(nn.Linear(x.shape[-1], 5, dtype=D), x)
    check(nn.Conv1d(x.shape[1], 4, 3, dtype=D), x)


torch.manual_seed(0)
LAYERS: dict[str, tuple[nn.Module, Tensor]] = {
    "linear": (nn.Linear(6, 7), torch.randn(2, 5, 6)),
    "conv1d": (Conv1D(7, 6), torch.randn(2, 5, 6)),
    "convolution": (nn.Conv2d(4, 6, 3, padding=1), torch.randn(2, 4, 5, 5)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2), torch.randn(2, 4, 5, 5)),
    "depthwise": (nn.Conv2d(4, 4, 3, padding=1, groups=4), torch.randn(2, 4, 5, 5)),
}
each_layer = pytest.mark.parametrize("name", LAYERS)


@each_layer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(name: str, dtype: torch.dtype) -> None:
    layer, x = LAYERS[name]
    check(copy.deepcopy(layer).to(dtype), x.to(dtype), rtol=0.05, atol=0.05)


class Around(nn.Module):
    """Runs a layer under autocast, or under one of the two kinds of activation checkpointing."""

    def __init__(self, layer: nn.Module, how: str) -> None:
        super().__init__()
        self.layer, self.how = layer, how

    def forward(self, x: Tensor) -> Tensor:
        from torch.utils.checkpoint import checkpoint

        if self.how == "autocast":
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.layer(x)
        return checkpoint(self.layer, x, use_reentrant=self.how == "reentrant")


@each_layer
@pytest.mark.parametrize("how", ["autocast", "reentrant", "non-reentrant"])
def test_autocast_and_activation_checkpointing(name: str, how: str) -> None:
    layer, x = LAYERS[name]
    if how == "autocast":
        check(Around(layer, how), x, rtol=0.05, atol=0.05, path="layer")
    else:
        check(Around(copy.deepcopy(layer).to(D), how), x.to(D), path="layer")


@each_layer
def test_gradcheck(name: str) -> None:
    """θ moves the output as finite differences say, and so does x."""
    layer, x = LAYERS[name]
    layer = copy.deepcopy(layer).to(D)
    for chosen in [*_some(layer)][:4]:

        def run(x: Tensor, theta: Tensor, chosen: Channels = chosen) -> Tensor:
            bound, binding = _bind(layer, chosen, by_graft=False)
            chosen.scatter_(binding.weight, theta.detach())
            binding.theta = theta
            return bound(x)

        theta = chosen.gather(layer.weight.detach()).requires_grad_()
        assert torch.autograd.gradcheck(run, (x.to(D).requires_grad_(), theta))


@each_layer
def test_compiled_gradients_equal_eager_ones(name: str) -> None:
    torch._dynamo.reset()
    layer, x = LAYERS[name]
    layer = nn.Sequential(copy.deepcopy(layer).to(D), nn.Tanh())
    chosen = [*_some(layer[0])][2]
    plan = tithe.attach(layer, Given({"0.weight": chosen}))
    (theta,) = plan.parameters()
    _, expected, _ = _differentiate(layer, x.to(D), theta)
    theta.grad = None
    _, found, _ = _differentiate(torch.compile(layer, backend="aot_eager"), x.to(D), theta)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


# --- one weight in several places


class Shared(nn.Module):
    """One matrix used twice by its layer, once by another, and once in a way that has no channels of its own."""

    def __init__(self, *, otherwise: bool) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(5, 5, dtype=D), nn.Linear(5, 5, dtype=D)
        self.two.weight = self.one.weight
        self.otherwise = otherwise

    def forward(self, x: Tensor) -> Tensor:
        y = self.two(torch.tanh(self.one(torch.tanh(self.one(x)))))
        return y @ self.one.weight + self.one.weight.square().sum() if self.otherwise else y


@pytest.mark.parametrize("otherwise", [False, True])
def test_a_weight_used_twice_tied_and_in_another_way(otherwise: bool) -> None:
    model, x = Shared(otherwise=otherwise), _x(4, 5)
    dense = copy.deepcopy(model)
    y, gw, gx = _differentiate(dense, x, dense.one.weight)
    chosen = Channels((5, 5), torch.tensor([0, 3]))
    plan = tithe.attach(model, Given({"one.weight": chosen}))
    ((name, theta),) = plan.named_parameters()
    found = _differentiate(model, x, theta)
    assert name == "one.weight"
    for a, b in zip(found, (y, chosen.gather(gw), gx), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_gradients_accumulate_over_micro_batches() -> None:
    layer, x = nn.Conv2d(4, 6, 3, dtype=D), _x(4, 4, 5, 5)
    chosen = Channels((6, 4, 3, 3), torch.tensor([1, 2]))
    _, binding = bound = _bind(layer, chosen, by_graft=False)
    bound[0](x).square().sum().backward()
    whole = binding.theta.grad.clone()
    binding.theta.grad = None
    for part in x.split(1):
        bound[0](part).square().sum().backward()
    torch.testing.assert_close(binding.theta.grad, whole, rtol=1e-9, atol=1e-11)
