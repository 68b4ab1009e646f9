"""A step runs the model more often than its loop does; what a forward pass writes and draws, it does once a step."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tithe
from narrow_plans import bound
from oracles import sgd
from tithe import VRPGE, NarrowPlan
from tithe.forward import untouched, written_weights

Batch = tuple[Tensor, Tensor]


def _loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


def _batch(seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 6, generator=generator), torch.randn(8, 3, generator=generator)


def _steps(plan: NarrowPlan, count: int = 3) -> None:
    opt = bound(plan, sgd)
    for seed in range(count):
        batch = _batch(seed)
        plan.backward(lambda batch=batch: _loss(plan.model, batch))
        opt.step()
        opt.zero_grad()
        plan.step()


class Remembers(nn.Module):
    """Writes into something of its own in every forward pass, by one of several ways."""

    def __init__(self, write: Callable[[Remembers, Tensor], object]) -> None:
        super().__init__()
        self.one, self.two, self.write = nn.Linear(6, 16), nn.Linear(16, 3), write
        self.register_buffer("steps", torch.tensor(0))
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("queue", torch.zeros(64, 3))
        self.register_buffer("at", torch.zeros(1, dtype=torch.int64), persistent=False)
        self.calls, self.plain, self.log, self.bank = 0, torch.zeros(()), list[int](), deque[int](maxlen=50)
        self.rng = torch.Generator().manual_seed(3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.two(torch.relu(self.one(x)))
        self.write(self, y.detach())
        return y


def _enqueue(model: Remembers, y: Tensor) -> None:
    at = int(model.at)
    model.queue[at : at + len(y)] = y
    model.at[0] = (at + len(y)) % 64


def _count(model: Remembers, y: Tensor) -> None:
    model.calls += 1


def _rebind(model: Remembers, y: Tensor) -> None:
    model.steps = model.steps + 1


def _in_place(model: Remembers, y: Tensor) -> None:
    model.steps += 1


def _rebind_plain(model: Remembers, y: Tensor) -> None:
    model.plain = model.plain + 1


WAYS: dict[str, tuple[Callable[[Remembers, Tensor], object], Callable[[Remembers], object]]] = {
    "in place": (_in_place, lambda m: int(m.steps)),
    "another buffer": (_rebind, lambda m: int(m.steps)),
    "a number": (_count, lambda m: m.calls),
    "a list": (lambda m, y: m.log.append(1), lambda m: len(m.log)),
    "a deque": (lambda m, y: m.bank.append(1), lambda m: len(m.bank)),
    "a plain tensor": (lambda m, y: m.plain.add_(1), lambda m: int(m.plain)),
    "another plain tensor": (_rebind_plain, lambda m: int(m.plain)),
    "a queue": (_enqueue, lambda m: int(m.at) // 8),
    "a queue's rows": (_enqueue, lambda m: int((m.queue != 0).any(1).sum()) // 8),
}


@pytest.mark.parametrize("way", WAYS)
def test_three_steps_write_three_times(way: str) -> None:
    write, written = WAYS[way]
    model = Remembers(write)
    plan = tithe.attach(model, VRPGE(0.5), loss=_loss, data=[_batch()])
    assert written(model) == 0
    _steps(plan)
    assert written(model) == 3
    plan.predict(_batch())
    print(plan)
    plan.settle([_batch()], draws=2)
    plan.export(_batch())
    assert written(model) == 3


def test_a_moving_average_is_of_the_steps_own_outputs() -> None:
    """Bit for bit what the outputs that the loop saw give."""
    model = Remembers(lambda m, y: m.mean.mul_(0.5).add_(y.mean(0), alpha=0.5))
    plan = tithe.attach(model, VRPGE(0.5), loss=_loss, data=[_batch()])
    opt, expected = bound(plan, sgd), torch.zeros(3)
    for seed in range(3):
        seen: list[Tensor] = []

        def closure(seed: int = seed, seen: list[Tensor] = seen) -> Tensor:
            x, target = _batch(seed)
            y = model(x)
            seen.append(y.detach())
            return F.mse_loss(y, target)

        plan.backward(closure)
        expected = expected * 0.5 + seen[-1].mean(0) * 0.5
        torch.testing.assert_close(model.mean, expected)
        opt.step()
        opt.zero_grad()
        plan.step()


def test_a_generator_of_the_model_draws_once_a_step() -> None:
    model = Remembers(lambda m, y: torch.rand(5, generator=m.rng))
    plan = tithe.attach(model, VRPGE(0.5), loss=_loss, data=[_batch()])
    _steps(plan)
    plan.settle([_batch()], draws=2)
    other = torch.Generator().manual_seed(3)
    for _ in range(3):
        torch.rand(5, generator=other)
    assert torch.equal(model.rng.get_state(), other.get_state())


class Teacher(nn.Module):
    """A frozen copy that follows the encoder in every forward pass in training mode."""

    def __init__(self, follow: Callable[[nn.Parameter, nn.Parameter], object]) -> None:
        super().__init__()
        self.encoder, self.teacher, self.follow = nn.Linear(6, 8), nn.Linear(6, 8), follow
        self.teacher.requires_grad_(False)
        self.head = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
        with torch.no_grad():
            self.encoder.weight.fill_(1.0)
            self.teacher.weight.zero_()

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                for kept, new in zip(self.teacher.parameters(), self.encoder.parameters(), strict=True):
                    self.follow(kept, new)
        return self.head(self.encoder(x) + self.teacher(x))


def _replace(kept: nn.Parameter, new: nn.Parameter) -> None:
    kept.data = kept.data * 0.5 + new.data * 0.5


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "follow",
    [
        lambda kept, new: kept.mul_(0.5).add_(new, alpha=0.5),
        lambda kept, new: kept.data.mul_(0.5).add_(new.data, alpha=0.5),
        _replace,
    ],
    ids=["in place", "data in place", "other data"],
)
def test_a_teacher_follows_once_a_step(follow: Callable[..., object], training: bool) -> None:
    model = Teacher(follow).train(training)
    plan = tithe.attach(model, VRPGE(0.5), loss=_loss, data=[_batch()], where="!encoder.*")
    assert float(model.teacher.weight[0, 0]) == 0.0
    model.train()
    opt = torch.optim.SGD(plan.parameters(), lr=0.0)
    plan.bind(opt)
    for _ in range(3):
        plan.backward(lambda: _loss(model, _batch()))
        opt.step()
        opt.zero_grad()
        plan.step()
    plan.settle([_batch()], draws=2)
    assert float(model.teacher.weight[0, 0]) == 0.875
    found = written_weights(model, lambda: model(_batch()[0]))
    assert [id(p) for p in found] == [id(p) for p in model.teacher.parameters()]


def test_untouched_leaves_other_objects_where_they_were() -> None:
    """Buffers keep their identity, their memory and their version; what two modules share, they share inside too."""
    model = nn.Sequential(nn.BatchNorm1d(6), nn.BatchNorm1d(6))
    model[1].running_mean = model[0].running_mean
    before = [(b, b._version, b.data_ptr(), b.clone()) for b in model.buffers()]
    with untouched(model):
        assert model[0].running_mean is model[1].running_mean
        model(_batch()[0])
        model.register_buffer("fresh", torch.zeros(2))
        raised = False
        try:
            with untouched(model):
                model(_batch()[0])
                raise ValueError
        except ValueError:
            raised = True
        assert raised
    assert "fresh" not in dict(model.named_buffers())
    for (buffer, version, memory, value), now in zip(before, model.buffers(), strict=True):
        assert now is buffer
        assert (buffer._version, buffer.data_ptr()) == (version, memory)
        assert torch.equal(buffer, value)
