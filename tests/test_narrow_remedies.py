"""Where a model cannot run narrow, what is offered was tried: followed to the letter, it works."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tithe
from narrow_plans import bound
from oracles import bits, equal_bits, sgd
from tithe import VRPGE, TitheError


def _loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


VECTORS = (torch.randn(8, 6), torch.randn(8, 3))
TOKENS = (torch.randn(4, 5, 32), torch.randn(4, 5, 3))
IMAGES = (torch.randn(4, 3, 6, 6), torch.randn(4, 2, 6, 6))


def _trains(model: nn.Module, batch: Any, *, loss: Any = _loss, keep: float = 0.7, **settings: Any) -> tithe.NarrowPlan:
    plan = tithe.attach(model, VRPGE(keep), loss=loss, data=[batch], **settings)
    opt = bound(plan, sgd)
    for _ in range(3):
        plan.backward(lambda: loss(model, batch))
        opt.step()
        opt.zero_grad()
        plan.step()
    plan.settle([batch], draws=2)
    return plan


def _followed(
    model: nn.Module, batch: Any, *, keep: float = 0.7, **settings: Any
) -> tuple[TitheError, tithe.NarrowPlan]:
    """The refusal, and the plan that its remedy gives."""
    before = bits(model)
    with pytest.raises(TitheError) as refused:
        tithe.attach(model, VRPGE(keep), loss=_loss, data=[batch], **settings)
    assert equal_bits(before, bits(model)) == []
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    given = re.search(r"pass where=(.*), with which it was seen to run narrow", refused.value.remedy)
    assert given is not None, refused.value
    return refused.value, _trains(model, batch, keep=keep, where=json.loads(given[1]))


class Stack(nn.Module):
    """Four layers, and something between the third and the last."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 12), nn.Linear(12, 3)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.d(self.between(self.c(self.b(self.a(x).relu()).relu()).relu()))


class OwnError(Exception):
    """A model's own."""


def _raising(error: Exception) -> Callable[[Tensor], Tensor]:
    def check(h: Tensor) -> Tensor:
        if h.shape[-1] != 12:
            raise error
        return h

    return check


FULL_WIDTH: dict[str, Callable[[Tensor], Tensor]] = {
    "view": lambda h: h.view(-1, 12),
    "KeyError": lambda h: {12: h}[h.shape[-1]],
    "AttributeError": lambda h: h if h.shape[-1] == 12 else h.nothing,
    "OwnError": _raising(OwnError("bad width")),
    "NotImplementedError": _raising(NotImplementedError()),
    "AssertionError": _raising(AssertionError()),
    "a factor": lambda h: h * (12 / h.shape[-1]),
}


@pytest.mark.parametrize("inside", [False, True], ids=["alone", "in a block"])
@pytest.mark.parametrize("kind", FULL_WIDTH)
def test_whatever_goes_wrong_at_other_widths_is_refused_with_what_helps(kind: str, inside: bool) -> None:
    model: nn.Module = Stack(FULL_WIDTH[kind])
    if inside:
        model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 6), model)
    error, plan = _followed(model, VECTORS)
    assert "full width" in error.found or "left out" in error.found
    if "Error" in kind:
        assert kind in error.found
    assert plan.stage.coupling.num_units > 0


@pytest.mark.parametrize("mode", [True, False])
def test_a_width_that_one_mode_alone_needs(mode: bool) -> None:
    class Moody(Stack):
        def forward(self, x: Tensor) -> Tensor:
            h = self.c(self.b(self.a(x).relu()).relu()).relu()
            return self.d(h.view(-1, 12) if self.training is mode else h)

    _followed(Moody(torch.relu), VECTORS)


def test_nothing_helps_and_nothing_is_offered() -> None:
    class Root(nn.Module):
        def __init__(self, width: int | None) -> None:
            super().__init__()
            self.a, self.b, self.width = nn.Linear(6, 16), nn.Linear(16, 3), width

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            return self.b(h.view(-1, 16) if self.width else h.view(len(h), -1))

    with pytest.raises(TitheError) as error:
        tithe.attach(Root(16), VRPGE(0.5), loss=_loss, data=[VECTORS])
    assert error.value.place == "b"
    assert error.value.remedy.startswith("no where= was found that helps; let the forward pass take each width")
    _trains(Root(None), VECTORS)  # as told: x.view(len(x), -1)


class Attention(nn.Module):
    """Query, key and value from one product, with widths from several places."""

    def __init__(self, widths: str) -> None:
        super().__init__()
        self.n_head, self.n_embd, self.widths = 4, 32, widths
        self.c_attn, self.c_proj = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.size()
        whole = c if self.widths == "of the input" else self.n_embd
        q, k, v = (
            z.view(b, t, self.n_head, whole // self.n_head).transpose(1, 2)
            for z in self.c_attn(x).split(self.n_embd, dim=2)
        )
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, whole)
        return x + self.c_proj(y)


def _gpt(widths: str, blocks: int) -> nn.Module:
    layers = [nn.Sequential(Attention(widths), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)) for _ in range(blocks)]
    return nn.Sequential(*layers, nn.Linear(32, 3))


def test_widths_from_attributes_of_any_likely_name_follow() -> None:
    plan = _trains(_gpt("of itself", 2), TOKENS)
    assert any("c_attn" in group.name for group in plan.stage.coupling.groups)


@pytest.mark.parametrize("blocks", [1, 3])
def test_a_width_of_the_residual_stream_in_every_block(blocks: int) -> None:

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.h = _gpt("of the input", blocks)

        def forward(self, x: Tensor) -> Tensor:
            return self.h(x)

    model = Model()
    error, plan = _followed(model, TOKENS)
    assert '"!h.' in error.remedy
    assert not any("c_attn" in group.name for group in plan.stage.coupling.groups)


