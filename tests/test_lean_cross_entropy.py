"""Cross-entropy in a lean model: stock's loss and gradients, of every kind that stock takes; less is kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tithe
from tithe.ledger import predict
from tithe.rules import Catch, Leanness
from tithe.rules.lean import cross_entropy as rule

SHAPES = {"rows": (90, 50), "images": (3, 7, 15, 14), "sequences": (4, 60, 20)}
REDUCTIONS = ["mean", "sum", "none"]
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "ignored": {"ignore_index": 3},
    "weighted": {"weighted": True},
    "smooth": {"label_smoothing": 0.3, "ignore_index": 3},
    "all": {"label_smoothing": 0.3, "ignore_index": 3, "weighted": True},
}


def caught(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The lean version's loss, and not stock's."""
    with Catch(Leanness()) as mode:
        loss = F.cross_entropy(x, *args, **kwargs)
    assert mode.served == {F.cross_entropy: 1}
    return loss


def draw(shape: tuple[int, ...], *, probabilities: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    x = (3 * torch.randn(shape, dtype=dtype)).requires_grad_()
    rows = shape[:1] + shape[2:]
    target = torch.randn(shape, dtype=dtype).softmax(1) if probabilities else torch.randint(shape[1], rows)
    return x, target


def arguments(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Any]:
    given = dict(SETTINGS[name])
    if given.pop("weighted", False):
        given["weight"] = torch.rand(shape[1], dtype=dtype)
        given["weight"][0] = 0.0
    return given


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_it_is_stock(shape: tuple[int, ...], probabilities: bool, settings: str, reduction: str) -> None:
    dtype = torch.float64
    x, target = draw(shape, probabilities=probabilities, dtype=dtype)
    given = arguments(settings, shape, dtype)
    if probabilities:
        given.pop("ignore_index", None)
    given["reduction"] = reduction
    stock, lean = F.cross_entropy(x, target, **given), caught(x, target, **given)
    assert lean.shape == stock.shape
    torch.testing.assert_close(lean, stock)
    gy = torch.randn_like(stock)
    torch.testing.assert_close(*(torch.autograd.grad(loss, x, gy)[0] for loss in (lean, stock)))


@pytest.mark.parametrize("size", [1, 60, 1 << 20])
def test_blocks_of_any_size(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rule, "_CACHED", size)
    for shape in ((90, 50), (3, 7, 15, 14)):
        x, target = draw(shape)
        stock, lean = F.cross_entropy(x, target), caught(x, target)
        torch.testing.assert_close(lean, stock)
        torch.testing.assert_close(*(torch.autograd.grad(loss, x)[0] for loss in (lean, stock)))


def test_rows_that_are_all_ignored() -> None:
    """NaN, with gradients of zero, as stock's."""
    x, target = draw((90, 50))
    target[:] = -100
    lean = caught(x, target)
    assert lean.isnan()
    assert not torch.autograd.grad(lean, x)[0].any()
    assert not torch.autograd.grad(F.cross_entropy(x, target), x)[0].any()


def test_logits_that_are_masked_or_far_away() -> None:
    """An offset common to all logits costs no precision, and a class with no chance gets no gradient."""
    x = torch.randn(90, 50) + 1e4
    x[:, 7] = -torch.inf
    x.requires_grad_()
    target = torch.randint(7, (90,))
    lean, stock = caught(x, target), F.cross_entropy(x, target)
    torch.testing.assert_close(lean, stock)
    torch.testing.assert_close(*(torch.autograd.grad(loss, x)[0] for loss in (lean, stock)))


def casts() -> dict[str, Callable[[Tensor], Tensor]]:
    return {
        "float": lambda x: x.float(),
        "view": lambda x: x.view(10, 10, 50).float().view(-1, 50),
        "shift": lambda x: x.view(10, 10, 50).float()[:, :-1].contiguous().view(-1, 50),
        "changed since": lambda x: x.float() * 1.5,
        "halves": lambda x: x,
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cast", casts())
def test_half_precision(cast: str, dtype: torch.dtype) -> None:
    """Logits cast to float32 give the float32 gradient, rounded once; those that were changed after it are kept so."""
    x = torch.randn(100, 50).to(dtype).requires_grad_()
    made = casts()[cast](x)
    target = torch.randint(50, made.shape[:1])
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lean = caught(made, target)
    stock = F.cross_entropy(casts()[cast](x.detach().float().requires_grad_() if cast == "halves" else x), target)
    assert lean.dtype == made.dtype
    assert saved[0].dtype == (torch.float32 if cast == "changed since" else dtype)
    tolerance = {"atol": 2e-2, "rtol": 2e-2} if cast == "halves" else {"atol": 1e-6, "rtol": 1e-5}
    torch.testing.assert_close(lean.float(), stock.float(), **tolerance)
    if cast != "halves":
        found, expected = (torch.autograd.grad(loss, x)[0] for loss in (lean, stock))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-2)


def test_autocast() -> None:
    x = torch.randn(90, 50).bfloat16().requires_grad_()
    target = torch.randint(50, (90,))
    with torch.autocast("cpu", torch.bfloat16):
        lean, stock = caught(x, target), F.cross_entropy(x, target)
    assert lean.dtype == stock.dtype
    torch.testing.assert_close(lean, stock)


def test_derivatives_of_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rule, "_LEAST", 1)
    x, target = draw((5, 4), dtype=torch.float64)
    weight = torch.rand(4, dtype=torch.float64)

    def loss(x: Tensor) -> Tensor:
        return caught(x, target, weight, label_smoothing=0.2, ignore_index=2)

    assert torch.autograd.gradcheck(loss, x)
    assert torch.autograd.gradgradcheck(loss, x)
    x, target = draw((2, 3, 4), probabilities=True, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(lambda x: caught(x, target), x)
    half = torch.randn(5, 4).bfloat16().requires_grad_()
    (slope,) = torch.autograd.grad(caught(half.float(), target := torch.randint(4, (5,))), half, create_graph=True)
    (twice,) = torch.autograd.grad(slope.float().square().sum(), half)
    (one,) = torch.autograd.grad(F.cross_entropy(half.float(), target), half, create_graph=True)
    torch.testing.assert_close(twice, torch.autograd.grad(one.float().square().sum(), half)[0], atol=1e-3, rtol=2e-2)


def test_what_is_left_to_stock() -> None:
    """Few logits, targets that ask for a gradient, errors of the caller."""
    x, target = draw((90, 50))
    with Catch(Leanness()) as mode:
        F.cross_entropy(x[:10], target[:10])
        F.cross_entropy(x.detach(), target)
        F.cross_entropy(x, torch.randn(90, 50).softmax(1).requires_grad_())
        F.cross_entropy(x[0], target[0])
        with pytest.raises(ValueError, match="batch_size"):
            F.cross_entropy(x, target[1:])
        with pytest.raises((IndexError, RuntimeError)):
            F.cross_entropy(x, torch.full((90,), 50))
        with torch.no_grad():
            F.cross_entropy(x, target)
    assert not mode.served


class Tagger(nn.Module):
    """A model that computes its own loss in float32, as language models do."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, 200).bfloat16()
        self.loss = nn.CrossEntropyLoss()

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return self.loss(self.head(x).float(), target)


def test_a_module_keeps_less_and_costs_what_a_prediction_says() -> None:
    model, x = Tagger(), torch.randn(400, 16).bfloat16()
    batch = {"x": x, "target": torch.randint(200, (400,))}
    model(**batch).backward()
    expected = model.head.weight.grad.clone()

    def measured() -> tithe.Ledger:
        model.zero_grad()
        return tithe.measure(lambda: model(**batch).backward(), model=model)

    stock = measured()
    tithe.lean(model)
    found = measured()
    torch.testing.assert_close(model.head.weight.grad, expected, atol=1e-5, rtol=2e-2)
    assert found.kept < 0.6 * stock.kept
    assert found.peak < 0.7 * stock.peak
    model.zero_grad()
    predicted = predict(model, lambda batch: model(**batch), batch)
    assert (predicted.kept, predicted.peak) == (found.kept, found.peak)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_loss(reentrant: bool) -> None:
    model, x = Tagger(), torch.randn(400, 16).bfloat16().requires_grad_()
    target = torch.randint(200, (400,))
    model(x, target).backward()
    expected, model.head.weight.grad = model.head.weight.grad, None
    tithe.lean(model)
    loss: Any = checkpoint(model, x, target, use_reentrant=reentrant)
    loss.backward()
    torch.testing.assert_close(model.head.weight.grad, expected, atol=1e-5, rtol=2e-2)
