"""A suggested learning rate: what it is, to the last digit, on every plan; and that asking for it leaves no trace."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import tithe
from histories import checkpoints, recorded
from models import CASES, Batch, Case
from narrow_plans import FAMILIES, drawn
from narrow_plans import attach as attach_narrow
from ranks import play, refused
from tithe import FISH, TitheError
from tithe.app.dense import Dense
from tithe.narrow import Stage

F64 = torch.float64
Masks = dict[str, Tensor]


def rate_of(model: nn.Module, loss: Callable[[nn.Module], Tensor], masks: Masks) -> float:
    """The definition for one batch, with a Hessian-vector product by autograd in place of a difference."""
    value, slopes, curvature = slopes_of(model, loss, masks)
    slope = float(slopes.abs().sum())
    assert 0 < slope / curvature < 2 * value / slope  # or the definition is another
    return slope / curvature


def slopes_of(model: nn.Module, loss: Callable[[nn.Module], Tensor], masks: Masks) -> tuple[float, Tensor, float]:
    """The loss, its gradient on what the masks (bool) pick, and its second derivative along the signs of that."""
    named = {name: p.requires_grad_(True) for name, p in model.named_parameters() if name in masks}
    with sdpa_kernel(SDPBackend.MATH):  # the other kernels have no second derivative
        value = loss(model)
    weights = list(named.values())
    gradients: Any = torch.autograd.grad(value, weights, create_graph=True, allow_unused=True)
    signs = [
        torch.zeros_like(p) if g is None else g.detach().sign() * masks[name]
        for (name, p), g in zip(named.items(), gradients, strict=True)
    ]
    slope = sum((g * s).sum() for g, s in zip(gradients, signs, strict=True) if g is not None)
    assert isinstance(slope, Tensor)
    curved: Any = torch.autograd.grad(slope, weights, allow_unused=True)
    curvature = sum(float((h * s).sum()) for h, s in zip(curved, signs, strict=True) if h is not None)
    picked = [
        (torch.zeros_like(p) if g is None else g.detach() * masks[name]).flatten()
        for (name, p), g in zip(named.items(), gradients, strict=True)
    ]
    return value.item(), torch.cat(picked), curvature


def masks_of(plan: tithe.Plan, model: nn.Module) -> Masks:
    """The entries that a sparse plan trains, bool, by name."""
    found: Masks = {}
    for name, parameter in model.named_parameters():
        mask = torch.full((parameter.numel(),), name in plan.head)
        if name not in plan.head:
            mask[plan.selected(name)] = True
        found[name] = mask.view(parameter.shape)
    return found


def fresh(case: Case, plan: tithe.Plan) -> nn.Module:
    """A plain model with the plan's weights, whose frozen norms are in evaluation mode too."""
    model = case.model(dtype=F64)
    model.load_state_dict(plan.model.state_dict())
    return model


# ------------------------------------------------------------------------------------------------------- what it is


class Bowl(nn.Module):
    """½ Σ a (w − t)²"""

    def __init__(self, a: Tensor, t: Tensor) -> None:
        super().__init__()
        self.a, self.t = a, t
        self.weight = nn.Parameter(torch.randn(len(a), dtype=F64, generator=torch.Generator().manual_seed(3)))

    def forward(self, scale: Tensor) -> Tensor:
        return 0.5 * (scale * self.a * (self.weight - self.t).square()).sum()


def bowl_loss(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch)


@settings(max_examples=30, deadline=None)
@given(
    a=st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=12),
    seed=st.integers(0, 100),
    density=st.floats(0.1, 1.0),
    scale=st.floats(1e-4, 1e4),
)
def test_on_a_quadratic_it_is_known(a: list[float], seed: int, density: float, scale: float) -> None:
    """Σ_S |a (w − t)| / Σ_S a, whatever the loss is multiplied by."""
    curvature = torch.tensor(a, dtype=F64)
    model = Bowl(curvature, torch.randn(len(a), dtype=F64, generator=torch.Generator().manual_seed(1000 + seed)))
    k = max(1, math.ceil(density * len(a)))
    plan = tithe.attach(model, FISH(k=k, score="random"), loss=bowl_loss, seed=seed)
    at = plan.selected("weight")
    slopes = (curvature * (model.weight.detach() - model.t))[at].abs()
    expected = float(slopes.sum() / curvature[at].sum())
    assert plan.suggest_lr(torch.tensor(scale, dtype=F64)) == pytest.approx(expected, rel=2e-2)


