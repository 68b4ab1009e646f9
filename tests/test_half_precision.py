"""Models in half precision: θ is float32, the master copy of what is selected, and the weights hold it rounded."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tithe
from tithe import FISH, SparseUpdate, SpIEL, TitheError, TraDy, every
from tithe.rules import Binding

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
Batch = tuple[Tensor, Tensor]


def net(dtype: torch.dtype = BF16) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(20, 6), nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3)).to(dtype)


def batches(count: int = 4, seed: int = 1) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randint(20, (8,), generator=generator), torch.randint(3, (8,), generator=generator))
        for _ in range(count)
    ]


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]).float(), batch[1])


def attach(model: nn.Module, method: Any, **settings: Any) -> Any:
    given: dict[str, Any] = {"loss": loss_fn, "data": batches(2, seed=9), "head": "3.*"}
    return tithe.attach(model, method, **given | settings)


def adamw(parameters: Iterable[nn.Parameter], lr: float = 1e-2) -> torch.optim.AdamW:
    return torch.optim.AdamW(list(parameters), lr=lr, weight_decay=0.1)


def train(plan: Any, optimizer: torch.optim.Optimizer, data: Iterable[Batch], *, epochs: bool = False) -> None:
    for batch in data:
        loss_fn(plan.model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        if epochs:
            plan.end_epoch()


def masters(plan: Any) -> dict[str, Tensor]:
    return {name: theta.detach().clone() for name, theta in plan.named_parameters()}


METHODS: dict[str, Callable[[], Any]] = {
    "FISH": lambda: FISH(k=40),
    "FISH, again": lambda: FISH(k=40, reselect=every(2)),
    "FISH, warm-up": lambda: FISH(k=40, warmup=2),
    "SpIEL": lambda: SpIEL(density=0.3, reselect=every(2)),
    "SparseUpdate": lambda: SparseUpdate({"1.weight": 0.5}, biases=["1.bias"]),
    "TraDy": lambda: TraDy(tithe.Budget(elements=60), layers="all", score="uniform"),
    "TraDy, bytes": lambda: TraDy(tithe.Budget("3KB"), layers="all", dynamic=False),
}
each_method = pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)


# --- the two limits


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_everything_selected_is_training_by_hand_with_a_master_copy(dtype: torch.dtype) -> None:
    model, twin = net(dtype), net(dtype)
    plan = attach(model, FISH(density=1.0, score="magnitude"))
    optimizer = adamw(plan.parameters())
    copies = {name: nn.Parameter(p.detach().float()) for name, p in twin.named_parameters()}
    by_hand = adamw(copies.values())
    for batch in batches(12):
        train(plan, optimizer, [batch])
        loss_fn(twin, batch).backward()
        for name, parameter in twin.named_parameters():
            assert parameter.grad is not None
            copies[name].grad, parameter.grad = parameter.grad.float(), None
        by_hand.step()
        with torch.no_grad():
            for name, parameter in twin.named_parameters():
                parameter.copy_(copies[name])
    for name, parameter in twin.named_parameters():
        assert torch.equal(model.state_dict()[name], parameter), name
    for name, theta in plan.named_parameters():
        assert theta.dtype == F32
        assert torch.equal(theta.detach().view(-1), copies[name].detach().view(-1)), name


@each_method
def test_what_is_not_selected_keeps_its_bits(make: Callable[[], Any]) -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    plan = attach(model, make())
    train(plan, adamw(plan.parameters()), batches(6), epochs=True)
    plan.state_dict()
    moved = {b.name: b.moved.indices for b in plan._candidates}
    assert sum(at.numel() for at in moved.values()) >= 30
    for name, now in model.state_dict().items():
        assert now.dtype == BF16
        if not name.startswith("3."):
            rest = torch.ones(now.numel(), dtype=torch.bool)
            rest[moved[name]] = False
            assert torch.equal(now.view(-1)[rest], before[name].view(-1)[rest]), name


# --- what the master is for


def test_updates_below_the_last_bit_of_a_weight_add_up() -> None:
    """At this learning rate a step moves a weight of 0.3 by a 64th of its last bit."""
    moved: dict[torch.dtype, int] = {}
    for dtype in (F32, BF16):
        model = net()
        before = copy.deepcopy(model.state_dict())
        plan = attach(model, FISH(density=0.5, score="magnitude"), dtype=dtype)
        train(plan, adamw(plan.parameters(), lr=2e-5), batches(1) * 60)
        assert all(theta.dtype == dtype for theta in plan.parameters())
        moved[dtype] = sum(int((now != before[name]).sum()) for name, now in model.state_dict().items())
    assert moved[F32] > 4 * moved[BF16]


@pytest.mark.parametrize("reselect", [None, every(3)])
def test_a_new_choice_leaves_stayers_their_master(reselect: Any) -> None:
    model = net()
    plan = attach(model, FISH(k=40, score="gradient", reselect=reselect))
    train(plan, adamw(plan.parameters(), lr=1e-3), batches(2))

    def values() -> dict[tuple[str, int], float]:
        """θ of every selected entry."""
        return {
            (b.name, int(at)): float(value)
            for b in plan._candidates
            if b.selection.size
            for at, value in zip(b.indices, b.values, strict=True)
        }

    before = values()
    plan._data = batches(2, seed=77)
    assert plan.reselect()
    after = values()
    stayers = before.keys() & after.keys()
    assert 5 <= len(stayers) < 40
    assert all(before[place] == after[place] for place in stayers)
    rounded = sum(value != float(torch.tensor(value).bfloat16()) for place, value in after.items() if place in stayers)
    assert rounded > len(stayers) // 2
    for (name, at), value in after.items():
        assert float(model.state_dict()[name].view(-1)[at]) == float(torch.tensor(value).bfloat16())


def test_spiel_drops_what_moved_least_in_the_master() -> None:
    """No weight shows that it moved: all moves are below half of its last bit."""
    model = net()
    plan = attach(model, SpIEL(density=0.2, replaced=0.5), head=())
    before = copy.deepcopy(model.state_dict())
    (theta,) = plan.parameters()
    start = theta.detach().clone()
    theta.data *= 1 + 2.0**-10 * torch.rand(len(theta), generator=torch.Generator().manual_seed(3))
    loss_fn(model, batches()[0])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    places = [(b.name, at) for b in plan._candidates for at in b.indices.tolist()]
    far = (theta.detach() - start).abs().topk(len(theta) - round(len(theta) / 2)).indices.tolist()
    plan._data = batches(2, seed=77)
    assert plan.reselect()
    for name, at in (places[n] for n in far):
        assert at in plan.selected(name).tolist()


def test_theta_of_channels_comes_in_the_order_of_their_places() -> None:
    class Look(tithe.SparseMethod):
        reselect = every(1)
        seen: tuple[Tensor, Tensor] | None = None

        def choose(self, context: tithe.SelectionContext) -> dict[str, tithe.Selection]:
            Look.seen = context.selected("1.weight"), context.trained("1.weight")
            return {"1.weight": tithe.Channels((12, 6), torch.tensor([1, 4]))}

    model = net()
    plan = attach(model, Look())
    train(plan, adamw(plan.parameters()), batches(2))
    assert Look.seen is not None
    places, values = Look.seen
    assert places.numel() == values.numel() == 24
    assert torch.equal(model.state_dict()["1.weight"].view(-1)[places], values.bfloat16())


@each_method
def test_the_state_of_the_optimizer_is_float32(make: Callable[[], Any]) -> None:
    plan = attach(net(), make())
    optimizer = adamw(plan.parameters())
    train(plan, optimizer, batches(3))
    assert all(theta.dtype == F32 for theta in plan.parameters())
    states = [value for kept in optimizer.state.values() for value in kept.values() if value.dim()]
    assert len(states) >= 6
    assert all(value.dtype == F32 for value in states)


# --- writes from outside


def test_a_commit_is_no_write_from_outside_and_a_load_is() -> None:
    model = net()
    plan = attach(model, FISH(k=30))
    train(plan, adamw(plan.parameters(), lr=1e-3), batches(2))
    before = masters(plan)
    own = copy.deepcopy(model.state_dict())
    loss_fn(model, batches()[0])  # the model is compared with what it was
    assert all(torch.equal(value, before[name]) for name, value in masters(plan).items())
    assert sum(b.moved.size for b in plan._candidates) == 30
    model.load_state_dict(own)  # what is there already: nothing that the master knows is lost
    assert all(torch.equal(value, before[name]) for name, value in masters(plan).items())
    model.load_state_dict(net().state_dict())
    base = net().state_dict()
    for name, selection in plan.selections.items():
        assert torch.equal(dict(plan.named_parameters())[name].detach().bfloat16(), selection.gather(base[name]))


def test_a_write_into_a_few_weights_keeps_the_masters_of_the_others() -> None:
    model = net()
    plan = attach(model, FISH(density=1.0, score="magnitude"))
    train(plan, adamw(plan.parameters(), lr=1e-3), batches(2))
    before = dict(plan.named_parameters())["1.weight"].detach().clone()
    with torch.no_grad():
        model.get_parameter("1.weight").view(-1)[7] = 2.0
    loss_fn(model, batches()[0])
    after = dict(plan.named_parameters())["1.weight"].detach()
    assert float(after[7]) == 2.0
    assert torch.equal(after[:7], before[:7])
    assert torch.equal(after[8:], before[8:])


def test_theta_that_is_written_goes_into_the_weights_rounded() -> None:
    model = net()
    plan = attach(model, FISH(k=30))
    for theta in plan.parameters():
        theta.data += 0.37
    loss_fn(model, batches()[0])
    for name, selection in plan.selections.items():
        value = dict(plan.named_parameters())[name].detach()
        assert torch.equal(selection.gather(model.state_dict()[name]), value.bfloat16())


@pytest.mark.parametrize("reselect", [None, every(2)])
def test_a_model_converted_under_its_plan_has_masters_from_then_on(reselect: Any) -> None:
    model = net(F32)
    plan = attach(model, FISH(k=40, reselect=reselect), head=())
    optimizer = adamw(plan.parameters(), lr=1e-3)
    train(plan, optimizer, batches(2))
    model.bfloat16()
    train(plan, optimizer, batches(3))
    assert all(theta.dtype == F32 for theta in plan.parameters())
    for binding in plan._candidates:
        values = binding.values
        if values is not None:
            assert torch.equal(values.bfloat16(), binding.selection.gather(model.state_dict()[binding.name]))
    assert sum(b.moved.size for b in plan._candidates) <= 80


def test_a_head_that_would_be_trained_without_a_master_is_refused() -> None:
    model = net(F32)
    plan = attach(model, FISH(k=40))
    model.bfloat16()
    with pytest.raises(TitheError, match=r"3\.weight: found torch\.bfloat16, without a master copy"):
        loss_fn(model, batches()[0])
    plan.model.float()
    loss_fn(model, batches()[0])


# --- resuming, saving, releasing


@each_method
@pytest.mark.parametrize("ride", [False, True], ids=["plan's state", "optimizer's state"])
def test_a_resumed_run_equals_one_that_never_stopped(make: Callable[[], Any], ride: bool) -> None:
    data = batches(10)
    whole, stopped = net(), net()
    plan = attach(whole, make())
    train(plan, adamw(plan.parameters(), lr=1e-3), data, epochs=True)

    first = attach(stopped, make())
    optimizer = adamw(first.parameters(), lr=1e-3)
    train(first, optimizer, data[:5], epochs=True)
    state, of_optimizer = copy.deepcopy(first.state_dict()), copy.deepcopy(optimizer.state_dict())
    resumed = net()
    second = attach(resumed, make(), **({} if ride else {"state": state}))
    optimizer = adamw(second.parameters(), lr=1e-3)
    if ride:
        second.bind(optimizer)
    else:
        del of_optimizer["state"]["tithe"]
    optimizer.load_state_dict(of_optimizer)
    train(second, optimizer, data[5:], epochs=True)
    assert all(torch.equal(value, masters(plan)[name]) for name, value in masters(second).items())
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in resumed.state_dict().items())


def test_a_state_of_other_masters_is_refused_and_nothing_changes() -> None:
    plan = attach(net(), FISH(k=40))
    train(plan, adamw(plan.parameters()), batches(2))
    state = plan.state_dict()
    other = attach(net(), FISH(k=40), dtype=BF16)
    before = copy.deepcopy(other.model.state_dict())
    with pytest.raises(TitheError, match=r"saved θ of torch\.float32.*dtype="):
        other.load_state_dict(state)
    assert all(torch.equal(value, before[name]) for name, value in other.model.state_dict().items())


def test_a_plan_attached_again_with_its_state_has_its_masters() -> None:
    model = net()
    plan = attach(model, FISH(k=40))
    train(plan, adamw(plan.parameters(), lr=1e-3), batches(3))
    state, before = copy.deepcopy(plan.state_dict()), masters(plan)
    plan.release()
    again = attach(model, FISH(k=40), state=state)
    assert all(torch.equal(value, before[name]) for name, value in masters(again).items())
    again.release()
    anew = attach(model, FISH(k=40))
    assert all(torch.equal(value, value.bfloat16().float()) for value in masters(anew).values())


@each_method
def test_a_delta_holds_the_weights_in_their_own_dtype(make: Callable[[], Any], tmp_path: Path) -> None:
    model = net()
    keys = list(model.state_dict())
    plan = attach(model, make())
    train(plan, adamw(plan.parameters()), batches(6), epochs=True)
    plan.save(tmp_path / "delta.safetensors")
    plan.release()
    assert list(model.state_dict()) == [name for name, _ in model.named_parameters()] == keys
    assert all(type(p) is nn.Parameter and p.requires_grad and p.dtype == BF16 for p in model.parameters())
    assert not [key for module in model.modules() for key in vars(module) if key in ("weight", "bias")]
    applied = tithe.apply(net(), tmp_path / "delta.safetensors")
    assert all(torch.equal(value, applied.state_dict()[name]) for name, value in model.state_dict().items())


# --- the head, and plans that train whole tensors


def test_a_head_in_half_precision_has_a_master_too() -> None:
    model = net()
    plan = attach(model, FISH(k=30))
    named = dict(plan.named_parameters())
    assert plan.head == ("3.weight", "3.bias")
    assert {name for name in named if name.startswith("3.")} == {"3.weight", "3.bias"}
    assert all(named[name].dtype == F32 for name in plan.head)
    assert not model.get_submodule("3")._parameters["weight"].requires_grad  # pyright: ignore
    with pytest.raises(TitheError, match="head"):
        plan.selected("3.weight")
    before = model.get_parameter("3.weight").detach().clone()
    train(plan, adamw(plan.parameters(), lr=2e-5), batches(1) * 30)
    assert not torch.equal(model.get_parameter("3.weight"), before)
    assert torch.equal(named["3.weight"].detach().bfloat16(), model.get_parameter("3.weight").detach())
    plan.release()
    assert model.get_parameter("3.weight").requires_grad


def test_a_bias_chosen_beside_a_weight_of_the_head_gets_its_gradient() -> None:
    model, twin = net(), net()
    plan = attach(model, FISH(k=2, score="magnitude"), head="1.weight", where="1.bias")
    loss_fn(model, batches()[0]).backward()
    loss_fn(twin, batches()[0]).backward()
    for name, theta in plan.named_parameters():
        found, dense = theta.grad, twin.get_parameter(name).grad
        assert found is not None
        assert dense is not None
        expected = dense[plan.selected(name)] if name == "1.bias" else dense
        assert torch.allclose(found, expected.float(), rtol=0.02, atol=1e-4), name


def test_a_weight_selected_by_a_grid_gets_its_gradient_beside_a_bias() -> None:
    """No rule knows a grid: such a weight goes through graft."""

    class Corner(tithe.SparseMethod):
        def choose(self, context: tithe.SelectionContext) -> dict[str, tithe.Selection]:
            grid = tithe.Grid((12, 6), {0: torch.tensor([1, 5]), 1: torch.tensor([0, 2, 3])})
            return {"1.weight": grid, "1.bias": tithe.Coordinates((12,), torch.tensor([3]))}

    model, twin = net(F32), net(F32)
    plan = attach(model, Corner())
    loss_fn(model, batches()[0]).backward()
    loss_fn(twin, batches()[0]).backward()
    named = dict(plan.named_parameters())
    for name, selection in plan.selections.items():
        assert named[name].grad is not None
        assert torch.allclose(named[name].grad, selection.gather(twin.get_parameter(name).grad), atol=1e-6)


def test_methods_that_train_whole_tensors_say_that_there_is_no_master() -> None:
    model = net()
    method = tithe.VRPGE(keep=0.5)
    settings: dict[str, Any] = {"loss": loss_fn, "data": batches(2), "where": "!0.*"}
    with pytest.warns(tithe.TitheWarning, match=r"bfloat16 rounds small updates away"):
        plan = tithe.attach(model, method, **settings)
    plan.release()
    tithe.attach(model, method, **settings, dtype=BF16).release()  # said to be so: no warning
    with pytest.raises(TitheError, match=r"the weight's own dtype"):
        tithe.attach(model, method, **settings, dtype=F32)


# --- dtype=


def test_theta_in_double_precision() -> None:
    plan = attach(net(F32), FISH(k=30), dtype=F64)
    assert all(theta.dtype == F64 for theta in plan.parameters())
    train(plan, adamw(plan.parameters()), batches(2))
    for name, theta in plan.named_parameters():
        if name in plan.selections:
            there = plan.selections[name].gather(plan.model.state_dict()[name])
            assert torch.equal(theta.detach().float(), there)
            assert not torch.equal(theta.detach(), there.double())


@pytest.mark.parametrize(
    ("dtype", "weights", "match"),
    [
        (BF16, F32, r"3\.weight: found a weight of torch\.float32, and dtype=torch\.bfloat16"),
        (F16, BF16, r"expected a dtype of θ that holds every value"),
        (torch.int32, F32, r"dtype: found torch\.int32"),
        ("float32", F32, r"dtype: found 'float32'"),
    ],
)
def test_a_dtype_that_cannot_hold_the_weights_is_refused(dtype: Any, weights: torch.dtype, match: str) -> None:
    model = net(weights)
    with pytest.raises(TitheError, match=match):
        attach(model, FISH(k=30), dtype=dtype)
    attach(model, FISH(k=30)).release()


def test_a_model_converted_to_what_the_given_dtype_cannot_hold_is_refused() -> None:
    model = net(BF16)
    plan = attach(model, FISH(k=30), dtype=F32)
    train(plan, adamw(plan.parameters()), batches(1))
    model.double()
    with pytest.raises(TitheError, match=r"torch\.float64, and dtype=torch\.float32"):
        loss_fn(model, batches()[0])


def test_a_binding_says_what_theta_it_asks_for() -> None:
    weight = nn.Parameter(torch.zeros(3, dtype=F16))
    assert Binding("w", weight).theta.dtype == F32
    assert Binding("w", weight, F16).theta.dtype == F16
