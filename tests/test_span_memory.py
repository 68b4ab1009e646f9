"""What training in a span saves, measured: gradients come and go layer by layer, and n checkpoints are a few blocks."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tithe
from histories import checkpoints, recorded
from models import CASES

WIDTH, DEPTH = 320, 8  # large enough that a weight's gradient is projected at once


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH)))


def _loss(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


def test_no_gradient_of_all_weights_ever_exists(tmp_path: Path) -> None:
    batch = torch.randn(4, WIDTH)
    full = _model()
    ordinary = tithe.measure(lambda: _loss(full, batch).backward(), model=full)
    model = _model()
    plan = tithe.attach(model, tithe.TWA(recorded(tmp_path / "run", checkpoints(model, 3), 8)), loss=_loss)
    plan.backward(lambda: _loss(model, batch))
    spanned = tithe.measure(lambda: plan.backward(lambda: _loss(model, batch)), model=model)
    one = 4 * WIDTH * WIDTH
    assert ordinary.peak >= DEPTH * one
    assert spanned.peak <= 3 * one + 2**20  # a gradient, a copy in blocks, what is decoded at a time
    assert all(p.grad is None for name, p in model.named_parameters() if not name.endswith("@theta"))


@pytest.mark.parametrize("name", ["bert", "resnet_basic", "gpt2", "vit"])
def test_saved_bytes_are_predicted(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    model, batch = case.model(), case.batch()
    plan = tithe.attach(model, tithe.TWA(recorded(tmp_path / "run", checkpoints(model, 3))), loss=case.loss)
    predicted = plan.predict(batch)
    assert all(p.grad is None for p in plan.parameters())
    measured = tithe.measure(lambda: plan.backward(lambda: case.loss(model, batch)), model=model)
    assert predicted.kept == measured.kept
    assert predicted.theta == 3 * 4


CHILD = """
import json, sys
from pathlib import Path
import torch, tithe
from torch import nn

torch.set_num_threads(1)
model = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(8)))
batch = torch.randn(8, 1024)

def resident(name):
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(name))
    return 1024 * int(line.split()[1])

def step(plan):
    plan.backward(lambda: model(batch).square().mean())
    optimizer.step(); optimizer.zero_grad(); plan.step()

model(batch).square().mean().backward()
model.zero_grad()
before = resident("VmRSS")
plan = tithe.attach(model, tithe.TWA(sys.argv[1]))
optimizer = torch.optim.SGD(plan.parameters(), lr=0.1)
plan.bind(optimizer)
for _ in range(3):
    step(plan)
print(json.dumps({"peak": resident("VmHWM") - before, "basis": plan.basis.nbytes}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_basis_is_not_in_memory(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(8)))
    history = tithe.History(tmp_path / "run", bits=8)
    for step in range(40):
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(1.01)
        history.record(model, step)
    # Without a threshold glibc keeps what was freed, more or less of it by the kernels that a processor has.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    command = [sys.executable, "-c", CHILD, str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["basis"] >= 39 * 8 * 1024 * 1024
    assert found["peak"] <= 0.5 * found["basis"]  # blocks of a few MB, whatever the number of weights


# torch 2.13's own capture of any autograd.Function raises these two
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("name", ["mlp", pytest.param("bert", marks=pytest.mark.slow)])
def test_compiled_models_train(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    model, batch = case.model(), case.batch()
    plan = tithe.attach(model, tithe.TWA(recorded(tmp_path / "run", checkpoints(model, 3))))
    theta = next(plan.parameters())
    plan.backward(lambda: case.loss(model, batch))
    assert theta.grad is not None
    expected, theta.grad = theta.grad.clone(), None
    compiled = torch.compile(model, backend="aot_eager")
    plan.backward(lambda: case.loss(compiled, batch))
    assert torch.allclose(theta.grad, expected, rtol=1e-4, atol=1e-6)


def test_a_copy_of_the_model_trains_on(tmp_path: Path) -> None:
    case = CASES["resnet_basic"]
    model = case.model()
    plan = tithe.attach(model, tithe.TWA(recorded(tmp_path / "run", checkpoints(model, 3))))
    batch = case.batch()
    plan.backward(lambda: case.loss(model, batch))
    plan.model.zero_grad()
    twin = copy.deepcopy(model)
    for network in (model, twin):
        case.loss(network, batch).backward()
    one, two = (dict(network.named_parameters())["@theta"].grad for network in (model, twin))
    assert one is not None
    assert two is not None
    assert float(one.norm()) > 0
    assert torch.equal(one, two)
    assert plan.model is model


def test_accumulated_and_scaled_gradients_add_up(tmp_path: Path) -> None:
    case = CASES["bert"]
    model = case.model(dtype=torch.float64)
    plan = tithe.attach(model, tithe.TWA(recorded(tmp_path / "run", checkpoints(model, 4))))
    theta = next(plan.parameters())
    batches = case.batches(2, dtype=torch.float64)
    found: list[Tensor] = []
    for batch in batches:
        plan.backward(lambda batch=batch: case.loss(model, batch))
        assert theta.grad is not None
        found.append(theta.grad.clone())
        theta.grad = None
    for batch in batches:
        plan.backward(lambda batch=batch: 8 * case.loss(model, batch))
    assert theta.grad is not None
    assert torch.allclose(theta.grad, 8 * (found[0] + found[1]), rtol=1e-9)


def test_a_backward_pass_that_failed_leaves_nothing(tmp_path: Path) -> None:
    case = CASES["mlp"]
    model, batch = case.model(), case.batch()
    plan = tithe.attach(model, tithe.TWA(recorded(tmp_path / "run", checkpoints(model, 4))))
    theta = next(plan.parameters())
    plan.backward(lambda: case.loss(model, batch))
    assert theta.grad is not None
    expected, theta.grad = theta.grad.clone(), None

    def stop(grad: Tensor) -> Tensor:
        raise KeyboardInterrupt

    handle = model[0].register_forward_hook(lambda module, args, output: output.register_hook(stop) and None)
    with pytest.raises(KeyboardInterrupt):
        plan.backward(lambda: case.loss(model, batch))
    handle.remove()
    theta.grad = None
    plan.backward(lambda: case.loss(model, batch))
    assert torch.equal(theta.grad, expected)


@pytest.mark.parametrize("name", ["bert", "resnet_basic", "gpt2", "llama"])
def test_in_bfloat16_and_under_autocast(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    model = case.model()
    history = recorded(tmp_path / "run", checkpoints(model, 3))
    batch = case.batch()
    plan = tithe.attach(model, tithe.TWA(history))
    optimizer = torch.optim.SGD(plan.parameters(), lr=0.1)
    plan.bind(optimizer)
    with torch.autocast("cpu", torch.bfloat16):
        loss = case.loss(model, batch)
    loss.backward()
    optimizer.step()
    theta = next(plan.parameters())
    assert theta.grad is not None
    assert bool(theta.grad.isfinite().all())
    assert float(theta.grad.norm()) > 0
    half = case.model().bfloat16()
    plan = tithe.attach(half, tithe.TWA(history))
    assert next(plan.parameters()).dtype == torch.float32
    expected = history.mean()
    for key, weight in half.named_parameters():
        if key in expected:
            assert torch.equal(weight, expected[key].bfloat16()), key