@pytest.mark.parametrize("name", ["mlp", "tied_mlp", "bert", "gpt2", "llama", "vit", "convnext", "recurrent"])
def test_it_is_that_of_the_hessian(name: str) -> None:
    case = CASES[name]
    model, batch = case.model(dtype=F64), case.batch(dtype=F64)
    plan = tithe.attach(model, FISH(density=0.3, score="random"), loss=case.loss, head=case.head, seed=7)
    plain = fresh(case, plan)
    expected = rate_of(plain, lambda m: case.loss(m, batch), masks_of(plan, plain))
    assert plan.suggest_lr(batch) == pytest.approx(expected, rel=2e-2)


def test_of_a_dense_plan_it_is_that_of_whole_parameters() -> None:
    case = CASES["bert"]
    model, batch = case.model(dtype=F64), case.batch(dtype=F64)
    plan = Dense(model, [name for name, _ in model.named_parameters()], loss=case.loss)
    everything = {name: torch.ones_like(p, dtype=torch.bool) for name, p in model.named_parameters()}
    expected = rate_of(case.model(dtype=F64), lambda m: case.loss(m, batch), everything)
    assert assert_leaves_no_trace(plan, batch) == pytest.approx(expected, rel=2e-2)


@pytest.mark.parametrize("name", ["mlp", "vit"])
def test_of_several_batches_it_is_their_common_slope_over_the_curvature_that_each_meets(name: str) -> None:
    case = CASES[name]
    model, batches = case.model(dtype=F64), case.batches(3, dtype=F64)
    plan = tithe.attach(model, FISH(density=0.3, score="random"), loss=case.loss, head=case.head)
    plain = fresh(case, plan)
    masks = masks_of(plan, plain)
    found = [slopes_of(plain, lambda m, batch=batch: case.loss(m, batch), masks) for batch in batches]
    slope = float(torch.stack([slopes for _, slopes, _ in found]).mean(0).abs().sum())
    assert plan.suggest_lr(*batches) == pytest.approx(3 * slope / sum(c for _, _, c in found), rel=2e-2)


def test_of_the_same_batch_twice_it_is_that_of_the_batch() -> None:
    case = CASES["bert"]
    model, batch = case.model(dtype=F64), case.batch(dtype=F64)
    plan = tithe.attach(model, FISH(density=0.3, score="random"), loss=case.loss, head=case.head)
    assert plan.suggest_lr(batch, batch) == pytest.approx(plan.suggest_lr(batch), rel=1e-6)


def test_a_flat_theta_has_the_rate_of_its_parts() -> None:
    case = CASES["bert"]
    batch = case.batch(dtype=F64)
    once, again = FISH(density=0.3, score="random"), FISH(density=0.3, score="random", reselect=tithe.every(2))
    rates: list[float] = []
    for method in (once, again):
        model = case.model(dtype=F64)
        plan = tithe.attach(model, method, loss=case.loss, head=case.head, data=case.batches(2, dtype=F64))
        rates.append(plan.suggest_lr(batch))
    assert rates[1] == pytest.approx(rates[0], rel=1e-6)


def test_while_a_warmup_lasts_it_is_that_of_the_head() -> None:
    case = CASES["bert"]
    data = case.batches(4, dtype=F64)
    model = case.model(dtype=F64)
    plan = tithe.attach(model, FISH(density=0.3, score="random", warmup=1), loss=case.loss, head=case.head, data=data)
    plain = fresh(case, plan)
    of_head = {name: torch.ones_like(p, dtype=torch.bool) for name, p in plain.named_parameters() if name in plan.head}
    assert plan.suggest_lr(data[0]) == pytest.approx(rate_of(plain, lambda m: case.loss(m, data[0]), of_head), rel=2e-2)
    optimizer = torch.optim.AdamW(plan.parameters(), lr=1e-3)
    plan.backward(lambda: case.loss(model, data[0]))
    optimizer.step()
    optimizer.zero_grad()
    assert plan.step()
    plain = fresh(case, plan)
    expected = rate_of(plain, lambda m: case.loss(m, data[0]), masks_of(plan, plain))
    assert plan.suggest_lr(data[0]) == pytest.approx(expected, rel=2e-2)


