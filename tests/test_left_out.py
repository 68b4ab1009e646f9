"""Weights that hold no dense floating-point numbers, parameters without values, and globs that match nothing."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tithe
from models import CASES
from tithe import TitheError, TitheWarning

pytestmark = pytest.mark.filterwarnings("ignore:Sparse")
X = torch.randn(12, 6, generator=torch.Generator().manual_seed(1))
Y = torch.randint(3, (12,), generator=torch.Generator().manual_seed(3))


class Scaled(torch.Tensor):
    """Codes and a scale behind a floating-point face, as torchao's weights are."""

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor) -> Scaled:
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, parts: Any, *_: Any) -> Scaled:
        return cls(parts["codes"], parts["scale"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0].codes, args[0].scale)
        plain = [arg.codes.float() * arg.scale if isinstance(arg, cls) else arg for arg in args]
        return func(*plain, **(kwargs or {}))


class Codes(nn.Parameter):
    """Whole numbers with what scales them as an attribute, as bitsandbytes' weights are."""

    def __new__(cls, data: Tensor, requires_grad: bool = False) -> Codes:
        found = torch.Tensor._make_subclass(cls, data, requires_grad)
        found.scale = 0.1
        return found


class Logged(nn.Parameter):
    """A parameter whose operations are its own."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


class Named(nn.Parameter):
    """A parameter that only has a name of its own."""


class Net(nn.Module):
    """A weight of some kind between two layers."""

    def __init__(self, weight: nn.Parameter, use: Callable[[Tensor, Any], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.weight, self.last = nn.Linear(6, 6), weight, nn.Linear(3, 3)
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.use(torch.tanh(self.first(x)), self.weight))


def _base() -> Tensor:
    return torch.randn(6, 3, generator=torch.Generator().manual_seed(4))


def _scaled() -> nn.Parameter:
    return nn.Parameter(Scaled((_base() * 10).to(torch.int8), torch.tensor(0.1)), requires_grad=False)


LEFT_OUT: dict[str, tuple[Callable[[], nn.Parameter], Callable[[Tensor, Any], Tensor], str]] = {
    "complex": (
        lambda: nn.Parameter(torch.complex(_base(), _base())),
        lambda h, w: (h.to(w.dtype) @ w).real,
        "complex64",
    ),
    "float8": (lambda: nn.Parameter(_base().to(torch.float8_e4m3fn)), lambda h, w: h @ w.float(), "float8_e4m3fn"),
    "codes": (lambda: Codes((_base() * 10).to(torch.int8)), lambda h, w: h @ (w * w.scale), "quantised, int8"),
    "scaled": (_scaled, lambda h, w: h @ w, "Scaled, a tensor subclass"),
    "sparse": (
        lambda: nn.Parameter(_base().to_sparse()),
        lambda h, w: torch.sparse.mm(w.t(), h.t()).t(),
        "sparse_coo",
    ),
    "compressed": (
        lambda: nn.Parameter(_base().to_sparse_csr(), requires_grad=False),
        lambda h, w: h @ w.to_dense(),
        "sparse_csr",
    ),
    "own operations": (lambda: Logged(_base()), lambda h, w: h @ w, "Logged, a tensor subclass"),
    "expanded": (lambda: nn.Parameter(torch.ones(1, 3).expand(6, 3)), lambda h, w: h @ w, "one place of memory"),
}
METHODS = {
    "fish": tithe.FISH(k=10, samples=12),
    "chosen again": tithe.FISH(k=10, score="random", reselect=tithe.every(1)),
    "channels": tithe.TraDy(tithe.Budget(fraction=0.6), samples=12),
}


def _loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def _contents(weight: Any) -> list[Tensor]:
    if isinstance(weight, Scaled):
        return [weight.codes.clone(), weight.scale.clone()]
    weight = weight.detach()
    dense = weight if weight.layout == torch.strided else weight.to_dense()
    return [
        dense.contiguous().view(torch.uint8).clone() if not dense.is_complex() else torch.view_as_real(dense).clone()
    ]


@pytest.mark.parametrize("kind", LEFT_OUT)
@pytest.mark.parametrize("method", METHODS)
def test_what_cannot_be_selected_is_named_once_and_frozen(kind: str, method: str, tmp_path: Path) -> None:
    make, use, said = LEFT_OUT[kind]
    model, base = Net(make(), use), Net(make(), use)
    required, before = model.weight.requires_grad, _contents(model.weight)
    with pytest.warns(TitheWarning) as heard:
        plan = tithe.attach(model, METHODS[method], loss=_loss, data=[(X, Y)])
    named = [str(w.message) for w in heard if "left out" in str(w.message)]
    assert len(named) == 1
    assert "left out: weight (" in named[0]
    assert said in named[0]
    assert "refers to the 54 other parameters" in named[0]
    assert said in str(plan)
    optimizer = torch.optim.SGD(plan.parameters(), lr=0.1)
    plan.bind(optimizer)
    with warnings.catch_warnings():  # named once
        warnings.filterwarnings("error", "left out")
        for _ in range(2):
            plan.backward(lambda: _loss(model, (X, Y)))
            assert not model.weight.requires_grad
            assert model.weight.grad is None
            optimizer.step()
            plan.step()
    plan.save(tmp_path / "delta.safetensors")
    plan.release()
    assert model.weight.requires_grad == required
    assert type(model.weight) is type(make())
    for now, then in zip(_contents(model.weight), before, strict=True):
        assert torch.equal(now, then)
    tithe.apply(base, tmp_path / "delta.safetensors")
    torch.testing.assert_close(base(X), model(X))


def test_a_delta_sees_another_weight_that_was_left_out(tmp_path: Path) -> None:
    make, use, _ = LEFT_OUT["scaled"]
    model, other = Net(make(), use), Net(make(), use)
    cast(Any, other.weight).codes += 1
    with pytest.warns(TitheWarning, match="left out"):
        plan = tithe.attach(model, tithe.FISH(k=3, score="random"))
    plan.save(tmp_path / "delta.safetensors")
    with pytest.raises(TitheError, match="another base"):
        tithe.apply(other, tmp_path / "delta.safetensors")


@pytest.mark.parametrize("kind", ["sparse", "scaled", "own operations", "expanded"])
def test_methods_that_move_all_weights_refuse_them_before_anything_happens(kind: str) -> None:
    make, use, said = LEFT_OUT[kind]
    model = Net(make(), use)
    required = model.weight.requires_grad
    with pytest.raises(TitheError, match=said):
        tithe.attach(model, tithe.VRPGE(keep=0.5), loss=_loss, data=[(X, Y)])
    assert model.weight.requires_grad == required
    with pytest.warns(TitheWarning, match="left out"):  # the remedy
        tithe.attach(model, tithe.FISH(k=3, score="random")).release()


def test_a_span_takes_complex_weights_on_which_its_checkpoints_agree(tmp_path: Path) -> None:
    make, use, said = LEFT_OUT["complex"]
    for name, moves in (("same", False), ("other", True)):
        model = Net(make(), use)
        history = tithe.History(tmp_path / name)
        for step in range(3):
            with torch.no_grad():
                model.first.weight.add_(0.1)
                model.weight.mul_(1.1 if moves else 1.0)
            history.record(model, step)
        if moves:
            with pytest.raises(TitheError, match="complex64 that differs"):
                tithe.attach(model, tithe.TWA(history))
        else:
            with pytest.warns(TitheWarning, match=said):
                tithe.attach(model, tithe.TWA(history)).release()


@pytest.mark.parametrize(
    "weight",
    [
        lambda: Named(_base()),
        lambda: nn.Parameter(_base().t().contiguous().t()),
        lambda: nn.Parameter(torch.randn(6, 6)[:, ::2]),
        lambda: nn.Parameter(_base().bfloat16()),
        lambda: nn.Parameter(_base().double()),
    ],
)
def test_ordinary_weights_of_any_layout_and_class_are_trained(weight: Callable[[], nn.Parameter]) -> None:
    model = Net(weight(), lambda h, w: (h.to(w.dtype) @ w).float())
    cast(Any, model.weight).tag = "kept"
    plan = tithe.attach(model, tithe.FISH(k=9, score="random"), where="weight", loss=_loss, data=[(X, Y)])
    assert cast(Any, model.weight).tag == "kept"
    before = model.state_dict()["weight"].clone()
    optimizer = torch.optim.SGD(plan.parameters(), lr=0.5)
    plan.bind(optimizer)
    plan.backward(lambda: _loss(model, (X, Y)))
    optimizer.step()
    moved = (model.state_dict()["weight"] != before).flatten().nonzero().flatten()
    assert set(moved.tolist()) <= set(plan.selected("weight").tolist())
    assert moved.numel()


def test_whole_numbers_that_code_nothing_are_passed_over_in_silence() -> None:
    places = nn.Parameter(torch.arange(6), requires_grad=False)
    tithe.attach(Net(places, lambda h, w: h[:, w][:, :3]), tithe.FISH(k=3, score="random"))


# --- parameters without values


def test_a_lazy_module_is_refused_until_it_ran() -> None:
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2))
    with pytest.raises(TitheError, match=r"0\.weight.*lazy") as refused:
        tithe.attach(model, tithe.FISH(k=3, score="random"))
    assert "run the model once" in refused.value.remedy
    model(X)
    assert tithe.attach(model, tithe.FISH(k=3, score="random")).selections


def test_weights_on_the_meta_device_or_of_inference_mode_are_refused() -> None:
    with torch.device("meta"):
        model = nn.Linear(6, 2)
    with pytest.raises(TitheError, match="meta device"):
        tithe.attach(model, tithe.FISH(k=3, score="random"))
    with torch.inference_mode():
        model = nn.Linear(6, 2)
    with pytest.raises(TitheError, match="inference_mode"):
        tithe.attach(model, tithe.FISH(k=3, score="random"))


# --- globs that match nothing, and heads that are missing


class Text(nn.Module):
    """Embeddings, an encoder and a classifier, named as in Hugging Face's models."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embeddings = nn.ModuleDict(
            {"word_embeddings": nn.Embedding(20, 6), "position_embeddings": nn.Embedding(9, 6)}
        )
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])})
        self.classifier = nn.Linear(6, 3)


