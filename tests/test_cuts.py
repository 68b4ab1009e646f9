"""Cuts: ordinary training, but for the steps in which the units of least score go for good, state and all."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import tithe
from models import CASES, Batch, Case
from narrow_plans import FAMILIES, Optimizer, every
from oracles import adamw, bits, equal_bits, sgd, train
from ranks import play, refused
from test_gates import gated, loss_with
from tithe import NarrowPlan, TaylorPruning, TitheError
from tithe.select.cut_order import cut_order
from tithe.testing import check_method

METHOD = TaylorPruning(0.45, stop=6, cuts=3)
"""Cuts after steps 2, 4 and 6."""
FRESH = TaylorPruning(0.45, stop=6, cuts=3, fresh=True)
QUICK = ("vgg", "residual", "inverted", "bert", "grouped_query_tied", "resnet_bottleneck")


def attach(case: Case, model: nn.Module | None = None, method: Any = METHOD, **settings: Any) -> NarrowPlan:
    model = case.model() if model is None else model
    dtype = next(model.parameters()).dtype
    return tithe.attach(model, method, **({"loss": case.loss, "data": case.batches(2, dtype=dtype)} | settings))


def step(plan: NarrowPlan, opt: torch.optim.Optimizer, case: Case, batch: Batch) -> bool:
    """One step of an ordinary loop; whether units went."""
    case.loss(plan.model, batch).backward()
    opt.step()
    opt.zero_grad()
    return plan.step()


def moments(opt: torch.optim.Optimizer, plan: NarrowPlan) -> dict[str, Tensor]:
    """Copies of the optimizer's tensors, by parameter and key."""
    return {
        f"{name} {key}": value.clone()
        for name, parameter in plan.named_parameters()
        for key, value in opt.state[parameter].items()
        if isinstance(value, Tensor)
    }


# ------------------------------------------------------------------------------------------------------ the two limits


@pytest.mark.parametrize("case", every(QUICK))
@pytest.mark.parametrize("optimizer", [sgd, adamw])
def test_all_kept_is_ordinary_training_bit_for_bit(case: Case, optimizer: Optimizer) -> None:
    model, batches = case.model(), case.batches(3)
    ordinary = copy.deepcopy(model)
    expected = train(ordinary, case, optimizer, batches)
    plan = attach(case, model, TaylorPruning(1.0, stop=2, cuts=2))
    assert plan.settled
    assert train(model, case, lambda _: optimizer(plan.parameters()), batches) == expected
    assert plan.num_steps == 3
    assert not plan.end_epoch()
    plan.release()
    assert equal_bits(bits(model), bits(ordinary)) == []


@pytest.mark.filterwarnings("ignore:the network that is exported:tithe.TitheWarning")
@pytest.mark.parametrize("case", every(QUICK))
@pytest.mark.parametrize("optimizer", [sgd, adamw])
def test_between_cuts_training_is_that_of_the_exported_network(case: Case, optimizer: Optimizer) -> None:
    """Each stretch goes on in a plain copy of the network, with a new optimizer that loads the state of the old one."""
    plan = attach(case)
    opt = optimizer(plan.parameters())
    plain = plan.export()
    other = optimizer(plain.parameters())
    for number, batch in enumerate(case.batches(8)):
        for model, each in ((plan.model, opt), (plain, other)):
            torch.manual_seed(number)
            case.loss(model, batch).backward()
            each.step()
            each.zero_grad()
        changed = plan.step()
        assert changed or equal_bits(bits(plain), bits(plan.model)) == []
        if changed:
            state = {key: value for key, value in opt.state_dict()["state"].items() if key != "tithe"}
            plain = plan.export(batch)
            other = optimizer(plain.parameters())
            other.load_state_dict(copy.deepcopy({"state": state, "param_groups": other.state_dict()["param_groups"]}))
    assert plan.settled
    assert sum(p.numel() for p in plan.model.parameters()) < sum(p.numel() for p in case.model().parameters())


