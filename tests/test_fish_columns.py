"""FISH over whole columns: the pick, the limits, what a step keeps, and all that a plan can do besides."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import tithe
from models import CASES, Batch, Case
from oracles import Optimizer, adamw, bits, empirical_fisher, equal_bits, sgd
from ranks import play
from tithe import FISH, Channels, TitheError, TitheWarning
from tithe.app.train import Recipe, parse_recipe
from tithe.ledger import measure
from tithe.select.importance import channel_sums
from tithe.select.topk import top_columns
from tithe.testing import check_method

SCORES = ("fisher", "gradient", "snr", "saliency", "magnitude", "random", "principal")
NAMES = ["mlp", "tied_mlp", "depthwise", "signal", "bert", "gpt2"]


def _attach(
    name: str, model: nn.Module, method: FISH, batches: list[Batch] | None = None, **more: object
) -> tithe.Plan:
    case = CASES[name]
    data = case.batches(2) if batches is None else batches
    return tithe.attach(model, method, loss=case.loss, data=data, head=case.head, **more)


def _train(plan: tithe.Plan, case: Case, optimizer: Optimizer, batches: list[Batch]) -> list[float]:
    opt = optimizer(plan.parameters())
    plan.bind(opt)
    losses: list[float] = []
    torch.manual_seed(7)
    for batch in batches:
        opt.zero_grad()
        loss = plan.backward(lambda batch=batch: case.loss(plan.model, batch))
        opt.step()
        plan.step()
        losses.append(loss.item())
    return losses


# --- the pick


def _greedy(
    scores: dict[str, list[float]], weights: dict[str, int], k: int, parts: dict[str, int] | None
) -> dict[str, list[int]]:
    """One column at a time."""
    ranked: list[tuple[float, int, str, int, int]] = []
    for at, (name, values) in enumerate(scores.items()):
        by_score = sorted(range(len(values)), key=lambda c, values=values: (-values[c], c))
        for place, column in enumerate(by_score):
            w = weights[name]
            rank = values[column] / w if parts is None else -(place * w) / parts[name]
            ranked.append((-rank, at, name, column, place))
    picked: dict[str, list[int]] = {name: [] for name in scores}
    ranked.sort(key=lambda entry: (entry[0], entry[1], entry[3]))
    for first in (True, False):
        for _, _, name, column, place in ranked:
            if (place == 0) == first and weights[name] <= k:
                picked[name].append(column)
                k -= weights[name]
    return {name: sorted(columns) for name, columns in picked.items()}


MATRICES = st.dictionaries(
    st.sampled_from("abcd"),
    st.tuples(st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.0]), min_size=1, max_size=6), st.integers(1, 7)),
    min_size=1,
)


@given(MATRICES, st.integers(0, 60), st.booleans())
def test_columns_are_picked_greedily_under_the_budget(
    drawn: dict[str, tuple[list[float], int]], k: int, evenly: bool
) -> None:
    scores = {name: values for name, (values, _) in drawn.items()}
    weights = {name: size for name, (_, size) in drawn.items()}
    parts = {name: len(values) * weights[name] for name, values in scores.items()} if evenly else None
    tensors = {name: torch.tensor(values) for name, values in scores.items()}
    picked = {name: columns.tolist() for name, columns in top_columns(tensors, weights, k, parts).items()}
    assert picked == _greedy(scores, weights, k, parts)
    spent = sum(len(columns) * weights[name] for name, columns in picked.items())
    assert spent <= k
    if sum(weights.values()) <= k:
        assert all(picked.values())
    assert all(len(picked[name]) == len(scores[name]) or weights[name] > k - spent for name in scores)  # no room left
    for name, values in scores.items():  # the best of each matrix, the first of equals
        rest = [c for c in range(len(values)) if c not in picked[name]]
        assert all((values[a], -a) > (values[b], -b) for a in picked[name] for b in rest)


@pytest.mark.parametrize(("shape", "groups"), [((6, 4), 1), ((6, 2, 3, 3), 1), ((6, 2, 3), 3), ((6, 1, 3, 3), 6)])
def test_the_sum_of_a_score_over_a_channel(shape: tuple[int, ...], groups: int) -> None:
    score = torch.rand(shape, dtype=torch.float64)
    channels = Channels(shape, torch.arange(shape[1] * groups), groups=groups)
    expected = channels.by_item(channels.gather(score)).sum(1)
    torch.testing.assert_close(channel_sums(score, groups, transposed=False), expected)
    channels = Channels(shape, torch.arange(shape[0]), transposed=True)
    expected = channels.by_item(channels.gather(score)).sum(1)
    torch.testing.assert_close(channel_sums(score, groups, transposed=True), expected)


@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("name", NAMES)
def test_columns_are_those_of_the_most_fisher_information(name: str, scope: str) -> None:
    case = CASES[name]
    model, batches = case.model(dtype=torch.float64), case.batches(3, dtype=torch.float64)
    information = empirical_fisher(model, case, batches)
    plan = _attach(name, model, FISH(density=0.5, scope=scope, unit="column"), batches)
    k = int(0.5 * sum(v.numel() for v in information.values())) - sum(information[n].numel() for n in plan.head)
    scores, weights = {}, {}
    for key, selection in plan.selections.items():
        assert isinstance(selection, Channels)
        sums = channel_sums(information[key], selection.groups, transposed=selection.transposed)
        scores[key], weights[key] = sums.tolist(), information[key].numel() // sums.numel()
    parts = {key: information[key].numel() for key in scores} if scope == "tensor" else None
    expected = _greedy(scores, weights, k, parts)
    assert {key: selection.items.tolist() for key, selection in plan.selections.items()} == expected
    spent = sum(selection.size for selection in plan.selections.values())
    assert k - min(weights.values()) < spent <= k


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("name", ["depthwise", "gpt2"])
def test_every_score_has_columns(name: str, scope: str, score: str) -> None:
    case = CASES[name]
    model = case.model()
    plan = _attach(name, model, FISH(density=0.4, score=score, scope=scope, unit="column"), case.batches(2, 8))
    weights = sum(p.numel() for n, p in model.named_parameters() if not n.endswith("@theta"))
    assert sum(p.numel() for p in plan.parameters()) <= int(0.4 * weights)
    assert all(isinstance(s, Channels) and s.items.numel() for s in plan.selections.values())
    if scope == "tensor" and score != "principal":  # the same part of each, as far as whole columns go
        chosen = list(plan.selections.values())
        part = sum(s.size for s in chosen) / sum(s.num_weights for s in chosen)
        assert all(abs(s.items.numel() - part * s.num_channels) < 2 for s in chosen)


def test_random_columns_do_not_depend_on_how_many_weights_they_have() -> None:
    model = nn.Sequential(nn.Linear(64, 4), nn.Linear(4, 64))
    wide = 0
    for seed in range(40):
        method = FISH(k=4 + 64 + 3 * 64, score="random", unit="column")
        plan = tithe.attach(
            model,
            method,
            loss=lambda m, b: m(b).square().mean(),
            data=[torch.randn(3, 64)],
            where="*.weight",
            seed=seed,
        )
        wide += plan.selections["1.weight"].items.numel() - 1
        plan.release()
    assert wide >= 20  # of 3 other columns in 66 none would ever be drawn if sums were compared


def test_a_budget_below_one_column_of_each_matrix_is_refused() -> None:
    case = CASES["bert"]
    model = case.model()
    with pytest.raises(TitheError, match="one column of each") as error:
        _attach("bert", model, FISH(k=100, unit="column"))
    least = int(error.value.remedy.partition("k=")[2].partition(",")[0])
    plan = _attach("bert", model, FISH(k=least, unit="column"))
    assert all(s.items.numel() == 1 for s in plan.selections.values())
    plan.release()
    with pytest.raises(TitheError, match="one column of each"):
        _attach("bert", model, FISH(k=least - 1, unit="column", warmup=3))
    density = float(error.value.remedy.split()[2])
    _attach("bert", model, FISH(density=density, unit="column"))


def test_what_columns_need_is_said() -> None:
    case = CASES["mlp"]
    with pytest.raises(TitheError, match="data"):
        tithe.attach(case.model(), FISH(k=60, score="magnitude", unit="column"))
    with pytest.raises(TitheError, match="weights in columns to choose from"):
        _attach("mlp", case.model(), FISH(density=1.0, unit="column"))
    with pytest.raises(TitheError, match="'column'"):
        FISH(k=5, unit="row")
    with pytest.raises(TitheError, match="input channels"):
        _attach("mlp", case.model(), FISH(k=2, unit="column"), where="*.bias")


def test_columns_without_a_score_are_said() -> None:
    """The second half of the inputs is zero, and so is the gradient of their weights."""
    model = nn.Sequential(nn.Linear(8, 4))
    x = torch.randn(4, 8)
    x[:, 4:] = 0
    with pytest.warns(TitheWarning, match="of 6 columns, 2 are chosen by their place"):
        plan = tithe.attach(
            model, FISH(k=24, unit="column"), loss=lambda m, b: m(b).square().mean(), data=[x], where="*.weight"
        )
    assert plan.selections["0.weight"].items.tolist() == [0, 1, 2, 3, 4, 5]


# --- training


@pytest.mark.parametrize("optimizer", [sgd, adamw])
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("name", ["mlp", "bert", "gpt2"])
def test_all_columns_are_ordinary_training_bit_for_bit(name: str, again: bool, optimizer: Optimizer) -> None:
    case = CASES[name]
    model, batches = case.model(), case.batches(4)
    probe = _attach(name, model, FISH(density=0.4, unit="column"))
    layers = set(probe.selections)
    probe.release()
    ordinary = copy.deepcopy(model)
    trained = [p for n, p in ordinary.named_parameters() if p.requires_grad_(n in layers).requires_grad]
    opt, expected = optimizer(trained), []
    torch.manual_seed(7)
    for batch in batches:
        opt.zero_grad()
        loss = case.loss(ordinary, batch)
        loss.backward()
        opt.step()
        expected.append(loss.item())
    method = FISH(k=sum(p.numel() for p in trained), unit="column", reselect=tithe.every(2) if again else None)
    plan = tithe.attach(model, method, loss=case.loss, data=case.batches(2), where=sorted(layers))
    assert _train(plan, case, optimizer, batches) == expected
    plan.release()
    assert equal_bits(bits(model), bits(ordinary)) == []


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_selected_keeps_its_bits(name: str) -> None:
    case = CASES[name]
    model = case.model()
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    plan = _attach(name, model, FISH(density=0.4, unit="column"))
    chosen = {key: s.indices for key, s in plan.selections.items()}
    _train(plan, case, adamw, case.batches(3))
    head = set(plan.head)
    plan.release()
    for key, weight in model.named_parameters():
        stays = torch.ones(weight.numel(), dtype=torch.bool)
        if key in chosen:
            stays[chosen[key]] = False
            assert not torch.equal(weight.flatten()[~stays], before[key].flatten()[~stays])
        if key not in head:
            assert torch.equal(weight.detach().flatten()[stays], before[key].flatten()[stays])


@pytest.mark.parametrize(
    "method",
    [
        FISH(density=0.45, unit="column"),
        FISH(density=0.45, unit="column", reselect=tithe.every(1)),
        FISH(density=0.45, unit="column", score="snr", scope="tensor", reselect=tithe.every(2)),
        FISH(density=0.45, unit="column", score="random", warmup=2, reselect=tithe.every(3)),
        FISH(density=0.45, unit="column", score="principal", scope="tensor", warmup=1),
    ],
    ids=lambda m: f"{m.score}-{m.scope}-{m.warmup}-{m.reselect}",
)
@pytest.mark.parametrize("name", NAMES)
def test_the_contract_holds(name: str, method: FISH) -> None:
    case = CASES[name]
    if not case.head and method.warmup:
        pytest.skip("a warm-up trains a head")
    check_method(method, case.model, case.loss, case.batches(2, 8), head=case.head)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_columns_of_half_precision_have_a_master(dtype: torch.dtype) -> None:
    case = CASES["mlp"]
    model = case.model().to(dtype)
    batches = [{k: t.to(dtype) if t.is_floating_point() else t for k, t in b.items()} for b in case.batches(4, 8)]

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return nn.functional.cross_entropy(model(batch["x"]).float(), batch["y"])

    method = FISH(density=0.6, unit="column", reselect=tithe.every(2))
    plan = tithe.attach(model, method, loss=loss, data=batches, head=case.head)
    assert all(p.dtype == torch.float32 for p in plan.parameters())
    opt = adamw(plan.parameters())
    before = bits(model)
    for batch in batches:
        loss(model, batch).backward()
        opt.step()
        opt.zero_grad()
        plan.step()
    assert len(equal_bits(before, bits(model))) >= 3


def test_a_delta_of_columns_gives_the_trained_model(tmp_path: Path) -> None:
    case = CASES["bert"]
    model, base = case.model(), case.model()
    plan = _attach("bert", model, FISH(density=0.4, unit="column", reselect=tithe.every(2)))
    _train(plan, case, adamw, case.batches(4))
    plan.save(tmp_path / "delta.safetensors")
    plan.release()
    tithe.apply(base, tmp_path / "delta.safetensors")
    assert equal_bits(bits(model), bits(base)) == []


# --- what a step takes


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("is_lean", [False, True])
@pytest.mark.parametrize("name", ["mlp", "depthwise", "bert", "gpt2"])
def test_what_a_step_keeps_is_predicted(name: str, is_lean: bool, again: bool) -> None:
    case = CASES[name]
    model, batch = case.model(), case.batch(6)
    if is_lean:
        tithe.lean(model)
    method = FISH(density=0.4, unit="column", reselect=tithe.every(2) if again else None)
    plan = _attach(name, model, method)
    plan.bind(torch.optim.AdamW(plan.parameters()))
    found = plan.predict(batch)
    measured = measure(lambda: case.loss(model, batch).backward())
    assert found.kept == measured.kept
    assert found.kept_by_module == measured.kept_by_module
    assert found.theta == sum(p.nbytes for p in plan.parameters())
    assert found.index == plan.index_bytes == 8 * sum(s.items.numel() for s in plan.selections.values())


def test_columns_keep_less_than_entries_of_the_same_number() -> None:
    """Entries by saliency are spread: they touch most columns of most layers."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(60, 64),
        nn.Linear(64, 96),
        nn.Tanh(),
        nn.Linear(96, 64),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(1024, 3),
    )
    batches = [(torch.randint(60, (8, 16)), torch.randint(3, (8,))) for _ in range(4)]

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    kept: dict[str, int] = {}
    index: dict[str, int] = {}
    for unit in ("entry", "column"):
        tithe_lean = tithe.lean(model)
        method = FISH(k=1500, score="saliency", unit=unit, samples=32)
        plan = tithe.attach(model, method, loss=loss, data=batches, where=["1.weight", "3.weight"], head="6.*")
        kept[unit] = measure(lambda: loss(model, batches[0]).backward()).kept
        index[unit] = plan.index_bytes
        assert kept[unit] == plan.predict(batches[0]).kept
        plan.release()
        tithe_lean.release()
    assert kept["column"] < 0.8 * kept["entry"]
    assert index["column"] < 0.1 * index["entry"]


