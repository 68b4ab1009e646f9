"""What TraDy is given and cannot do: an error that names the place, and the model as it was."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tithe
from models import CASES, Case
from oracles import adamw, bits, equal_bits
from tithe import Budget, TitheError, TitheWarning, TraDy

MLP, DEPTHWISE = CASES["mlp"], CASES["depthwise"]


def _attach(case: Case, model: nn.Module, method: TraDy, **settings: object) -> tithe.Plan:
    return tithe.attach(model, method, **({"loss": case.loss, "data": case.batches(2), "head": case.head} | settings))


def _refused(method: TraDy, match: str, case: Case = MLP, **settings: object) -> TitheError:
    model = case.model()
    before, attributes = bits(model), [sorted(vars(m)) for m in model.modules()]
    with pytest.raises(TitheError, match=match) as error:
        _attach(case, model, method, **settings)
    assert equal_bits(before, bits(model)) == []
    assert [sorted(vars(m)) for m in model.modules()] == attributes
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    return error.value


# --- budgets


def test_a_budget_smaller_than_the_head_says_how_large_that_is() -> None:
    error = _refused(TraDy(Budget(100), optimizer_states=0), "head")
    assert "204 bytes" in error.found  # 16 × 3 + 3 values


def test_a_budget_smaller_than_one_channel_says_what_the_cheapest_costs() -> None:
    error = _refused(TraDy(Budget(elements=16), layers="all", optimizer_states=0), "budget")
    assert "17" in error.expected
    assert ".weight" in error.expected
    _refused(TraDy(Budget(210), optimizer_states=0), "budget")
    _refused(TraDy(Budget(flops=3)), "budget")
    _refused(TraDy(Budget(fraction=1e-4)), "budget")


@pytest.mark.parametrize("bound", [True, False])
def test_an_optimizer_that_keeps_more_than_the_budget_charges_is_refused_by_its_first_step(bound: bool) -> None:
    model = MLP.model()
    plan = _attach(MLP, model, TraDy(Budget(elements=180), layers="all", optimizer_states=1))
    optimizer = adamw(plan.parameters())
    plan.backward(lambda: MLP.loss(model, MLP.batch()))
    before = bits(model)
    with pytest.raises(TitheError, match="2 tensors") as error:
        plan.bind(optimizer) if bound else optimizer.step()
    assert equal_bits(before, bits(model)) == []
    plan.release()
    assert all(p.requires_grad for p in model.parameters())
    assert "optimizer_states=2" in error.value.remedy
    plan = _attach(MLP, model, TraDy(Budget(elements=180), layers="all", optimizer_states=2))
    plan.bind(adamw(plan.parameters()))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"coverage": 0.0}, "coverage"),
        ({"coverage": 1.5}, "coverage"),
        ({"samples": 0}, "samples"),
        ({"layers": "some"}, "topk"),
        ({"score": "loss"}, "uniform"),
        ({"budget": "2MB"}, "Budget"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, object], told: str) -> None:
    with pytest.raises(TitheError, match=told):
        TraDy(**({"budget": Budget(elements=10)} | settings))


# --- what is missing or does not belong


@pytest.mark.parametrize("missing", ["loss", "data"])
def test_missing_data_or_loss_is_named(missing: str) -> None:
    _refused(TraDy(Budget(elements=500), layers="all"), missing, **{missing: None})


def test_data_without_a_batch() -> None:
    _refused(TraDy(Budget(elements=500)), "without a batch", data=[])


@pytest.mark.parametrize("name", ["recurrent", "functional"])
def test_a_model_without_channels_says_so(name: str) -> None:
    """An LSTM's and a loose matrix's weights have no rule for channels; lookup tables have none to choose."""
    with pytest.warns(TitheWarning, match="no rule for input channels"):
        _refused(TraDy(Budget(elements=500)), "no weight with input channels", CASES[name])


def test_biases_alone_are_nothing_to_draw_from() -> None:
    _refused(TraDy(Budget(elements=500)), "no weight with input channels", where="*.bias")


def test_a_path_without_a_ranking(tmp_path: Path) -> None:
    _refused(TraDy(Budget(elements=500), tmp_path / "missing.json"), "missing.json")


def test_layers_without_a_rule_are_named_and_left_frozen() -> None:
    case = CASES["encoder"]
    model = case.model()
    with pytest.warns(TitheWarning, match="in_proj_weight"):
        plan = _attach(case, model, TraDy(Budget(elements=10**6), layers="all"))
    assert not any("in_proj" in name for name in plan.selections)
    assert any("linear1" in name for name in plan.selections)


def test_a_second_plan_is_refused() -> None:
    model = DEPTHWISE.model()
    plan = _attach(DEPTHWISE, model, TraDy(Budget(fraction=0.3)))
    with pytest.raises(TitheError, match="plan already"):
        _attach(DEPTHWISE, model, TraDy(Budget(fraction=0.3)))
    assert tithe.Lean.of(model) is not None
    plan.backward(lambda: DEPTHWISE.loss(model, DEPTHWISE.batch()))
    plan.release()
    assert tithe.Lean.of(model) is None


# --- batches that were not priced


def _step(plan: tithe.Plan, optimizer: torch.optim.Optimizer, case: Case, batch: dict[str, Tensor]) -> bool:
    plan.backward(lambda: case.loss(plan.model, batch))
    optimizer.step()
    optimizer.zero_grad()
    return plan.step()


@pytest.mark.parametrize(
    ("case", "budget", "larger"), [(MLP, "2kB", 16), (DEPTHWISE, "16kB", 6)], ids=["mlp", "depthwise"]
)
def test_a_batch_larger_than_priced_is_said_and_the_next_draw_is_priced_for_it(
    case: Case, budget: str, larger: int
) -> None:
    model = case.model()
    plan = _attach(case, model, TraDy(Budget(budget), layers="all"))
    opt = torch.optim.SGD(plan.parameters(), lr=0.01)
    plan.bind(opt)
    with torch.no_grad():
        case.loss(model, case.batch(64))
    plan.predict(case.batch(64))
    for size in (1, 3, 4):
        assert not _step(plan, opt, case, case.batch(size))
    with pytest.warns(TitheWarning, match=r"larger than .* priced for") as said:
        assert _step(plan, opt, case, case.batch(larger))
    assert len(said) == 1
    spent = plan.spending()
    assert spent is not None
    assert spent.spent <= spent.limit
    assert plan.selections
    batch = case.batch(larger)
    measured = tithe.measure(lambda: plan.backward(lambda: case.loss(model, batch)), model=model)
    assert measured.kept == plan.predict(batch).kept
    assert not _step(plan, opt, case, batch)
    assert _step(plan, opt, case, case.batch(3 * larger))  # said once, followed each time
    state = plan.state_dict()
    plan.release()
    other = case.model()
    resumed = _attach(case, other, TraDy(Budget(budget), layers="all"), state=state)
    resumed.end_epoch()
    spent = resumed.spending()
    assert spent is not None
    assert spent.spent <= spent.limit
    case.loss(model, case.batch(64)).backward()


def test_a_batch_too_large_for_any_channel_keeps_the_draw_that_there_is() -> None:
    case, model = MLP, MLP.model()
    plan = _attach(case, model, TraDy(Budget("1kB"), layers="all"))
    opt = torch.optim.SGD(plan.parameters(), lr=0.01)
    plan.bind(opt)
    before = {name: selection.items.tolist() for name, selection in plan.selections.items()}
    with pytest.warns(TitheWarning, match="larger than"):
        _step(plan, opt, case, case.batch(500))
    assert before == {name: selection.items.tolist() for name, selection in plan.selections.items()}
    assert plan.end_epoch()


def test_a_larger_batch_that_the_budget_has_room_for_is_no_matter() -> None:
    model = MLP.model()
    plan = _attach(MLP, model, TraDy(Budget("64kB"), layers="all"))
    opt = torch.optim.SGD(plan.parameters(), lr=0.01)
    plan.bind(opt)
    assert not _step(plan, opt, MLP, MLP.batch(9))


def test_a_static_draw_stays_and_says_what_is_larger() -> None:
    case, model = MLP, MLP.model()
    plan = _attach(case, model, TraDy(Budget("2kB"), layers="all", dynamic=False))
    opt = torch.optim.SGD(plan.parameters(), lr=0.01)
    plan.bind(opt)
    with pytest.warns(TitheWarning, match="the next choice stays"):
        assert not _step(plan, opt, case, case.batch(40))
    assert not _step(plan, opt, case, case.batch(40))


@pytest.mark.parametrize("lazily", [False, True])
def test_the_largest_batch_of_the_data_is_priced(lazily: bool) -> None:
    """Batches padded to their longest sample: a later one may be longer than the first."""
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    data = [torch.randn(4, length, 4) for length in (5, 9, 7)]

    class Loader:
        def __iter__(self) -> Iterator[Tensor]:
            return iter(data)

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).square().mean()

    plan = tithe.attach(model, TraDy(Budget("4kB"), layers="all"), loss=loss, data=Loader() if lazily else data)
    opt = torch.optim.SGD(plan.parameters(), lr=0.01)
    plan.bind(opt)
    for x in data:
        plan.backward(lambda x=x: loss(model, x))
        opt.step()
        opt.zero_grad()
        assert not plan.step()  # nor a warning


def test_a_budget_in_elements_is_for_any_batch() -> None:
    model = DEPTHWISE.model()
    plan = _attach(DEPTHWISE, model, TraDy(Budget(fraction=0.3)))
    plan.backward(lambda: DEPTHWISE.loss(model, DEPTHWISE.batch(32)))


def test_a_released_plan_does_nothing_more() -> None:
    plan = _attach(DEPTHWISE, DEPTHWISE.model(), TraDy(Budget(fraction=0.3)))
    plan.release()
    for call in (plan.end_epoch, plan.reselect, plan.step):
        with pytest.raises(TitheError, match="released"):
            call()
