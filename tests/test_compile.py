"""`torch.compile` captures an attached model in one graph and gives the gradients of eager, also after a reselect."""

from __future__ import annotations

import pytest
import torch

import tithe
from models import CASES, Case
from oracles import gradients, thetas

# torch 2.13's own capture of any autograd.Function raises it
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]
QUICK = ["mlp", "tied_mlp", "depthwise", "functional", "bert"]
SLOW = ["signal", "encoder", "vit", "gpt2", "llama"]
CAPTURED = [
    *(pytest.param(CASES[name], id=name) for name in QUICK),
    *(pytest.param(CASES[name], id=name, marks=pytest.mark.slow) for name in SLOW),
]


@pytest.mark.parametrize("again", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", CAPTURED)
def test_compiled_training_equals_eager(case: Case, backend: str, again: bool) -> None:
    torch._dynamo.reset()
    model, batch = case.model(dtype=torch.float64).eval(), case.batch(dtype=torch.float64)
    expected = gradients(model, case.loss, batch)
    method = tithe.FISH(density=0.2, score="random", reselect=tithe.every(1000) if again else None)
    plan = tithe.attach(model, method)
    compiled = torch.compile(model, backend=backend)
    tolerance = {"rtol": 1e-4, "atol": 1e-6} if "single" in case.tags else {"rtol": 1e-8, "atol": 1e-10}
    for _ in range(2):
        plan.backward(lambda: case.loss(compiled, batch))
        for name, theta in thetas(plan).items():
            assert theta.grad is not None
            torch.testing.assert_close(theta.grad, expected[name].flatten()[plan.selected(name)], **tolerance)
        model.zero_grad()
        plan.reselect()


def test_capture_has_no_graph_break() -> None:
    torch._dynamo.reset()
    case = CASES["mlp"]
    model = case.model()
    plan = tithe.attach(model, tithe.FISH(density=0.2, score="random"))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(case.batch()["x"]).sum().backward()
    assert all(theta.grad is not None for theta in plan.parameters())
