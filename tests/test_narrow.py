"""A step of the narrow network is a step of the dense one whose absent channels emit nothing, and a run is a run."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import tithe
from models import Batch, Case
from narrow_plans import FAMILIES, Masked, Optimizer, attach, bound, drawn, every, live_entries, plain, step
from oracles import adamw, bits, sgd
from slicing import zeroed
from tithe import VRPGE, NarrowPlan

QUICK = [name for name in FAMILIES if name not in ("mobilenet_v2", "swin", "convnext", "gpt2_classifier", "llama")]
DOUBLE = {"rtol": 1e-9, "atol": 1e-11}


# --- one step


@pytest.mark.parametrize("training", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["train", "eval"])
@pytest.mark.parametrize("case", every(QUICK))
def test_a_step_is_that_of_the_masked_network(case: Case, training: bool) -> None:
    """Loss, gradient of every live entry, running statistics of live channels; those of absent ones keep their bits."""
    _compare_step(attach(case, case.model(dtype=torch.float64).train(training), seed=1), case)


@given(
    widths=st.lists(st.integers(2, 7), min_size=1, max_size=3),
    groups=st.sampled_from([1, 2]),
    samples=st.integers(2, 4),
    keep=st.floats(0.5, 1.0),
    seed=st.integers(0, 99),
)
def test_a_step_of_any_widths_is_too(widths: list[int], groups: int, samples: int, keep: float, seed: int) -> None:
    def make() -> nn.Module:
        layers, before = list[nn.Module](), 3
        for width in (groups * width for width in widths):
            grouped = groups if before % groups == 0 else 1
            layers += [nn.Conv2d(before, width, 3, padding=1, groups=grouped), nn.BatchNorm2d(width), nn.ReLU()]
            before = width
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * before, 3))

    case = replace(FAMILIES["vgg"], make=make)
    _compare_step(attach(case, case.model(dtype=torch.float64), keep=keep, seed=seed), case, samples)


def _compare_step(plan: NarrowPlan, case: Case, samples: int = 4) -> None:
    """With a dense network that has zeros where channels are absent."""
    model, mask, batch = plan.model, drawn(plan)[0], case.batch(samples, seed=5, dtype=torch.float64)
    live, before = live_entries(plan, mask), bits(model)
    masked = zeroed(plain(plan, case), plan.stage.coupling, mask)
    expected = case.loss(masked, batch)
    expected.backward()
    loss = plan.backward(lambda: case.loss(model, batch))
    torch.testing.assert_close(loss, expected, **_tolerance(case))
    grads = {name: parameter.grad for name, parameter in masked.named_parameters()}
    for name, theta in plan.named_parameters():
        grad, want = theta.grad, grads[name]
        assert (grad is None) == (want is None), name
        if grad is not None and want is not None:
            want = want[live[name]].view(grad.shape) if name in live else want
            torch.testing.assert_close(grad, want, **_tolerance(case), msg=lambda text, name=name: f"{name}: {text}")
    for name, buffer in masked.named_buffers():
        found, here = model.get_buffer(name), live.get(name, torch.ones_like(buffer, dtype=torch.bool))
        torch.testing.assert_close(found[here], buffer[here], **DOUBLE)
        assert name not in before or torch.equal(found[~here], before[name][~here])


def _tolerance(case: Case) -> dict[str, float]:
    """Some losses are computed in float32 whatever the model's dtype."""
    return {"rtol": 1e-5, "atol": 1e-6} if "single" in case.tags else DOUBLE


def test_what_is_live_is_what_the_plan_says() -> None:
    case = FAMILIES["residual"]
    plan = attach(case)
    live = live_entries(plan, drawn(plan)[0])
    plan.backward(lambda: case.loss(plan.model, case.batch()))
    for name, theta in plan.named_parameters():
        selection = plan.selections[name]
        assert tuple(theta.shape) == selection.theta_shape
        if name in live:
            assert torch.equal(plan.selected(name), live[name].flatten().nonzero().flatten())
    assert plan.selections["fc.bias"].full


def test_both_losses_see_the_same_random_draws() -> None:
    case, seen = FAMILIES["vgg"], list[tuple[float, ...]]()
    plan = attach(case)
    batches = case.batches(2)

    def closure(batch: Batch) -> Tensor:
        seen.append((float(torch.rand(())), random.random(), float(np.random.rand())))
        return case.loss(plan.model, batch)

    for count, batch in zip((3, 2), batches, strict=True):  # the first step looks whether a loss is the same twice
        assert not torch.equal(*drawn(plan))
        seen.clear()
        plan.backward(lambda batch=batch: closure(batch))
        assert len(seen) == count
        assert len(set(seen)) == 1
        plan.step()
    after = float(torch.rand(())), random.random(), float(np.random.rand())
    assert after != seen[0]


