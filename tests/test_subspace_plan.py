"""A plan in a span, as every plan: keys, release, resume, starts, statistics, and what it composes with."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tithe
from histories import checkpoints, flat, perturbed, recorded
from models import CASES, Case
from oracles import adamw, bits, equal_bits, sgd

NAMES = [
    "mlp",
    "tied_mlp",
    "bert",
    "gpt2",
    "llama",
    "vit",
    "resnet_basic",
    "resnet_bottleneck",
    "convnext",
    "recurrent",
]
SOME = [pytest.param(CASES[name], id=name) for name in NAMES]


def _train(plan: tithe.Plan, case: Case, optimizer: torch.optim.Optimizer, batches: list[dict[str, Tensor]]) -> None:
    for batch in batches:
        optimizer.zero_grad()
        plan.backward(lambda batch=batch: case.loss(plan.model, batch))
        optimizer.step()
        plan.step()


def _run(model: nn.Module, case: Case, method: tithe.TWA, steps: int = 3) -> tithe.SubspacePlan:
    plan = tithe.attach(model, method, loss=case.loss, data=case.batches(2))
    assert isinstance(plan, tithe.SubspacePlan)
    optimizer = adamw(plan.parameters())
    plan.bind(optimizer)
    _train(plan, case, optimizer, case.batches(steps))
    return plan


@pytest.mark.parametrize("case", SOME)
def test_keys_stay_and_release_leaves_nothing(case: Case, tmp_path: Path) -> None:
    model = case.model()
    before = {path: (set(vars(m)), dict(m._forward_pre_hooks)) for path, m in model.named_modules()}
    keys, required = list(model.state_dict()), [p.requires_grad for p in model.parameters()]
    plan = _run(model, case, tithe.TWA(recorded(tmp_path / "run", checkpoints(model, 3))))
    assert list(model.state_dict()) == keys
    assert all(p.grad is None for name, p in model.named_parameters() if not name.endswith("@theta"))
    weights = flat(model)
    plan.release()
    assert torch.equal(flat(model), weights)
    after = {path: (set(vars(m)), dict(m._forward_pre_hooks)) for path, m in model.named_modules()}
    assert after == before
    assert list(model.state_dict()) == keys
    assert [p.requires_grad for p in model.parameters()] == required


@pytest.mark.parametrize("granularity", ["model", "tensor"])
@pytest.mark.parametrize("bits_", [None, 8, 4, 1])
def test_a_resumed_plan_goes_on_as_if_never_stopped(granularity: str, bits_: int | None, tmp_path: Path) -> None:
    case = CASES["resnet_basic"]
    model = case.model()
    method = tithe.TWA(recorded(tmp_path / "run", checkpoints(model, 4)), bits=bits_, granularity=granularity)
    again = copy.deepcopy(model)
    batches = case.batches(4)
    plan = tithe.attach(model, method, loss=case.loss)
    optimizer = adamw(plan.parameters())
    plan.bind(optimizer)
    _train(plan, case, optimizer, batches[:2])
    torch.save([plan.state_dict(), optimizer.state_dict()], tmp_path / "state.pt")
    _train(plan, case, optimizer, batches[2:])
    state, optimizer_state = torch.load(tmp_path / "state.pt", weights_only=True)
    plan2 = tithe.attach(again, method, loss=case.loss, state=state)
    optimizer = adamw(plan2.parameters())
    optimizer.load_state_dict(optimizer_state)
    plan2.bind(optimizer)
    assert plan2.num_steps == 2
    _train(plan2, case, optimizer, batches[2:])
    assert equal_bits(bits(model), bits(again)) == []


def test_a_state_of_another_history_is_refused(tmp_path: Path) -> None:
    case = CASES["mlp"]
    model = case.model()
    first = recorded(tmp_path / "first", checkpoints(model, 3))
    second = recorded(tmp_path / "second", [perturbed(model, seed) for seed in (7, 8, 9)])
    state = tithe.attach(copy.deepcopy(model), tithe.TWA(first)).state_dict()
    with pytest.raises(tithe.TitheError, match="another history"):
        tithe.attach(model, tithe.TWA(second), state=state)
    assert not any(name.endswith("@theta") for name, _ in model.named_parameters())


@pytest.mark.parametrize("case", SOME)
def test_starts_at_the_last_and_at_the_best(case: Case, tmp_path: Path) -> None:
    model = case.model()
    models = checkpoints(model, 4)
    history = tithe.History(tmp_path / "run")
    for step, (other, score) in enumerate(zip(models, [0.1, 0.9, None, 0.3], strict=True)):
        history.record(other, step, score=score)
    for start, expected in (("last", models[3]), ("best", models[1])):
        fresh = copy.deepcopy(model)
        plan = tithe.attach(fresh, tithe.TWA(history, start=start))
        assert equal_bits(bits(fresh), bits(expected)) == []
        assert isinstance(plan, tithe.SubspacePlan)
        weights = plan.coefficients()["span"]
        assert torch.allclose(weights, torch.eye(4, dtype=torch.float64)[3 if start == "last" else 1], atol=1e-6)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            plan.release()


def test_the_best_needs_scores(tmp_path: Path) -> None:
    model = CASES["mlp"].model()
    with pytest.raises(tithe.TitheError, match="no score"):
        tithe.attach(model, tithe.TWA(recorded(tmp_path / "run", checkpoints(model, 2)), start="best"))


@pytest.mark.parametrize("case", SOME)
def test_coefficients_rebuild_the_weights(case: Case, tmp_path: Path) -> None:
    model = case.model(dtype=torch.float64)
    models = checkpoints(model, 4)
    history = recorded(tmp_path / "run", models)
    plan = tithe.attach(model, tithe.TWA(history), loss=case.loss)
    assert isinstance(plan, tithe.SubspacePlan)
    optimizer = sgd(plan.parameters())
    plan.bind(optimizer)
    _train(plan, case, optimizer, case.batches(3, dtype=torch.float64))
    weights = plan.coefficients()["span"]
    assert float(weights.sum()) == pytest.approx(1)
    rebuilt = history.average(weights.tolist())
    for name, weight in model.named_parameters():
        if name in rebuilt:
            assert torch.allclose(rebuilt[name], weight, atol=1e-9), name


def test_frozen_weights_and_buffers_take_their_start_and_counters_that_of_the_last(tmp_path: Path) -> None:
    case = CASES["resnet_basic"]
    model = case.model()
    frozen = [name for name, _ in model.named_parameters() if "embedder" in name]
    for name, p in model.named_parameters():
        p.requires_grad_(name not in frozen)
    models = checkpoints(model, 3)
    plan = _run(model, case, tithe.TWA(recorded(tmp_path / "run", models)))
    for name in frozen:
        expected = torch.stack([m.get_parameter(name) for m in models]).mean(0)
        assert torch.allclose(model.get_parameter(name), expected, atol=1e-6), name
        assert name not in plan.selections
    fresh = tithe.attach(copy.deepcopy(models[0]), tithe.TWA(tmp_path / "run"))
    for name, buffer in fresh.model.named_buffers():
        expected = [dict(m.named_buffers())[name] for m in models]
        if buffer.dtype == torch.int64:
            assert torch.equal(buffer, expected[-1]), name
        else:
            assert torch.allclose(buffer, torch.stack(expected).mean(0), atol=1e-6), name


def test_what_where_leaves_out_takes_its_start_and_stays(tmp_path: Path) -> None:
    case = CASES["mlp"]
    model = case.model()
    models = checkpoints(model, 3)
    plan = tithe.attach(model, tithe.TWA(recorded(tmp_path / "run", models)), where="0.*", head="4.*", loss=case.loss)
    assert set(plan.selections) == {"0.weight", "0.bias"}
    assert [name for name, _ in plan.named_parameters()] == ["span", "4.weight", "4.bias"]
    middle = model.get_parameter("2.weight").detach().clone()
    head = model.get_parameter("4.weight").detach().clone()
    assert torch.allclose(middle, torch.stack([m.get_parameter("2.weight") for m in models]).mean(0), atol=1e-6)
    optimizer = sgd(plan.parameters())
    plan.bind(optimizer)
    _train(plan, case, optimizer, case.batches(2))
    assert torch.equal(model.get_parameter("2.weight"), middle)
    assert not torch.equal(model.get_parameter("4.weight"), head)


def test_statistics_are_never_forgotten(tmp_path: Path) -> None:
    case = CASES["resnet_basic"]
    model = case.model()
    history = recorded(tmp_path / "run", checkpoints(model, 3))
    alone = copy.deepcopy(model)
    plan = tithe.attach(model, tithe.TWA(history), loss=case.loss, data=case.batches(3))
    plan.release()  # by itself, over data=
    by_hand = tithe.attach(alone, tithe.TWA(history), loss=case.loss)
    assert isinstance(by_hand, tithe.SubspacePlan)
    assert by_hand.refresh_statistics(case.batches(3)) == 3
    by_hand.release()
    assert equal_bits(bits(model), bits(alone)) == []
    assert model.training
    without = tithe.attach(case.model(), tithe.TWA(history))
    with pytest.warns(tithe.TitheWarning, match="refresh_statistics"):
        without.release()
    with pytest.raises(tithe.TitheError, match="no batch"):
        tithe.attach(case.model(), tithe.TWA(history)).refresh_statistics([])
    text = CASES["bert"]
    plain = text.model()
    tithe.attach(plain, tithe.TWA(recorded(tmp_path / "text", checkpoints(plain, 2)))).release()  # nothing to warn of


@pytest.mark.parametrize("case", [pytest.param(CASES[n], id=n) for n in ("mlp", "bert", "gpt2", "resnet_basic")])
def test_over_deltas_of_fisher_masks(case: Case, tmp_path: Path) -> None:
    base = case.model()
    other = copy.deepcopy(base)
    fish = tithe.attach(other, tithe.FISH(density=0.2, samples=4), loss=case.loss, data=case.batches(1), head=case.head)
    optimizer = adamw(fish.parameters())
    fish.bind(optimizer)
    tuned: list[dict[str, Tensor]] = []
    for step in range(3):
        _train(fish, case, optimizer, case.batches(2))
        fish.save(tmp_path / f"delta-{step}.safetensors")
        tuned.append(bits(other))
    history = tithe.History([tmp_path / f"delta-{step}.safetensors" for step in range(3)])
    model = copy.deepcopy(base)
    plan = tithe.attach(model, tithe.TWA(history), loss=case.loss, data=case.batches(2))
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and "running" not in name:
            expected = torch.stack([t[name].double() for t in tuned]).mean(0)
            assert torch.allclose(tensor.double(), expected, atol=1e-6), name
    optimizer = sgd(plan.parameters())
    plan.bind(optimizer)
    before = flat(model)
    _train(plan, case, optimizer, case.batches(2))
    moved = flat(model) != before
    assert (
        0
        < int(moved.sum())
        <= sum(fish.selected(n).numel() for n in fish.selections)
        + sum(base.get_parameter(n).numel() for n in fish.head)
    )
    plan.save(tmp_path / "average.safetensors")
    fresh = copy.deepcopy(base)
    tithe.apply(fresh, tmp_path / "average.safetensors")
    assert equal_bits(bits(fresh), bits(model)) == []


@pytest.mark.parametrize("case", SOME)
def test_saved_and_applied_to_a_fresh_model(case: Case, tmp_path: Path) -> None:
    model = case.model()
    fresh = case.model(seed=5)
    plan = _run(model, case, tithe.TWA(recorded(tmp_path / "run", checkpoints(model, 3)), bits=8))
    plan.save(tmp_path / "average.safetensors")
    tithe.apply(fresh, tmp_path / "average.safetensors")
    assert equal_bits(bits(fresh), bits(model)) == []


@pytest.mark.parametrize("case", SOME)
def test_lean_layers_under_it(case: Case, tmp_path: Path) -> None:
    model = case.model()
    history = recorded(tmp_path / "run", checkpoints(model, 3))
    plain = copy.deepcopy(model)
    _run(plain, case, tithe.TWA(history))
    handle = tithe.lean(model, exact=True)
    _run(model, case, tithe.TWA(history))
    assert torch.allclose(flat(model), flat(plain), atol=1e-4)
    handle.release()


def test_over_the_fine_tuning_of_a_narrow_network(tmp_path: Path) -> None:
    case = CASES["mlp"]
    model = case.model()
    narrow = tithe.attach(model, tithe.VRPGE(keep=0.5), loss=case.loss, data=case.batches(2), head=case.head)
    narrow.settle(draws=2)
    optimizer = sgd(narrow.parameters())
    narrow.bind(optimizer)
    history = tithe.History(tmp_path / "run")
    for step in range(3):
        _train(narrow, case, optimizer, case.batches(1))
        history.record(narrow.export(), step)
    network = narrow.export()
    plan = tithe.attach(network, tithe.TWA(history), loss=case.loss)
    for name, weight in network.named_parameters():
        if not name.endswith("@theta"):
            assert torch.allclose(weight, torch.stack([state[name] for state in history]).mean(0), atol=1e-6), name
    optimizer = adamw(plan.parameters())
    plan.bind(optimizer)
    _train(plan, case, optimizer, case.batches(2))
    plan.release()


@pytest.mark.parametrize("granularity", ["model", "tensor"])
def test_it_starts_at_weights_that_are_given(granularity: Any, tmp_path: Path) -> None:
    """Base plus 0.3 of each task vector, as AdaMerging starts."""
    case = CASES["bert"]
    base = case.model()
    first, *tuned = [base, *checkpoints(base, 2)]
    history = recorded(tmp_path / "run", [first, *tuned])
    expected = flat(first) + sum(0.3 * (flat(model) - flat(first)) for model in tuned)
    method = tithe.TWA(history, start=[0.4, 0.3, 0.3], granularity=granularity)
    model = case.model()
    plan = tithe.attach(model, method, loss=case.loss, data=case.batches(1))
    assert torch.allclose(flat(model), expected, atol=1e-6)
    plan.release()


@pytest.mark.parametrize("start", [[0.5, 0.5, 0.5], [1.0], [float("nan"), 1.0, 0.0], []])
def test_weights_that_are_no_start_are_refused(start: list[float], tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    history = recorded(tmp_path / "run", checkpoints(model, 3))
    with pytest.raises(tithe.TitheError, match="weights"):
        tithe.attach(model, tithe.TWA(history, start=start), loss=lambda m, x: m(x).sum(), data=[torch.randn(2, 3)])


@pytest.mark.parametrize("granularity", ["model", "tensor"])
def test_coefficients_move_the_weights_of_a_model_in_float64(granularity: Any, tmp_path: Path) -> None:
    """θ needs no conversion there, and still is no view of where it started."""
    case = CASES["mlp"]
    model = case.model(dtype=torch.float64)
    history = recorded(tmp_path / "run", checkpoints(model, 3))
    plan = tithe.attach(model, tithe.TWA(history, granularity=granularity), loss=case.loss)
    before = flat(model)
    with torch.no_grad():
        plan.theta.add_(0.1)
    plan.step()
    assert not torch.equal(flat(model), before)


@pytest.mark.parametrize("start", [3, ["a", 1.0, 0.0], None])
def test_a_start_that_is_neither_a_name_nor_numbers_is_refused(start: Any, tmp_path: Path) -> None:
    with pytest.raises(tithe.TitheError, match="a number for each checkpoint"):
        tithe.TWA(tmp_path, start=start)
