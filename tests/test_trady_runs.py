"""TraDy in training: resume, momentum, wrappers, files, real models, and giving the model back."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import tithe
from models import CASES, LARGE, Batch, Case
from oracles import Optimizer, adamw, bits, equal_bits, gradients, parts, sgd
from tithe import Budget, TraDy
from tithe.testing import check_method

pytestmark = pytest.mark.filterwarnings("ignore:.*no rule for input channels:tithe.TitheWarning")
EVERY = [
    pytest.param(case, id=name, marks=[pytest.mark.slow] if case in LARGE else [])
    for name, case in CASES.items()
    if name not in ("recurrent", "functional")
]
THIRD = Budget(fraction=0.3)


def _attach(case: Case, model: nn.Module, method: TraDy, **settings: object) -> tithe.Plan:
    given = {"loss": case.loss, "data": case.batches(2), "head": case.head} | settings
    return tithe.attach(model, method, **given)


def _step(plan: tithe.Plan, opt: torch.optim.Optimizer, case: Case, batch: Batch, forward: object = None) -> float:
    opt.zero_grad()
    loss = plan.backward(lambda: case.loss(plan.model if forward is None else forward, batch))
    opt.step()
    plan.step()
    return loss.item()


# --- the contract, resume


@pytest.mark.parametrize(
    "method",
    [
        TraDy(Budget(fraction=0.6)),
        TraDy(Budget(fraction=0.6), layers="all", dynamic=False, lean=False),
        TraDy(Budget(fraction=0.6), layers="all", score="rgn"),
        TraDy(Budget(fraction=0.6), score="fisher"),
        TraDy(Budget("20kB"), layers="all"),
    ],
    ids=lambda m: f"{m.score}-{m.layers}-{'dynamic' if m.dynamic else 'static'}",
)
@pytest.mark.parametrize("name", ["mlp", "tied_mlp", "depthwise", "signal", "bert", "gpt2"])
def test_the_contract_holds(name: str, method: TraDy) -> None:
    case = CASES[name]
    check_method(method, case.model, case.loss, case.batches(2), head=case.head)


@pytest.mark.parametrize("optimizer", [pytest.param(sgd, marks=pytest.mark.slow), adamw])
@pytest.mark.parametrize(
    "method",
    [
        TraDy(Budget(fraction=0.6)),
        TraDy(Budget(fraction=0.6), dynamic=False),
        TraDy(Budget("10kB"), layers="all"),
        TraDy(Budget(fraction=0.6), score="rgn"),
        TraDy(Budget(fraction=0.6), score="fisher", dynamic=False),
    ],
    ids=["uniform", "static", "bytes", "rgn", "static-fisher"],
)
@pytest.mark.parametrize("stop", [2, 3])
@pytest.mark.parametrize("name", ["depthwise", "bert_dropout"])
def test_resume_equals_never_stopping(name: str, stop: int, method: TraDy, optimizer: Optimizer) -> None:
    """Epochs of two steps: the stop is at an end of an epoch, or inside one. The ranking is remembered."""
    case, batches = CASES[name], CASES[name].batches(7)

    def run(plan: tithe.Plan, opt: torch.optim.Optimizer, part: list[Batch], first: int) -> list[list[int]]:
        drawn: list[list[int]] = []
        for number, batch in enumerate(part, first):
            torch.manual_seed(number)
            _step(plan, opt, case, batch)
            drawn.append([i for s in plan.selections.values() for i in s.items.tolist()])
            if number % 2:
                plan.end_epoch()
        return drawn

    def start(model: nn.Module, state: object = None, saved: object = None) -> tuple[tithe.Plan, torch.optim.Optimizer]:
        plan = _attach(case, model, method, seed=4, state=state)
        opt = optimizer(plan.parameters())
        if saved is not None:
            opt.load_state_dict(saved)
        plan.bind(opt)
        return plan, opt

    straight, stopped, resumed = case.model(), case.model(), case.model(seed=9)
    drawn = run(*start(straight), batches, 0)
    plan, opt = start(stopped)
    assert run(plan, opt, batches[:stop], 0) == drawn[:stop]
    saved = copy.deepcopy((stopped.state_dict(), plan.state_dict(), opt.state_dict()))
    resumed.load_state_dict(saved[0])
    assert run(*start(resumed, saved[1], saved[2]), batches[stop:], stop) == drawn[stop:]
    assert equal_bits(bits(straight), bits(resumed)) == []


def test_a_state_survives_a_file(tmp_path: Path) -> None:
    case = CASES["depthwise"]
    plan = _attach(case, case.model(), TraDy(Budget("10kB")))
    torch.save(plan.state_dict(), tmp_path / "plan.pt")
    state = torch.load(tmp_path / "plan.pt", weights_only=True)
    again = _attach(case, case.model(), TraDy(Budget("10kB")), state=state)
    assert all(torch.equal(plan.selected(name), again.selected(name)) for name in plan.selections)
    plan.end_epoch()
    again.end_epoch()
    assert all(torch.equal(plan.selected(name), again.selected(name)) for name in plan.selections)


# --- training


@pytest.mark.parametrize("method", [TraDy(THIRD, lean=False), TraDy(THIRD), TraDy(THIRD, layers="all", score="rgn")])
@pytest.mark.parametrize("name", ["mlp", "depthwise", "bert", "gpt2_classifier", "convnext"])
def test_gradients_are_those_of_autograd(name: str, method: TraDy) -> None:
    """Also after a new draw; lean layers code the derivative of a GELU in eight bits."""
    case = CASES[name]
    model, batch = case.model(dtype=torch.float64), case.batch(dtype=torch.float64)
    plan = _attach(case, model, method, data=[batch])
    for _ in range(3):
        stock = case.model(dtype=torch.float64)
        for module in stock.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        expected = gradients(stock, case.loss, batch)
        plan.backward(lambda: case.loss(model, batch))
        theta = next(plan.parameters())
        assert theta.grad is not None
        found = parts(plan, theta.grad)
        for key, selection in plan.selections.items():
            want = selection.gather(expected[key])
            error = (found[key] - want).norm() / want.norm().clamp(min=1e-12)
            assert error < (1e-6 if "single" in case.tags or not method.lean else 0.02), key
        theta.grad = None
        plan.end_epoch()


@pytest.mark.parametrize("case", EVERY)
def test_every_model_of_the_zoo_learns(case: Case) -> None:
    """A fifth of the channels, a new draw every second step, SGD without momentum as in the paper."""
    if "single" in case.tags or case.dropout:
        pytest.skip("random labels, or a loss that is drawn")
    model, batch = case.model(), case.batch(8)
    plan = _attach(case, model, TraDy(Budget(fraction=0.4), layers="all", optimizer_states=0), data=[batch])
    opt = torch.optim.SGD(plan.parameters(), lr=0.05)
    plan.bind(opt)
    predicted = None if case.name == "experts" else plan.predict(batch)
    losses: list[float] = []
    for number in range(16):
        losses.append(_step(plan, opt, case, batch))
        if number % 2:
            plan.end_epoch()
    assert losses[-1] < losses[0]
    assert predicted is None or predicted.kept > 0


def test_stayers_keep_their_momentum_and_entrants_start_at_zero() -> None:
    case = CASES["bert"]
    plan = _attach(case, case.model(), TraDy(Budget(fraction=0.8), layers="all"))
    opt = sgd(plan.parameters())
    plan.bind(opt)
    parameters = [(name, id(p)) for name, p in plan.named_parameters()]
    stayed = entered = 0
    for _ in range(3):
        _step(plan, opt, case, case.batch())
        theta = next(plan.parameters())
        before = parts(plan, opt.state[theta]["momentum_buffer"])
        old = {
            name: {c: row.clone() for c, row in zip(s.items.tolist(), s.by_item(before[name]), strict=True)}
            for name, s in plan.selections.items()
        }
        assert plan.end_epoch()
        after = parts(plan, opt.state[theta]["momentum_buffer"])
        for name, selection in plan.selections.items():
            if name not in old:
                continue
            for channel, row in zip(selection.items.tolist(), selection.by_item(after[name]), strict=True):
                stayed += channel in old[name]
                entered += channel not in old[name]
                assert torch.equal(row, old[name].get(channel, torch.zeros_like(row)))
    assert stayed
    assert entered
    assert [(name, id(p)) for name, p in plan.named_parameters()] == parameters


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_model_is_priced_once(reentrant: bool) -> None:
    """What activation checkpointing runs again is no second use of a weight."""

    class Again(nn.Module):
        def __init__(self, again: bool) -> None:
            super().__init__()
            self.body, self.out, self.again = nn.Sequential(nn.Linear(6, 8), nn.ReLU()), nn.Linear(8, 3), again

        def forward(self, x: Tensor) -> Tensor:
            h = checkpoint(self.body, x, use_reentrant=reentrant) if self.again else self.body(x)
            return self.out(h)

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return model(x.requires_grad_()).square().mean()

    found: list[dict[str, list[int]]] = []
    for again in (False, True):
        torch.manual_seed(0)
        plan = tithe.attach(Again(again), TraDy(Budget(elements=40), layers="all"), loss=loss, data=[torch.randn(4, 6)])
        found.append({name: s.items.tolist() for name, s in plan.selections.items()})
        plan.backward(lambda plan=plan: loss(plan.model, torch.randn(4, 6)))
    assert found[0] == found[1]


def test_backward_stops_at_the_lowest_drawn_layer() -> None:
    """Static, one layer in the middle: nothing below it records or keeps anything."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(m for _ in range(4) for m in (nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU6()))
    )

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).square().mean()

    x = torch.randn(4, 4, 8, 8)
    plan = tithe.attach(model, TraDy(Budget(elements=300), layers="all"), loss=loss, data=[x], where="6.weight")
    ledger = tithe.measure(lambda: plan.backward(lambda: loss(model, x)), model=model)
    assert {path for path, size in ledger.kept_by_module.items() if size} <= {"", *map(str, range(6, 12))}
    assert ledger.kept_by_module["6"] == 4 * 64 * 4 * plan.selections["6.weight"].items.numel()
    seen: dict[str, bool] = {}
    for path, module in model.named_children():
        module.register_forward_hook(lambda m, x, y, path=path: seen.__setitem__(path, y.requires_grad))
    loss(model, x)
    assert [path for path, asks in seen.items() if not asks] == [str(i) for i in range(6)]


