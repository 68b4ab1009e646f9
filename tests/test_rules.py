"""Rules: rule == graft == autograd for every layer, shape, layout, dtype and pattern of selection."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tithe.rules.sparse import linear
from tithe.rules.sparse.sparse_gradient import Touch, ways
from tithe.selection import Coordinates
from tithe.testing import ContractError, check_rule, patterns

D = torch.float64
FEW = settings(max_examples=25, deadline=None)
pytestmark = pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel")


def _x(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=D)


# --- ways, one by one


@given(
    st.integers(0, 6),
    st.integers(1, 7),
    st.integers(1, 7),
    st.booleans(),
    st.sampled_from(["dense", "columns", "rows", "block", "sampled"]),
)
@settings(deadline=None)
def test_every_way_gives_the_selected_entries(n: int, o: int, i: int, transposed: bool, name: str) -> None:
    left, right = _x(n, o), _x(n, i)
    dense = right.t() @ left if transposed else left.t() @ right
    for _, selection in patterns(dense.shape):
        touch = Touch.of(selection.indices, selection.shape)
        (way,) = [way for way in ways(touch, transposed=transposed, sampled=True) if way.name == name]
        if n == 0 and name == "sampled":
            continue
        torch.testing.assert_close(way.grad(left, way.keep(right)), selection.gather(dense))


@pytest.mark.parametrize("name", ["dense", "columns", "rows", "block", "sampled"])
@pytest.mark.parametrize("shape", [(5, 6), (3, 4, 6), (2, 1, 3, 6)])
def test_every_way_through_the_layer(name: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    def only(touch: Touch, right: Tensor, *, transposed: bool = False) -> object:
        return next(way for way in ways(touch, transposed=transposed, sampled=True) if way.name == name)

    monkeypatch.setattr(linear, "cheapest", only)
    check_rule(nn.Linear(6, 7, dtype=D), _x(*shape))
    check_rule(Conv1D(7, 6).to(D), _x(*shape))


class Conv1D(nn.Module):
    """As in Hugging Face's GPT-2: the weight is stored input first."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


# --- layers


@given(st.lists(st.integers(0, 4), max_size=3), st.integers(1, 9), st.integers(1, 9), st.booleans())
@FEW
def test_linear(lead: list[int], i: int, o: int, bias: bool) -> None:
    check_rule(nn.Linear(i, o, bias=bias, dtype=D), _x(*lead, i))


@given(st.integers(0, 4), st.integers(1, 9), st.integers(1, 9))
@FEW
def test_conv1d_of_hugging_face(n: int, i: int, o: int) -> None:
    check_rule(Conv1D(o, i).to(D), _x(n, 3, i))


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    axes, groups = draw(st.integers(1, 3)), draw(st.sampled_from([1, 1, 2, 3]))
    channels, out = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    kernel, stride = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    dilation = draw(st.integers(1, 2))
    padding = draw(st.sampled_from([0, 1, 2, "same", "valid"]))
    if padding == "same":
        stride = 1
    mode = draw(st.sampled_from(["zeros", "zeros", "circular"]))
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
    layer = kind(
        channels,
        out,
        kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=mode,
        dtype=D,
    )
    size = draw(st.integers(5, 6))
    batched = draw(st.booleans()) or mode == "circular"
    x = _x(*([draw(st.integers(1, 3))] if batched else []), channels, *[size] * axes)
    if axes == 2 and batched and draw(st.booleans()):
        x = x.to(memory_format=torch.channels_last)
        layer = layer.to(memory_format=torch.channels_last) if draw(st.booleans()) else layer
    return layer, x


@given(convolutions())
@settings(max_examples=60, deadline=None)
def test_convolutions(drawn: tuple[nn.Module, Tensor]) -> None:
    check_rule(*drawn)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 8, 3, groups=4, dtype=D),
        nn.Conv2d(4, 4, (1, 3), padding=(0, 1), stride=(2, 1), dtype=D),
        nn.Conv2d(4, 3, 2, padding="same", dtype=D),
        nn.Conv2d(4, 6, 1, dtype=D),
        nn.ConvTranspose2d(4, 4, 3, groups=4, dtype=D),
        nn.ConvTranspose2d(4, 6, (1, 3), stride=(2, 1), padding=(0, 1), output_padding=(1, 0), groups=2, dtype=D),
    ],
    ids=str,
)
@pytest.mark.parametrize("samples", [0, 1, 3])
def test_convolutions_by_hand(layer: nn.Module, samples: int) -> None:
    check_rule(layer, _x(samples, 4, 5, 6))