def test_the_users_own_globs_stay_in_what_is_offered() -> None:
    model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 6), Stack(lambda h: h.view(-1, 12)))
    error, plan = _followed(model, VECTORS, where=["*", "!0.bias"])
    assert error.remedy.startswith('pass where=["!0.bias", "!3.d.*"]')
    plan.release()
    error, _ = _followed(model, VECTORS, where=["3.*", "0.*"])
    assert error.remedy.startswith('pass where=["3.*", "0.*", "!3.d.*"]')


# --- decisions on values


class Guard(nn.Module):
    """Limits what it computed, where that is not finite."""

    def __init__(self, reads: Callable[[Tensor], bool]) -> None:
        super().__init__()
        self.a, self.b, self.reads = nn.Linear(6, 16), nn.Linear(16, 3), reads

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).relu()
        return self.b(y if self.reads(y) else y.clamp(-1e4, 1e4))


READS: dict[str, Callable[[Tensor], bool]] = {
    "if": lambda y: bool(torch.isfinite(y).all()),
    "item": lambda y: y.sum().item() > 0,
    "tolist": lambda y: y.sum().tolist() > 0,
    "numpy": lambda y: float(y.detach().numpy().max()) < 9e9,
    "nonzero": lambda y: len(y.nonzero()) > 0,
    "masked_select": lambda y: len(torch.masked_select(y, y > 0)) > 0,
    "equal": lambda y: torch.equal(y, y),
}


def _guarded(kind: str) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 6), Guard(READS[kind]))


@pytest.mark.parametrize("kind", READS)
def test_a_module_that_was_left_whole_may_decide(kind: str) -> None:
    error, plan = _followed(_guarded(kind), VECTORS, keep=0.8)
    assert error.place == "3"
    assert "decide what runs" in error.found
    assert [group.name for group in plan.stage.coupling.groups] == ["0"]
    _trains(_guarded(kind), VECTORS, keep=0.8, where="!3.*")


def test_a_decision_at_the_root_is_refused_without_a_false_promise() -> None:
    with pytest.raises(TitheError) as error:
        tithe.attach(Guard(READS["if"]), VRPGE(0.5), loss=_loss, data=[VECTORS])
    assert "where" not in error.value.remedy.replace("no where= was found", "").replace("torch.where", "")


def test_a_forward_pass_that_cannot_be_watched_is_refused() -> None:
    class Addresses(nn.Module):
        """Reads memory behind the back of torch, and minds who is looking."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            if torch.utils._python_dispatch._get_current_dispatch_mode() is not None:
                raise LookupError("not while somebody is looking")
            return self.b(self.a(x))

    with pytest.raises(TitheError, match=r"fails while its operators are watched .LookupError"):
        tithe.attach(Addresses(), VRPGE(0.5), loss=_loss, data=[VECTORS])


# --- nothing to leave out


def test_nothing_that_could_be_absent_with_what_was_left_out() -> None:
    model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3))
    with pytest.raises(TitheError, match="nothing that could be absent") as error:
        tithe.attach(model, VRPGE(0.5), loss=_loss, data=[VECTORS], where="2.*")
    assert 'where="*"' in error.value.remedy
    _trains(model, VECTORS, where="*")


def test_a_penalty_on_whole_weights() -> None:
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3))

    def penalised(model: nn.Module, batch: Any) -> Tensor:
        return _loss(model, batch) + sum(p.square().sum() for p in model.parameters())

    with pytest.raises(TitheError, match="taken whole by sum outside of any module") as error:
        tithe.attach(model, VRPGE(0.5), loss=penalised, data=[VECTORS])
    assert "weight_decay" in error.value.remedy
    _trains(model, VECTORS)


# --- losses and data of other kinds


def _each(model: nn.Module, batch: list[Tensor]) -> Tensor:
    return torch.stack([model(x[None]).square().mean() for x in batch]).mean()


@pytest.mark.parametrize("norm", [nn.Identity, lambda: nn.BatchNorm2d(8)], ids=["plain", "batch norm"])
def test_images_of_several_sizes_in_a_list(norm: Callable[[], nn.Module]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), norm(), nn.ReLU(), nn.Conv2d(8, 2, 1))
    images = [torch.randn(3, 6, 6), torch.randn(3, 8, 8), torch.randn(3, 5, 7)]
    _trains(model, images, loss=_each)


def test_images_and_targets_that_count_something_else() -> None:
    def loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
        return _each(model, batch["images"]) + 0 * sum(target["boxes"].sum() for target in batch["targets"])

    images = [torch.randn(3, 6, 6), torch.randn(3, 8, 8)]
    targets = [{"boxes": torch.randn(2, 4)}, {"boxes": torch.randn(0, 4)}]
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 2, 1))
    _trains(model, {"images": images, "targets": targets}, loss=loss)


def test_a_loss_that_calls_the_model_several_times() -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        return F.mse_loss(model(batch[0]), model(batch[0] + 0.1).detach()) + _loss(model, batch)

    _trains(nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 3)), VECTORS, loss=loss)


@pytest.mark.parametrize(
    ("loss", "told"),
    [
        (lambda model, batch: {}["nothing"], "fails on the first batch of data= .KeyError"),
        (lambda model, batch: _loss(model, batch).item(), "a float"),
        (lambda model, batch: model(batch[0]), "a tensor of shape"),
    ],
    ids=["raises", "a number", "many numbers"],
)
def test_a_loss_that_is_none(loss: Any, told: str) -> None:
    with pytest.raises(TitheError, match=f"^loss: found .*{told}"):
        tithe.attach(nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 3)), VRPGE(0.5), loss=loss, data=[VECTORS])
