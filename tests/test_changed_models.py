"""A model that is changed under its plan: what can be followed is, the rest is refused by name before the next step."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

import tithe
from models import CASES
from oracles import bits, equal_bits, sgd
from tithe import FISH, TitheError, TitheWarning

Batch = tuple[Tensor, Tensor]


def _mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.LeakyReLU(0.2), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))


def _batch() -> Batch:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(32, 6, generator=generator), torch.randint(3, (32,), generator=generator)


def _loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


METHODS: dict[str, Callable[[], tithe.SparseMethod]] = {
    "once": lambda: FISH(k=60),
    "again": lambda: FISH(k=60, reselect=tithe.every(100)),
    "channels": lambda: tithe.TraDy(tithe.Budget(fraction=0.5)),
}
each_method = pytest.mark.parametrize("method", METHODS)


def _attach(model: nn.Module, method: str) -> tithe.Plan:
    return tithe.attach(model, METHODS[method](), loss=_loss, data=[_batch()], head="4.*")


def _steps(plan: tithe.Plan, count: int = 2) -> None:
    optimizer = torch.optim.SGD(plan.parameters(), lr=0.3)
    for _ in range(count):
        optimizer.zero_grad()
        _loss(plan.model, _batch()).backward()
        optimizer.step()


def _expected(start: nn.Module, plan: tithe.Plan, count: int = 2) -> dict[str, Tensor]:
    """Masked training from the weights of `start`, written the obvious way."""
    model = copy.deepcopy(start)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for _ in range(count):
        optimizer.zero_grad()
        _loss(model, _batch()).backward()
        for name, parameter in model.named_parameters():
            if name in plan.head:
                continue
            assert parameter.grad is not None
            mask = torch.zeros(parameter.numel())
            mask[plan.selected(name)] = 1
            parameter.grad.mul_(mask.view_as(parameter))
        optimizer.step()
    return model.state_dict()


def _other() -> nn.Sequential:
    model = _mlp()
    torch.manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def _assign(model: nn.Module) -> None:
    model.load_state_dict({k: v.clone() for k, v in _other().state_dict().items()}, assign=True)


def _load(model: nn.Module) -> None:
    model.load_state_dict(_other().state_dict())


def _load_a_part(model: nn.Module) -> None:
    for number in ("0", "2", "4"):
        model.get_submodule(number).load_state_dict(_other().get_submodule(number).state_dict())


def _fresh_parameters(model: nn.Module) -> None:
    for number in ("0", "2", "4"):
        for name, value in _other().get_submodule(number).named_parameters():
            setattr(model.get_submodule(number), name, nn.Parameter(value.detach().clone()))


def _copy(model: nn.Module) -> None:
    with torch.no_grad():
        for name, value in _other().named_parameters():
            model.get_parameter(name).copy_(value)


def _through_data(model: nn.Module) -> None:
    for name, value in _other().named_parameters():
        model.get_parameter(name).data.copy_(value)


WRITES = [_assign, _load, _load_a_part, _fresh_parameters, _copy, _through_data]


@each_method
@pytest.mark.parametrize("write", WRITES)
def test_weights_that_are_written_are_followed_and_saved(
    method: str, write: Callable[[nn.Module], None], tmp_path: object
) -> None:
    base, model = _mlp(), _mlp()
    plan = _attach(model, method)
    write(model)
    expected = _expected(_other(), plan)
    _steps(plan)
    for name, value in expected.items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    assert list(model.state_dict()) == list(base.state_dict())
    if write is not _through_data:  # nothing counts such a write: entries that are not selected are not known to move
        plan.save(f"{tmp_path}/delta")
        tithe.apply(base, f"{tmp_path}/delta")
        assert equal_bits(bits(base), bits(model)) == []
    plan.release()
    assert [type(p) for p in model.parameters()] == [nn.Parameter] * 6
    assert all(p.requires_grad for p in model.parameters())


@each_method
def test_a_checkpoint_of_the_run_counts_only_what_differs(method: str, tmp_path: object) -> None:
    """Loading a trained checkpoint into a freshly attached base: the delta is that of the run, not the whole model."""
    trained = _mlp()
    first = _attach(trained, method)
    _steps(first)
    state = trained.state_dict()
    moved = sum(int((value != _mlp().state_dict()[name]).sum()) for name, value in state.items())
    model = _mlp()
    plan = _attach(model, method)
    model.load_state_dict(state)
    plan.save(f"{tmp_path}/delta")
    base = _mlp()
    tithe.apply(base, f"{tmp_path}/delta")
    assert equal_bits(bits(base), bits(trained)) == []
    whole = sum(parameter.numel() for parameter in base.parameters())
    assert 0 < moved < whole
    assert sum(int(value.numel()) for value in plan.state_dict()["values"].values()) < whole


@each_method
def test_theta_that_is_written_goes_into_the_weights(method: str) -> None:
    """In place, through `.data`, and back: as an average does that swaps places with the parameters."""
    model = _mlp()
    plan = _attach(model, method)
    before = bits(model)
    kept = [p.detach().clone() for p in plan.parameters()]
    for write in (lambda p: p.data.add_(1), lambda p: p.detach().add_(1), lambda p: p.data.mul_(2)):
        with torch.no_grad():
            for parameter in plan.parameters():
                write(parameter)
            model(_batch()[0])
        for name in plan.selections:
            assert (model.get_parameter(name).detach().flatten() != before[name].flatten())[plan.selected(name)].all()
        with torch.no_grad():
            for parameter, value in zip(plan.parameters(), kept, strict=True):
                parameter.data.copy_(value)
            model(_batch()[0])
        assert equal_bits(before, bits(model)) == []


@each_method
def test_flags_are_set_back_with_one_warning(method: str) -> None:
    model, twin = _mlp(), _mlp()
    plan, other = _attach(model, method), _attach(twin, method)
    model.requires_grad_(False)
    model.requires_grad_(True)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.3) for m in (model, twin)]
    for network, optimizer in zip((model, twin), optimizers, strict=True):
        for step in range(2):
            optimizer.zero_grad()
            told = pytest.warns(TitheWarning, match="head=") if network is model and not step else _quiet()
            with told:
                _loss(network, _batch()).backward()
            optimizer.step()
    assert equal_bits(bits(model), bits(twin)) == []
    assert {type(plan), type(other)} == {type(plan)}


def _quiet() -> warnings.catch_warnings:
    return warnings.catch_warnings()


def _replace(model: nn.Sequential) -> None:
    model[0] = nn.Linear(6, 16)


def _resize(model: nn.Sequential) -> None:
    model[0].weight = nn.Parameter(torch.randn(20, 6))


def _prune(model: nn.Sequential) -> None:
    prune.l1_unstructured(model[2], "weight", 0.3)


def _delete(model: nn.Sequential) -> None:
    del model[2].bias


def _retype(model: nn.Sequential) -> None:
    model[2].weight = nn.Parameter(torch.randn(16, 16, dtype=torch.float64))


def _swap(model: nn.Sequential) -> None:
    """Each has the other's Parameter."""
    a, b = model[0]._parameters, model[2]._parameters
    a["bias"], b["bias"] = b["bias"], a["bias"]