# ---------------------------------------------------------------------------------------------------- scores and cuts


@pytest.mark.parametrize("case", every(("vgg", "residual", "bert", "grouped_query_tied")))
def test_scores_are_averages_of_squared_gate_gradients(case: Case) -> None:
    """The gate gradients by autograd, with explicit gates in the model."""
    model = case.model(dtype=torch.float64)
    plan = attach(case, model, TaylorPruning(0.5, stop=10, cuts=1))
    opt, expected = sgd(plan.parameters()), torch.zeros(plan.stage.coupling.num_units, dtype=torch.float64)
    for number, batch in enumerate(case.batches(3, dtype=torch.float64)):
        m = torch.ones_like(expected, requires_grad=True)
        with torch.random.fork_rng():
            torch.manual_seed(number)
            copied = copy.deepcopy(model)
            (c,) = torch.autograd.grad(loss_with(copied, case, gated(copied, plan.stage.coupling, m), batch), m)
        expected = 0.95 * expected + 0.05 * c.square()
        torch.manual_seed(number)
        step(plan, opt, case, batch)
    ((_, scores),) = plan.structure.watched()
    torch.testing.assert_close(scores, expected, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("case", every(QUICK))
def test_the_units_of_least_score_over_root_price_go_until_the_cost_is_met_and_no_further(case: Case) -> None:
    plan = attach(case, method=TaylorPruning(0.45, stop=4, cuts=2, floor=0.0))
    opt = sgd(plan.parameters())
    coupling, total = plan.stage.coupling, _cost(plan)
    gone = 0
    for batch in case.batches(5):
        names = {group.name: range(group.start, group.stop) for group in coupling.groups}
        case.loss(plan.model, batch).backward()
        opt.step()
        opt.zero_grad()
        before = plan.stage.coupling if plan.num_steps not in (2, 4) else coupling
        if plan.step():
            gone += 1
            limit = plan.method.share(plan.num_steps) * total
            assert _cost(plan) <= limit * (1 + 1e-9)
            # Of what went, the unit of most worth would have been too much beside what stayed.
            assert before.num_units > plan.stage.coupling.num_units
            assert set(names) == {group.name for group in plan.stage.coupling.groups}
        coupling = plan.stage.coupling
    assert gone
    assert plan.narrowing().spent == pytest.approx(_cost(plan) / total)


def _cost(plan: NarrowPlan) -> float:
    coupling = plan.stage.coupling
    return float(coupling.cost(coupling.flops, torch.ones(coupling.num_units, dtype=torch.float64)))


def test_one_unit_more_is_too_much_and_the_flops_are_those_that_torch_counts() -> None:
    case = FAMILIES["vgg"]
    plan = attach(case, method=TaylorPruning(0.4, stop=2, cuts=1, floor=0.0))
    opt, coupling = sgd(plan.parameters()), plan.stage.coupling
    whole = _counted(case.model(), case)
    for batch in case.batches(1):
        step(plan, opt, case, batch)
    case.loss(plan.model, case.batch(seed=5)).backward()
    opt.step()  # the second step is heard, and the cut comes with it
    scores = plan.structure
    assert plan.settled
    spent = _counted(plan.export(), case) / whole
    assert spent == pytest.approx(plan.narrowing().spent, rel=1e-6)
    assert spent <= 0.4
    ones = torch.ones(coupling.num_units, dtype=torch.float64)
    prices = coupling.shares(coupling.flops, ones)
    assert spent * _model_cost(coupling) + 2 * float(prices.max()) > 0.4 * _model_cost(coupling)
    assert scores.num_units < coupling.num_units


def _model_cost(coupling: Any) -> float:
    return float(coupling.cost(coupling.flops, torch.ones(coupling.num_units, dtype=torch.float64)))


def _counted(model: nn.Module, case: Case) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        case.logits(model.eval(), case.batch(1))
    return counter.get_total_flops()


@pytest.mark.parametrize("floor", [0.5, 0.9, 1.0])
def test_no_group_gets_below_its_part_of_the_evenly_narrow_width(floor: float) -> None:
    case = FAMILIES["vgg"]
    plan = attach(case, method=TaylorPruning(0.4, stop=3, cuts=3, floor=floor))
    opt = sgd(plan.parameters())
    groups, total = plan.stage.coupling.groups, _cost(plan)
    coupling = plan.stage.coupling
    for batch in case.batches(3):
        step(plan, opt, case, batch)
    s = torch.ones(coupling.num_units, dtype=torch.float64)
    levels = torch.linspace(0, 1, 1001).tolist()
    level = max(u for u in levels if float(coupling.cost(coupling.flops, s * u)) <= 0.4 * total)
    for before, after in zip(groups, plan.stage.coupling.groups, strict=True):
        assert after.num_units >= int(floor * level * before.num_units)


def test_weights_statistics_gradients_and_optimizer_state_become_the_part_that_stays() -> None:
    """Bit for bit, in the memory order that kernels like; a gradient that is not cleared yet among them."""
    case = FAMILIES["vgg"]
    model = case.model().to(memory_format=torch.channels_last)
    plan = attach(case, model, TaylorPruning(0.5, stop=2, cuts=1))
    opt = adamw(plan.parameters())
    step(plan, opt, case, case.batch())
    stage = plan.stage
    case.loss(model, case.batch(seed=3)).backward()
    seen: dict[str, Any] = {}

    def watch(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        seen["weights"], seen["moments"] = bits(model), moments(optimizer, plan)
        seen["grads"] = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    drop, cut = plan.structure.shrink, []
    plan.structure.shrink = lambda coupling, alive: (cut.append(alive), drop(coupling, alive))[1]  # type: ignore
    post = opt.register_step_post_hook(watch)
    opt._optimizer_step_post_hooks.move_to_end(post.id, last=False)
    opt.step()
    grids = stage_grids(stage, cut[0], seen["weights"])
    for name, value in bits(model).items():
        expected = grids[name].gather(seen["weights"][name]) if name in grids else seen["weights"][name]
        assert torch.equal(value, expected), name
    for key, value in moments(opt, plan).items():
        name = key.split()[0]
        expected = seen["moments"][key]
        assert torch.equal(value, grids[name].gather(expected) if name in grids and expected.dim() else expected), key
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert torch.equal(
            parameter.grad, grids[name].gather(seen["grads"][name]) if name in grids else seen["grads"][name]
        )
        if parameter.dim() == 4:
            assert parameter.is_contiguous(memory_format=torch.channels_last), name


def stage_grids(stage: Any, alive: Tensor, before: dict[str, Tensor]) -> dict[str, Any]:
    """The part of each tensor that stays, by the coupling before the cut."""
    kept = stage.coupling.kept(alive)
    return {
        name: tithe.Grid(
            tuple(before[name].shape), {axis: kept[at] for axis, at in stage.coupling.places[name].items()}
        )
        for name in stage.coupling.places
    }


@pytest.mark.parametrize("case", every(("vgg", "bert")))
def test_a_step_takes_what_was_predicted_and_less_after_the_cuts(case: Case) -> None:
    plan = attach(case)
    opt = sgd(plan.parameters())
    peaks: list[int] = []
    for batch in case.batches(8):
        predicted = plan.predict(batch)
        measured = tithe.measure(lambda batch=batch: case.loss(plan.model, batch).backward(), model=plan.model)
        assert (predicted.peak, predicted.kept) == (measured.peak, measured.kept)
        peaks.append(measured.peak)
        opt.step()
        opt.zero_grad()
    assert peaks[-1] < peaks[0]


def test_a_loss_that_is_still_held_does_no_harm() -> None:
    """It keeps autograd's node alive that knows the old shape."""
    case = FAMILIES["vgg"]
    plan = attach(case)
    opt, held = sgd(plan.parameters()), []
    for batch in case.batches(8):
        loss = case.loss(plan.model, batch)
        loss.backward()
        held.append(loss)
        opt.step()
        opt.zero_grad(set_to_none=False)
    assert plan.settled


@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=4),
    st.floats(0, 1),
    st.integers(0, 2**32 - 1),
)
def test_the_order_of_cuts(sizes: list[int], floor: float, seed: int) -> None:
    """Least worth first; of each group the best stay, as many as it needs; ties by index."""
    generator = torch.Generator().manual_seed(seed)
    worth = torch.randint(4, (sum(sizes),), generator=generator).double()
    group = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    least = [max(1, round(floor * size)) for size in sizes]
    order = cut_order(worth, group, torch.tensor(least)).tolist()
    best = sorted(range(len(worth)), key=lambda unit: (-worth[unit], unit))
    stay = {unit for g, n in enumerate(least) for unit in [u for u in best if group[u] == g][:n]}
    assert order == [unit for unit in reversed(best) if unit not in stay]


