"""Input channels in training: the two limits, what a layer keeps, and that nothing else moves."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import tithe
from oracles import Given, Optimizer, adamw, bits, equal_bits, parts, sgd, thetas
from tithe import Channels

FLOAT, N = 4, 8


def _network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.Tanh(),
        nn.Conv2d(8, 16, 3, groups=4, stride=2),
        nn.Tanh(),
        nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False),
        nn.Flatten(),
        nn.Linear(16 * 9, 12),
        nn.Tanh(),
        nn.Linear(12, 3),
    )


GROUPS = {"0.weight": 1, "2.weight": 4, "4.weight": 16, "6.weight": 1, "8.weight": 1}


def _select(model: nn.Module, ids: dict[str, list[int]]) -> dict[str, Channels]:
    return {
        name: Channels(
            tuple(model.get_parameter(name).shape), torch.tensor(picked, dtype=torch.int64), groups=GROUPS[name]
        )
        for name, picked in ids.items()
    }


def _all(model: nn.Module) -> dict[str, Channels]:
    counts = {name: model.get_parameter(name).shape[1] * groups for name, groups in GROUPS.items()}
    return _select(model, {name: list(range(count)) for name, count in counts.items()})


def _loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def _train(model: nn.Module, parameters: object, optimizer: Optimizer, plan: tithe.Plan | None = None) -> list[float]:
    opt = optimizer(parameters)
    if plan is not None:
        plan.bind(opt)
    losses: list[float] = []
    for seed in range(4):
        x = torch.randn(N, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
        loss = _loss(model, x)
        loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
    return losses


# --- the two limits


@pytest.mark.parametrize("optimizer", [sgd, adamw])
@pytest.mark.parametrize("again", [False, True])
def test_all_channels_are_ordinary_training_bit_for_bit(optimizer: Optimizer, again: bool) -> None:
    """θ keeps the weight's values, decay and momentum act on it; biases are left out on both sides."""
    model = _network()
    ordinary = copy.deepcopy(model)
    for name, parameter in ordinary.named_parameters():
        parameter.requires_grad_(name in GROUPS)
    expected = _train(ordinary, [p for p in ordinary.parameters() if p.requires_grad], optimizer)
    plan = tithe.attach(model, Given(_all(model), reselect=tithe.every(1) if again else None))
    assert _train(model, plan.parameters(), optimizer, plan) == expected
    assert equal_bits(bits(model), bits(ordinary)) == []
    plan.release()
    assert equal_bits(bits(model), bits(ordinary)) == []


def test_no_channels_leave_the_model_untouched() -> None:
    model = _network()
    before = bits(model)
    plan = tithe.attach(model, Given(_select(model, {key: [] for key in GROUPS} | {"8.weight": [1]})))
    assert list(plan.selections) == ["8.weight"]
    _train(model, plan.parameters(), adamw, plan)
    assert equal_bits(before, bits(model)) == ["8.weight"]
    plan.release()
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("optimizer", [sgd, adamw])
def test_unselected_columns_keep_their_bits_under_decay_and_momentum(optimizer: Optimizer) -> None:
    model = _network()
    before = bits(model)
    ids = {"0.weight": [1], "2.weight": [0, 1, 5], "4.weight": [2, 15], "6.weight": [0, 100], "8.weight": [11]}
    plan = tithe.attach(model, Given(_select(model, ids)))
    _train(model, plan.parameters(), optimizer, plan)
    for name, parameter in model.named_parameters():
        if name.endswith("@theta"):
            continue
        moved = (parameter.detach() != before[name]).flatten().nonzero().flatten()
        assert set(moved.tolist()) == (set(plan.selected(name).tolist()) if name in ids else set()), name


