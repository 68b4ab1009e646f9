"""Models in half precision: the ways that gradients take to float32 masters, what those cost, and two ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tithe
from ranks import play
from test_half_precision import BF16, F16, F32, F64, adamw, attach, batches, each_method, loss_fn, masters, net, train
from tithe import FISH, TraDy, every

# --- the ways a gradient takes


@each_method
def test_micro_batches_add_up_in_float32(make: Callable[[], Any]) -> None:
    """Four gradients of bfloat16 weights are added in float32: their sum is exact to float32's rounding."""
    model = net()
    plan = attach(model, make())
    train(plan, adamw(plan.parameters()), batches(3))
    total: dict[str, Tensor] = {}
    for batch in batches(4):
        loss_fn(model, batch).backward()
        for name, theta in plan.named_parameters():
            if theta.grad is not None:
                assert theta.grad.dtype == F32
                total[name] = total.get(name, torch.zeros_like(theta, dtype=F64)) + theta.grad.double()
                theta.grad = None
    for batch in batches(4):
        loss_fn(model, batch).backward()
    for name, theta in plan.named_parameters():
        if name in total:
            assert theta.grad is not None
            assert torch.allclose(theta.grad.double(), total[name], rtol=1e-6, atol=1e-8), name


def test_under_autocast_a_float32_model_is_what_it_was() -> None:
    model = net(F32)
    plan = attach(model, FISH(k=40))
    with torch.autocast("cpu", BF16):
        loss_fn(model, batches()[0]).backward()
    assert all(p.dtype == p.grad.dtype == F32 for p in plan.parameters() if p.grad is not None)
    assert plan.state_dict()["masters"] == {}


def test_a_scaled_loss_of_a_float16_model_is_unscaled() -> None:
    """`GradScaler` refuses gradients in float16, which θ has none of."""
    weights = []
    for scale in (False, True):
        model = net(F16)
        plan = attach(model, FISH(k=40))
        optimizer = adamw(plan.parameters())
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=scale)
        for batch in batches(4):
            scaler.scale(loss_fn(model, batch)).backward()
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert plan.num_steps == 4
        weights.append(torch.cat([p.detach().view(-1) for p in plan.parameters()]))
    start = torch.cat([p.detach().view(-1) for p in attach(net(F16), FISH(k=40)).parameters()])
    assert torch.allclose(weights[0], weights[1], atol=2e-2)
    assert float((weights[0] - start).abs().max()) > 2e-2


@pytest.mark.parametrize("kernel", ["fused", "foreach"])
def test_other_kernels_of_an_optimizer(kernel: str) -> None:
    plan = attach(net(), FISH(k=40))
    optimizer = torch.optim.AdamW(
        list(plan.parameters()), lr=1e-2, fused=kernel == "fused", foreach=kernel == "foreach"
    )
    before = masters(plan)
    train(plan, optimizer, batches(3))
    for name, theta in plan.named_parameters():
        assert not torch.equal(theta, before[name])
    for name, selection in plan.selections.items():
        value = dict(plan.named_parameters())[name].detach()
        assert torch.equal(selection.gather(plan.model.state_dict()[name]), value.bfloat16())


@pytest.mark.parametrize("reselect", [None, every(2)])
def test_theta_handed_to_functional_call(reselect: Any) -> None:
    model = net()
    plan = attach(model, FISH(k=40, reselect=reselect), head=())
    handed = {
        name: p.detach().clone() + (0.25 if name.endswith("@theta") else 0.0)
        for name, p in model.named_parameters()
        if name.endswith("@theta")
    }
    assert all(value.dtype == F32 for value in handed.values())
    batch = batches()[0]

    def loss(thetas: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(model, thetas, (batch[0],)).float(), batch[1])

    grads = torch.func.grad(loss)(handed)
    assert all(grad.dtype == F32 and bool(grad.any()) for grad in grads.values())
    for theta in plan.parameters():
        theta.data += 0.25
    assert torch.equal(loss(handed), loss_fn(model, batch))
    loss_fn(model, batch).backward()
    own = {name: p.grad for name, p in model.named_parameters() if name.endswith("@theta")}
    for name, grad in grads.items():
        expected = own[name]
        assert expected is not None
        assert torch.allclose(grad, expected, rtol=0.05, atol=1e-3)


