"""The limits of training in a span, and its rule: one checkpoint is a point, enough of them are all directions.

one step of SGD on θ  ==  w − lr · P Pᵀ (∇w + λ w)
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, update_bn

import tithe
from histories import checkpoints, flat, gradient, gram_schmidt, load, perturbed, recorded
from models import CASES, LARGE, Case
from oracles import adamw, bits, equal_bits, train

EVERY = [pytest.param(case, id=name, marks=[pytest.mark.slow] if case in LARGE else []) for name, case in CASES.items()]


def _step(plan: tithe.Plan, case: Case, batch: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> Tensor:
    optimizer.zero_grad()
    loss = plan.backward(lambda: case.loss(plan.model, batch))
    optimizer.step()
    plan.step()
    return loss.detach()


@pytest.mark.parametrize("case", EVERY)
def test_zero_steps_are_the_average_of_torch(case: Case, tmp_path: Path) -> None:
    model = case.model()
    models = checkpoints(model, 3)
    averaged = AveragedModel(models[0])
    for other in models:
        averaged.update_parameters(other)
    data = case.batches(3)
    expected = averaged.module
    plan = tithe.attach(model, tithe.TWA(recorded(tmp_path / "run", models)), loss=case.loss)
    assert torch.allclose(flat(model), flat(expected), rtol=0, atol=5e-7)
    plan.refresh_statistics(data)
    wrapped = _Runs(expected, case)
    update_bn(data, wrapped)
    for (name, one), (_, two) in zip(model.named_buffers(), expected.named_buffers(), strict=True):
        if name.endswith(("running_mean", "running_var")):
            assert torch.allclose(one, two, rtol=1e-4, atol=1e-5), name
    plan.release()


class _Runs(nn.Module):
    """A model that takes a batch of a case, as update_bn hands it over."""

    def __init__(self, model: nn.Module, case: Case) -> None:
        super().__init__()
        self.model, self.case = model, case

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.case.loss(self.model, batch)


@pytest.mark.parametrize("coded", [None, 8, 4, 1])
def test_one_checkpoint_is_a_point(coded: int | None, tmp_path: Path) -> None:
    case = CASES["bert"]
    model = case.model()
    before = bits(model)
    plan = tithe.attach(model, tithe.TWA(recorded(tmp_path / "run", [copy.deepcopy(model)]), bits=coded))
    optimizer = adamw(plan.parameters())
    plan.bind(optimizer)
    for batch in case.batches(3):
        _step(plan, case, batch, optimizer)
    plan.release()
    assert equal_bits(bits(model), before) == []


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_enough_checkpoints_are_ordinary_training(momentum: float, tmp_path: Path) -> None:
    case = CASES["regression"]
    model = case.model(dtype=torch.float64)
    size = flat(model).numel()
    models = checkpoints(model, size + 1)
    ordinary = copy.deepcopy(model)
    load(ordinary, torch.stack([flat(m) for m in models]).mean(0))
    batches = case.batches(4, dtype=torch.float64)

    def optimizer(parameters):  # annotations would say less than the line
        return torch.optim.SGD(parameters, lr=0.1, momentum=momentum, weight_decay=0.1)

    expected = train(ordinary, case, optimizer, batches)
    plan = tithe.attach(model, tithe.TWA(recorded(tmp_path / "run", models)))
    opt = optimizer(plan.parameters())
    plan.bind(opt)
    losses = [float(_step(plan, case, batch, opt)) for batch in batches]
    assert losses == pytest.approx(expected, rel=1e-7)
    assert torch.allclose(flat(model), flat(ordinary), rtol=0, atol=1e-7)


@pytest.mark.parametrize("kind", ["distinct", "duplicated", "near-parallel"])
@pytest.mark.parametrize("case", EVERY)
def test_one_step_is_the_projected_step(case: Case, kind: str, tmp_path: Path) -> None:
    if case.dropout:
        pytest.skip("draws random numbers")
    model = case.model()
    models = checkpoints(model, 4)
    if kind == "duplicated":
        models += [copy.deepcopy(models[0]), copy.deepcopy(models[2])]
    if kind == "near-parallel":
        models.append(perturbed(models[0], 9, scale=1e-4))
    history = recorded(tmp_path / "run", models)
    points = torch.stack([flat(m) for m in models])
    mean = points.mean(0)
    basis = gram_schmidt(points - mean)
    ordinary = copy.deepcopy(model)
    load(ordinary, mean)
    batch = case.batch()
    rate, decay = 0.5, 0.1
    full = gradient(ordinary, case, batch) + decay * flat(ordinary)
    expected = mean - rate * (basis.T @ (basis @ full))
    plan = tithe.attach(model, tithe.TWA(history))
    opt = torch.optim.SGD(plan.parameters(), lr=rate, weight_decay=decay)
    plan.bind(opt)
    _step(plan, case, batch, opt)
    moved = (expected - mean).norm()
    assert (flat(model) - expected).norm() <= 1e-5 * moved + 1e-6 * mean.norm()
    assert next(iter(plan.parameters())).isfinite().all()


@pytest.mark.parametrize("case", [pytest.param(CASES[n], id=n) for n in ("mlp", "bert", "resnet_basic", "gpt2")])
def test_coefficients_of_each_tensor_follow_autograd(case: Case, tmp_path: Path) -> None:
    model = case.model()
    models = checkpoints(model, 3)
    ordinary = copy.deepcopy(model)
    points = [
        torch.stack([dict(m.named_parameters())[n].detach() for m in models]) for n, _ in model.named_parameters()
    ]
    means = [p.double().mean(0) for p in points]
    units = []
    for p, mean in zip(points, means, strict=True):
        d = (p.double() - mean).flatten(1)
        units.append(d / d.norm(dim=1, keepdim=True))
    beta = torch.zeros(len(points), 3, dtype=torch.float64, requires_grad=True)
    theirs = torch.optim.AdamW([beta], lr=0.01, weight_decay=0.01)
    plan = tithe.attach(model, tithe.TWA(recorded(tmp_path / "run", models), granularity="tensor"))
    ours = torch.optim.AdamW(plan.parameters(), lr=0.01, weight_decay=0.01)
    plan.bind(ours)
    for batch in case.batches(3):
        weights = {
            name: (mean + (beta[i] @ units[i]).view(mean.shape)).float()
            for i, ((name, _), mean) in enumerate(zip(ordinary.named_parameters(), means, strict=True))
        }
        theirs.zero_grad()
        functional = _Functional(ordinary, weights)
        case.loss(functional, batch).backward()
        theirs.step()
        _step(plan, case, batch, ours)
    assert torch.allclose(dict(plan.named_parameters())["span"].double(), beta, atol=2e-3, rtol=1e-3)


class _Functional(nn.Module):
    """A model run with other weights."""

    def __init__(self, model: nn.Module, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.inner, self.weights = [model], weights

    def forward(self, *args: object, **kwargs: object) -> object:
        return torch.func.functional_call(self.inner[0], self.weights, args, kwargs)
