"""Whole models whose losses hold derivatives: penalties on gradients, forces, products with a Hessian.

Under every plan they train as stock does, or a TitheError says no later than the first step what to do.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import tithe
from narrow_plans import drawn, live_entries
from oracles import Given, largest, thetas
from slicing import zeroed
from tithe import TitheError

D = torch.float64


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def penalty(model: Callable[..., Any], batch: Any) -> Tensor:
    """A loss with a penalty on the gradient by the input, as of WGAN-GP."""
    x, y = batch
    x = x.clone().requires_grad_()
    out = model(x)
    (grad,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    return F.mse_loss(out, y) + (grad.flatten(1).norm(dim=1) - 1).square().mean()


class Forces(nn.Module):
    """An energy, and forces as its gradient, taken inside of the forward pass."""

    def __init__(self, energy: nn.Module) -> None:
        super().__init__()
        self.energy = energy

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        positions = positions.clone().requires_grad_()
        energy = self.energy(positions).sum()
        (grad,) = torch.autograd.grad(energy, positions, create_graph=True)
        return energy, -grad


def forces(model: nn.Module, batch: Any) -> Tensor:
    energy, found = model(batch[0])
    return (found - batch[0].roll(1, 0)).square().mean() + 0.01 * energy.square()


class Block(nn.Module):
    """A block of a transformer that is checkpointed or not."""

    def __init__(self, size: int, *, checkpointed: bool) -> None:
        super().__init__()
        self.norm, self.inner, self.out = nn.LayerNorm(size), nn.Linear(size, 3 * size), nn.Linear(size, size)
        self.drop, self.checkpointed = nn.Dropout(0.3), checkpointed

    def _run(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.inner(self.norm(x)).chunk(3, -1))
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)
        return x + self.drop(F.leaky_relu(self.out(attended), 0.3))

    def forward(self, x: Tensor) -> Tensor:
        if not self.checkpointed:
            return self._run(x)
        return torch.utils.checkpoint.checkpoint(self._run, x, use_reentrant=False)


def _dense() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 16), nn.LeakyReLU(0.2), nn.LayerNorm(16), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3)
    )


def _encoder(*, checkpointed: bool = False) -> nn.Module:
    blocks = [Block(8, checkpointed=checkpointed) for _ in range(2)]
    return nn.Sequential(nn.Linear(6, 8), *blocks, nn.RMSNorm(8), nn.Linear(8, 3))


def _images() -> nn.Module:
    convolutions = [nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU6(), nn.MaxPool2d(2)]
    deeper = [nn.Conv2d(4, 6, 3, groups=2, padding=1), nn.Tanh(), nn.ConvTranspose2d(6, 4, 2), nn.AdaptiveAvgPool2d(2)]
    return nn.Sequential(*convolutions, *deeper, nn.Flatten(), nn.Linear(16, 3)).eval()


class Recurrent(nn.Module):
    """A map that is used at each step, and a table that is used in a loss too."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = nn.Linear(6 + 4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(len(x), 4)
        for _ in range(3):
            state = torch.relu_(self.cell(torch.cat([x, state], 1)))
        return self.out(state) + self.cell.weight.square().sum()


FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
DENSE = _randn(7, 6), _randn(7, 3, seed=1)
TOKENS = _randn(3, 4, 6), _randn(3, 4, 3, seed=1)
PICTURES = _randn(3, 2, 6, 6), _randn(3, 3, seed=1)
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[..., Tensor], tuple[Tensor, Tensor]]] = {
    "dense": (_dense, penalty, DENSE),
    "encoder": (_encoder, penalty, TOKENS),
    "checkpointed": (lambda: _encoder(checkpointed=True), penalty, TOKENS),
    "images": (_images, penalty, PICTURES),
    "recurrent": (Recurrent, penalty, DENSE),
    "forces": (lambda: Forces(_dense()), forces, DENSE),
    "forces of an encoder": (lambda: Forces(_encoder()), forces, TOKENS),
}
WAYS: dict[str, Callable[[nn.Module, Any, Any], tithe.Plan]] = {
    "FISH": lambda model, loss, data: tithe.attach(model, tithe.FISH(density=0.2, score="random")),
    "FISH, lean": lambda model, loss, data: (tithe.lean(model), WAYS["FISH"](model, loss, data))[1],
    "FISH by score": lambda model, loss, data: tithe.attach(model, tithe.FISH(density=0.2), loss=loss, data=[data]),
    "TraDy": lambda model, loss, data: tithe.attach(
        model, tithe.TraDy(tithe.Budget(fraction=0.4)), loss=loss, data=[data]
    ),
    "TraDy, not lean": lambda model, loss, data: tithe.attach(
        model, tithe.TraDy(tithe.Budget(fraction=0.4), lean=False), loss=loss, data=[data]
    ),
    "bottom alone": lambda model, loss, data: (
        tithe.lean(model),
        tithe.attach(model, Given({next(n for n, p in model.named_parameters() if p.dim() > 1): torch.arange(5)})),
    )[1],
}


def _model(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name][0]().to(D)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_a_penalty_on_a_gradient_trains_as_stock_does(name: str, way: str) -> None:
    """Every θ has Sᵀ of stock's gradient, whose loss holds a derivative."""
    _, loss, data = MODELS[name]
    stock, model = _model(name), _model(name)
    with sdpa_kernel(SDPBackend.MATH):
        torch.manual_seed(1)
        expected = loss(stock, data)
        expected.backward()
    with sdpa_kernel(SDPBackend.MATH if way in ("FISH", "FISH by score", "TraDy, not lean") else FUSED):
        plan = WAYS[way](model, loss, data)
        torch.manual_seed(1)
        found = loss(model, data)
        found.backward()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    dense = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in stock.named_parameters()}
    scale = max(float(grad.abs().max()) for grad in dense.values())
    checked = 0
    for key, theta in thetas(plan).items():
        if theta.numel():
            want = plan.selections[key].gather(dense[key])
            got = torch.zeros_like(want) if theta.grad is None else theta.grad
            torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10 * scale)
            checked += 1
    assert checked


ACTIVATIONS = {
    "relu": nn.ReLU(),
    "relu6": nn.ReLU6(),
    "leaky": nn.LeakyReLU(0.2),
    "hardsigmoid": nn.Hardsigmoid(),
    "tanh": nn.Tanh(),
    "softplus": nn.Softplus(),
    "dropout": nn.Dropout(0.5),
    "norm": nn.LayerNorm(16),
}