@st.composite
def transposed_convolutions(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    axes, groups = draw(st.integers(1, 3)), draw(st.sampled_from([1, 1, 2, 3]))
    channels, out = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    stride, dilation = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    layer = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[axes - 1](
        channels,
        out,
        draw(st.integers(1, 3)),
        stride=stride,
        padding=draw(st.integers(0, 1)),
        output_padding=draw(st.integers(0, max(stride, dilation) - 1)),
        groups=groups,
        bias=draw(st.booleans()),
        dilation=dilation,
        dtype=D,
    )
    batched = draw(st.booleans())
    x = _x(*([draw(st.integers(1, 3))] if batched else []), channels, *[draw(st.integers(3, 5))] * axes)
    if axes == 2 and batched and draw(st.booleans()):
        x = x.to(memory_format=torch.channels_last)
    return layer, x


@given(transposed_convolutions())
@settings(max_examples=60, deadline=None)
def test_transposed_convolutions(drawn: tuple[nn.Module, Tensor]) -> None:
    check_rule(*drawn)


@given(st.lists(st.integers(0, 4), max_size=3), st.sampled_from([None, 0, 2, -1]))
@FEW
def test_embedding(shape: list[int], padding_idx: int | None) -> None:
    check_rule(nn.Embedding(6, 3, padding_idx=padding_idx, dtype=D), torch.randint(6, shape))


@given(st.lists(st.integers(0, 3), min_size=1, max_size=3), st.integers(1, 6), st.booleans())
@FEW
def test_layer_norm_and_rms_norm(lead: list[int], width: int, affine: bool) -> None:
    if 0 not in lead:
        check_rule(nn.LayerNorm([2, width], bias=affine, dtype=D), _x(*lead, 2, width))
        check_rule(nn.RMSNorm([2, width], dtype=D), _x(*lead, 2, width))
    check_rule(nn.LayerNorm(width, bias=affine, dtype=D), _x(*lead, width))
    check_rule(nn.RMSNorm(width, eps=None if affine else 1e-6, dtype=D), _x(*lead, width))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        (nn.BatchNorm1d, (4, 3)),
        (nn.BatchNorm1d, (4, 3, 5)),
        (nn.BatchNorm2d, (2, 3, 4, 2)),
        (nn.BatchNorm3d, (2, 3, 2, 2, 2)),
    ],
)
def test_batch_norm(kind: type[nn.Module], shape: tuple[int, ...], training: bool) -> None:
    layer = kind(3, dtype=D).train(training)
    with torch.no_grad():
        for tensor in (layer.weight, layer.running_mean, layer.running_var):
            tensor.add_(torch.rand(3, dtype=D))
    check_rule(layer, _x(*shape))


class Own(nn.Module):
    """A stranger's layer: each weight in an operation of its own, some broadcast, some transposed, some indexed."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(4, 3, dtype=D)), nn.Parameter(torch.randn(3, dtype=D))
        self.c, self.d = nn.Parameter(torch.randn(4, 1, dtype=D)), nn.Parameter(torch.randn((), dtype=D))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.einsum("ni,oi->no", x * self.b + self.b[0], self.a) @ self.a
        return (
            h.softmax(-1) * self.d
            + (self.c.squeeze() * x.sum(1, keepdim=True)).sum(1, keepdim=True)
            - self.a.norm() * x.abs()
        )


class Scale(nn.Module):
    """As in Llama: the normalised input times a vector, the vector first."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.first, self.weight = first, nn.Parameter(torch.randn(5, dtype=D))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x if self.first else x * self.weight