# --- ranks


def _half(rank: int | None, again: bool) -> dict[str, Tensor]:
    """What training on half of each batch gives, or on all of it; θ's gradient is reduced by DDP."""
    case, part = CASES["bert"], slice(None) if rank is None else slice(4 * rank, 4 * rank + 4)
    batches = [{key: t[part] for key, t in batch.items()} for batch in case.batches(4, 8, dtype=torch.float64)]
    model = case.model(dtype=torch.float64)
    method = FISH(density=0.4, unit="column", reselect=tithe.every(2) if again else None)
    plan = _attach("bert", model, method, batches[:2])
    forward = model if rank is None else DistributedDataParallel(model)
    opt = sgd(plan.parameters())
    plan.bind(opt)
    for batch in batches:
        opt.zero_grad()
        plan.backward(lambda batch=batch: case.loss(forward, batch))
        opt.step()
        plan.step()
    plan.release()
    return model.state_dict()


def once(rank: int) -> dict[str, Tensor]:
    return _half(rank, again=False)


def every_second_step(rank: int) -> dict[str, Tensor]:
    return _half(rank, again=True)


def test_two_ranks_equal_one_with_the_doubled_batch(tmp_path: Path) -> None:
    found = play(tmp_path, once, every_second_step)
    for again, scene in ((False, "once"), (True, "every_second_step")):
        expected = _half(None, again)
        for rank in found[scene]:
            for key, value in expected.items():
                torch.testing.assert_close(rank[key], value, rtol=1e-9, atol=1e-12)


