"""θ is an ordinary parameter, and the optimizer that holds it is found: hooks, inputs=, states, two optimizers."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import loops
import tithe
from loops import batches, loss_fn, net
from oracles import bits, equal_bits
from tithe import FISH, TitheError

METHODS: dict[str, Callable[[], tithe.SparseMethod]] = {
    "once": lambda: FISH(k=100),
    "again": lambda: FISH(k=120, reselect=tithe.every(2)),
    "warm-up": lambda: FISH(k=120, warmup=2),
    "channels": lambda: tithe.TraDy(tithe.Budget(fraction=0.5)),
}
each_method = pytest.mark.parametrize("method", METHODS)


def _attach(method: str, **settings: object) -> tithe.Plan:
    return tithe.attach(net(), METHODS[method](), loss=loss_fn, data=batches(), head="head.*", **settings)


def _adam(plan: tithe.Plan) -> torch.optim.Optimizer:
    return torch.optim.AdamW(plan.parameters(), lr=0.01)


def _step(plan: tithe.Plan, optimizer: torch.optim.Optimizer, number: int = 0) -> None:
    loss_fn(plan.model, batches()[number % 4]).backward()
    optimizer.step()
    optimizer.zero_grad()


# --- an ordinary parameter


@each_method
def test_hooks_fire_once_a_backward_and_may_change_the_gradient(method: str) -> None:
    plan = _attach(method)
    optimizer = _adam(plan)
    for number in range(2):  # a warm-up is over then
        _step(plan, optimizer, number)
    trained = [p for p in plan.parameters() if p.numel()]
    after, before = [0] * len(trained), [0] * len(trained)
    for index, parameter in enumerate(trained):

        def on_gradient(grad: Tensor, index: int = index) -> Tensor:
            before[index] += 1
            return 2 * grad

        def accumulated(parameter: Tensor, index: int = index) -> None:
            after[index] += 1

        parameter.register_hook(on_gradient)
        parameter.register_post_accumulate_grad_hook(accumulated)
    plain = copy.deepcopy(plan.model)
    loss_fn(plan.model, batches()[0]).backward()
    assert after == before == [1] * len(trained)
    grads = torch.autograd.grad(
        loss_fn(plain, batches()[0]), [p for p in plain.parameters() if p.requires_grad and p.numel()]
    )
    assert sum(g.double().abs().sum() for g in grads).item() == pytest.approx(
        sum(p.grad.double().abs().sum().item() for p in trained if p.grad is not None) / 2
    )


@each_method
def test_backward_may_be_asked_for_some_inputs_only(method: str) -> None:
    plan = _attach(method)
    theta, *head = list(plan.parameters())
    loss_fn(plan.model, batches()[0]).backward(inputs=head)
    assert theta.grad is None
    assert all(p.grad is not None for p in head if p.numel() in (48, 3))


@each_method
def test_the_list_of_parameters_is_always_the_same(method: str) -> None:
    plan = _attach(method)
    start = [(name, id(p), p.shape) for name, p in plan.named_parameters()]
    optimizer = _adam(plan)
    for number in range(6):
        _step(plan, optimizer, number)
        assert [(name, id(p), p.shape) for name, p in plan.named_parameters()] == start
    plan.end_epoch()
    resumed = _attach(method, state=plan.state_dict())
    fresh = _attach(method)
    fresh.load_state_dict(plan.state_dict())
    for other in (resumed, fresh):
        assert [(name, p.shape) for name, p in other.named_parameters()] == [(name, shape) for name, _, shape in start]
        _adam(other).load_state_dict(optimizer.state_dict())


def test_an_update_in_backward_trains() -> None:
    """An optimizer for each parameter, stepped by its post-accumulate hook."""
    plans = [_attach("channels"), _attach("channels")]

    def update(parameter: Tensor) -> None:
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in plans[0].parameters()}
    for parameter in optimizers:
        parameter.register_post_accumulate_grad_hook(update)
    other = torch.optim.SGD(plans[1].parameters(), lr=0.1)
    for batch in batches():
        loss_fn(plans[0].model, batch).backward()
        loss_fn(plans[1].model, batch).backward()
        other.step()
        other.zero_grad()
    assert equal_bits(bits(plans[0].model), bits(plans[1].model)) == []


# --- optimizers


@pytest.mark.parametrize("method", ["once", "again", "channels"])
@pytest.mark.parametrize("both", [True, False], ids=["both each step", "one every second step"])
def test_two_optimizers_share_the_parameters(method: str, both: bool) -> None:
    plan = _attach(method)
    head = [p for name, p in plan.named_parameters() if name in plan.head]
    rest = [p for name, p in plan.named_parameters() if name not in plan.head]
    first, second = torch.optim.SGD(head, lr=0.1), torch.optim.SGD(rest, lr=0.1)
    for number, batch in enumerate(batches()):
        loss_fn(plan.model, batch).backward()
        first.step()
        if both or number % 2:
            second.step()
        plan.model.zero_grad()
    plan.step()
    assert plan.num_steps == 4


@pytest.mark.parametrize("method", ["once", "again"])
def test_an_optimizer_without_theta_is_refused_at_its_first_step(method: str) -> None:
    model = net()
    early = torch.optim.SGD(model.parameters(), lr=0.1)
    plan = tithe.attach(model, METHODS[method](), loss=loss_fn, data=batches(), head="head.*")
    before = bits(model)
    loss_fn(model, batches()[0]).backward()
    with pytest.raises(TitheError, match=r"plan\.parameters\(\)"):
        early.step()
    assert equal_bits(before, bits(model)) == []
    _step(plan, torch.optim.SGD(plan.parameters(), lr=0.1))
    del early
    gc.collect()
    plan.release()


@each_method
def test_an_optimizer_that_is_not_elementwise_is_refused_at_its_first_step(method: str) -> None:
    plan = _attach(method)
    optimizer = torch.optim.Adafactor(plan.parameters())
    before = bits(plan.model)
    loss_fn(plan.model, batches()[0]).backward()
    with pytest.raises(TitheError, match="elementwise"):
        optimizer.step()
    assert equal_bits(before, bits(plan.model)) == []


def test_optimizers_of_other_models_are_left_alone() -> None:
    _attach("again")
    other = nn.Linear(3, 3)
    optimizer = torch.optim.LBFGS(other.parameters())

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = other(torch.ones(2, 3)).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert "tithe" not in optimizer.state_dict()["state"]


@pytest.mark.parametrize("method", ["once", "again", "channels"])
def test_a_closure_is_a_step(method: str) -> None:
    plans = [_attach(method), _attach(method)]
    first, second = (torch.optim.SGD(plan.parameters(), lr=0.1) for plan in plans)
    for batch in batches():

        def closure(batch: dict[str, Tensor] = batch) -> Tensor:
            first.zero_grad()
            loss = loss_fn(plans[0].model, batch)
            loss.backward()
            return loss

        first.step(closure)
        second.zero_grad()
        loss_fn(plans[1].model, batch).backward()
        second.step()
    assert equal_bits(bits(plans[0].model), bits(plans[1].model)) == []
    assert plans[0].num_steps == 4


def test_a_closure_without_the_plan_is_refused_by_a_narrow_network_before_the_update() -> None:
    plan = tithe.attach(net(), tithe.VRPGE(0.6), loss=loss_fn, data=batches())
    optimizer = torch.optim.SGD(plan.parameters(), lr=0.1)
    before = bits(plan.model)

    def closure() -> Tensor:
        loss = loss_fn(plan.model, batches()[0])
        loss.backward()
        return loss

    with pytest.raises(TitheError, match=r"plan\.backward"):
        optimizer.step(closure)
    assert equal_bits(before, bits(plan.model)) == []


def test_updates_by_hand_are_followed_and_counted_by_step() -> None:
    plan = _attach("again")
    reference = _attach("again")
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1)
    for batch in batches():
        loss_fn(plan.model, batch).backward()
        with torch.no_grad():
            for parameter in plan.parameters():
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad
                    parameter.grad = None
        plan.step()
        loss_fn(reference.model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert plan.num_steps == 4
    for name, value in bits(reference.model).items():
        torch.testing.assert_close(bits(plan.model)[name], value)


def test_a_compiled_step_is_counted_by_plan_step() -> None:
    torch._dynamo.reset()
    plan, reference = _attach("again"), _attach("again")
    optimizer, other = (torch.optim.SGD(p.parameters(), lr=0.1) for p in (plan, reference))
    update = torch.compile(lambda: optimizer.step(), backend="eager")
    for batch in batches():
        for one, step in ((plan, update), (reference, other.step)):
            loss_fn(one.model, batch).backward()
            step()
            one.model.zero_grad()
            one.step()
    assert plan.num_steps == reference.num_steps == 4
    assert equal_bits(bits(plan.model), bits(reference.model)) == []


# --- the plan's state in the optimizer's


@each_method
def test_the_state_of_a_bound_optimizer_brings_the_plan_back(method: str) -> None:
    """Before the first forward pass, bound or not; in the file it is plain tensors and numbers."""
    plan = _attach(method)
    optimizer = _adam(plan)
    for number in range(5):
        _step(plan, optimizer, number)
    state = optimizer.state_dict()
    for bind in (True, False):
        other = _attach(method)
        resumed = _adam(other)
        if bind:
            other.bind(resumed)
        resumed.load_state_dict(copy.deepcopy(state))
        _step(other, resumed, 5)
        assert "tithe" not in resumed.state
        straight = _attach(method)
        full = _adam(straight)
        for number in range(6):
            _step(straight, full, number)
        assert equal_bits(bits(other.model), bits(straight.model)) == []
        assert other.num_steps == 6


def test_a_state_of_another_model_is_refused_by_the_first_forward_pass() -> None:
    plan = _attach("once")
    optimizer = _adam(plan)
    _step(plan, optimizer)
    state = optimizer.state_dict()
    other = tithe.attach(net(), FISH(k=100, score="random"), where="one.*", head="head.*")
    resumed = torch.optim.AdamW(other.parameters(), lr=0.01)
    try:
        resumed.load_state_dict(state)
    except ValueError:  # torch refuses another number of parameters
        return
    with pytest.raises(TitheError):
        loss_fn(other.model, batches()[0])


def test_a_plan_lives_with_its_model_and_goes_with_it() -> None:
    model = net()
    optimizer = torch.optim.SGD(list(tithe.attach(model, FISH(k=50, score="random")).parameters()), lr=0.1)
    before = bits(model)
    loss_fn(model, batches()[0]).backward()
    optimizer.step()
    assert equal_bits(before, bits(model)) != []
    gone = weakref.ref(model)
    del model, optimizer
    gc.collect()
    assert gone() is None


def test_release_leaves_no_hook_behind() -> None:
    from torch.optim.optimizer import _global_optimizer_pre_hooks

    gc.collect()
    before = len(_global_optimizer_pre_hooks)
    plan = _attach("again")
    optimizer = _adam(plan)
    _step(plan, optimizer)
    plan.release()
    assert len(_global_optimizer_pre_hooks) <= max(before, 1)
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert not optimizer._optimizer_state_dict_post_hooks
    assert "tithe" not in optimizer.state_dict()["state"]
    assert F.linear(torch.ones(1, 6), plan.model.one.weight).shape == (1, 16)
    assert loops.EPOCHS


@pytest.mark.parametrize("again", [False, True], ids=["chosen once", "chosen again"])
def test_an_average_of_all_parameters_is_refused_or_taken_from_the_weights(again: bool) -> None:
    def attached() -> tuple[nn.Module, tithe.Plan]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        reselect = tithe.every(2) if again else None
        return model, tithe.attach(model, tithe.FISH(k=12, score="magnitude", reselect=reselect))

    def write(model: nn.Module) -> dict[str, torch.Tensor]:
        """As an average does that swaps places with the parameters, θ by slots that meant other weights."""
        for parameter in model.parameters():
            parameter.data.copy_(parameter.data + 0.1 + 0.01 * torch.arange(parameter.numel()).view_as(parameter))
        return {name: value.clone() for name, value in model.state_dict().items()}

    x = torch.randn(3, 4)
    model, _ = attached()
    write(model)
    with pytest.raises(TitheError, match="both written"):
        model(x)
    model, plan = attached()
    expected = write(model)
    plan.take_weights()
    model(x)
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    optimizer = torch.optim.SGD(plan.parameters(), lr=0.0)
    model(x).square().mean().backward()
    optimizer.step()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