def test_dropout_is_the_same_in_both() -> None:
    """Two networks that differ in a unit whose outgoing weights are zero have the same loss, dropout or not.

    But for rounding: their products have other shapes, for which a library may sum in another order. Another draw of
    dropout moves the loss by a tenth.
    """
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        model[3].weight.zero_()
        model[3].weight[:, 0] = 1.0
    x = torch.randn(64, 6)
    losses: list[float] = []

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        value = model(batch).square().mean()
        losses.append(value.item())
        return value

    plan = tithe.attach(model, VRPGE(0.75), loss=loss, data=[x])
    with torch.no_grad():
        plan.structure_parameters()[0].copy_(torch.tensor([1.0, 0.6, 0.6, 0.6]))
    while torch.equal(*drawn(plan)):
        plan.step()
    losses.clear()
    plan.backward(lambda: loss(model, x))
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-6)
    assert losses[0] > 0


# --- a run


OPTIMIZERS: dict[str, Optimizer] = {
    "sgd": sgd,
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1),
    "plain": lambda p: torch.optim.SGD(p, lr=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1, amsgrad=True),
    "adamw": adamw,
    "fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "foreach": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, foreach=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05, initial_accumulator_value=0.1),
}
RUNS = [
    *(("vgg", name) for name in OPTIMIZERS),
    *((name, "sgd") for name in ("residual", "inverted", "dense", "grouped", "grouped_query")),
    *((name, "adamw") for name in ("residual", "bert", "block")),
]


@pytest.mark.parametrize(("name", "optimizer"), RUNS)
def test_a_run_is_that_of_masks_on_dense_tensors(name: str, optimizer: str) -> None:
    """Weights, running statistics and probabilities, under a learning rate that falls and a clipped gradient."""
    case, steps = FAMILIES[name], 5
    method = VRPGE(0.6, structure_lr=0.05, alpha=0.25 if optimizer == "adamw" else 0.5, gradual=(1, 4))
    model, twin = (case.model(dtype=torch.float64) for _ in range(2))
    plan = attach(case, model, method, seed=2)
    reference = Masked(plan, twin, case, OPTIMIZERS[optimizer])
    opt = bound(plan, OPTIMIZERS[optimizer])
    falls = [torch.optim.lr_scheduler.StepLR(one, 2, 0.5) for one in (opt, reference.opt)]
    for number, batch in enumerate(case.batches(steps, 6, dtype=torch.float64)):
        plan.backward(lambda batch=batch: case.loss(model, batch))
        nn.utils.clip_grad_norm_(plan.parameters(), 0.05)
        opt.step()
        opt.zero_grad()
        plan.step()
        reference.step([batch], clip=0.05, pace=0.5 ** (number // 2))
        for fall in falls:
            fall.step()
        torch.testing.assert_close(plan.structure.s.detach(), reference.s, rtol=1e-7, atol=1e-9)
        for key, value in twin.state_dict().items():
            torch.testing.assert_close(model.state_dict()[key], value, rtol=1e-7, atol=1e-9)
    assert reference.s.unique().numel() > 3
    assert float(reference.s.sum()) <= 0.6 * reference.n + 1e-9


@pytest.mark.parametrize("name", ["mlp", "bert", "block"])
def test_micro_batches_add_up_to_the_batch(name: str) -> None:
    """Where no norm mixes samples: gradients, and the losses' difference that the probabilities learn from."""
    case = FAMILIES[name]
    model, twin = (case.model(dtype=torch.float64) for _ in range(2))
    plan = attach(case, model, VRPGE(0.5, structure_lr=0.05))
    reference = Masked(plan, twin, case, sgd)
    opt = bound(plan, sgd)
    for batch in case.batches(4, 6, dtype=torch.float64):
        for part in (slice(0, 3), slice(3, 6)):
            half = {key: value[part] for key, value in batch.items()}
            plan.backward(lambda half=half: case.loss(model, half) / 2)
        opt.step()
        opt.zero_grad()
        plan.step()
        reference.step([batch])
    torch.testing.assert_close(plan.structure.s.detach(), reference.s, rtol=1e-7, atol=1e-9)
    for key, value in twin.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("cost", ["channels", "flops", "params"])
@pytest.mark.parametrize(
    "name", ["vgg", "inverted", "dense", pytest.param("bert", marks=pytest.mark.slow), "grouped_query"]
)
def test_no_more_is_spent_than_is_kept(name: str, cost: str) -> None:
    """In expectation by the probabilities of each step, and for certain by the network that is exported."""
    case = FAMILIES[name]
    model, batch = case.model(), case.batch(2)
    whole = _spends(case, model, batch, cost)
    method = VRPGE(0.6, structure_lr=0.1, cost=cost, gradual=(1, 4))
    plan = attach(case, model, method)
    opt = bound(plan, sgd)
    for batch in case.batches(6):
        step(plan, opt, case, batch)
        assert plan.structure.spent() <= method.share(plan.num_steps) * (1 + 1e-9)
    assert plan.structure.spent() > 0.4
    if cost == "channels":
        kept = plan.structure.likely(plan.num_steps)
        assert int(kept.sum()) == int(0.6 * kept.numel())
    else:
        assert 0.4 * whole < _spends(case, plan.export(), batch, cost) <= 0.6 * whole


def _spends(case: Case, model: nn.Module, batch: Batch, cost: str) -> float:
    if cost == "params":
        return sum(p.numel() for p in model.parameters())
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        case.loss(model, {key: value[:2] for key, value in batch.items()})
    return counter.get_total_flops()
