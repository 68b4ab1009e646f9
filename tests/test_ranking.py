"""Rankings: equal to dense autograd, measured in a stream, saved and loaded, refused where they do not belong."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import tithe
from models import CASES, LARGE, Batch, Case
from oracles import bits, equal_bits
from prices import prices, rgn
from tithe import Budget, Ranking, TitheError, TraDy

pytestmark = pytest.mark.filterwarnings("ignore:.*no rule for input channels:tithe.TitheWarning")
NO_CHANNELS = ("recurrent", "functional")
EVERY = [
    pytest.param(case, id=name, marks=[pytest.mark.slow] if case in LARGE else [])
    for name, case in CASES.items()
    if name not in NO_CHANNELS
]
MLP = CASES["mlp"]


def _compute(case: Case, model: nn.Module, batches: list[Batch], **settings: object) -> Ranking:
    return Ranking.compute(model, loss=case.loss, data=batches, **settings)


# --- equal to the loop


@pytest.mark.parametrize("case", EVERY)
def test_a_ranking_is_the_sum_of_dense_gradient_norms_over_costs(case: Case) -> None:
    """Layers whose weight is used by an operation without a rule are left out, and no other."""
    model, batches = case.model(dtype=torch.float64), case.batches(3, dtype=torch.float64)
    expected = rgn(model, case, batches, prices(model, case, batches[0]))
    found = _compute(case, model, batches, samples=10**6)
    assert set(found.rgn) <= set(expected)
    left_out = {name for name in set(expected) - set(found.rgn) if "attn" not in name and "attention" not in name}
    assert left_out <= {"lm_head.weight", "transformer.wte.weight"}  # tied to a table
    for name, value in found.rgn.items():
        assert value == pytest.approx(expected[name], rel=1e-3 if "single" in case.tags else 1e-8), name
        assert found.shapes[name] == tuple(model.get_parameter(name).shape)


def test_whole_batches_are_read_until_they_hold_the_samples() -> None:
    model, batches = MLP.model(dtype=torch.float64), MLP.batches(5, 4, dtype=torch.float64)
    found = _compute(MLP, model, batches, samples=9)
    expected = rgn(model, MLP, batches[:3], prices(model, MLP, batches[0]))
    assert dict(found.rgn) == pytest.approx(expected, rel=1e-9)


def test_where_and_head_say_what_is_ranked() -> None:
    found = _compute(MLP, MLP.model(), MLP.batches(1), head="4.*", where="*")
    assert list(found.rgn) == ["0.weight", "2.weight"]
    assert list(_compute(MLP, MLP.model(), MLP.batches(1), where="2.*").rgn) == ["2.weight"]


def test_a_plan_that_is_given_no_ranking_measures_the_same() -> None:
    """One that is lean by default codes the derivatives of smooth activations: this one has none."""
    case = CASES["depthwise"]
    model, batches = case.model(), case.batches(2)
    ranking = _compute(case, model, batches, head=case.head)
    own, given = (
        tithe.attach(
            case.model(),
            TraDy(Budget(fraction=0.3), ranking=r, coverage=0.8),
            loss=case.loss,
            data=batches,
            head=case.head,
        )
        for r in (None, ranking)
    )
    assert list(own.selections) == list(given.selections)
    assert all(torch.equal(own.selected(name), given.selected(name)) for name in own.selections)
    assert set(own.selections) <= set(ranking.layers(0.8))


# --- the model is left as it was


@pytest.mark.parametrize("name", ["depthwise", "bert_dropout", "tied_mlp", "gpt2"])
def test_measuring_leaves_the_model_as_it_was(name: str) -> None:
    case = CASES[name]
    model = case.model()
    frozen = next(iter(model.parameters()))
    frozen.requires_grad_(False)
    last = [*model.parameters()][-1]
    last.grad = torch.ones_like(last)
    model.get_submodule(next(path for path, _ in model.named_modules() if path)).eval()
    before, training = bits(model), [module.training for module in model.modules()]
    attributes = [sorted(vars(module)) for module in model.modules()]
    hooks = [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()]
    torch.manual_seed(3)
    state = torch.get_rng_state()
    _compute(case, model, case.batches(2))
    assert equal_bits(before, bits(model)) == []
    assert [module.training for module in model.modules()] == training
    assert [sorted(vars(module)) for module in model.modules()] == attributes
    assert [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()] == hooks
    assert not frozen.requires_grad
    assert all(p.requires_grad for p in model.parameters() if p is not frozen)
    assert torch.equal(last.grad, torch.ones_like(last))
    assert all(p.grad is None for p in model.parameters() if p is not last)
    assert torch.equal(torch.get_rng_state(), state)


def test_one_layers_gradient_stands_in_memory_at_a_time() -> None:
    """Beside stock training, which holds the gradients of all layers together."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(128, 128, bias=False) for _ in range(12)))

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).square().mean()

    x = torch.randn(4, 128)
    stock = copy.deepcopy(model)
    step = tithe.measure(lambda: loss(stock, x).backward(), model=stock)
    ledger = tithe.measure(lambda: Ranking.compute(model, loss=loss, data=[x, x, x]), model=model)
    layer = 128 * 128 * 4
    assert step.peak > 12 * layer
    assert ledger.peak < 4 * layer