# --- from outside


def _recipe(**method: object) -> Recipe:
    return parse_recipe(
        {
            "model": {"callable": "package:make"},
            "data": {"task": "image-classification", "train": "none"},
            "method": {"name": "fish", "density": 0.02, **method},
            "optimizer": {"lr": 1e-3},
            "run": {"epochs": 1, "output": "none"},
        }
    )


def test_a_recipe_says_score_and_unit() -> None:
    section = _recipe(score="snr", unit="column").method
    assert section.make(Path()) == FISH(density=0.02, score="snr", unit="column")
    with pytest.raises(TitheError, match="mean gradient is zero"):
        _recipe(score="snr", fisher="true")
    with pytest.raises(TitheError, match="unit"):
        _recipe(unit="row")


def test_an_own_method_asks_for_the_scores_of_channels() -> None:
    heard: dict[str, Tensor] = {}

    class Best(tithe.SparseMethod):
        needs_data = True

        def choose(self, context: tithe.SelectionContext) -> dict[str, Channels]:
            layers = context.layers()
            heard.update(context.channel_scores("snr", samples=8))
            return {name: layers[name].select(score.argmax()[None].cpu()) for name, score in heard.items()}

    case = CASES["gpt2"]
    plan = tithe.attach(case.model(), Best(), loss=case.loss, data=case.batches(2))
    assert list(heard) == list(plan.selections)
    assert all(s.items.numel() == 1 and heard[key].numel() == s.num_channels for key, s in plan.selections.items())
