"""Narrow steps inside the loops that people have: scalers, checkpointing, autocast, lean layers, frozen parts."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tithe
from narrow_plans import FAMILIES, attach, bound, drawn, plain, step
from oracles import adamw, bits, equal_bits, sgd
from slicing import zeroed

# --- a step


def test_a_step_that_the_scaler_skips_changes_no_weight() -> None:
    case = FAMILIES["vgg"]
    model, plain = case.model(), case.model()
    plans = [attach(case, one) for one in (model, plain)]
    opts = [bound(plan, sgd) for plan in plans]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    moved: list[bool] = []
    for number, batch in enumerate(case.batches(3)):
        before = {name: value.clone() for name, value in model.named_parameters()}
        factor = float("inf") if number == 1 else 1.0
        plans[0].backward(lambda batch=batch, factor=factor: scaler.scale(case.loss(model, batch)) * factor)
        scaler.unscale_(opts[0])
        scaler.step(opts[0])
        scaler.update()
        opts[0].zero_grad()
        plans[0].step()
        moved.append(any(not torch.equal(value, before[name]) for name, value in model.named_parameters()))
        if number == 0:
            step(plans[1], opts[1], case, batch)
            assert all(torch.equal(value, model.get_parameter(name)) for name, value in plain.named_parameters())
    assert moved == [True, False, True]
    assert scaler.get_scale() == 1.0
    assert bool(plans[0].structure.s.isfinite().all())


def test_a_loss_that_is_not_finite_teaches_nothing() -> None:
    case = FAMILIES["vgg"]
    plan = attach(case)
    s = plan.structure.s.clone()
    plan.backward(lambda: case.loss(plan.model, case.batch()) * float("nan"))
    plan.step()
    assert torch.equal(plan.structure.s, s)
    assert plan.num_steps == 1


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_runs_the_same_network_again(reentrant: bool) -> None:
    case = FAMILIES["block"]
    model, twin = (case.model(dtype=torch.float64) for _ in range(2))
    batch = case.batch(dtype=torch.float64)
    batch["x"].requires_grad_()
    plans = [attach(case, one) for one in (model, twin)]

    def again() -> Tensor:
        return nn.functional.cross_entropy(checkpoint(model, batch["x"], use_reentrant=reentrant), batch["y"])

    losses = plans[0].backward(again), plans[1].backward(lambda: case.loss(twin, batch))
    assert losses[0].item() == losses[1].item()
    for one, other in zip(plans[0].parameters(), plans[1].parameters(), strict=True):
        assert (one.grad is None and other.grad is None) or torch.equal(one.grad, other.grad)


@pytest.mark.parametrize("around", ["closure", "step"])
@pytest.mark.parametrize("name", ["vgg", "bert"])
def test_autocast(name: str, around: str) -> None:
    """Half the bits inside, single precision in θ; every weight gets its gradient."""
    case = FAMILIES[name]
    model, batch = case.model(), case.batch()
    plan = attach(case, model)
    masked = zeroed(plain(plan, case), plan.stage.coupling, drawn(plan)[0])
    cast = partial(torch.autocast, "cpu", torch.bfloat16)

    def closure(one: nn.Module) -> Tensor:
        with cast():
            return case.loss(one, batch)

    expected = closure(masked)
    expected.backward()
    if around == "step":
        with cast():
            loss = plan.backward(lambda: case.loss(model, batch))
    else:
        loss = plan.backward(lambda: closure(model))
    torch.testing.assert_close(loss, expected, rtol=0.02, atol=0.02)
    want = {name: p.grad is not None for name, p in masked.named_parameters()}
    assert {name: p.grad is not None for name, p in plan.named_parameters()} == want
    assert {p.grad.dtype for p in plan.parameters() if p.grad is not None} == {torch.float32}


@pytest.mark.parametrize("first", ["lean", "plan"])
@pytest.mark.parametrize("name", ["residual", "bert"])
def test_lean_layers_keep_less_of_the_narrow_network_too(name: str, first: str) -> None:
    case = FAMILIES[name]
    model, twin = (case.model() for _ in range(2))
    batch = case.batch(8)
    other = attach(case, twin)
    if first == "lean":
        tithe.lean(model)
    plan = attach(case, model)
    if first == "plan":
        tithe.lean(model)
    stock = tithe.measure(lambda: other.backward(lambda: case.loss(twin, batch)), model=twin)
    lean = tithe.measure(lambda: plan.backward(lambda: case.loss(model, batch)), model=model)
    assert lean.kept < stock.kept
    for (key, one), (_, two) in zip(plan.named_parameters(), other.named_parameters(), strict=True):
        if two.grad is not None:
            torch.testing.assert_close(
                one.grad, two.grad, rtol=5e-2, atol=5e-3, msg=lambda text, key=key: f"{key}: {text}"
            )
    for one in (plan, other):
        one.settle(case.batches(2, 8), draws=0)
    for key, value in other.model.named_buffers():
        torch.testing.assert_close(plan.model.get_buffer(key), value)
    assert tithe.Lean.of(plan.export()) is None


# --- what stays whole


def test_frozen_parameters_stay_as_they_are_and_whole() -> None:
    case = FAMILIES["residual"]
    model = case.model()
    model.one.requires_grad_(False)
    before = bits(model)
    plan = attach(case, model)
    assert not any(name.startswith("one") for name, _ in plan.named_parameters())
    assert not any(group.name.startswith("one") for group in plan.stage.coupling.groups)
    opt = bound(plan, adamw)
    for batch in case.batches(2):
        step(plan, opt, case, batch)
    frozen = {name for name, _ in model.one.named_parameters(prefix="one")}
    assert not frozen & set(equal_bits(before, bits(model)))
    plan.release()
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == frozen
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("settings", [{"where": "!two.*"}, {"head": "two.*"}])
def test_what_is_left_out_is_whole_and_trained(settings: dict[str, str]) -> None:
    """`two` makes the stem's channels as well, so these stay; its input may still be narrow unless it is kept too."""
    case = FAMILIES["residual"]
    plan = attach(case, **settings)
    before = bits(plan.model)
    assert "two.0.weight" not in plan.stage.coupling.places
    assert not {"stem.0", "one.0"} & {group.name for group in plan.stage.coupling.groups}
    opt = bound(plan, sgd)
    step(plan, opt, case, case.batch())
    assert "two.0.weight" in equal_bits(before, bits(plan.model))
    if "head" in settings:
        assert "two.0.weight" in plan.head
        assert "two.0.weight" not in plan.selections
    else:
        assert plan.selections["two.0.weight"].full