# --- giving the model back


@pytest.mark.parametrize("lean_before", [False, True])
def test_release_leaves_nothing_and_a_model_that_was_lean_stays_lean(lean_before: bool) -> None:
    case = CASES["depthwise"]
    model = case.model()
    handle = tithe.lean(model) if lean_before else None
    keys, attributes = list(model.state_dict()), [sorted(vars(m)) for m in model.modules()]
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
    flags = [(name, p.requires_grad, type(p)) for name, p in model.named_parameters()]
    plan = _attach(case, model, TraDy(THIRD))
    opt = sgd(plan.parameters())
    plan.bind(opt)
    assert tithe.Lean.of(model) is not None
    assert list(model.state_dict()) == keys
    _step(plan, opt, case, case.batch())
    plan.end_epoch()
    plan.release()
    plan.release()
    assert (tithe.Lean.of(model) is not None) is lean_before
    assert list(model.state_dict()) == keys
    assert [sorted(vars(m)) for m in model.modules()] == attributes
    assert [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()] == hooks
    assert [(name, p.requires_grad, type(p)) for name, p in model.named_parameters()] == flags
    if handle is not None:
        handle.release()


def test_a_delta_holds_every_column_ever_drawn(tmp_path: Path) -> None:
    case = CASES["depthwise"]
    model, base = case.model(), case.model()
    plan = _attach(case, model, TraDy(Budget(fraction=0.5)))
    opt = adamw(plan.parameters())
    plan.bind(opt)
    for number in range(6):
        _step(plan, opt, case, case.batch(seed=number))
        plan.end_epoch()
    plan.save(tmp_path / "delta.safetensors")
    tithe.apply(base, tmp_path / "delta.safetensors")
    assert equal_bits(bits(model), bits(base)) == []
    info = tithe.inspect(tmp_path / "delta.safetensors")
    assert "TraDy" in str(info)