@pytest.mark.parametrize(
    ("setting", "glob", "remedy"),
    [
        ("head", "classifier", 'head="classifier.*"'),
        ("head", "classifer.*", 'head="classifier.*"'),
        ("head", "Classifier", 'head="classifier.*"'),
        ("where", "layer", 'where="*.layer.*"'),
        ("where", "encoder.layers.*", 'where="encoder.layer'),
        ("where", "word_embeddings", 'where="*.word_embeddings.*"'),
        ("where", "bias", 'where="*.bias"'),
    ],
)
def test_the_closest_glob_is_named_and_matches(setting: str, glob: str, remedy: str) -> None:
    with pytest.raises(TitheError) as refused:
        tithe.attach(Text(), tithe.FISH(k=3, score="random"), **cast(Any, {setting: glob}))
    assert refused.value.place == f"{setting}={glob!r}"
    assert remedy in refused.value.remedy
    written = refused.value.remedy.split('"')[1]
    matched = tithe.attach(Text(), tithe.FISH(k=3, score="random"), **cast(Any, {setting: written}))
    assert matched.head or all(fnmatchcase(name, written) for name in matched.selections)


def test_a_glob_that_is_near_to_nothing_says_where_the_names_are() -> None:
    with pytest.raises(TitheError, match="named_parameters"):
        tithe.attach(Text(), tithe.FISH(k=3, score="random"), head="qqq")


