"""Gate gradients: what a weight step's own gradients say about each unit, against autograd with a gate in the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from models import Batch, Case
from narrow_networks import Residual
from narrow_plans import every
from slicing import draw, zeroed
from tithe.coupling import Coupling, couple
from tithe.narrow import Stage, gate_gradients
from tithe.selection import Grid


def coupled(model: nn.Module, case: Case) -> Coupling:
    batch = case.batch(2, dtype=torch.float64)
    names = [name for name, _ in model.named_parameters()]
    return couple(model, lambda: case.loss(model, batch), names, samples=2)


def gated(model: nn.Module, coupling: Coupling, m: Tensor) -> dict[str, Tensor]:
    """The parameters, with the columns of every reader multiplied by the gates of their units."""
    found: dict[str, Tensor] = {}
    factors = torch.cat([m, m.new_ones(1)])
    for name, parameter in model.named_parameters(remove_duplicate=False):
        value: Tensor = parameter
        for axis, at in coupling.places.get(name, {}).items():
            if (name, axis) in coupling.reads:
                shape = [-1 if dim == axis else 1 for dim in range(value.dim())]
                value = value * factors[coupling.axes[at]].view(shape)
        found[name] = value
    return found


class Loss(nn.Module):
    """A case's loss as a forward pass."""

    def __init__(self, model: nn.Module, case: Case) -> None:
        super().__init__()
        self.model, self.case = model, case

    def forward(self, batch: Batch) -> Tensor:
        return self.case.loss(self.model, batch)


def loss_with(model: nn.Module, case: Case, parameters: Mapping[str, Tensor], batch: Batch) -> Tensor:
    named = {f"model.{name}": value for name, value in parameters.items()}
    return functional_call(Loss(model, case), named, (batch,), tie_weights=False)


@pytest.mark.parametrize("case", every())
def test_a_closed_gate_is_an_absent_unit(case: Case) -> None:
    """The gates of all readers at 0 or 1 give the network of a mask, for every way in which channels are joined."""
    model = case.model(dtype=torch.float64)
    coupling, batch = coupled(model, case), case.batch(3, seed=5, dtype=torch.float64)
    read = {group.name for group in coupling.groups if any(place in coupling.reads for place in group.members)}
    assert read == {group.name for group in coupling.groups}
    for seed in range(2):
        mask = draw(coupling, seed)
        with torch.no_grad():
            loss = loss_with(model, case, gated(model, coupling, mask.double()), batch)
            expected = case.loss(zeroed(model, coupling, mask), batch)
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", every())
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "drawn"])
def test_the_gradient_is_that_of_the_gates(case: Case, whole: bool) -> None:
    model = case.model(dtype=torch.float64)
    coupling, batch = coupled(model, case), case.batch(3, seed=5, dtype=torch.float64)
    mask = torch.ones(coupling.num_units, dtype=torch.bool) if whole else draw(coupling, 1)
    m = mask.double().requires_grad_()
    (expected,) = torch.autograd.grad(loss_with(model, case, gated(model, coupling, m), batch), m)
    found = of_narrow(model, coupling, case, mask, batch)
    torch.testing.assert_close(found, torch.where(mask, expected, 0.0), rtol=1e-8, atol=1e-10)


def of_narrow(model: nn.Module, coupling: Coupling, case: Case, mask: Tensor, batch: Batch) -> Tensor:
    """From the gradients of the narrow network that runs in the model's own forward."""
    stage = Stage(model, coupling)
    fit, names = stage.fit(mask), {name for name, _ in model.named_parameters()}
    live = {name: tensor.requires_grad_(name in names) for name, tensor in stage.filled(fit).items()}
    with stage.run(fit.read, live):
        case.loss(model, batch).backward()
    weights = fit.strip({name: tensor.detach() for name, tensor in live.items()})
    grads = fit.strip({name: tensor.grad for name, tensor in live.items() if tensor.grad is not None})
    return gate_gradients(coupling, fit.grids, weights, grads)


def test_channels_of_a_residual_stream_are_gated_once_at_each_reader() -> None:
    """An explicit gate on the activations themselves, where each block and the classifier read the stream."""
    torch.manual_seed(3)
    model, x = Residual().double(), torch.randn(4, 3, 8, 8, dtype=torch.float64)
    names = [name for name, _ in model.named_parameters()]
    coupling = couple(model, lambda: model(x).square().mean(), names, samples=4)
    gates = {g.name: torch.ones(g.num_units, dtype=torch.float64, requires_grad=True) for g in coupling.groups}
    for group in coupling.groups:
        for name, axis in group.members:
            if (name, axis) in coupling.reads:
                module = model.get_submodule(name.rpartition(".")[0])
                module.register_forward_pre_hook(_gate(gates[group.name]))
    loss = model(x).square().mean()
    loss.backward()
    weights = {name: p.detach() for name, p in model.named_parameters()}
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    found = gate_gradients(coupling, whole_grids(coupling, weights), weights, grads)
    for group in coupling.groups:
        torch.testing.assert_close(found[group.start : group.stop], gates[group.name].grad)


def whole_grids(coupling: Coupling, weights: Mapping[str, Tensor]) -> dict[str, Grid]:
    """All of every tensor."""
    return {
        name: Grid(tuple(w.shape), {axis: torch.arange(w.shape[axis]) for axis in coupling.places.get(name, {})})
        for name, w in weights.items()
    }


def _gate(gate: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    def multiply(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        shape = [1, -1, *[1] * (args[0].dim() - 2)]
        return (args[0] * gate.view(shape), *args[1:])

    return multiply


class Factors(nn.Module):
    """Queries and keys whose width is summed over by a product of activations: no weight reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(5, 7), nn.Linear(5, 7)
        self.gate: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        q = self.query(x)
        return (q if self.gate is None else q * self.gate) @ self.key(x).transpose(-2, -1)


def test_a_unit_that_no_weight_reads_is_gated_where_it_is_made() -> None:
    model, x = Factors().double(), torch.randn(3, 4, 5, dtype=torch.float64)
    names = [name for name, _ in model.named_parameters()]
    coupling = couple(model, lambda: model(x).sin().mean(), names, samples=3)
    assert not coupling.reads
    model.gate = torch.ones(7, dtype=torch.float64, requires_grad=True)
    model(x).sin().mean().backward()
    weights = {name: p.detach() for name, p in model.named_parameters()}
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    found = gate_gradients(coupling, whole_grids(coupling, weights), weights, grads)
    torch.testing.assert_close(found, model.gate.grad)