# ---------------------------------------------------------------------------------------------- stopping, saving, ranks


class Run:
    """A run that can be stopped after any of its steps and taken up in a model of other values."""

    def __init__(
        self, case: Case, optimizer: Optimizer, method: TaylorPruning, saved: dict[str, Any] | None = None
    ) -> None:
        self.case, self.model = case, case.model(seed=0 if saved is None else 9)
        state = {} if saved is None or "plan" not in saved else {"state": saved["plan"]}
        self.plan = attach(case, self.model, method, **state)
        self.opt = optimizer(self.plan.parameters())
        self.plan.bind(self.opt)
        if saved is not None:
            self.opt.load_state_dict(saved["opt"])

    def go(self, first: int, stop: int) -> None:
        for number in range(first, stop):
            torch.manual_seed(number)
            step(self.plan, self.opt, self.case, self.case.batch(6, seed=number))

    def everything(self) -> dict[str, Any]:
        return bits(self.model) | moments(self.opt, self.plan) | self.plan.structure.state()


@pytest.mark.parametrize("stop", [1, 2, 3, 5, 6, 7])
@pytest.mark.parametrize("by", ["plan", "optimizer"])
@pytest.mark.parametrize(
    ("name", "optimizer", "method"), [("vgg", sgd, METHOD), ("residual", adamw, FRESH), ("bert_dropout", adamw, FRESH)]
)
def test_resuming_equals_never_stopping(
    name: str, optimizer: Optimizer, method: TaylorPruning, by: str, stop: int, tmp_path: Any
) -> None:
    """Before, at and after cuts; by the plan's own state or the optimizer's."""
    case = FAMILIES.get(name) or CASES[name]
    straight, stopped = Run(case, optimizer, method), Run(case, optimizer, method)
    straight.go(0, 8)
    stopped.go(0, stop)
    state = {"opt": stopped.opt.state_dict()} | ({"plan": stopped.plan.state_dict()} if by == "plan" else {})
    torch.save(state, tmp_path / "state.pt")
    resumed = Run(case, optimizer, method, torch.load(tmp_path / "state.pt", weights_only=True))
    assert resumed.plan.settled == (stop >= 6)
    assert equal_bits(stopped.everything(), resumed.everything()) == []
    resumed.go(stop, 8)
    assert equal_bits(straight.everything(), resumed.everything()) == []