@each_method
@pytest.mark.parametrize(
    ("change", "told"),
    [
        (_replace, "0"),
        (_resize, "0.weight"),
        (_prune, "2.weight"),
        (_delete, "2.bias"),
        (_retype, "2.weight"),
        (_swap, ".bias"),
    ],
)
def test_what_cannot_be_followed_is_refused_by_name(
    method: str, change: Callable[[nn.Sequential], None], told: str
) -> None:
    model = _mlp()
    plan = _attach(model, method)
    optimizer = sgd(plan.parameters())
    _loss(model, _batch()).backward()
    change(model)
    with pytest.raises(TitheError, match="release") as error:
        _loss(model, _batch())
    assert told in error.value.place
    with pytest.raises(TitheError):
        optimizer.step()
    plan.release()  # the remedy
    model[2] = nn.Linear(16, 16)
    model[0] = nn.Linear(6, 16)
    _steps(_attach(model, method))


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(10, 6), nn.Linear(6, 10, bias=False)
        self.mix = nn.Linear(6, 6)
        self.tie()

    def tie(self) -> None:
        self.out.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(torch.tanh(self.mix(self.embed(ids))))


def test_weights_tied_again_stay_tied() -> None:
    model = _Tied()
    plan = tithe.attach(model, FISH(k=20, score="random"))
    model.tie()
    ids = torch.arange(10)
    F.cross_entropy(model(ids), ids).backward()
    assert sum(1 for _ in model.state_dict()) == 4
    plan.release()
    assert type(model.out.weight) is nn.Parameter
    assert model.out.weight is model.embed.weight
    assert len(list(model.parameters())) == 3


def test_weights_that_come_apart_are_refused() -> None:
    model = _Tied()
    tithe.attach(model, FISH(k=20, score="random"))
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    with pytest.raises(TitheError, match="tied"):
        model(torch.arange(10))


