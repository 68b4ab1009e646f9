"""A lean model: the same outputs and gradients, fewer bytes, no trace after release."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tithe
from models import CASES, ZOO, Case

each_case = pytest.mark.parametrize("case", ZOO, ids=lambda case: case.name)


@contextmanager
def quiet() -> Iterator[None]:
    """Accept that frozen norms are held."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", tithe.TitheWarning)
        yield


def step(case: Case, model: nn.Module, num_samples: int = 4) -> tuple[Tensor, list[Tensor | None]]:
    """Loss and gradients of one step, with the random numbers of a fixed seed."""
    model.zero_grad()
    torch.manual_seed(1)
    loss = case.loss(model, case.batch(num_samples))
    loss.backward()
    return loss.detach(), [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def same(left: list[Tensor | None], right: list[Tensor | None]) -> bool:
    return all(a is b if a is None or b is None else torch.equal(a, b) for a, b in zip(left, right, strict=True))


def close(left: list[Tensor | None], right: list[Tensor | None], part: float) -> bool:
    """Whether all differences together are no more than `part` of all gradients together."""
    pairs = [(a, b) for a, b in zip(left, right, strict=True) if a is not None and b is not None]
    wrong = sum((a - b).double().square().sum() for a, b in pairs)
    return bool(wrong <= part**2 * sum(a.double().square().sum() for a, _ in pairs))


# --- the limits


@each_case
def test_everything_trained_is_ordinary_training(case: Case) -> None:
    plain, model = case.model(), case.model()
    tithe.lean(model, exact=True)
    for _ in range(2):  # running statistics go on alike
        loss, grads = step(case, plain)
        lean_loss, lean_grads = step(case, model)
        assert torch.equal(loss, lean_loss)
        assert same(grads, lean_grads)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in plain.state_dict().items())


@each_case
def test_coded_gradients_are_near(case: Case) -> None:
    plain, model = case.model(), case.model()
    tithe.lean(model)
    loss, grads = step(case, plain)
    lean_loss, lean_grads = step(case, model)
    assert torch.equal(loss, lean_loss)
    assert close(grads, lean_grads, 0.02)


@each_case
def test_release_leaves_no_trace(case: Case) -> None:
    model = case.model()
    before = [dict(vars(module)) for module in model.modules()]
    hooks = [
        {k: dict(v) for k, v in vars(m).items() if k.endswith(("hooks", "called", "kwargs"))} for m in model.modules()
    ]
    keys = list(model.state_dict())
    handle = tithe.lean(model)
    step(case, model)
    assert list(model.state_dict()) == keys
    handle.release()
    handle.release()
    for module, names, held in zip(model.modules(), before, hooks, strict=True):
        assert list(vars(module)) == list(names)
        assert all(dict(vars(module)[key]) == value for key, value in held.items())
        assert module.training
    assert tithe.Lean.of(model) is None
    assert not torch.overrides._get_current_function_mode_stack()
    plain = case.model()
    step(case, plain)  # buffers as far on as the model's
    assert same(step(case, plain)[1], step(case, model)[1])