# --- layers, sums


RGN = st.dictionaries(st.sampled_from("abcdef"), st.sampled_from([0.0, 0.5, 1.0, 2.0, 8.0]), min_size=1)


@given(RGN, st.sampled_from([1e-9, 0.1, 0.5, 0.97, 1.0]))
def test_layers_are_the_fewest_that_cover(drawn: dict[str, float], coverage: float) -> None:
    ranking = Ranking(drawn, dict.fromkeys(drawn, (2, 2)))
    found, total = ranking.layers(coverage), sum(drawn.values())
    assert sum(drawn[name] for name in found) >= coverage * total - 1e-9
    assert sum(drawn[name] for name in found[:-1]) < coverage * total or not found
    assert [drawn[name] for name in found] == sorted(drawn.values(), reverse=True)[: len(found)]
    assert all(
        found.index(a) < found.index(b) for a in found for b in found if drawn[a] == drawn[b] and _first(drawn, a, b)
    )


def _first(drawn: dict[str, float], a: str, b: str) -> bool:
    names = list(drawn)
    return names.index(a) < names.index(b)


def test_whole_and_tiny_coverage() -> None:
    ranking = Ranking({"a": 1.0, "b": 5.0, "c": 0.0}, dict.fromkeys("abc", (2, 2)))
    assert ranking.layers(1.0) == ["b", "a"]
    assert ranking.layers(1e-6) == ["b"]
    assert ranking.layers() == ["b", "a"]


def test_rankings_of_one_architecture_add_up_in_any_order() -> None:
    """The paper adds up over epochs of fine-tuning."""
    model = MLP.model(dtype=torch.float64)
    batches = MLP.batches(4, dtype=torch.float64)
    parts = [_compute(MLP, model, [batch]) for batch in batches]
    whole = _compute(MLP, model, batches)
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        total = parts[order[0]]
        for number in order[1:]:
            total = total + parts[number]
        assert dict(total.rgn) == pytest.approx(dict(whole.rgn), rel=1e-9)
        assert total.shapes == whole.shapes


# --- files