def test_the_saved_network_makes_a_fresh_model_narrow(tmp_path: Any) -> None:
    case = FAMILIES["bert"]
    plan = attach(case)
    opt = adamw(plan.parameters())
    for batch in case.batches(7):
        step(plan, opt, case, batch)
    plan.save(tmp_path / "narrow.safetensors")
    fresh = tithe.apply(case.model(seed=5), tmp_path / "narrow.safetensors")
    batch = case.batch(seed=8)
    assert torch.equal(case.logits(fresh.eval(), batch), case.logits(plan.model.eval(), batch))
    plan.release()
    again = attach(case, plan.model, TaylorPruning(0.7, stop=1, cuts=1))  # of the narrow network, once more
    step(again, sgd(again.parameters()), case, batch)
    assert again.settled


def test_settling_makes_the_cuts_that_are_left_and_says_the_loss() -> None:
    case = FAMILIES["vgg"]
    plan = attach(case)
    opt = sgd(plan.parameters())
    for batch in case.batches(3):
        step(plan, opt, case, batch)
    assert not plan.settled
    loss = plan.settle(case.batches(2))
    assert plan.settled
    assert 0 < loss < 10
    assert plan.narrowing().spent <= 0.45
    for batch in case.batches(6):
        assert not step(plan, opt, case, batch)