@pytest.mark.parametrize("reselect", [None, tithe.every(100)], ids=["once", "again"])
def test_a_use_outside_of_what_is_attached_counts(reselect: tithe.Schedule | None) -> None:
    torch.manual_seed(0)
    embed, out = nn.Embedding(10, 6), nn.Linear(6, 10, bias=False)
    out.weight = embed.weight
    body, ids = nn.Sequential(embed, nn.Linear(6, 6), nn.Tanh()), torch.randint(10, (32,))
    F.cross_entropy(out(body(ids)), ids).backward()
    assert embed.weight.grad is not None
    want = embed.weight.grad.flatten().clone()
    embed.weight.grad = None
    plan = tithe.attach(body, FISH(k=30, score="random", reselect=reselect), where="0.weight")
    F.cross_entropy(out(body(ids)), ids).backward()
    (theta,) = plan.parameters()
    assert theta.grad is not None
    torch.testing.assert_close(theta.grad, want[plan.selected("0.weight")])
    plan.release()
    assert out.weight is embed.weight
    assert type(out.weight) is nn.Parameter
    assert list(out.state_dict()) == ["weight"]


def test_a_use_outside_of_a_narrow_network_is_refused() -> None:
    model = _mlp()
    outside = nn.Linear(6, 16)
    outside.weight = model[0].weight
    with pytest.raises(TitheError, match="outside") as error:
        tithe.attach(model, tithe.VRPGE(0.5), loss=_loss, data=[_batch()])
    assert error.value.place == "0.weight"


@each_method
def test_a_copy_goes_on_by_itself_and_may_be_attached_again(method: str) -> None:
    model = _mlp()
    plan = _attach(model, method)
    _steps(plan)
    best = copy.deepcopy(model)
    kept = bits(best)
    _steps(plan)
    assert equal_bits(kept, bits(best)) == []
    again = _attach(best, method)
    _steps(again)
    again.release()
    assert [sorted(vars(m)) for m in best.modules()] == [sorted(vars(m)) for m in _mlp().modules()]
    plan.release()


def test_a_copy_of_a_part_follows_its_own_theta() -> None:
    model = _mlp()
    plan = _attach(model, "once")
    part = copy.deepcopy(model[0])
    theta = next(p for name, p in part.named_parameters() if name.endswith("@theta"))
    optimizer = torch.optim.SGD([theta], lr=1.0)
    x = torch.randn(4, 6)
    before = part(x).detach()
    part(x).square().sum().backward()
    optimizer.step()
    assert not torch.equal(part(x), before)
    assert equal_bits({"w": model[0].weight.detach()}, {"w": _mlp()[0].weight.detach()}) == []
    plan.release()


def test_an_average_of_the_model_by_torch_is_an_average() -> None:
    model = _mlp()
    plan = _attach(model, "once")
    average = torch.optim.swa_utils.AveragedModel(model)
    points: list[dict[str, Tensor]] = []
    for _ in range(3):
        _steps(plan, 1)
        average.update_parameters(model)
        points.append({k: v.clone() for k, v in model.state_dict().items()})
    mean = _mlp()
    mean.load_state_dict({k: torch.stack([p[k] for p in points]).mean(0) for k in points[0]})
    torch.testing.assert_close(average(_batch()[0]), mean(_batch()[0]))


@pytest.mark.parametrize("method", ["narrow", "span"])
def test_the_other_plans_refuse_what_they_cannot_follow(method: str, tmp_path: object) -> None:
    history = tithe.History(str(tmp_path))
    for step in range(3):
        torch.manual_seed(step)
        point = _mlp()
        with torch.no_grad():
            for parameter in point.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        history.record(point, step)
    model = _mlp()
    kind = tithe.VRPGE(0.7) if method == "narrow" else tithe.TWA(history)
    plan = tithe.attach(model, kind, loss=_loss, data=[_batch()])
    _assign(model)
    with pytest.raises(TitheError):
        plan.backward(lambda: _loss(model, _batch()))
    if method == "span":  # written in place
        plan = tithe.attach(_mlp(), kind, loss=_loss, data=[_batch()])
        _copy(plan.model)
        with pytest.raises(TitheError, match="written into it from outside"):
            plan.backward(lambda: _loss(plan.model, _batch()))
        plan.backward(lambda: _loss(plan.model, _batch()))


def test_a_model_that_moved_is_followed() -> None:
    """`.to(dtype)` and back while attached."""
    case = CASES["mlp"]
    model = case.model()
    plan = tithe.attach(model, FISH(k=40, score="random"), loss=case.loss, data=case.batches(1))
    model.to(torch.float64).to(torch.float32)
    plan.backward(lambda: case.loss(model, case.batch()))
    assert any(p.grad is not None for p in plan.parameters())