def test_a_frozen_head_is_trained_and_given_back_frozen() -> None:
    case = FAMILIES["vgg"]
    model = case.model()
    model[12].requires_grad_(False)
    before = bits(model)
    plan = attach(case, model, head="12.*")
    step(plan, bound(plan, sgd), case, case.batch())
    assert {"12.weight", "12.bias"} <= set(equal_bits(before, bits(model)))
    plan.release()
    assert not model[12].weight.requires_grad


def test_tied_weights_are_one_parameter() -> None:
    case = FAMILIES["grouped_query_tied"]
    plan = attach(case)
    names = [name for name, _ in plan.named_parameters()]
    assert "lm_head.weight" not in names
    step(plan, bound(plan, adamw), case, case.batch())
    assert plan.model.lm_head.weight is plan.model.model.embed_tokens.weight
    twice = FAMILIES["twice"]
    plan = attach(twice)
    step(plan, bound(plan, adamw), twice, twice.batch())


# --- outside of a step


def test_whoever_runs_the_model_runs_the_network_that_would_be_exported() -> None:
    case = FAMILIES["residual"]
    plan = attach(case)
    opt = bound(plan, sgd)
    for batch in case.batches(2):
        step(plan, opt, case, batch)
    before = bits(plan.model)
    assert plan.reselect() is False  # every step draws
    with torch.no_grad():
        for training in (False, True):
            plan.model.train(training)
            mask = plan.structure.likely(plan.num_steps)
            masked = zeroed(plain(plan, case), plan.stage.coupling, mask)
            torch.testing.assert_close(plan.model(batch["x"]), masked(batch["x"]))
    assert equal_bits(before, bits(plan.model)) == []
    assert [tuple(p.shape) for p in plan.model.parameters()] == [tuple(p.shape) for p in case.model().parameters()]


def test_a_forward_pass_that_fails_leaves_the_model_whole() -> None:
    case = FAMILIES["vgg"]
    plan = attach(case)
    own = [dict(vars(module)) for module in plan.model.modules()]
    with pytest.raises(RuntimeError):
        plan.model(torch.randn(2, 5, 8, 8))
    with pytest.raises(RuntimeError):
        plan.backward(lambda: plan.model(torch.randn(2, 5, 8, 8)).sum())
    assert [sorted(vars(module)) for module in plan.model.modules()] == [sorted(each) for each in own]
    step(plan, bound(plan, sgd), case, case.batch())


def test_release_leaves_no_trace() -> None:
    case = FAMILIES["bert"]
    model = case.model()
    attributes, keys = [sorted(vars(module)) for module in model.modules()], list(model.state_dict())
    plan = attach(case, model)
    assert list(model.state_dict()) == keys
    whole = {name for name, p in model.named_parameters() if p.requires_grad}  # the optimizer holds them themselves
    opt = bound(plan, adamw)
    step(plan, opt, case, case.batch())
    plan.backward(lambda: case.loss(model, case.batch()))
    plan.release()
    plan.release()
    assert [sorted(vars(module)) for module in model.modules()] == attributes
    assert list(model.state_dict()) == keys
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not opt._optimizer_step_pre_hooks
    assert not opt._optimizer_step_post_hooks
    assert all(p.requires_grad for p in model.parameters())
    assert {name for name, p in model.named_parameters() if p.grad is not None} == whole
    case.loss(model, case.batch()).backward()
    with pytest.raises(tithe.TitheError, match="released"):
        plan.step()