@pytest.mark.parametrize(("name", "seed"), [("vgg", 0), ("residual", 0), ("bert", 0), ("mlp", 2)])
def test_of_a_drawn_network_it_is_the_network_s_own(name: str, seed: int) -> None:
    case = FAMILIES[name]
    model, batch = case.model(dtype=F64), case.batch(dtype=F64, seed=seed)
    plan = attach_narrow(case, model)
    network = case.model(dtype=F64)
    network.load_state_dict(model.state_dict())
    Stage(network, plan.stage.coupling, plan.stage.counts).settle(drawn(plan)[0])
    everything = {name: torch.ones_like(p, dtype=torch.bool) for name, p in network.named_parameters()}
    expected = rate_of(network, lambda m: case.loss(m, batch), everything)
    assert plan.suggest_lr(batch) == pytest.approx(expected, rel=2e-2)


@pytest.mark.parametrize("granularity", ["model", "tensor"])
def test_of_a_span_it_is_that_of_the_coefficients(granularity: Any, tmp_path: Path) -> None:
    """In the space of the weights, s is the displacement that it makes."""
    case = CASES["mlp"]
    model, batch = case.model(dtype=F64), case.batch(dtype=F64)
    history = recorded(tmp_path / "run", checkpoints(model, 4))
    plan = tithe.attach(model, tithe.TWA(history, granularity=granularity), loss=case.loss)
    found = plan.suggest_lr(batch)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    plan.backward(lambda: case.loss(model, batch))
    (theta,) = plan.parameters()
    assert theta.grad is not None
    signs, theta.grad = theta.grad.sign(), None
    with torch.no_grad():
        theta += 1e-3 * signs
    plan.step()
    moved = {name: (value - start[name]) / 1e-3 for name, value in model.state_dict().items()}
    plain = case.model(dtype=F64)
    plain.load_state_dict(start)
    named = dict(plain.named_parameters())
    gradients = torch.autograd.grad(case.loss(plain, batch), list(named.values()), create_graph=True)
    slope = sum((g * moved[name]).sum() for name, g in zip(named, gradients, strict=True))
    assert isinstance(slope, Tensor)
    curved = torch.autograd.grad(slope, list(named.values()))
    curvature = sum(float((h * moved[name]).sum()) for name, h in zip(named, curved, strict=True))
    assert found == pytest.approx(slope.item() / curvature, rel=2e-2)


def test_micro_batches_make_a_step_together() -> None:
    case = CASES["mlp"]
    batches = [case.batch(4, dtype=F64, seed=seed) for seed in range(6)]
    joined = [{key: torch.cat([part[key] for part in batches[at : at + 3]]) for key in batches[0]} for at in (0, 3)]
    plan = tithe.attach(case.model(dtype=F64), FISH(density=0.3, score="random"), loss=case.loss)
    rate = plan.suggest_lr(*joined)
    assert plan.suggest_lr(*batches, accumulate=3) == pytest.approx(rate, rel=1e-3)
    assert plan.suggest_lr(*batches) != pytest.approx(rate, rel=1e-2)
    for number in (4, 0, 1.5):
        with pytest.raises(TitheError, match=f"6 batches, accumulate={number}"):
            plan.suggest_lr(*batches, accumulate=number)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------ it leaves no trace