@pytest.mark.parametrize("trained", ["0.weight", "2.weight", "2.bias"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_gradient_by_the_input_asks_for_one_as_stock_does(name: str, trained: str) -> None:
    """Also below a frozen top, and above a frozen bottom."""

    def asks(model: nn.Module) -> tuple[bool, Tensor]:
        x = DENSE[0].clone().requires_grad_()
        torch.manual_seed(2)
        (grad,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        return grad.requires_grad, grad.detach()

    torch.manual_seed(0)
    stock = nn.Sequential(nn.Linear(6, 16), ACTIVATIONS[name], nn.Linear(16, 3)).to(D)
    model = copy.deepcopy(stock)
    for key, parameter in stock.named_parameters():
        parameter.requires_grad_(key == trained)
    plan = tithe.attach(model, Given({trained: torch.arange(0, model.get_parameter(trained).numel(), 2)}, lean=True))
    (found, value), (expected, want) = asks(model), asks(stock)
    assert found or not expected
    torch.testing.assert_close(value, want)
    plan.release()


@pytest.mark.parametrize("way", ["FISH", "FISH, lean", "TraDy"])
@pytest.mark.parametrize("name", ["hessian", "hvp", "vhp", "jacobian", "jvp"])
def test_the_tools_of_torch_give_what_they_give_of_stock(name: str, way: str) -> None:
    x, vector = DENSE[0][:3], DENSE[0][3:6]
    tools = torch.autograd.functional

    def run(model: nn.Module) -> Any:
        def value(z: Tensor) -> Tensor:
            return model(z).square().sum()

        if name in ("hvp", "vhp"):
            return getattr(tools, name)(value, x, vector)
        if name == "jvp":
            return tools.jvp(model, x, vector)
        return tools.hessian(value, x) if name == "hessian" else tools.jacobian(model, x, create_graph=True)

    stock, model = _model("dense"), _model("dense")
    WAYS[way](model, lambda model, batch: F.mse_loss(model(batch[0]), batch[1]), DENSE)
    torch.testing.assert_close(run(model), run(stock), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("reselects", [False, True])
def test_a_product_of_the_hessian_and_a_vector_of_theta(reselects: bool) -> None:
    """∇θ (∇θ L · v) = Sᵀ H S v."""

    def loss(model: nn.Module) -> Tensor:
        return F.mse_loss(model(DENSE[0]), DENSE[1]) + model(DENSE[0]).pow(3).mean()

    stock, model = _model("dense"), _model("dense")
    every = tithe.every(5) if reselects else None
    plan = tithe.attach(model, tithe.FISH(density=0.3, score="random", reselect=every))
    asked = list(plan.parameters())
    grads = torch.autograd.grad(loss(model), asked, create_graph=True)
    products = torch.autograd.grad(sum((g * g.detach()).sum() for g in grads), asked)
    found = torch.cat([product.reshape(-1) for product in products])
    named = dict(stock.named_parameters())
    dense = dict(zip(named, torch.autograd.grad(loss(stock), list(named.values()), create_graph=True), strict=True))
    total = torch.zeros((), dtype=D)
    for key in plan.selections:
        mask = torch.zeros_like(named[key]).reshape(-1)
        mask[plan.selected(key)] = 1
        total = total + (dense[key] * dense[key].detach() * mask.view_as(named[key])).sum()
    exact = dict(zip(named, torch.autograd.grad(total, list(named.values()), allow_unused=True), strict=True))
    want = torch.cat([plan.selections[key].gather(exact[key]) for key in plan.selections])
    torch.testing.assert_close(found[: want.numel()], want, rtol=1e-9, atol=1e-12)


def _gelu() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 3)).to(D)


def test_codes_refuse_a_penalty_at_the_first_backward_and_each_remedy_helps() -> None:
    stock = _gelu()
    penalty(stock, DENSE).backward()
    method = tithe.TraDy(tithe.Budget(fraction=0.4))
    model = _gelu()
    plan = tithe.attach(model, method, loss=lambda model, batch: F.mse_loss(model(batch[0]), batch[1]), data=[DENSE])
    with pytest.raises(TitheError, match=r"gelu in a lean model.*lean=False") as error:
        penalty(model, DENSE).backward()
    for said in ("tithe.lean(model, exact=True) without bits", "lean=False", "release()"):
        assert said in error.value.remedy

    def check(model: nn.Module, plan: tithe.Plan) -> None:
        plan.backward(lambda: penalty(model, DENSE))
        for key, theta in thetas(plan).items():
            if theta.numel():
                want = plan.selections[key].gather(stock.get_parameter(key).grad)
                torch.testing.assert_close(theta.grad, want, rtol=1e-9, atol=1e-11)

    tithe.Lean.of(model).release()  # pyright: ignore[reportOptionalMemberAccess]
    for theta in plan.parameters():
        theta.grad = None
    check(model, plan)
    plain = _gelu()
    with pytest.raises(TitheError, match="gelu in a lean model"):  # no later than where the loss is known
        tithe.attach(plain, method, loss=penalty, data=[DENSE])
    plan = tithe.attach(plain, tithe.TraDy(tithe.Budget(fraction=0.4), lean=False), loss=penalty, data=[DENSE])
    check(plain, plan)
    exact = _gelu()
    tithe.lean(exact, exact=True)
    check(exact, tithe.attach(exact, method, loss=penalty, data=[DENSE]))


def test_a_first_derivative_that_is_recorded_trains_as_ever() -> None:
    """`create_graph=True` alone is no second derivative: codes give the same gradients with it."""
    grads: list[list[Tensor]] = []
    for recorded in (False, True):
        model = _gelu()
        tithe.lean(model, bits=8)
        loss = F.mse_loss(model(DENSE[0]), DENSE[1])
        grads.append([t.detach() for t in torch.autograd.grad(loss, list(model.parameters()), create_graph=recorded)])
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-14)


def test_what_does_not_pass_codes_is_not_refused() -> None:
    """The second derivative of the last layer's weight does not meet the activation below."""
    model, stock = _gelu(), _gelu()
    tithe.lean(model)
    found: list[Tensor] = []
    for one in (model, stock):
        weight = one[3].weight
        (grad,) = torch.autograd.grad(one(DENSE[0]).pow(3).sum(), weight, create_graph=True)
        found += torch.autograd.grad(grad.square().sum(), weight)
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-11)


