"""`torch.func`, forward-mode differentiation and batched gradients: as without a plan, or refused with the remedy."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, stack_module_state, vjp, vmap

import tithe
from tithe import TitheError

pytestmark = [  # torch's own, of its forward mode
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is"),
    pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node"),
]
X = torch.randn(12, 6, generator=torch.Generator().manual_seed(1))
V = torch.randn(12, 6, generator=torch.Generator().manual_seed(2))
Y = torch.randint(3, (12,), generator=torch.Generator().manual_seed(3))


def _network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 16), nn.LeakyReLU(0.2), nn.LayerNorm(16), nn.Linear(16, 8), nn.Hardswish(), nn.Linear(8, 3)]
    return nn.Sequential(*layers)


def _loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def _history(model: nn.Module, folder: Path) -> tithe.History:
    history = tithe.History(folder / "history")
    for step in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
        history.record(model, step)
    return history


ATTACH: dict[str, Callable[[nn.Module, Path], tithe.Plan | None]] = {
    "single weights": lambda m, _: tithe.attach(m, tithe.FISH(k=40, score="magnitude"), head="5.*"),
    "all weights": lambda m, _: tithe.attach(m, tithe.FISH(density=1.0, score="magnitude")),
    "one flat parameter": lambda m, _: tithe.attach(m, tithe.FISH(k=40, score="magnitude", reselect=tithe.every(5))),
    "channels, lean": lambda m, _: tithe.attach(
        m, tithe.TraDy(tithe.Budget(fraction=0.5), samples=12), loss=_loss, data=[(X, Y)]
    ),
    "a span": lambda m, folder: tithe.attach(m, tithe.TWA(_history(m, folder))),
    "lean alone": lambda m, _: tithe.lean(m) and None,
}


def _sum(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: model(x).square().sum()


def _forward_mode(model: nn.Module) -> Any:
    with forward_ad.dual_level():
        return tuple(forward_ad.unpack_dual(model(forward_ad.make_dual(X, V))))


TRANSFORMS: dict[str, Callable[[nn.Module], Any]] = {
    "vmap": lambda m: vmap(m)(X),
    "grad": lambda m: grad(_sum(m))(X),
    "grad of grad": lambda m: grad(lambda x: grad(_sum(m))(x).square().sum())(X),
    "vmap of grad": lambda m: vmap(grad(_sum(m)))(X),
    "vjp": lambda m: vjp(m, X)[1](torch.ones(12, 3)),
    "jvp": lambda m: jvp(m, (X,), (V,)),
    "jacrev": lambda m: vmap(jacrev(m))(X),
    "jacfwd": lambda m: vmap(jacfwd(m))(X),
    "hessian": lambda m: hessian(_sum(m))(X[0]),
    "linearize": lambda m: linearize(m, X)[1](V),
    "forward mode": _forward_mode,
}


def _leaves(tree: Any) -> list[Tensor]:
    return [tree] if isinstance(tree, Tensor) else [leaf for part in tree for leaf in _leaves(part)]


def _plain(model: nn.Module) -> nn.Sequential:
    plain = _network()
    plain.load_state_dict(model.state_dict())
    return plain


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("method", ATTACH)
def test_a_transform_of_an_attached_model_is_that_of_the_model(method: str, transform: str, tmp_path: Path) -> None:
    model = _network()
    plan = ATTACH[method](model, tmp_path)
    plain, run = _plain(model), TRANSFORMS[transform]
    found, want = run(model), run(plain)
    torch.testing.assert_close(_leaves(found), _leaves(want), rtol=1e-4, atol=1e-5)
    last, expected = _leaves(found)[-1], _leaves(want)[-1]
    if plan is None or transform == "linearize":  # its map has no gradient without a plan either
        return
    last.square().sum().backward()
    expected.square().sum().backward()
    dense = dict(plain.named_parameters())
    if method == "a span":
        spans = plan.selections.items()
        total = sum(s.gather(g) for name, s in spans if (g := dense[name].grad) is not None)
        torch.testing.assert_close(next(iter(plan.parameters())).grad, total, rtol=1e-3, atol=1e-4)
        return
    moved = _stepped(plan, model)
    for name, selection in plan.selections.items():
        of = dense[name].grad
        want_change = 0 * selection.gather(dense[name].detach()) if of is None else -selection.gather(of)
        change = selection.gather(moved[name]) - selection.gather(dense[name].detach())
        torch.testing.assert_close(change, want_change, rtol=1e-3, atol=1e-3 * float(want_change.abs().max() + 1))


def _stepped(plan: tithe.Plan, model: nn.Module) -> dict[str, Tensor]:
    """The weights after one step of plain gradient descent of rate 1."""
    optimizer = torch.optim.SGD(plan.parameters(), lr=1.0)
    plan.bind(optimizer)
    optimizer.step()
    return model.state_dict()


@pytest.mark.parametrize("method", [name for name in ATTACH if name != "a span"])
def test_batches_of_gradients(method: str, tmp_path: Path) -> None:
    model = _network()
    model[4] = nn.Hardtanh()
    plain = copy.deepcopy(model)
    ATTACH[method](model, tmp_path)
    found: list[list[Tensor]] = []
    for network in (model, plain):
        x = X.clone().requires_grad_()
        y = network(x).sum(0)
        (rows,) = torch.autograd.grad(y, x, torch.eye(3), is_grads_batched=True, retain_graph=True)
        mapped = vmap(lambda v, x=x, y=y: torch.autograd.grad(y, x, v, retain_graph=True)[0])(torch.eye(3))
        jacobian = torch.autograd.functional.jacobian(network, X[0], vectorize=True)
        found.append([rows, mapped, jacobian])
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


SPARSE = ["single weights", "all weights", "one flat parameter", "channels, lean"]


def _written(plan: tithe.Plan, plain: nn.Module, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of the plain model where `given` stands in the place of its plan's parameters."""
    weights = {name: p.detach().clone() for name, p in plain.named_parameters()}
    start = 0
    for name, selection in plan.selections.items():
        if f"{name}@theta" in given:
            selection.scatter_(weights[name], given[f"{name}@theta"].detach())
        else:
            part = given["@theta"].detach()[start : start + selection.size]
            selection.scatter_(weights[name], part.view(selection.theta_shape))
            start += selection.size
    weights.update({name: value for name, value in given.items() if "@theta" not in name})
    return weights