def test_selected_columns_follow_the_same_path_as_masked_training() -> None:
    model = _network().double()
    masked = copy.deepcopy(model)
    chosen = _select(model, {"0.weight": [1], "2.weight": [0, 1, 5], "4.weight": [2, 15], "6.weight": [0, 100]})
    plan = tithe.attach(model, Given(chosen))
    opts = [adamw(plan.parameters()), adamw(masked.parameters())]
    plan.bind(opts[0])
    start = {name: p.detach().clone() for name, p in masked.named_parameters()}
    for seed in range(4):
        x = torch.randn(N, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        for net, opt in zip((model, masked), opts, strict=True):
            opt.zero_grad()
            _loss(net, x).backward()
            opt.step()
        with torch.no_grad():
            for name, p in masked.named_parameters():
                kept = chosen[name].gather(p) if name in chosen else None
                p.copy_(start[name])
                if kept is not None:
                    chosen[name].scatter_(p, kept)
    for name, p in masked.named_parameters():
        torch.testing.assert_close(model.get_parameter(name).detach(), p.detach(), rtol=1e-10, atol=1e-12)


# --- bytes

KEPT = [
    # layer, selected channels, input, values of one channel's input, of one channel's columns
    (nn.Linear(64, 40, bias=False), [0, 9, 63], torch.randn(N, 5, 64), N * 5, 40),
    (nn.Conv1d(16, 24, 3), [1, 2], torch.randn(N, 16, 20), N * 20, 24 * 3),
    (nn.Conv2d(16, 24, 3, stride=2), [0, 15], torch.randn(N, 16, 9, 9), N * 81, 24 * 9),
    (nn.Conv2d(16, 24, 1, bias=False), [7], torch.randn(N, 16, 6, 6), N * 36, 24),
    (nn.Conv3d(8, 6, 3), [3, 4], torch.randn(N, 8, 4, 4, 4), N * 64, 6 * 27),
    (nn.Conv2d(16, 24, 3, groups=4), [0, 1, 2, 9], torch.randn(N, 16, 9, 9), N * 81, 6 * 9),
    (nn.Conv2d(16, 16, 5, groups=16), [0, 8, 15], torch.randn(N, 16, 9, 9), N * 81, 25),
    (nn.Conv2d(16, 32, 3, groups=16), [4, 5], torch.randn(N, 16, 9, 9), N * 81, 2 * 9),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("layer", "ids", "x", "positions", "weights"), KEPT, ids=lambda v: type(v).__name__)
def test_a_layer_keeps_its_selected_inputs_and_theta_has_their_columns(
    layer: nn.Module, ids: list[int], x: Tensor, positions: int, weights: int, dtype: torch.dtype
) -> None:
    """x[:, idx] and nothing besides; θ and its gradient are C'·D² values a channel."""
    model = nn.Sequential(copy.deepcopy(layer)).to(dtype)
    chosen = Channels(tuple(layer.weight.shape), torch.tensor(ids), groups=getattr(layer, "groups", 1))
    plan = tithe.attach(model, Given({"0.weight": chosen}))
    x = x.to(dtype)
    ledger = tithe.measure(lambda: model(x + 0).sum().backward(), model=model)
    size = len(ids) * dtype.itemsize
    assert ledger.kept == ledger.kept_by_module["0"] == positions * size
    (theta,) = plan.parameters()
    assert theta.grad is not None
    of_theta = weights * len(ids) * max(dtype.itemsize, 4)  # in float32 at least
    assert theta.nbytes == theta.grad.nbytes == of_theta
    assert ledger.by_kind["gradients"] <= of_theta


def test_micro_batches_keep_their_share() -> None:
    """Batch 1 keeps an eighth of batch 8, and the gradients add up to the same."""
    model = _network().double()
    plan = tithe.attach(model, Given(_select(model, {"2.weight": [3], "6.weight": [1, 2, 3]})))
    x = torch.randn(N, 3, 8, 8, dtype=torch.float64)
    whole = tithe.measure(lambda: (model(x).square().sum() / N).backward(), model=model)
    grads = [p.grad.clone() for p in plan.parameters() if p.grad is not None]
    for parameter in plan.parameters():
        parameter.grad = None
    parts = tithe.measure(lambda: [(model(p).square().sum() / N).backward() for p in x.split(1)], model=model)
    assert whole.kept_by_module["2"] == N * parts.kept_by_module["2"] == N * 64 * 8
    for parameter, grad in zip(plan.parameters(), grads, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-9, atol=1e-12)


def test_below_the_lowest_selected_layer_nothing_is_kept() -> None:
    model = _network()
    plan = tithe.attach(model, Given(_select(model, {"6.weight": [5], "8.weight": [0]})))
    x = torch.randn(N, 3, 8, 8)
    ledger = tithe.measure(lambda: plan.backward(lambda: _loss(model, x)), model=model)
    assert {path for path, size in ledger.kept_by_module.items() if size} <= {"", "6", "7", "8"}
    assert ledger.kept_by_module["6"] == N * FLOAT


def test_memory_beside_a_mask_by_gradient_hook_and_full_training() -> None:
    """Four 256² layers, 5 % of the channels: what the obvious way to freeze the rest would not save."""
    torch.manual_seed(0)
    model, x = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(4))), torch.randn(64, 256)
    full = tithe.measure(lambda: _loss(copy.deepcopy(model), x).backward())
    chosen = {f"{i}.weight": Channels((256, 256), torch.arange(0, 256, 20)) for i in range(4)}
    tithe.attach(model, Given(chosen))
    part = tithe.measure(lambda: _loss(model, x).backward(), model=model)
    assert part.by_kind["gradients"] <= 0.052 * 4 * 256 * 256 * FLOAT
    assert sum(part.kept_by_module[str(i)] for i in range(4)) == 4 * 64 * 13 * FLOAT
    assert part.peak < 0.25 * full.peak


# --- a new choice


def test_a_reselect_carries_momentum_by_channel_and_keeps_identities() -> None:
    """Stayers keep their rows, entrants start at zero, for every layout of θ."""
    model = _network()
    first = _select(model, {"0.weight": [0, 2], "2.weight": [0, 4, 5], "4.weight": [3, 7], "6.weight": [1, 50]})
    then = _select(model, {"0.weight": [2], "2.weight": [3, 4, 6, 7], "4.weight": [7, 9], "6.weight": [50, 60]})
    method = Given(dict(first), reselect=tithe.every(1, "epochs"))
    plan = tithe.attach(model, method)
    opt = sgd(plan.parameters())
    parameters = [id(p) for p in plan.parameters()]
    plan.bind(opt)
    plan.backward(lambda: _loss(model, torch.randn(N, 3, 8, 8)))
    opt.step()
    plan.step()
    (theta,) = plan.parameters()
    old = {name: part.clone() for name, part in parts(plan, opt.state[theta]["momentum_buffer"]).items()}
    method.chosen.update(then)
    assert plan.end_epoch()
    assert [id(p) for p in plan.parameters()] == parameters
    momentum = parts(plan, opt.state[theta]["momentum_buffer"])
    for name, selection in then.items():
        now = selection.by_item(momentum[name])
        before = dict(zip(first[name].items.tolist(), first[name].by_item(old[name]), strict=True))
        for channel, row in zip(selection.items.tolist(), now, strict=True):
            assert torch.equal(row, before.get(channel, torch.zeros_like(row))), (name, channel)
        assert torch.equal(selection.gather(model.get_parameter(name).detach()), thetas(plan)[name].detach())