def everything(plan: tithe.Plan, optimizer: torch.optim.Optimizer | None = None) -> list[Any]:
    """Whatever a call may have changed, as copies."""
    model, plain = plan.model, list(plan.parameters())
    return [
        {name: value.clone() for name, value in model.state_dict().items()},
        [(p.detach().clone(), p._version, p.requires_grad, None if p.grad is None else p.grad.clone()) for p in plain],
        [p.requires_grad for p in model.parameters()],
        [module.training for module in model.modules()],
        [sorted(map(str, vars(module))) for module in model.modules()],
        copy.deepcopy(plan.state_dict()),
        torch.get_rng_state(),
        None if optimizer is None else copy.deepcopy(optimizer.state_dict()),
        (plan.num_steps, plan.num_epochs),
    ]


def same(one: Any, other: Any) -> bool:
    """Whether two trees are equal, tensors bit by bit."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return one == other


def assert_leaves_no_trace(plan: tithe.Plan, batch: Any, optimizer: torch.optim.Optimizer | None = None) -> float:
    """Ask for a rate, and compare everything with what it was before; returns the rate."""
    before = everything(plan, optimizer)
    rate = plan.suggest_lr(batch)
    after = everything(plan, optimizer)
    for number, (one, other) in enumerate(zip(before, after, strict=True)):
        assert same(one, other), number
    assert 0 < rate < math.inf
    return rate


def a_plan(kind: str, folder: Path, name: str = "resnet_basic", dtype: torch.dtype = torch.float32) -> Any:
    """A case and a plan of every method on it."""
    case = CASES[name]
    model, data = case.model(dtype=dtype), case.batches(3, dtype=dtype)
    kernels = [name for name, parameter in model.named_parameters() if parameter.dim() == 4]
    methods: dict[str, Callable[[], Any]] = {
        "fish": lambda: FISH(density=0.3, samples=8),
        "random": lambda: FISH(density=0.3, score="random"),
        "fish again": lambda: FISH(density=0.3, samples=8, reselect=tithe.every(1)),
        "fish after a warm-up": lambda: FISH(density=0.3, samples=8, warmup=2),
        "trady": lambda: tithe.TraDy(tithe.Budget(fraction=0.3), layers="all", samples=8),
        "sparse update": lambda: tithe.SparseUpdate(dict.fromkeys(kernels, 0.5)),
        "spiel": lambda: tithe.SpIEL(density=0.3, reselect=tithe.every(2)),
        "vrpge": lambda: tithe.VRPGE(0.6),
        "cuts": lambda: tithe.TaylorPruning(0.6, cuts=2, start=1, stop=3),
        "twa": lambda: tithe.TWA(recorded(folder / "run", checkpoints(case.model(dtype=dtype), 3)), bits=8),
    }
    head = () if kind in ("vrpge", "cuts", "twa") else case.head
    return case, tithe.attach(model, methods[kind](), loss=case.loss, data=data, head=head)


KINDS = ("fish", "fish again", "fish after a warm-up", "trady", "sparse update", "spiel", "vrpge", "cuts", "twa")


@pytest.mark.parametrize("kind", KINDS)
def test_it_leaves_no_trace(kind: str, tmp_path: Path) -> None:
    """Before a step, bound or not; between the micro-batches of a step; after steps. Training goes on the same."""
    (case, plan), (_, twin) = (a_plan(kind, tmp_path / str(number)) for number in range(2))
    batches = case.batches(4)
    assert_leaves_no_trace(plan, batches[0])
    ends: list[Any] = []
    for asked, one in ((True, plan), (False, twin)):
        optimizer = torch.optim.AdamW(one.parameters(), lr=1e-3)
        if asked:
            assert_leaves_no_trace(one, batches[0])
        one.bind(optimizer)
        torch.manual_seed(5)
        for batch in batches[:3]:
            for _ in range(2):
                one.backward(lambda batch=batch, one=one: case.loss(one.model, batch))
                if asked:
                    assert_leaves_no_trace(one, batches[3], optimizer)
            optimizer.step()
            if asked:
                assert_leaves_no_trace(one, batches[3], optimizer)
            optimizer.zero_grad()
            one.step()
            if asked:
                assert_leaves_no_trace(one, batches[3], optimizer)
        one.end_epoch()
        ends.append(everything(one, optimizer))
    assert same(ends[0][0], ends[1][0])
    assert same(ends[0][-3:], ends[1][-3:])


def test_dropout_draws_the_same_twice_and_is_as_before() -> None:
    case = next(case for case in CASES.values() if case.dropout)
    model = case.model()
    plan = tithe.attach(model, FISH(density=0.2, score="random"), loss=case.loss, head=case.head)
    torch.manual_seed(1)
    rates = [assert_leaves_no_trace(plan, case.batch()) for _ in range(2)]
    assert rates[0] == rates[1]
    torch.manual_seed(2)
    assert plan.suggest_lr(case.batch()) != rates[0]


def test_a_model_in_evaluation_mode_is_tried_in_training_mode() -> None:
    case = next(case for case in CASES.values() if case.dropout)
    model = case.model()
    plan = tithe.attach(model, FISH(density=0.2, score="random"), loss=case.loss, head=case.head)
    torch.manual_seed(1)
    rate = plan.suggest_lr(case.batch())
    model.eval()
    torch.manual_seed(1)
    assert assert_leaves_no_trace(plan, case.batch()) == rate


def test_no_hook_trains_and_nobody_else_gets_a_gradient() -> None:
    """An optimizer that steps in backward; a loss with weights of its own; an input that asks for a gradient."""
    case = CASES["mlp"]
    model, batch = case.model(), case.batch()
    batch["x"].requires_grad_()
    scale = nn.Parameter(torch.ones(()))
    plan = tithe.attach(model, FISH(k=9, score="random"), loss=lambda m, b: case.loss(m, b) * scale, head=case.head)
    fired: list[Tensor] = []
    for parameter in plan.parameters():
        parameter.register_post_accumulate_grad_hook(fired.append)
    assert_leaves_no_trace(plan, batch)
    assert not fired
    assert scale.grad is None
    assert batch["x"].grad is None
    plan.backward(lambda: case.loss(model, batch))
    assert fired


@pytest.mark.parametrize("kind", ["random", "fish again", "trady", "twa", "vrpge"])
def test_hooks_on_what_is_trained_see_and_change_nothing(kind: str, tmp_path: Path) -> None:
    """Clipping of each value would leave no curvature, and an update in backward would move θ."""
    case, plan = a_plan(kind, tmp_path)
    batch, seen = case.batch(), list[int]()
    rate = plan.suggest_lr(batch)

    def hook(grad: Tensor) -> Tensor:
        seen.append(len(seen))
        return grad.clamp(-1e-6, 1e-6)

    for parameter in plan.parameters():
        parameter.register_hook(hook)
    assert assert_leaves_no_trace(plan, batch) == pytest.approx(rate, rel=1e-3)
    assert not seen
    plan.backward(lambda: case.loss(plan.model, batch))
    assert seen or kind == "vrpge"  # whose θ is given its gradient


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_changes_nothing(reentrant: bool) -> None:
    torch.manual_seed(0)
    body, top = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8)).double(), nn.Linear(8, 3).double()
    model = nn.ModuleList([nn.Linear(4, 4).double(), body, top])
    x, y = torch.randn(6, 4, dtype=F64), torch.randint(3, (6,))

    def loss(m: Any, checkpointed: bool) -> Tensor:
        h = m[0](x)
        h = checkpoint(m[1], h, use_reentrant=reentrant) if checkpointed else m[1](h)
        return F.cross_entropy(m[2](h), y)

    rates: list[float] = []
    for number in (0, 1):
        plan = tithe.attach(model, FISH(density=0.5, score="random"), loss=lambda m, b, n=number: loss(m, bool(n)))
        rates.append(plan.suggest_lr(None))
        plan.release()
    assert rates[0] == pytest.approx(rates[1], rel=1e-9)


def test_what_passes_a_carrier_by_counts() -> None:
    """A function of autograd runs on the carrier's memory, and its gradient is handed on to θ."""

    class Own(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
            ctx.save_for_backward(x, w)
            return x @ w.T

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            x, w = ctx.saved_tensors
            return grads[0] @ w, grads[0].T @ x

    torch.manual_seed(0)
    x, y = torch.randn(6, 4, dtype=F64), torch.randint(3, (6,))
    rates: list[float] = []
    for own in (False, True):
        torch.manual_seed(1)
        layer = nn.Linear(4, 3, bias=False).double()

        def loss(m: Any, b: Any, own: bool = own) -> Tensor:
            return F.cross_entropy(Own.apply(x, m.weight) if own else F.linear(x, m.weight), y)

        rates.append(tithe.attach(layer, FISH(k=7, score="random"), loss=loss).suggest_lr(None))
    assert rates[0] == pytest.approx(rates[1], rel=1e-9)


# ------------------------------------------------------------------------------------------------------ it is refused


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (lambda m, b: (m.weight * b).sum() - 100, "nothing bounds a step"),
        (lambda m, b: m.weight.sum() * 0.0, "sum 0"),
        (lambda m, b: m.weight.sum() * float("nan"), "a loss of nan"),
        (lambda m, b: (m.weight - m.weight.detach()).abs().sqrt().sum(), "sum nan"),
        (lambda m, b: m.weight, "a tensor of shape"),
    ],
)  # fmt: skip
def test_what_bounds_no_step_is_refused(loss: Any, words: str) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(3, 2, bias=False)
    plan = tithe.attach(layer, FISH(k=4, score="random"), loss=loss)
    before = everything(plan)
    with pytest.raises(TitheError, match=words):
        plan.suggest_lr(torch.ones(2, 3))
    assert same(everything(plan), before)