def test_a_ranking_survives_a_file(tmp_path: Path) -> None:
    ranking = _compute(CASES["depthwise"], CASES["depthwise"].model(), CASES["depthwise"].batches(2))
    path = tmp_path / "ranking.json"
    ranking.save(path)
    assert Ranking.load(path) == ranking
    assert Ranking.load(str(path)).layers(0.9) == ranking.layers(0.9)
    content = json.loads(path.read_text("utf-8"))
    assert content["tithe"] == "ranking"
    assert [layer["name"] for layer in content["layers"]] == list(ranking.rgn)
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_does_not_exist_is_said(tmp_path: Path) -> None:
    with pytest.raises(TitheError, match="nowhere"):
        Ranking({"a": 1.0}, {"a": (2, 2)}).save(tmp_path / "nowhere" / "r.json")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "{}",
        '{"tithe": "ranking"}',
        '{"tithe": "ranking", "format": 99, "layers": []}',
        '{"tithe": "other", "format": 1, "layers": []}',
        '{"tithe": "ranking", "format": 1}',
        '{"tithe": "ranking", "format": 1, "layers": [{"name": "a"}]}',
        '{"tithe": "ranking", "format": 1, "layers": [{"name": "a", "shape": 3, "rgn": 1.0}]}',
        '{"tithe": "ranking", "format": 1, "layers": [{"name": "a", "shape": [3], "rgn": "x"}]}',
        '{"tithe": "ranking", "format": 1, "layers": [{"name": "a", "shape": [3, 3], "rgn": NaN}]}',
        '{"tithe": "ranking", "format": 1, "layers": [{"name": "a", "shape": [3, 3], "rgn": -1.0}]}',
    ],
)
def test_broken_files_are_refused_by_path(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.json"
    path.write_text(text, "utf-8")
    with pytest.raises(TitheError, match=r"broken\.json"):
        Ranking.load(path)


def test_no_file_binary_files_and_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    for name in ("missing.json", "binary", "."):
        with pytest.raises(TitheError, match="no ranking"):
            Ranking.load(tmp_path / name)


# --- where it does not belong


@pytest.mark.parametrize("through_a_file", [False, True])
def test_a_ranking_of_another_architecture_names_the_layer(tmp_path: Path, through_a_file: bool) -> None:
    shape = dict(_compute(MLP, MLP.model(), MLP.batches(1)).shapes)
    others = [
        (Ranking({"other": 1.0}, {"other": (3, 3)}), "0.weight"),
        (Ranking(dict.fromkeys(shape, 1.0), shape | {"2.weight": (16, 9)}), "2.weight"),
    ]
    for number, (ranking, layer) in enumerate(others):
        given: Ranking | Path = ranking
        if through_a_file:
            given = tmp_path / f"{number}.json"
            ranking.save(given)
        model = MLP.model()
        before = bits(model)
        with pytest.raises(TitheError, match=layer):
            tithe.attach(model, TraDy(Budget(fraction=0.5), given), loss=MLP.loss, data=MLP.batches(1))
        assert equal_bits(before, bits(model)) == []
        assert all(p.requires_grad for p in model.parameters())
        assert not any(m._forward_pre_hooks for m in model.modules())


def test_rankings_of_two_architectures_do_not_add_up() -> None:
    one, two = Ranking({"a": 1.0}, {"a": (2, 2)}), Ranking({"a": 1.0, "b": 1.0}, {"a": (2, 2), "b": (2, 2)})
    for left, right in ((one, two), (two, one)):
        with pytest.raises(TitheError, match="b"):
            _ = left + right


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"data": []}, "no batch"),
        ({"where": "*.bias"}, "no input channels"),
        ({"where": "nothing.*"}, "nothing"),
        ({"loss": lambda model, batch: model(batch["x"])}, "loss"),
        ({"loss": lambda model, batch: model(batch["x"]).sum() * float("nan")}, "finite"),
    ],
)
def test_what_cannot_be_ranked_is_said(settings: dict[str, object], told: str) -> None:
    model = MLP.model()
    with pytest.raises(TitheError, match=told):
        Ranking.compute(model, **({"loss": MLP.loss, "data": MLP.batches(1)} | settings))
    assert all(p.requires_grad for p in model.parameters())
    assert all(type(m._parameters.get("weight", None)) in (nn.Parameter, type(None)) for m in model.modules())


def test_a_model_with_a_plan_is_refused() -> None:
    model = MLP.model()
    plan = tithe.attach(model, tithe.FISH(k=3, score="random"))
    with pytest.raises(TitheError, match="plan"):
        _compute(MLP, model, MLP.batches(1))
    plan.release()