@pytest.mark.parametrize("method", SPARSE)
def test_functional_call_takes_other_values_for_what_is_trained(method: str, tmp_path: Path) -> None:
    model = _network()
    plan = ATTACH[method](model, tmp_path)
    assert plan is not None
    plain = _plain(model)
    trained = {name: p.detach() + 0.1 for name, p in model.named_parameters() if p.requires_grad}

    def loss(values: dict[str, Tensor], x: Tensor = X, y: Tensor = Y) -> Tensor:
        return F.cross_entropy(functional_call(model, values, (x,)), y)

    weights = _written(plan, plain, trained)
    with torch.no_grad():
        torch.testing.assert_close(functional_call(model, trained, (X,)), functional_call(plain, weights, (X,)))
    gradients = grad(loss)(trained)
    dense = grad(lambda w: F.cross_entropy(functional_call(plain, w, (X,)), Y))(weights)
    for key, found in gradients.items():
        if key in dense:
            torch.testing.assert_close(found, dense[key])
    flat = [s.gather(dense[name]).reshape(-1) for name, s in plan.selections.items()]
    theta = [value.reshape(-1) for key, value in gradients.items() if "@theta" in key]
    want = torch.cat(flat)
    torch.testing.assert_close(torch.cat(theta)[: want.numel()], want, rtol=1e-4, atol=1e-6)
    each = vmap(grad(lambda v, x, y: loss(v, x[None], y[None])), in_dims=(None, 0, 0))(trained, X, Y)
    torch.testing.assert_close({key: rows.mean(0) for key, rows in each.items()}, gradients, rtol=1e-4, atol=1e-6)
    _, change = jvp(loss, (trained,), ({key: torch.ones_like(value) for key, value in trained.items()},))
    torch.testing.assert_close(change, sum(value.sum() for value in gradients.values()), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("method", SPARSE)
def test_functional_call_takes_other_weights(method: str, tmp_path: Path) -> None:
    model = _network()
    ATTACH[method](model, tmp_path)
    plain = _plain(model)
    other = {name: value + 0.1 for name, value in plain.state_dict().items()}
    torch.testing.assert_close(functional_call(model, other, (X,)), functional_call(plain, other, (X,)))
    everything = grad(lambda values: F.cross_entropy(functional_call(model, values, (X,)), Y))
    gradients = everything({name: p.detach() for name, p in model.named_parameters()})
    assert all(bool(gradient.isfinite().all()) for gradient in gradients.values())


def test_another_weight_and_another_theta_at_once_are_refused_and_either_alone_works() -> None:
    models = [_network() for _ in range(2)]
    plans = [tithe.attach(m, tithe.FISH(k=40, score="random"), seed=seed) for seed, m in enumerate(models)]
    everything = {name: p.detach() + 0.1 * ("@theta" in name) for name, p in models[1].named_parameters()}
    with pytest.raises(TitheError, match="both handed to functional_call") as refused:
        functional_call(models[0], everything, (X,))
    assert "@theta" in refused.value.remedy
    weights = {name: value for name, value in everything.items() if "@theta" not in name}
    torch.testing.assert_close(functional_call(models[0], weights, (X,)), models[1](X))
    outputs = torch.stack([model(X) for model in models])
    for plan in plans:
        plan.release()
    parameters, buffers = stack_module_state(models)
    torch.testing.assert_close(vmap(lambda p: functional_call(models[0], (p, buffers), (X,)))(parameters), outputs)


def test_a_stack_of_weights_of_models_with_one_choice_is_taken_without_their_thetas() -> None:
    models = [_network() for _ in range(3)]
    for model in models:
        with torch.no_grad():
            model[0].weight.add_(torch.randn(16, 6))
        tithe.attach(model, tithe.FISH(k=40, score="random"))
    parameters, buffers = stack_module_state(models)
    weights = {name: value for name, value in parameters.items() if "@theta" not in name}
    found = vmap(lambda p: functional_call(models[0], (p, buffers), (X,)))(weights)
    torch.testing.assert_close(found, torch.stack([model(X) for model in models]))


def test_the_coefficients_of_a_span_are_not_swapped(tmp_path: Path) -> None:
    model = _network()
    plan = tithe.attach(model, tithe.TWA(_history(model, tmp_path)))
    with pytest.raises(TitheError, match="coefficients that all weights share") as refused:
        functional_call(model, {"@theta": next(iter(plan.parameters())) + 1}, (X,))
    assert "leave '@theta' out" in refused.value.remedy
    weights = {name: p.detach() for name, p in model.named_parameters() if "@theta" not in name}
    torch.testing.assert_close(functional_call(model, weights, (X,)), model(X))


def test_transforms_inside_of_a_loss_that_is_scored() -> None:
    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return grad(_sum(model))(batch[0]).square().mean() + F.cross_entropy(vmap(model)(batch[0]), batch[1])

    model, plain = _network(), _network()
    plan = tithe.attach(model, tithe.FISH(k=20, samples=12), loss=loss, data=[(X, Y)])
    totals = {name: torch.zeros_like(p) for name, p in plain.named_parameters()}
    for row in range(12):
        plain.zero_grad()
        loss(plain, (X[row : row + 1], Y[row : row + 1])).backward()
        for name, parameter in plain.named_parameters():
            if parameter.grad is not None:
                totals[name] += parameter.grad.square()
    ranked = sorted((-v, n, i) for n, t in totals.items() for i, v in enumerate(t.flatten().tolist()))[:20]
    chosen = {(name, int(i)) for name in plan.selections for i in plan.selected(name)}
    assert chosen == {(name, index) for _, name, index in ranked}
    with pytest.raises(TitheError, match=r"torch\.func") as refused:
        tithe.measure(lambda: loss(model, (X, Y)).backward())
    assert "torch.autograd.grad" in refused.value.remedy


def test_what_is_drawn_runs_under_transforms_between_forward_and_backward() -> None:
    model = _network()
    plan = tithe.attach(model, tithe.VRPGE(keep=0.5), loss=_loss, data=[(X, Y)])
    optimizer = torch.optim.SGD(plan.parameters(), lr=0.1)
    plan.bind(optimizer)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    loss = plan.backward(lambda: F.cross_entropy(vmap(model)(X), Y) + vmap(grad(_sum(model)))(X).square().mean())
    optimizer.step()
    plan.step()
    assert loss.isfinite()
    assert any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        torch.testing.assert_close(vmap(model)(X), model(X))