def test_of_a_negative_loss_that_curves_downwards_it_is_where_the_slope_doubles() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(3, 2, bias=False).double()
    plan = tithe.attach(layer, FISH(k=4, score="random"), loss=lambda m, b: -m.weight.square().sum())
    chosen = layer.weight.detach().flatten()[plan.selected("weight")]
    assert plan.suggest_lr(None) == pytest.approx(float(chosen.abs().mean()), rel=1e-4)


def test_of_a_loss_without_curvature_it_is_what_takes_the_loss_away_twice() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(3, 2, bias=False).double()
    plan = tithe.attach(layer, FISH(k=4, score="random"), loss=lambda m, b: 3 + m.weight.sum())
    loss = 3 + float(layer.weight.detach().sum())
    assert plan.suggest_lr(None) == pytest.approx(2 * loss / 4, rel=1e-6)


def test_of_a_loss_that_curves_upwards_further_on_it_is_by_the_whole_distance() -> None:
    """1 − cos w from beyond its inflection, w = 2: at θ it curves downwards; the slope is sin 2, then sin(2 − t)."""
    layer = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(layer.weight, 2.0)
    plan = tithe.attach(layer, FISH(k=1, score="random"), loss=lambda m, b: (1 - m.weight.cos()).sum())
    far = 2 * (1 - math.cos(2)) / math.sin(2)
    curved = (math.sin(2) - math.sin(2 - far)) / far
    expected = math.sin(2) / curved if curved > 0 else far
    assert plan.suggest_lr(None) == pytest.approx(expected, rel=1e-4)