def test_autocast() -> None:
    """Second derivatives in the precision in which stock takes them."""
    found: list[Tensor] = []
    for lean in (False, True):
        model, x = _model("dense").float(), DENSE[0].float().requires_grad_()
        if lean:
            tithe.attach(model, Given({"0.weight": torch.arange(96), "3.weight": torch.arange(128)}, lean=True))
        with torch.autocast("cpu", torch.bfloat16):
            out = model(x)
        (grad,) = torch.autograd.grad(out.float().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(grad.square().sum(), x)
        found.append(second)
    torch.testing.assert_close(found[0], found[1], rtol=0.1, atol=0.03 * float(found[0].abs().max()))


def test_a_span_takes_penalties_and_refuses_a_second_derivative_of_theta(tmp_path: Any) -> None:
    model, stock = _model("dense"), _model("dense")
    history = tithe.History(tmp_path / "run")
    for step in range(3):
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in moved.parameters():
                parameter.add_(0.1 * _randn(*parameter.shape, seed=step))
        history.record(moved, step)
    plan = tithe.attach(model, tithe.TWA(history), loss=penalty)
    stock.load_state_dict(model.state_dict())
    penalty(stock, DENSE).backward()
    plan.backward(lambda: penalty(model, DENSE))
    want = sum(plan.selections[key].gather(p.grad) for key, p in stock.named_parameters() if p.grad is not None)
    (theta,) = plan.parameters()
    torch.testing.assert_close(theta.grad, want, rtol=1e-9, atol=1e-11)
    (grad,) = torch.autograd.grad(model(DENSE[0]).square().sum(), theta, create_graph=True)
    with pytest.raises(TitheError, match=r"second derivative.*plan\.release\(\)"):
        grad.square().sum().backward()
    plan.release()
    weights = list(model.parameters())
    grads = torch.autograd.grad(model(DENSE[0]).square().sum(), weights, create_graph=True)
    sum((g.square().sum() for g in grads), start=torch.zeros((), dtype=D)).backward()
    assert all(weight.grad is not None for weight in weights)


def test_a_narrow_network_takes_a_penalty_in_the_closure() -> None:
    """Its gradient is that of the dense network whose absent units are zero; `attach` says where it belongs."""
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 8), nn.Softplus(), nn.Linear(8, 3)).to(D)

    def plain(model: nn.Module, batch: Any) -> Tensor:
        return F.mse_loss(model(batch[0]), batch[1])

    with pytest.raises(TitheError, match=r"loss: found a gradient taken within the loss.*plan\.backward a closure"):
        tithe.attach(model, tithe.VRPGE(keep=0.5), loss=penalty, data=[DENSE])
    unattached = copy.deepcopy(model)
    plan = tithe.attach(model, tithe.VRPGE(keep=0.5), loss=plain, data=[DENSE])
    mask = drawn(plan)[0]
    live, masked = live_entries(plan, mask), zeroed(unattached, plan.stage.coupling, mask)
    expected = penalty(masked, DENSE)
    expected.backward()
    found = plan.backward(lambda: penalty(model, DENSE))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    grads = {name: parameter.grad for name, parameter in masked.named_parameters()}
    for name, theta in plan.named_parameters():
        grad, want = theta.grad, grads[name]
        if grad is not None and want is not None:
            want = want[live[name]].view(grad.shape) if name in live else want
            torch.testing.assert_close(grad, want, rtol=1e-9, atol=1e-11)


