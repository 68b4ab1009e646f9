"""When a plan chooses again, what it saves, and that resuming equals never stopping."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tithe
from models import CASES, Batch, Case
from oracles import adamw, bits, equal_bits, sgd
from tithe import FISH, TitheError

MLP = CASES["mlp"]


def _attach(case: Case, model: nn.Module, method: FISH, **settings: object) -> tithe.Plan:
    return tithe.attach(model, method, loss=case.loss, data=case.batches(2), **settings)


def _step(plan: tithe.Plan, opt: torch.optim.Optimizer, case: Case, batch: Batch) -> bool:
    opt.zero_grad()
    plan.backward(lambda: case.loss(plan.model, batch))
    opt.step()
    return plan.step()


# --- schedules and resume


def test_reselect_follows_the_schedule_and_keeps_shapes_and_identities() -> None:
    method = FISH(k=60, reselect=tithe.every(2))
    plan = _attach(MLP, MLP.model(), method)
    opt = sgd(plan.parameters())
    plan.bind(opt)
    parameters = [id(p) for p in plan.parameters()]
    before = [plan.selected(name).clone() for name in plan.selections]
    changed = [_step(plan, opt, MLP, batch) for batch in MLP.batches(4)]
    assert changed[0] is changed[2] is False
    assert changed[1] or changed[3]
    after = [plan.selected(name) for name in plan.selections]
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert [id(p) for p in plan.parameters()] == parameters
    assert sum(map(len, after)) == 60
    assert plan.num_steps == 4


def test_a_loss_of_an_earlier_step_may_be_held_over_a_reselect() -> None:
    """As in every training loop: `loss` of the last step lives until the next is assigned."""
    plan = _attach(MLP, MLP.model(), FISH(k=60, reselect=tithe.every(1)))
    opt = sgd(plan.parameters())
    plan.bind(opt)
    held: list[Tensor] = []
    for batch in MLP.batches(4):
        opt.zero_grad()
        held.append(plan.backward(lambda batch=batch: MLP.loss(plan.model, batch)))
        opt.step()
        plan.step()
    assert len(held) == 4


def test_clipping_and_accumulation_work_under_a_reselect() -> None:
    """Two micro-batches a step, the norm clipped: the same as one batch of both."""
    results: list[dict[str, Tensor]] = []
    for parts in (1, 2):
        model = MLP.model(dtype=torch.float64)
        plan = tithe.attach(model, FISH(k=60, score="random", reselect=tithe.every(2)))
        opt = sgd(plan.parameters())
        plan.bind(opt)
        for batch in MLP.batches(5, 4, dtype=torch.float64):
            opt.zero_grad()
            for part in range(parts):
                half = {key: value[part::parts] for key, value in batch.items()}
                plan.backward(lambda half=half, model=model, parts=parts: MLP.loss(model, half) / parts)
            norm = torch.nn.utils.clip_grad_norm_(plan.parameters(), 0.01)
            assert norm > 0.01
            grads = torch.cat([p.grad for p in plan.parameters() if p.grad is not None])
            torch.testing.assert_close(grads.norm(), torch.tensor(0.01, dtype=torch.float64), rtol=1e-3, atol=0)
            opt.step()
            plan.step()
        results.append(bits(model))
    for key, value in results[0].items():
        torch.testing.assert_close(results[1][key], value, rtol=1e-9, atol=1e-12)


def test_epochs_count_and_reselect() -> None:
    plan = _attach(MLP, MLP.model(), FISH(k=60, reselect=tithe.every(1, "epochs")))
    opt = sgd(plan.parameters())
    plan.bind(opt)
    for batch in MLP.batches(3):
        assert _step(plan, opt, MLP, batch) is False
    plan.end_epoch()
    assert plan.num_epochs == 1


def test_the_choice_of_a_reselect_is_the_choice_of_a_fresh_plan_on_those_weights() -> None:
    plan = _attach(MLP, MLP.model(), FISH(k=60))
    opt = sgd(plan.parameters())
    plan.bind(opt)
    for batch in MLP.batches(3):
        _step(plan, opt, MLP, batch)
    fresh = _attach(MLP, copy.deepcopy(_released(plan)), FISH(k=60))
    plan.reselect()
    assert all(torch.equal(plan.selected(name), fresh.selected(name)) for name in plan.selections)


def _released(plan: tithe.Plan) -> nn.Module:
    model = MLP.model()
    model.load_state_dict(plan.model.state_dict())
    return model


def test_warm_up_trains_the_head_alone_and_then_chooses() -> None:
    model = MLP.model()
    before = bits(model)
    plan = _attach(MLP, model, FISH(density=0.3, warmup=3), head="4.*")
    opt = adamw(plan.parameters())
    plan.bind(opt)
    parameters = [id(p) for p in plan.parameters()]
    batches = MLP.batches(5)
    for batch in batches[:2]:
        _step(plan, opt, MLP, batch)
    assert equal_bits(before, bits(model)) == ["4.weight", "4.bias"]
    assert sum(selection.size for selection in plan.selections.values()) == 0
    assert _step(plan, opt, MLP, batches[2])
    total = sum(p.numel() for name, p in model.named_parameters() if not name.endswith("@theta"))
    assert sum(p.numel() for p in plan.parameters()) == int(0.3 * total)
    assert [id(p) for p in plan.parameters()] == parameters
    middle = bits(model)
    for batch in batches[3:]:
        _step(plan, opt, MLP, batch)
    assert set(equal_bits(middle, bits(model))) > {"4.weight", "4.bias"}


@pytest.mark.parametrize("score", ["fisher", "random"])
@pytest.mark.parametrize("stop", [1, 2, 5])
@pytest.mark.parametrize("name", ["mlp", "depthwise", "tied_mlp", "bert_dropout"])
def test_resume_equals_never_stopping_with_a_reselect_between(name: str, stop: int, score: str) -> None:
    case = CASES[name]
    method = FISH(density=0.3, score=score, reselect=tithe.every(2), warmup=1)
    batches = case.batches(7)

    def run(model: nn.Module, plan: tithe.Plan, opt: torch.optim.Optimizer, part: list[Batch], first: int) -> None:
        for number, batch in enumerate(part, first):
            torch.manual_seed(number)
            _step(plan, opt, case, batch)

    straight = case.model()
    plan = _attach(case, straight, method, head=case.head, seed=4)
    opt = adamw(plan.parameters())
    plan.bind(opt)
    run(straight, plan, opt, batches, 0)

    stopped = case.model()
    plan = _attach(case, stopped, method, head=case.head, seed=4)
    opt = adamw(plan.parameters())
    plan.bind(opt)
    run(stopped, plan, opt, batches[:stop], 0)
    saved = copy.deepcopy((stopped.state_dict(), plan.state_dict(), opt.state_dict()))

    resumed = case.model(seed=9)
    resumed.load_state_dict(saved[0])
    plan = _attach(case, resumed, method, head=case.head, seed=4, state=saved[1])
    opt = adamw(plan.parameters())
    opt.load_state_dict(saved[2])
    plan.bind(opt)
    assert plan.num_steps == stop
    run(resumed, plan, opt, batches[stop:], stop)
    assert equal_bits(bits(straight), bits(resumed)) == []


def test_load_state_dict_moves_a_fresh_plan_to_a_later_choice() -> None:
    one, two = (_attach(MLP, MLP.model(), FISH(k=50, score="random", reselect=tithe.every(1))) for _ in range(2))
    opt = sgd(one.parameters())
    one.bind(opt)
    _step(one, opt, MLP, MLP.batch())
    assert any(not torch.equal(one.selected(name), two.selected(name)) for name in one.selections)
    two.load_state_dict(one.state_dict())
    assert all(torch.equal(one.selected(name), two.selected(name)) for name in one.selections)
    assert equal_bits(bits(one.model), bits(two.model)) == []
    values = [two.model.get_parameter(name).detach().flatten()[two.selected(name)] for name in two.selections]
    assert torch.equal(next(two.parameters()).detach(), torch.cat(values))


def test_a_state_that_would_leave_trained_weights_behind_is_refused() -> None:
    one, two = (_attach(MLP, MLP.model(), FISH(k=50, score="random"), seed=seed) for seed in (1, 2))
    opt = sgd(two.parameters())
    two.bind(opt)
    _step(two, opt, MLP, MLP.batch())
    before = bits(two.model)
    with pytest.raises(TitheError, match="base"):
        two.load_state_dict(one.state_dict())
    assert equal_bits(before, bits(two.model)) == []


def test_state_dict_is_tensors_and_plain_values_and_survives_torch_save(tmp_path: object) -> None:
    plan = _attach(MLP, MLP.model(), FISH(k=50))
    path = f"{tmp_path}/plan.pt"
    torch.save(plan.state_dict(), path)
    state = torch.load(path, weights_only=True)
    again = tithe.attach(MLP.model(), FISH(k=50), state=state)
    assert all(torch.equal(plan.selected(name), again.selected(name)) for name in plan.selections)


def test_a_state_of_another_model_is_refused() -> None:
    state = _attach(MLP, MLP.model(), FISH(k=50)).state_dict()
    other = CASES["regression"]
    with pytest.raises(TitheError):
        tithe.attach(other.model(), FISH(k=50), state=state)


@pytest.mark.parametrize("again", [False, True])
def test_a_state_of_a_plan_that_chooses_at_other_times_is_refused(again: bool) -> None:
    once, often = FISH(k=60), FISH(k=60, reselect=tithe.every(2))
    saved = _attach(MLP, MLP.model(), often if again else once).state_dict()
    with pytest.raises(TitheError, match="plan that chooses") as error:
        _attach(MLP, MLP.model(), once if again else often, state=saved)
    assert "reselect=" in error.value.remedy


@pytest.mark.parametrize("bound", [False, True])
def test_the_state_of_another_optimizer_is_refused(bound: bool) -> None:
    """Torch takes it over, and fails within the first step."""
    plan = _attach(MLP, MLP.model(), FISH(k=60))
    opt = adamw(plan.parameters())
    plan.bind(opt)
    _step(plan, opt, MLP, MLP.batches(1)[0])
    saved = opt.state_dict()
    plan.release()
    again = _attach(MLP, MLP.model(), FISH(k=60))
    other = torch.optim.RMSprop(again.parameters())
    if bound:
        again.bind(other)

    def load() -> None:
        other.load_state_dict(saved)
        again.bind(other)

    with pytest.raises(TitheError, match="another optimizer, without alpha"):
        load()


def test_an_optimizer_state_of_other_sizes_is_refused() -> None:
    """As where another choice than the saved one was made when attaching: torch goes by the parameters' order."""
    method = FISH(k=7, score="magnitude")
    plan = tithe.attach(MLP.model(), method)
    opt = adamw(plan.parameters())
    plan.bind(opt)
    _step(plan, opt, MLP, MLP.batches(1)[0])
    fits = copy.deepcopy(opt.state_dict())
    for state in opt.state_dict()["state"].values():
        if "exp_avg" in state:
            state.update(exp_avg=torch.zeros(99), exp_avg_sq=torch.zeros(99))
    spoiled = opt.state_dict()
    plan.release()
    again = tithe.attach(MLP.model(), method)
    optimizer = adamw(again.parameters())
    again.bind(optimizer)
    optimizer.load_state_dict(fits)
    with pytest.raises(TitheError, match=r"shape \[99\]"):
        optimizer.load_state_dict(spoiled)