def convolutional() -> nn.Module:
    """A block as in MobileNetV2, with biases on some kernels."""
    return nn.Sequential(
        nn.Conv2d(4, 16, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6(),
        nn.Conv2d(16, 16, 3, 2, 1, groups=16), nn.BatchNorm2d(16), nn.ReLU(inplace=True),
        nn.MaxPool2d(2), nn.Conv2d(16, 8, 3, padding="same"), nn.Hardswish(), nn.ConvTranspose2d(8, 6, 2, 2),
        nn.Flatten(), nn.Linear(384, 3),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("last", [False, True], ids=["row-major", "channels-last"])
def test_frozen_layers_are_stock_bit_for_bit(dtype: torch.dtype, last: bool) -> None:
    model = convolutional().to(dtype).eval().requires_grad_(False)
    x = torch.randn(3, 4, 16, 16, dtype=dtype)
    if last:
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    x.requires_grad_()
    (expected,) = torch.autograd.grad(model(x).square().sum(), x)
    tithe.lean(model, exact=True)
    (found,) = torch.autograd.grad(model(x).square().sum(), x)
    assert torch.equal(found, expected)
    assert found.stride() == expected.stride()


def test_a_frozen_block_keeps_its_bits_and_nothing_else() -> None:
    model = convolutional()[:6].eval().requires_grad_(False)
    x = torch.randn(8, 4, 16, 16, requires_grad=True)
    stock = tithe.measure(lambda: model(x).sum().backward()).kept
    handle = tithe.lean(model)
    ledger = tithe.measure(lambda: model(x).sum().backward())
    kept = {
        path: size for path, size in ledger.kept_by_module.items() if not isinstance(model[int(path)], nn.BatchNorm2d)
    }
    assert kept == {"2": 8 * 16 * 256 // 8, "5": 8 * 16 * 64 // 8}
    assert ledger.kept < stock / 30
    handle.release()


def test_a_handle_says_what_the_last_forward_pass_served() -> None:
    """Calls by family of the table; not summed over passes, nor counted again where backward computes again."""
    model = convolutional().eval().requires_grad_(False)
    x = torch.randn(3, 4, 16, 16, requires_grad=True)
    handle = tithe.lean(model)
    assert str(handle) == "lean: 0 calls served in the last forward pass"
    for _ in range(2):
        model(x).sum().backward()
    first, *lines = str(handle).splitlines()
    assert first == "lean: 10 calls served in the last forward pass"
    counts = {line.split(" × ")[1].split(": keeps ")[0]: int(line.split(" × ")[0]) for line in lines}
    rows = {row.family: row for row in tithe.rules.table().wing("lean")}
    assert set(counts) <= set(rows)
    for line, name in zip(lines, counts, strict=True):
        assert line.endswith(f" × {name}: keeps {rows[name].keeps}; stock keeps {rows[name].stock}")
    assert counts["convolution with a frozen kernel"] == 4
    assert counts["batch norm with a frozen scale in evaluation mode"] == counts["two derivatives, in place too"] == 2
    checkpoint(model[0], x, use_reentrant=False).sum().backward()
    assert str(handle).startswith("lean: 11 calls")
    assert str(tithe.Lean.of(pickle.loads(pickle.dumps(model)))).startswith("lean: 0 calls")
    handle.release()
    assert str(handle) == "lean: released"


# --- frozen norms


class Counted(nn.Module):
    """A frozen norm in front of what is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.plain, self.out = nn.BatchNorm1d(4), nn.BatchNorm1d(4, affine=False), nn.Linear(4, 2)
        self.norm.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.plain(self.norm(x)))


def test_frozen_norms_are_held_and_named_once() -> None:
    model, x = Counted().train(), torch.randn(5, 4)
    handle = tithe.lean(model)
    with pytest.warns(tithe.TitheWarning, match=r"^norm, plain: frozen batch norms .* set requires_grad") as said:
        model(x)
    assert len(said) == 1
    model.train()(x)
    assert int(model.norm.num_batches_tracked) == int(model.plain.num_batches_tracked) == 0
    assert all(module.training for module in model.modules())
    expected = copy.deepcopy(model).eval()
    assert torch.equal(model(x), expected(x))
    handle.release()
    model(x)
    assert int(model.norm.num_batches_tracked) == 1


def test_norms_in_evaluation_mode_are_held_in_silence() -> None:
    model = Counted().eval()
    tithe.lean(model)
    model(torch.randn(5, 4))


def test_a_trained_norm_keeps_its_batch_statistics() -> None:
    model = Counted().train()
    model.norm.bias.requires_grad_(True)
    tithe.lean(model)
    with quiet():
        model(torch.randn(5, 4))
    assert int(model.norm.num_batches_tracked) == 1


def test_norms_without_parameters_follow_the_model() -> None:
    model = Counted().train().requires_grad_(True)
    tithe.lean(model)
    model(torch.randn(5, 4))
    assert int(model.plain.num_batches_tracked) == 1


# --- what people do with models


def test_arguments_are_checked() -> None:
    model = nn.ReLU()
    with pytest.raises(tithe.TitheError, match="bits=4"):
        tithe.lean(model, bits=4)
    tithe.lean(model)
    with pytest.raises(tithe.TitheError, match=r"lean already.*release"):
        tithe.lean(nn.Sequential(model))


@pytest.mark.parametrize("name", ["mlp", "depthwise", "llama"])
def test_copies_are_lean_by_themselves(name: str) -> None:
    case = CASES[name]
    model = case.model()
    tithe.lean(model)
    expected = step(case, model)[1]
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same(step(case, twin)[1], expected) or name == "depthwise"  # its running statistics have moved
        handle = tithe.Lean.of(twin)
        assert handle is not None
        handle.release()
        assert tithe.Lean.of(twin) is None
    assert tithe.Lean.of(model) is not None
    for module in model.modules():
        assert any(hook.__class__.__name__ == "_Watch" for hook in module._forward_pre_hooks.values())


def test_a_failure_and_an_interrupt_end_catching() -> None:
    class Fails(nn.Module):
        error: type[BaseException] | None = None

        def forward(self, x: Tensor) -> Tensor:
            if self.error is not None:
                raise self.error("here")
            return F.relu(x)

    model, x = nn.Sequential(nn.ReLU(), Fails()), torch.randn(3, requires_grad=True)
    handle = tithe.lean(model)
    Fails.error = ValueError
    with pytest.raises(ValueError, match="here"):
        model(x)
    assert not torch.overrides._get_current_function_mode_stack()
    Fails.error = KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        model(x)
    Fails.error = None
    assert model(x).grad_fn.name() == "GatedBackward"
    assert not torch.overrides._get_current_function_mode_stack()
    handle.release()
    assert model(x).grad_fn.name() == "ReluBackward0"


class Blocks(nn.Module):
    """Checkpointed blocks: a module, or a function that calls operations outside of any."""

    def __init__(self, reentrant: bool, function: bool) -> None:
        super().__init__()
        self.one, self.two, self.reentrant, self.function = nn.Linear(4, 8), nn.Linear(8, 4), reentrant, function

    def block(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.two(F.dropout(F.relu(self.one(torch.clamp(x, -1.0, 1.0))), 0.3)))

    def forward(self, x: Tensor) -> Tensor:
        layers = self.block if self.function else nn.Sequential(self.one, nn.ReLU6(), nn.Dropout(0.3), self.two)
        return F.relu(checkpoint(layers, x, use_reentrant=self.reentrant))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("function", [False, True])
def test_checkpointing(reentrant: bool, function: bool) -> None:
    model, x = Blocks(reentrant, function), torch.randn(5, 4, requires_grad=True)

    def gradients() -> list[Tensor | None]:
        model.zero_grad()
        x.grad = None
        torch.manual_seed(3)
        model(x).square().sum().backward()
        return [x.grad, *(p.grad.clone() for p in model.parameters())]

    expected = gradients()
    handle = tithe.lean(model)
    assert same(gradients(), expected)
    handle.release()
    assert same(gradients(), expected)


# torch 2.13's own capture of any autograd.Function raises it
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("name", ["mlp", *(pytest.param(n, marks=pytest.mark.slow) for n in ("depthwise", "signal"))])
def test_compiled(name: str) -> None:
    torch._dynamo.reset()
    case = CASES[name]
    model, plain = case.model(), case.model()
    tithe.lean(model)
    compiled = torch.compile(model, backend="aot_eager")
    grads = step(case, plain)[1]
    case.loss(compiled, case.batch(4)).backward()
    assert close(grads, [p.grad for p in model.parameters()], 0.01)


@pytest.mark.parametrize("kind", [torch.bfloat16])
@pytest.mark.parametrize("name", ["mlp", "depthwise", "volume", "vit"])
def test_autocast(name: str, kind: torch.dtype) -> None:
    case = CASES[name]
    plain, model = case.model(), case.model()
    tithe.lean(model, exact=True)
    with torch.autocast("cpu", kind):
        loss, grads = step(case, plain)
        lean_loss, lean_grads = step(case, model)
    assert torch.equal(loss, lean_loss)
    assert close(grads, lean_grads, 1e-2)


def test_function_transforms_see_the_stock_operations() -> None:
    model, x = nn.Sequential(nn.Linear(3, 3), nn.ReLU()), torch.randn(4, 3)
    tithe.lean(model)
    grads = torch.func.vmap(torch.func.grad(lambda row: model(row).sum()))(x)
    x.requires_grad_()
    model(x).sum().backward()
    torch.testing.assert_close(grads, x.grad)  # row by row, and all rows in one product: other kernels