@settings(max_examples=20, deadline=None)
@given(offset=st.floats(-100, 100), slope=st.floats(-10, 10))
def test_of_a_parabola_of_any_height_it_is_its_minimum(offset: float, slope: float) -> None:
    assume(abs(1 + slope) > 1e-2)
    layer = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(layer.weight, 0.5)

    def loss(model: nn.Linear, _: None) -> Tensor:
        return (model.weight.square() + slope * model.weight + offset).sum()

    plan = tithe.attach(layer, FISH(k=1, score="random"), loss=loss)
    assert plan.suggest_lr(None) == pytest.approx(abs(1 + slope) / 2, rel=1e-3)


@pytest.mark.parametrize("width", [1e-3, 0.1, 1.0])
def test_of_a_loss_above_zero_it_is_never_further_than_its_parabola_has_a_minimum(width: float) -> None:
    """|w| with a soft bend at zero, from w = 3: its slope is the same nearly all the way to the bend."""
    layer = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(layer.weight, 3.0)

    def loss(model: nn.Linear, _: None) -> Tensor:
        return width * F.softplus(model.weight / width).sum()

    value, slope = loss(layer, None).item(), torch.sigmoid(layer.weight / width).item()
    plan = tithe.attach(layer, FISH(k=1, score="random"), loss=loss)
    assert plan.suggest_lr(None) <= 2 * value / slope * (1 + 1e-6)