class Lion(torch.optim.Optimizer):
    """Sign descent with one moment (Chen et al., 2023); its groups have no setting but its own, as most have."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 1e-3})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                moment = self.state[parameter].setdefault("moment", torch.zeros_like(parameter))
                moment.lerp_(parameter.grad, 0.1)
                parameter.sub_(group["lr"] * moment.sign())


@pytest.mark.parametrize("by", ["plan", "optimizer"])
def test_an_optimizer_of_a_user_s_own_resumes(by: str) -> None:
    """Torch adds a setting to the defaults of every optimizer that loads a state, which its groups lack."""
    method, batches = FISH(k=60), MLP.batches(4)

    def start() -> tuple[tithe.Plan, torch.optim.Optimizer]:
        plan = _attach(MLP, MLP.model(), method)
        return plan, Lion(plan.parameters())

    straight, opt = start()
    for batch in batches[:2]:
        _step(straight, opt, MLP, batch)
    saved = copy.deepcopy((straight.state_dict(), opt.state_dict()))
    for batch in batches[2:]:
        _step(straight, opt, MLP, batch)
    resumed, opt = start()
    if by == "plan":
        resumed.load_state_dict(saved[0])
        resumed.bind(opt)
    opt.load_state_dict(saved[1])
    for batch in batches[2:]:
        _step(resumed, opt, MLP, batch)
    assert equal_bits(bits(straight.model), bits(resumed.model)) == []