def test_a_penalty_on_the_gradient_by_theta() -> None:
    model = net()
    plan = attach(model, FISH(k=40, score="magnitude"), where=["1.weight", "1.bias"])
    found = torch.autograd.grad(loss_fn(model, batches()[0]), list(plan.parameters()), create_graph=True)
    torch.stack([g.square().sum() for g in found]).sum().backward()
    assert all(p.grad is not None and p.grad.dtype == F32 and bool(p.grad.isfinite().all()) for p in plan.parameters())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own, of any Function
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_compiled_model_trains_the_masters() -> None:
    ends = []
    for wrap in (lambda model: model, lambda model: torch.compile(model, backend="aot_eager")):
        model = net()
        plan = attach(model, FISH(k=40))
        compiled = wrap(model)
        optimizer = adamw(plan.parameters())
        for batch in batches(3):
            F.cross_entropy(compiled(batch[0]).float(), batch[1]).backward()
            assert all(p.grad is None or p.grad.dtype == F32 for p in plan.parameters())
            optimizer.step()
            optimizer.zero_grad()
        ends.append(torch.cat([p.detach().view(-1) for p in plan.parameters()]))
    assert torch.allclose(ends[0], ends[1], atol=2e-2)


# --- what it costs


@each_method
def test_the_ledger_counts_theta_as_it_is(make: Callable[[], Any]) -> None:
    model = net()
    plan = attach(model, make())
    optimizer = adamw(plan.parameters())
    train(plan, optimizer, batches(3))
    found = plan.predict(batches()[0])
    loss_fn(model, batches()[0]).backward()
    assert found.theta == found.gradients == sum(p.nbytes for p in plan.parameters()) > 4 * 40
    assert found.gradients == sum(p.grad.nbytes for p in plan.parameters() if p.grad is not None)
    optimizer.step()
    states = [value for kept in optimizer.state.values() for value in kept.values() if value.dim()]
    assert found.optimizer == sum(value.nbytes for value in states)
    optimizer.zero_grad()
    batch = batches()[0]
    measured = tithe.measure(lambda: loss_fn(model, batch).backward())
    assert plan.predict(batch).kept == measured.kept


def test_a_budget_in_bytes_pays_for_theta_in_float32() -> None:
    model = net()
    plan = attach(model, TraDy(tithe.Budget("3KB"), layers="all", dynamic=False))
    spending = plan.spending()
    optimizer = adamw(plan.parameters())
    train(plan, optimizer, batches(1))
    loss_fn(model, batches()[0]).backward()
    head = sum(p.numel() for p in (model.get_parameter("3.weight"), model.get_parameter("3.bias")))
    theta = sum(p.numel() for p in plan.parameters()) - head
    channels = sum(s.items.numel() for s in plan.selections.values())
    batch = 8
    kept = channels * (batch * 2 + 8)  # their input in bfloat16, and their number
    assert spending.spent == 4 * 4 * theta + kept + 3 * 4 * head
    assert spending.spent <= spending.limit == 3000


# --- several ranks


def _on_a_rank(method: Any, rank: int) -> dict[str, Tensor]:
    model = net()
    plan = attach(model, method)
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = adamw(plan.parameters(), lr=1e-3)
    for batch in batches(4, seed=20 + rank):
        F.cross_entropy(wrapped(batch[0]).float(), batch[1]).backward()
        optimizer.step()
        optimizer.zero_grad()
    found = {f"θ {name}": value for name, value in masters(plan).items()}
    plan.release()
    return found | {name: value.detach().clone() for name, value in model.state_dict().items()}


def chosen_once(rank: int) -> dict[str, Tensor]:
    return _on_a_rank(FISH(k=40), rank)


def chosen_again(rank: int) -> dict[str, Tensor]:
    return _on_a_rank(FISH(k=40, reselect=every(2)), rank)


def test_two_ranks_have_the_same_masters(tmp_path: Path) -> None:
    for first, second in play(tmp_path, chosen_once, chosen_again).values():
        assert first.keys() == second.keys()
        assert all(torch.equal(value, second[name]) for name, value in first.items())
        thetas = [value for name, value in first.items() if name.startswith("θ")]
        assert len(thetas) >= 3
        assert all(value.dtype == F32 and not torch.equal(value, value.bfloat16().float()) for value in thetas)