OTHERS: dict[str, tuple[nn.Module, tuple[Tensor, ...]]] = {
    "own": (Own(), (_x(5, 3),)),
    "scale first": (Scale(True), (_x(2, 3, 5),)),
    "scale last": (Scale(False), (_x(2, 3, 5),)),
    "bilinear": (nn.Bilinear(3, 4, 2, dtype=D), (_x(5, 3), _x(5, 4))),
    "group norm": (nn.GroupNorm(2, 4, dtype=D), (_x(2, 4, 3),)),
    "instance norm": (nn.InstanceNorm2d(3, affine=True, dtype=D), (_x(2, 3, 4, 4),)),
    "prelu": (nn.PReLU(3, dtype=D), (_x(2, 3, 4),)),
    "embedding bag": (nn.EmbeddingBag(6, 3, mode="sum", dtype=D), (torch.randint(6, (4, 2)),)),
    "attention": (nn.MultiheadAttention(4, 2, dtype=D), (*[_x(3, 2, 4)] * 3,)),
    "attention, other key width": (
        nn.MultiheadAttention(4, 2, kdim=3, vdim=5, dtype=D),
        (_x(3, 2, 4), _x(6, 2, 3), _x(6, 2, 5)),
    ),
    "transformer layer": (nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, dtype=D), (_x(3, 2, 4),)),
    "attention, batch first": (nn.MultiheadAttention(4, 2, batch_first=True, dtype=D), (*[_x(3, 2, 4)] * 3,)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_layers_without_a_rule_of_their_own_go_by_graft(name: str) -> None:
    layer, inputs = OTHERS[name]
    check_rule(layer, *inputs, rtol=1e-8, atol=1e-10)


# --- layouts and dtypes


@pytest.mark.parametrize(
    "view",
    [lambda x: x.transpose(0, 1), lambda x: x.flip(0)[::2], lambda x: x[..., ::2], lambda x: x[:1].expand(4, -1, -1)],
)
def test_inputs_that_are_not_contiguous(view: object) -> None:
    x = view(_x(4, 6, 6))
    check_rule(nn.Linear(x.shape[-1], 5, dtype=D), x)
    check_rule(nn.LayerNorm(x.shape[-1], dtype=D), x)
    check_rule(nn.RMSNorm(x.shape[-1], dtype=D), x)
    check_rule(nn.Conv1d(x.shape[1], 4, 3, dtype=D), x.contiguous().transpose(1, 2).contiguous().transpose(1, 2))


torch.manual_seed(0)  # short numbers: a tolerance holds for given inputs, not for any
LOW: dict[str, tuple[nn.Module, Tensor]] = {
    "linear": (nn.Linear(6, 7), torch.randn(2, 5, 6)),
    "conv1d": (Conv1D(7, 6), torch.randn(2, 5, 6)),
    "convolution": (nn.Conv2d(4, 6, 3, padding=1), torch.randn(2, 4, 5, 5)),
    "depthwise": (nn.Conv2d(4, 4, 3, padding=1, groups=4), torch.randn(2, 4, 5, 5)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), torch.randn(2, 4, 5, 5)),
    "embedding": (nn.Embedding(6, 3), torch.randint(6, (4, 5))),
    "layer norm": (nn.LayerNorm(6), torch.randn(2, 5, 6)),
    "rms norm": (nn.RMSNorm(6), torch.randn(2, 5, 6)),
    "batch norm": (nn.BatchNorm2d(4).eval(), torch.randn(2, 4, 5, 5)),
    "attention": (nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0), torch.randn(3, 2, 4)),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LOW)
def test_low_precision(name: str, dtype: torch.dtype) -> None:
    layer, x = LOW[name]
    check_rule(layer.to(dtype), x.to(dtype) if x.is_floating_point() else x, rtol=0.05, atol=0.05)


class Autocast(nn.Module):
    """Runs a layer under autocast."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.layer(x)


@pytest.mark.parametrize("name", LOW)
def test_autocast(name: str) -> None:
    layer, x = LOW[name]
    check_rule(Autocast(layer.float()), x, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", LOW)
def test_activation_checkpointing(name: str, reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    class Again(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer
            self.tick = nn.Parameter(torch.ones((), dtype=D))

        def forward(self, x: Tensor, tick: Tensor) -> Tensor:
            return checkpoint(lambda x, t: self.layer(x) * t, x, tick, use_reentrant=reentrant)

    layer, x = LOW[name]
    names = [f"layer.{name}" for name, _ in layer.named_parameters()]
    check_rule(Again(layer.to(D)), x.to(D) if x.is_floating_point() else x, torch.ones((), dtype=D), parameters=names)


# --- the contract has teeth


def test_the_contract_refuses_a_rule_that_is_wrong() -> None:
    from tithe.rules import register
    from tithe.rules.dispatch import _RULES, graft

    before = _RULES.get(F.bilinear)

    @register(F.bilinear)
    def wrong(input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.bilinear(input1, input2, 2 * graft(weight) - graft(weight).detach(), bias)

    try:
        with pytest.raises(ContractError, match="Bilinear"):
            check_rule(nn.Bilinear(3, 4, 2, bias=False, dtype=D), _x(5, 3), _x(5, 4))
    finally:
        _RULES.pop(F.bilinear)
        if before is not None:
            _RULES[F.bilinear] = before


def test_patterns_are_selections_of_the_shape() -> None:
    for shape in [(1,), (5,), (1, 1), (4, 3), (2, 3, 1, 2)]:
        for _, selection in patterns(shape):
            assert isinstance(selection, Coordinates)
            assert selection.shape == shape
            assert selection.size > 0