def test_a_glob_for_a_weight_that_is_left_out_says_what_it_is() -> None:
    make, use, said = LEFT_OUT["complex"]
    with pytest.raises(TitheError, match=said) as refused:
        tithe.attach(Net(make(), use), tithe.FISH(k=3, score="random"), head=["weight", "last.*"])
    assert "leave it out of head=" in refused.value.remedy


def test_a_new_last_layer_without_a_head_is_named_and_the_remedy_silences() -> None:
    model = Text()
    nn.init.zeros_(model.classifier.bias)
    with pytest.warns(TitheWarning, match=r"classifier is zero.*head=\"classifier\.\*\""):
        tithe.attach(model, tithe.FISH(k=3, score="random")).release()
    tithe.attach(model, tithe.FISH(k=3, score="random"), head="classifier.*").release()
    tithe.attach(model, tithe.FISH(k=3, score="random"), where="!classifier.*").release()


def test_two_new_layers_are_named_together() -> None:
    model = nn.Sequential()
    for name, layer in (("body", nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))), ("pre", nn.Linear(6, 6))):
        model.add_module(name, layer)
    model.add_module("out", nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2)))
    for layer in (model.pre, *cast(Any, model.out)):
        nn.init.zeros_(layer.bias)
    with pytest.warns(TitheWarning, match=r'head=\["pre\.\*", "out\.\*"\]'):
        tithe.attach(model, tithe.FISH(k=3, score="random")).release()
    tithe.attach(model, tithe.FISH(k=3, score="random"), head=["pre.*", "out.*"]).release()


def test_a_plan_without_a_head_says_so_when_it_is_printed() -> None:
    assert "no head" in str(tithe.attach(CASES["mlp"].model(), tithe.FISH(k=3, score="random")))
    assert "no head" not in str(tithe.attach(CASES["mlp"].model(), tithe.FISH(k=3, score="random"), head="4.*"))