def sharp(model: nn.Module, batch: Any) -> Tensor:
    """A loss at inputs that were moved along its own gradient, as in adversarial training."""
    x, y = batch
    x = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(F.mse_loss(model(x), y) * len(x), x)
    return F.mse_loss(model(x.detach() + 0.3 * grad.sign()), y)


def squares(model: nn.Module, batch: Any) -> Tensor:
    """The same penalty as above, for a mean over samples whatever the model."""
    x, y = batch
    x = x.clone().requires_grad_()
    out = model(x)
    (grad,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    return F.mse_loss(out, y) + grad.square().mean()


@pytest.mark.parametrize("score", ["fisher", "gradient"])
@pytest.mark.parametrize("loss", [sharp, squares])
def test_scores_of_a_loss_that_differentiates_are_those_of_the_loss(loss: Callable[..., Tensor], score: str) -> None:
    """What is differentiated inside of the loss is no gradient of it; a penalty's own gradient is."""
    totals: dict[str, Tensor] = {}
    model = _model("dense")
    for n in range(len(DENSE[0])):
        model.zero_grad()
        loss(model, (DENSE[0][n : n + 1], DENSE[1][n : n + 1])).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            grad = parameter.grad.square() if score == "fisher" else parameter.grad
            totals[name] = totals.get(name, torch.zeros_like(grad)) + grad
    scores = {name: total.abs() for name, total in totals.items()}
    plan = tithe.attach(_model("dense"), tithe.FISH(k=40, samples=7, score=score), loss=loss, data=[DENSE])
    expected = {name: chosen for name, chosen in largest(scores, 40).items() if chosen}
    assert {name: s.indices.tolist() for name, s in plan.selections.items() if s.size} == expected


class Steered(nn.Module):
    """Attention that is added to its own gradient, which no graph is recorded for."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(8), nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.inner(self.norm(x)).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v)
        (grad,) = torch.autograd.grad(y.square().sum(), x, retain_graph=True)
        return y.sum() + grad.sum()


@pytest.mark.parametrize("exact", [False, True])
def test_a_model_may_differentiate_within_its_forward_pass(exact: bool) -> None:
    """Where lean operations are caught, and their backward is not."""
    stock = Steered().to(D)
    model = copy.deepcopy(stock)
    tithe.lean(model, exact=exact)
    x = _randn(2, 5, 8)
    for one in (stock, model):
        one(x).backward()
    for one, two in zip(model.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-9, atol=1e-11)


def test_statistics_are_taken_with_a_loss_that_holds_a_derivative(tmp_path: Any) -> None:
    """A pass without gradients cannot run it: a span's statistics are those of the same passes with them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).to(D)
    history = tithe.History(tmp_path / "run")
    for step in range(2):
        model[0].weight.data.add_(0.1 * step)
        history.record(model, step)
    plan = tithe.attach(model, tithe.TWA(history), loss=penalty)
    data = [DENSE, (DENSE[0] * 2, DENSE[1])]
    assert plan.refresh_statistics(data) == 2
    with torch.no_grad():
        inner = [model[0](x) for x, _ in data]
    want = torch.stack([y.mean(0) for y in inner]).mean(0), torch.stack([y.var(0) for y in inner]).mean(0)
    torch.testing.assert_close((model[1].running_mean, model[1].running_var), want)