def test_a_copy_of_the_model_keeps_its_width_when_the_model_is_cut() -> None:
    case = FAMILIES["residual"]
    plan = attach(case)
    opt = sgd(plan.parameters())
    twin = copy.deepcopy(plan.model)
    before, batch = bits(twin), case.batch(seed=4)
    for each in case.batches(6):
        step(plan, opt, case, each)
    assert plan.settled
    assert equal_bits(bits(twin), before) == []
    case.loss(twin, batch).backward()


def test_the_contract_holds() -> None:
    case = FAMILIES["vgg"]
    check_method(METHOD, case.model, case.loss, case.batches(3))


def test_half_precision_trains_and_is_cut() -> None:
    case = FAMILIES["vgg"]
    with pytest.warns(tithe.TitheWarning):
        plan = attach(case, case.model(dtype=torch.bfloat16))
    opt = sgd(plan.parameters())
    for batch in case.batches(7, dtype=torch.bfloat16):
        step(plan, opt, case, batch)
    assert plan.settled
    assert plan.narrowing().spent <= 0.45


# --------------------------------------------------------------------------------------------------------------- ranks


def _half(batch: Batch, rank: int) -> Batch:
    return {key: value[4 * rank : 4 * rank + 4] for key, value in batch.items()}


def _together(rank: int) -> dict[str, Tensor]:
    """Half of each batch a rank, through the plan, which averages gradients."""
    case = CASES["mlp"]
    plan = attach(case, method=FRESH)
    opt = sgd(plan.parameters())
    for batch in case.batches(8, 8):
        plan.backward(lambda batch=batch: case.loss(plan.model, _half(batch, rank)))
        opt.step()
        opt.zero_grad()
    assert plan.settled
    return bits(plan.model)


def _apart(rank: int) -> None:
    """Gradients that nobody averages."""
    case = CASES["mlp"]
    plan = attach(case)
    opt = sgd(plan.parameters())
    try:
        case.loss(plan.model, _half(case.batch(8), rank)).backward()
        opt.step()
        opt.zero_grad()
    finally:
        plan.release()


def test_two_ranks_are_cut_alike_as_one_with_both_halves(tmp_path: Any) -> None:
    found = play(tmp_path, _together, _apart)
    first, second = found["_together"]
    assert equal_bits(first, second) == []
    case = CASES["mlp"]
    plan = attach(case, method=FRESH)
    opt = sgd(plan.parameters())
    for batch in case.batches(8, 8):
        step(plan, opt, case, batch)
    for name, value in bits(plan.model).items():
        torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-5)
    refused(found["_apart"], "gradients", "plan.backward")


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"keep": "half"}, "keep='half'"),
        ({"stop": 5.5}, "stop=5.5"),
        ({"cuts": 2.0}, "cuts=2.0"),
        ({"start": None}, "start="),
        ({"fresh": "yes"}, "fresh='yes'"),
    ],
)
def test_settings_of_another_kind_are_refused(settings: Any, found: str) -> None:
    with pytest.raises(TitheError, match=found):
        tithe.TaylorPruning(**{"keep": 0.5, "stop": 6, **settings})
