"""Inputs that are not plain dense tensors: every operation gives what it gives without a plan, and so do gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tithe
from oracles import Given
from tithe import Channels, Coordinates, TitheError

pytestmark = [
    pytest.mark.filterwarnings("ignore:Sparse"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of"),
    pytest.mark.filterwarnings("ignore:.*MaskedTensor"),
    pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight"),
]


class Marked(torch.Tensor):
    """A subclass that marks its results."""


class Unasked(torch.Tensor):
    """A subclass that runs operations without asking the weights, as nested tensors do."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


class Doubled(torch.Tensor):
    """A subclass whose products are doubled."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = [arg.as_subclass(Tensor) if isinstance(arg, cls) else arg for arg in args]
        out = func(*plain, **(kwargs or {}))
        return out * 2 if func in (F.linear, torch.mm, torch.matmul, torch.mul) else out


class Weighted(nn.Module):
    """One weight, one bias and an operation."""

    def __init__(self, run: Callable[[Weighted, Any], Tensor], weight: tuple[int, ...], bias: tuple[int, ...]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.weight = nn.Parameter(torch.randn(weight, generator=generator))
        self.bias = nn.Parameter(torch.randn(bias, generator=generator))
        self.run = run

    def forward(self, *args: Any) -> Tensor:
        return self.run(self, *args)


def _input() -> Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(2))


INPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "coo": lambda x: (x * (x > 0)).to_sparse(),
    "csr": lambda x: (x * (x > 0)).to_sparse_csr(),
    "csc": lambda x: (x * (x > 0)).to_sparse_csc(),
    "bsr": lambda x: x.to_sparse_bsr((2, 2)),
    "marked": lambda x: x.as_subclass(Marked),
    "unasked": lambda x: x.as_subclass(Unasked),
    "doubled": lambda x: x.as_subclass(Doubled),
    "negated": lambda x: torch.complex(x, x).conj().imag,
    "complex": lambda x: torch.complex(x, x),
    "half": lambda x: x.half(),
    "expanded": lambda x: x[:1].expand(4, 6),
    "transposed": lambda x: x.t().contiguous().t(),
    "empty": lambda x: x[:0],
    "parameter": lambda x: nn.Parameter(x),
}
OPERATIONS: dict[str, tuple[Callable[[Any, Any], Tensor], tuple[int, ...], tuple[int, ...]]] = {
    "mm": (lambda m, x: torch.mm(x, m.weight), (6, 3), (1,)),
    "matmul": (lambda m, x: x @ m.weight, (6, 3), (1,)),
    "sparse.mm": (lambda m, x: torch.sparse.mm(x, m.weight), (6, 3), (1,)),
    "addmm": (lambda m, x: torch.addmm(m.bias, x, m.weight), (6, 3), (3,)),
    "sparse.addmm": (lambda m, x: torch.sparse.addmm(m.bias, x, m.weight), (6, 3), (4, 3)),
    "linear": (lambda m, x: F.linear(x, m.weight, m.bias), (3, 6), (3,)),
    "relu of linear": (lambda m, x: F.relu(F.linear(x, m.weight, m.bias)), (3, 6), (3,)),
    "mul": (lambda m, x: x * m.weight, (6,), (1,)),
    "rmul": (lambda m, x: m.weight * x, (6,), (1,)),
    "layer_norm": (lambda m, x: F.layer_norm(x, (6,), m.weight, m.bias), (6,), (6,)),
    "rms_norm": (lambda m, x: F.rms_norm(x, (6,), m.weight), (6,), (1,)),
    "conv1d": (lambda m, x: F.conv1d(x[None], m.weight, m.bias), (3, 4, 2), (3,)),
}


def _loss(y: Any) -> Tensor:
    y = y.to_dense() if y.layout != torch.strided else y
    y = y.abs() if y.is_complex() else y
    return y.as_subclass(Tensor).square().sum()


def _as_without(model: nn.Module, plan: tithe.Plan, plain: nn.Module, *args: Any) -> None:
    """Value and gradients are those of `plain`, a copy without a plan."""
    value, expected = _loss(model(*args)), _loss(plain(*args))
    torch.testing.assert_close(value, expected, equal_nan=True)
    value.backward()
    expected.backward()
    dense = {name: p.grad for name, p in plain.named_parameters()}
    thetas = dict(plan.named_parameters())
    for name, selection in plan.selections.items():
        want, found = dense[name], thetas[name].grad
        if want is None:
            assert found is None or not found.any()
            continue
        assert found is not None, name
        want = selection.gather(want.to_dense() if want.layout != torch.strided else want)
        torch.testing.assert_close(found, want, equal_nan=True, rtol=1e-4, atol=1e-5)


def _ways(weight: Tensor, transposed: bool) -> list[Mapping[str, tithe.Selection]]:
    """Some entries, all of them, and some channels of a weight."""
    shape = tuple(weight.shape)
    some = Coordinates(shape, torch.arange(0, weight.numel(), 3))
    ways: list[Mapping[str, tithe.Selection]] = [{"weight": some}, {"weight": Coordinates.everything(shape)}]
    if len(shape) > 1:
        ways.append({"weight": Channels(shape, torch.tensor([0, 2]), transposed=transposed)})
    return ways


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_operation_on_any_input_gives_what_it_gives_without_a_plan(operation: str, kind: str) -> None:
    run, weight, bias = OPERATIONS[operation]
    plain = Weighted(run, weight, bias)
    x = INPUTS[kind](_input())
    try:
        _loss(plain(x)).backward()
    except (RuntimeError, NotImplementedError, IndexError, AssertionError):
        pytest.skip("torch does not do it either")
    transposed = operation in ("mm", "matmul", "sparse.mm", "addmm", "sparse.addmm")
    for choice in _ways(plain.weight, transposed):
        model = Weighted(run, weight, bias)
        _as_without(model, tithe.attach(model, Given(choice)), Weighted(run, weight, bias), x)
    model = Weighted(run, weight, bias)
    tithe.lean(model)
    torch.testing.assert_close(_loss(model(x)), _loss(plain(x)), equal_nan=True)


def test_a_masked_input_gives_gradients_where_it_is_not_masked() -> None:
    model = Weighted(lambda m, x: (x * m.weight).get_data(), (6,), (1,))
    plan = tithe.attach(model, tithe.FISH(k=4, score="magnitude"), where="weight")
    x = _input()
    masked = cast(Any, torch.masked).masked_tensor(x, x > 0)
    y = masked * model.weight
    y.sum().backward()
    (theta,) = plan.parameters()
    want = (x * (x > 0)).sum(0)
    torch.testing.assert_close(theta.grad, plan.selections["weight"].gather(want))


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
@pytest.mark.parametrize("reselect", [None, tithe.every(2)])
@pytest.mark.parametrize("density", [0.3, 1.0])
def test_nested_inputs(layout: torch.layout, reselect: tithe.Schedule | None, density: float) -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 8), nn.ReLU(), nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 3)]
    model = nn.Sequential(*layers)
    plain = copy.deepcopy(model)
    rows = [torch.randn(3, 6), torch.randn(5, 6)]
    method = tithe.FISH(density=density, score="magnitude", reselect=reselect)
    plan = tithe.attach(model, method)
    steps = [torch.optim.SGD(plan.parameters(), lr=0.1), torch.optim.SGD(plain.parameters(), lr=0.1)]
    plan.bind(steps[0])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for network, optimizer in zip((model, plain), steps, strict=True):
        y = network(torch.nested.nested_tensor(rows, layout=layout))
        torch.nested.to_padded_tensor(y, 0.0).square().sum().backward()
        optimizer.step()
    for name, selection in plan.selections.items():
        values = selection.gather(plain.state_dict()[name])
        torch.testing.assert_close(selection.gather(model.state_dict()[name]), values)
        assert density < 1 or not torch.equal(before[name], model.state_dict()[name])


def test_scores_of_inputs_that_do_not_ask_the_weight_are_those_of_plain_ones() -> None:
    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).square().mean()

    chosen: list[list[int]] = []
    for kind in (lambda x: x, lambda x: x.as_subclass(Unasked)):
        model = Weighted(lambda m, x, kind=kind: F.linear(kind(x), m.weight, m.bias), (3, 6), (3,))
        plan = tithe.attach(model, tithe.FISH(k=5, samples=4), loss=loss, data=[_input()], where="weight")
        chosen.append(plan.selected("weight").tolist())
    assert chosen[0] == chosen[1]


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.t() + bias

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, ...]:
        x, weight = ctx.saved_tensors
        return grads[0] @ weight, grads[0].t() @ x, grads[0].sum(0)


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x, weight, bias)


USES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "a function of autograd": lambda m, x: cast(Tensor, _Product.apply(x, m.weight, m.bias)),
    "an operator by its overload": lambda m, x: torch.ops.aten.linear.default(x, m.weight, m.bias),
    "arguments of a checkpoint": lambda m, x: checkpoint(_linear, x.tanh(), m.weight, m.bias, use_reentrant=False),
    "of a reentrant one": lambda m, x: checkpoint(_linear, x.tanh(), m.weight, m.bias, use_reentrant=True),
    "in two": lambda m, x: checkpoint(
        lambda x, w, b: checkpoint(_linear, x.tanh(), w, b, use_reentrant=False),
        x,
        m.weight,
        m.bias,
        use_reentrant=False,
    ),
    "iterated over": lambda m, x: x @ torch.stack(list(m.weight)).t() + m.bias,
    "split": lambda m, x: torch.cat([x @ part.t() for part in m.weight.chunk(3)], 1) + m.bias,
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("measured", [False, True])
def test_a_weight_finds_its_gradient_however_it_is_used(use: str, measured: bool) -> None:
    plain = Weighted(USES[use], (3, 6), (3,))
    for choice in _ways(plain.weight, False):
        model = Weighted(USES[use], (3, 6), (3,))
        plan = tithe.attach(model, Given({**choice, "bias": Coordinates((3,), torch.tensor([1]))}))
        x = _input().requires_grad_()
        if measured:
            tithe.measure(lambda model=model, x=x: _loss(model(x)).backward())
            for theta in plan.parameters():
                theta.grad = None
        _as_without(model, plan, Weighted(USES[use], (3, 6), (3,)), x)


def _table(bag: bool, **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.EmbeddingBag(9, 4, **settings) if bag else nn.Embedding(9, 4, **settings), nn.Linear(4, 2))


@given(
    st.sampled_from(["rows", "sum", "mean", "max"]),
    st.booleans(),
    st.sampled_from([None, 1, -1]),
    st.booleans(),
    st.lists(st.lists(st.integers(0, 8), min_size=3, max_size=3), min_size=1, max_size=5),
)
@settings(deadline=None, max_examples=40)
def test_tables_with_any_settings(
    kind: str, sparse: bool, padding: int | None, freq: bool, ids: list[list[int]]
) -> None:
    freq = freq and not sparse and kind != "max"
    more = {"padding_idx": padding, "sparse": sparse and kind != "max", "scale_grad_by_freq": freq}
    bag = kind != "rows"
    more |= {"mode": kind} if bag else {}
    for k in (11, 36):
        model, plain = _table(bag, **more), _table(bag, **more)
        plan = tithe.attach(model, tithe.FISH(k=k, score="random"), where="0.weight")
        _as_without(model, plan, plain, torch.tensor(ids))


def test_weights_of_samples_in_a_bag_get_their_gradient_from_a_sparse_table() -> None:
    model = Weighted(
        lambda m, ids: F.embedding_bag(ids, m.weight, mode="sum", sparse=True, per_sample_weights=m.bias),
        (9, 4),
        (3, 2),
    )
    plain = copy.deepcopy(model)
    plan = tithe.attach(model, tithe.FISH(k=20, score="random"))
    _as_without(model, plan, plain, torch.tensor([[1, 2], [2, 2], [8, 0]]))


# --- tables that each look-up scales


IDS = torch.tensor([[0, 1, 1], [3, 2, 8], [5, 5, 0], [8, 1, 2]])


@pytest.mark.parametrize("bag", [False, True])
@pytest.mark.parametrize("padding", [None, 1, -1])
@pytest.mark.parametrize("ids", [IDS, IDS[:2]])
def test_a_frozen_table_with_a_largest_norm_stays_as_it_is(bag: bool, padding: int | None, ids: Tensor) -> None:
    model, plain = (_table(bag, max_norm=0.8, padding_idx=padding) for _ in range(2))
    before = copy.deepcopy(model.state_dict())
    plan = tithe.attach(model, tithe.FISH(k=3, score="random"), where="1.weight")
    with torch.no_grad():
        assert torch.equal(model(ids), plain(ids))
    _as_without(model, plan, plain, ids)
    assert torch.equal(model.state_dict()["0.weight"], before["0.weight"])
    assert not torch.equal(plain.state_dict()["0.weight"], before["0.weight"])


@pytest.mark.parametrize("bag", [False, True])
def test_a_table_with_a_largest_norm_is_trained_whole_as_stock_does(bag: bool) -> None:
    model, plain = (_table(bag, max_norm=0.8) for _ in range(2))
    plan = tithe.attach(model, tithe.FISH(density=1.0, score="random"))
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.3) for each in (plan, plain)]
    plan.bind(optimizers[0])
    for _ in range(3):
        for each, optimizer in zip((model, plain), optimizers, strict=True):
            each(IDS).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        plan.step()
    for name, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)


@pytest.mark.parametrize("bag", [False, True])
@pytest.mark.parametrize("norm_type", [1.0, 2.0])
def test_a_part_of_a_table_with_a_largest_norm_is_refused_and_each_remedy_helps(
    bag: bool, norm_type: float, tmp_path: Any
) -> None:
    model = _table(bag, max_norm=0.8, norm_type=norm_type)
    plan = tithe.attach(model, tithe.FISH(k=9, score="random"), where="0.weight")
    before = copy.deepcopy(model.state_dict())
    for context in (torch.enable_grad(), torch.no_grad()):
        with context, pytest.raises(TitheError, match=r"0\.weight.*max_norm") as refused:
            model(IDS)
    assert 'head="0.weight"' in refused.value.remedy
    assert 'where="!0.weight"' in refused.value.remedy
    assert torch.equal(model.state_dict()["0.weight"], before["0.weight"])
    plan.release()
    for arguments, largest in (({"head": "0.weight"}, 0.8), ({"where": "!0.weight"}, 0.8), ({}, None)):
        model = _table(bag, max_norm=0.8, norm_type=norm_type)
        cast(Any, model[0]).max_norm = largest
        base = copy.deepcopy(model)
        plan = tithe.attach(model, tithe.FISH(k=4, score="random"), **cast(Any, arguments))
        optimizer = torch.optim.SGD(plan.parameters(), lr=0.3)
        plan.bind(optimizer)
        plan.backward(lambda model=model: model(IDS).square().sum())
        optimizer.step()
        plan.save(tmp_path / "delta.safetensors")
        plan.release()
        tithe.apply(base, tmp_path / "delta.safetensors")
        torch.testing.assert_close(base(IDS), model(IDS))