def test_copies_of_an_attached_model_train_alone() -> None:
    case = CASES["depthwise"]
    model = case.model()
    plan = _attach(case, model, TraDy(THIRD))
    twin = copy.deepcopy(model)
    before = bits(twin)
    opt = sgd(plan.parameters())
    plan.bind(opt)
    _step(plan, opt, case, case.batch())
    assert equal_bits(before, bits(twin)) == []
    case.loss(twin, case.batch()).backward()


# --- ranks


def _halves(batch: Batch) -> list[Batch]:
    half = len(next(iter(batch.values()))) // 2
    return [{k: v[:half] for k, v in batch.items()}, {k: v[half:] for k, v in batch.items()}]


SETTINGS = {"uniform": {}, "static": {"dynamic": False}, "rgn": {"score": "rgn"}, "bytes": {"budget": Budget("9kB")}}


def _run(name: str, rank: int | None) -> dict[str, object]:
    """Three epochs of two steps on the depthwise model, on half of each batch where there are two ranks."""
    case = CASES["depthwise"]
    method = TraDy(**({"budget": Budget(fraction=0.6), "layers": "all"} | SETTINGS[name]))
    model, batches = case.model(dtype=torch.float64), case.batches(2, 8, dtype=torch.float64)
    if rank is not None:
        batches = [_halves(batch)[rank] for batch in batches]
    plan = tithe.attach(model, method, loss=case.loss, data=batches, head=case.head, seed=2)
    forward = model if rank is None else DistributedDataParallel(model)
    opt = torch.optim.SGD(plan.parameters(), lr=0.05)
    plan.bind(opt)
    drawn: list[dict[str, list[int]]] = []
    for _ in range(3):
        drawn.append({key: selection.items.tolist() for key, selection in plan.selections.items()})
        for batch in batches:
            _step(plan, opt, case, batch, forward)
        plan.end_epoch()
    return {"model": model.state_dict(), "drawn": drawn}


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for name in SETTINGS:
        torch.save(_run(name, rank), f"{folder}/{name}-{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_draw_alike_and_equal_one(tmp_path: Path) -> None:
    """The wrapper is made once, before the first draw is replaced."""
    mp.spawn(_rank, (str(tmp_path),), nprocs=2)
    for name in SETTINGS:
        one = _run(name, None)
        ranks = [torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=True) for rank in range(2)]
        assert ranks[0]["drawn"] == ranks[1]["drawn"], name
        assert all(torch.equal(ranks[0]["model"][key], value) for key, value in ranks[1]["model"].items()), name
        if name in ("rgn", "bytes"):
            continue  # a rank measures norms of, and pays for, its own half of a batch
        assert ranks[0]["drawn"] == one["drawn"], name
        for key, value in one["model"].items():
            torch.testing.assert_close(ranks[0]["model"][key], value, rtol=1e-9, atol=1e-12)