def test_a_plan_without_a_loss_or_a_model_has_none() -> None:
    layer = nn.Linear(3, 2)
    plan = tithe.attach(layer, FISH(k=4, score="random"))
    with pytest.raises(TitheError, match="no loss"):
        plan.suggest_lr(torch.ones(2, 3))
    plan.release()
    with pytest.raises(TitheError, match="released"):
        plan.suggest_lr(torch.ones(2, 3))


# --------------------------------------------------------------------------------------------------------- two ranks


def _halves(batch: Batch, rank: int) -> Batch:
    half = len(next(iter(batch.values()))) // 2
    return {key: value[:half] if rank == 0 else value[half:] for key, value in batch.items()}


def _rate(kind: str, folder: Path, rank: int | None) -> float:
    case, plan = a_plan(kind, folder, "mlp", F64)
    batch = case.batch(8, dtype=F64)
    return plan.suggest_lr(batch if rank is None else _halves(batch, rank))


def test_two_ranks_have_the_rate_of_one_with_both_batches(tmp_path: Path) -> None:
    recorded(tmp_path / "run", checkpoints(CASES["mlp"].model(dtype=F64), 3))

    def random(rank: int) -> float:
        return _rate("random", tmp_path, rank)

    def vrpge(rank: int) -> float:
        return _rate("vrpge", tmp_path, rank)

    def twa(rank: int) -> float:
        history = tithe.History(tmp_path / "run")
        case = CASES["mlp"]
        plan = tithe.attach(case.model(dtype=F64), tithe.TWA(history), loss=case.loss)
        return plan.suggest_lr(_halves(case.batch(8, dtype=F64), rank))

    def one_is_wrong(rank: int) -> float:
        case = CASES["mlp"]
        plan = tithe.attach(case.model(), FISH(k=3, score="random"), loss=lambda m, b: case.loss(m, b) * b["by"])
        return plan.suggest_lr({**case.batch(), "by": torch.tensor(0.0 if rank else math.nan)})

    def one_has_more(rank: int) -> float:
        case = CASES["mlp"]
        plan = tithe.attach(case.model(), FISH(k=3, score="random"), loss=case.loss)
        return plan.suggest_lr(*case.batches(1 + rank))

    found = play(tmp_path, random, vrpge, twa, one_is_wrong, one_has_more)
    refused(found["one_has_more"], "suggest_lr")
    for scene in (random, vrpge):
        rates = found[scene.__name__]
        assert rates[0] == rates[1] == pytest.approx(_rate(scene.__name__, tmp_path, None), rel=2e-2)
    case = CASES["mlp"]
    plan = tithe.attach(case.model(dtype=F64), tithe.TWA(tithe.History(tmp_path / "run")), loss=case.loss)
    assert found["twa"][0] == found["twa"][1] == pytest.approx(plan.suggest_lr(case.batch(8, dtype=F64)), rel=2e-2)
    refused(found["one_is_wrong"], "loss")


def test_while_the_structure_of_frozen_weights_is_searched_only_a_head_has_a_rate() -> None:
    case = CASES["resnet_basic"]
    batches = case.batches(2, dtype=F64)
    method = tithe.VRPGE(0.6, weights="frozen")
    plan = tithe.attach(case.model(dtype=F64), method, loss=case.loss, data=batches)
    with pytest.raises(TitheError, match="trains nothing now"):
        plan.suggest_lr(batches[0])
    plan.settle(batches)
    assert 0 < plan.suggest_lr(batches[0]) < math.inf
    with_head = tithe.attach(case.model(dtype=F64), method, loss=case.loss, data=batches, head=case.head)
    assert 0 < with_head.suggest_lr(batches[0]) < math.inf
