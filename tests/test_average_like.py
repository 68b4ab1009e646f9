"""Averages that stand for something: a decay of the learning rate, or a moving average of any width."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn
from typer.testing import CliRunner

import tithe
from deltas import Tied
from histories import checkpoints, recorded, walk
from models import CASES
from tithe import TWA, History, TitheError, TitheWarning
from tithe.app.cli import app
from tithe.averages import recorder
from tithe.averages.decay import DECAYS, decay_weights
from tithe.averages.power_ema import Profile, exponent, followed, products, reconstruct, steps_between
from tithe.averages.recorder import weights_of

each_decay = pytest.mark.parametrize("decay", DECAYS)
SHAPES = {
    "linear": lambda i, k: 1 - i / (k + 1),
    "cosine": lambda i, k: (1 + math.cos(math.pi * i / (k + 1))) / 2,
    "sqrt": lambda i, k: 1 - math.sqrt(i / (k + 1)),
}
"""What is left of the update from checkpoint i − 1 to i, of k + 1 checkpoints: the paper's formulas."""


def sgd(model: nn.Module, steps: int, rates: Sequence[float], history: History | None = None) -> list[Tensor]:
    """A run of SGD, each step recorded; returns all weights after each, the start first."""
    generator = torch.Generator().manual_seed(1)
    found = [torch.cat([p.detach().flatten().clone() for p in model.parameters()])]
    if history is not None:
        history.record(model, 0)
    for step in range(1, steps + 1):
        x = torch.randn(8, 5, generator=generator, dtype=torch.float64)
        y = torch.randn(8, generator=generator, dtype=torch.float64)
        (model(x)[:, 0] - y).square().mean().backward()
        with torch.no_grad():
            for weight in model.parameters():
                assert weight.grad is not None
                weight -= rates[step - 1] * weight.grad
                weight.grad = None
        found.append(torch.cat([p.detach().flatten().clone() for p in model.parameters()]))
        if history is not None:
            history.record(model, step)
    return found


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 1)).double()


def flat(state: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.flatten() for value in state.values()])


# --- decays


@each_decay
@given(count=st.integers(1, 60))
def test_weights_leave_of_each_update_what_the_decay_leaves(decay: str, count: int) -> None:
    weights = decay_weights(decay, count)
    assert len(weights) == count
    assert math.isclose(sum(weights), 1)
    assert min(weights) > 0
    left = [math.fsum(weights[i:]) for i in range(1, count)]
    assert left == pytest.approx([SHAPES[decay](i, count - 1) for i in range(1, count)], abs=1e-14)


def test_linear_is_the_uniform_mean() -> None:
    assert decay_weights("linear", 7) == pytest.approx([1 / 7] * 7, abs=1e-15)


@each_decay
def test_the_average_of_a_run_is_its_updates_scaled_by_the_decay(decay: str, tmp_path: Path) -> None:
    history, model = History(tmp_path / "run"), net()
    at = sgd(model, 9, [0.1] * 9, history)
    found = flat(history.average(history.weights(decay)))
    updates = [before - after for before, after in itertools.pairwise(at)]
    expected = at[0] - torch.stack([SHAPES[decay](i, 9) * update for i, update in enumerate(updates, start=1)]).sum(0)
    assert torch.allclose(found, expected, rtol=0, atol=1e-15)
    late = flat(history.average(history.weights(decay, last=4)))
    expected = at[6] - torch.stack([SHAPES[decay](i, 3) * updates[5 + i] for i in range(1, 4)]).sum(0)
    assert torch.allclose(late, expected, rtol=0, atol=1e-15)


@each_decay
def test_where_gradients_do_not_depend_on_weights_it_is_the_decayed_run(decay: str, tmp_path: Path) -> None:
    slopes = torch.randn(8, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    history, model, decayed = History(tmp_path / "run"), nn.Linear(3, 1, bias=False).double(), torch.zeros(3)
    nn.init.zeros_(model.weight)
    decayed = decayed.double()
    history.record(model, 0)
    for step, slope in enumerate(slopes, start=1):
        with torch.no_grad():
            model.weight -= 0.1 * slope
        decayed -= 0.1 * SHAPES[decay](step, 8) * slope
        history.record(model, step)
    assert torch.allclose(history.average(history.weights(decay))["weight"][0], decayed, rtol=0, atol=1e-15)


@each_decay
@pytest.mark.parametrize("bits", [None, 8])
def test_the_command_the_function_and_the_history_agree(decay: str, bits: int | None, tmp_path: Path) -> None:
    history = recorded(tmp_path / "run", walk(CASES["resnet_basic"].model(), 5), bits)
    expected = history.average(history.weights(decay, last=3))
    one = tithe.average(history, tmp_path / "one.safetensors", like=decay, last=3)
    words = ["average", tmp_path / "run", "-o", tmp_path / "two.safetensors", "--like", decay, "--last", 3]
    ran = CliRunner().invoke(app, [str(word) for word in words])
    assert ran.exit_code == 0, ran.output
    for path in (one, tmp_path / "two.safetensors"):
        found = load_file(path)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.allclose(found[name].double(), value.double(), rtol=0, atol=1e-6)


@each_decay
@pytest.mark.parametrize("bits", [None, 4])
def test_a_span_starts_where_the_decay_leads(decay: str, bits: int | None, tmp_path: Path) -> None:
    case = CASES["resnet_basic"]
    models = walk(case.model(), 5)
    history = recorded(tmp_path / "run", models)
    expected = history.average(history.weights(decay))
    model = copy.deepcopy(models[0])
    plan = tithe.attach(model, TWA(history, bits=bits, start=decay), loss=case.loss, data=case.batches(2))
    found = model.state_dict()
    for name, value in expected.items():
        assert torch.allclose(found[name].double(), value.double(), rtol=1e-6, atol=1e-6), name
    plan.release()


def test_a_state_of_another_start_is_refused(tmp_path: Path) -> None:
    case = CASES["resnet_basic"]
    history = recorded(tmp_path / "run", walk(case.model(), 4))
    plan = tithe.attach(case.model(), TWA(history, granularity="tensor", start="cosine"), loss=case.loss)
    state = plan.state_dict()
    table = plan.coefficients()
    assert all(values.tolist() == pytest.approx(decay_weights("cosine", 4)) for values in table.values())
    again = tithe.attach(case.model(), TWA(history, granularity="tensor", start="cosine"), loss=case.loss)
    again.load_state_dict(state)
    older = {key: value for key, value in state.items() if key != "start"}
    other = tithe.attach(case.model(), TWA(history, granularity="tensor"), loss=case.loss)
    other.load_state_dict(older)
    with pytest.raises(TitheError, match="another start"):
        other.load_state_dict(state)


def test_deltas_average_along_a_decay(tmp_path: Path) -> None:
    case = CASES["resnet_basic"]
    model = case.model()
    plan = tithe.attach(model, tithe.FISH(density=0.3), loss=case.loss, data=case.batches(2), head=case.head)
    optimizer = torch.optim.SGD(plan.parameters(), lr=0.1)
    plan.bind(optimizer)
    (tmp_path / "deltas").mkdir()
    for step, batch in enumerate(case.batches(4)):
        plan.backward(lambda batch=batch: case.loss(model, batch))
        optimizer.step()
        optimizer.zero_grad()
        plan.step()
        plan.save(tmp_path / "deltas" / f"{step}.safetensors")
    path = tithe.average(tmp_path / "deltas", tmp_path / "end.safetensors", like="cosine")
    same = tithe.average(tmp_path / "deltas", tmp_path / "w.safetensors", decay_weights("cosine", 4))
    assert all(torch.equal(value, load_file(same)[name]) for name, value in load_file(path).items())
    plan.release()


# --- moving averages


@given(width=st.floats(0.005, 0.28))
def test_the_exponent_has_the_width(width: float) -> None:
    gamma = exponent(width)
    assert math.isclose(math.sqrt(gamma + 1) / ((gamma + 2) * math.sqrt(gamma + 3)), width, rel_tol=1e-9)


steps_of_runs = st.lists(st.integers(1, 9), min_size=1, max_size=40).map(lambda gaps: np.cumsum(gaps).tolist())


@given(steps=steps_of_runs, width=st.floats(0.02, 0.28), cut=st.integers(1, 200))
def test_a_profile_is_what_the_updates_leave(steps: list[int], width: float, cut: int) -> None:
    runs: tuple[tuple[int, int, int], ...] = ()
    expected, before = np.zeros(len(steps)), 0
    for place, step in enumerate(steps):
        runs = followed(runs, step)
        keep = (before / step) ** (exponent(width) + 1)
        expected *= keep
        expected[place] += 1 - keep
        before = step
    found, values = Profile(width, runs).between(1, steps[-1] + 1)
    assert found.tolist() == steps
    assert np.allclose(values, expected, rtol=1e-9, atol=1e-12)
    assert math.isclose(values.sum(), 1, rel_tol=1e-12)
    last, rest = steps_between(runs, cut, steps[-1] + 1)
    assert last == max((step for step in steps if step < cut), default=0)
    assert rest.tolist() == [step for step in steps if step >= cut]


@given(ends=st.lists(st.integers(1, 60), min_size=1, max_size=4, unique=True), stride=st.integers(1, 3))
def test_products_are_those_of_the_profiles(ends: list[int], stride: int) -> None:
    profiles = [Profile(w, ((stride, stride * end, stride),)) for end in ends for w in (0.05, 0.2)]
    dense = np.zeros((len(profiles), stride * max(ends) + 1))
    for row, profile in zip(dense, profiles, strict=True):
        steps, values = profile.between(1, stride * max(ends) + 1)
        row[steps] = values
    assert np.allclose(products(profiles).numpy(), dense @ dense.T, rtol=1e-12, atol=1e-15)


@given(count=st.integers(2, 12), step=st.integers(5, 40), data=st.data())
def test_a_recorded_average_is_given_back(count: int, step: int, data: st.DataObject) -> None:
    profiles = [Profile(w, ((1, step * i, 1),)) for i in range(1, count + 1) for w in (0.05, 0.10)]
    wanted = data.draw(st.sampled_from(profiles))
    weights, distance = reconstruct(profiles, wanted)
    assert distance < 1e-5
    assert math.isclose(sum(weights), 1, abs_tol=1e-9)


@pytest.mark.parametrize(("width", "limit"), [(0.03, 0.03), (0.06, 0.003), (0.08, 0.002), (0.15, 0.006), (0.2, 0.02)])
def test_twenty_snapshots_come_near_other_widths(width: float, limit: float) -> None:
    profiles = [Profile(w, ((1, 100 * i, 1),)) for i in range(1, 21) for w in (0.05, 0.10)]
    assert reconstruct(profiles, Profile(width, ((1, 2000, 1),)))[1] < limit


class Run:
    """SGD on noise, whose history of averages is recorded every few steps, and every weight kept."""

    def __init__(self, folder: Path, *, each: int = 10, model: nn.Module | None = None) -> None:
        torch.manual_seed(3)
        made = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 1)).double()
        self.model = made if model is None else model
        self.folder, self.each, self.step = folder, each, 0
        self.history = History(folder, ema=(0.05, 0.10))
        self.states: list[dict[str, Tensor]] = []

    def go(self, steps: int) -> None:
        for _ in range(steps):
            self.step += 1
            generator = torch.Generator().manual_seed(self.step)
            weight = next(self.model.parameters())
            x = torch.randn(16, 4, generator=generator, dtype=torch.float64).to(weight.dtype)
            self.model(x).square().mean().backward()
            with torch.no_grad():
                for weight in self.model.parameters():
                    assert weight.grad is not None
                    weight -= 0.1 * weight.grad
                    weight.grad = None
            self.states.append({name: value.clone() for name, value in self.model.state_dict().items()})
            self.history.update(self.model, self.step)
            if self.step % self.each == 0:
                assert self.history.record(self.model, self.step)

    def true(self, width: float, name: str) -> Tensor:
        """The moving average itself, in float64."""
        average, power = torch.zeros(()), exponent(width) + 1
        for step, state in enumerate(self.states, start=1):
            keep = ((step - 1) / step) ** power
            average = keep * average + (1 - keep) * state[name].double()
        return average


def test_any_width_is_near_the_moving_average_itself(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    run.go(200)
    history = History(tmp_path / "run")
    assert history.ema == (0.05, 0.10)
    assert history.steps == [step for step in range(10, 201, 10) for _ in range(2)]
    spread = (run.true(0.05, "0.weight") - run.true(0.10, "0.weight")).norm()
    for width, limit in ((0.05, 1e-6), (0.10, 1e-6), (0.07, 0.02), (0.08, 0.02), (0.13, 0.02)):
        found = history.average(history.weights(f"ema:{width}"))
        for name in ("0.weight", "1.running_var"):
            error = (found[name] - run.true(width, name)).norm()
            assert error <= limit * (spread if name == "0.weight" else run.true(width, name).norm()), (width, name)
    path = tithe.average(tmp_path / "run", tmp_path / "end.safetensors", like="ema:0.08")
    single = tithe.average(sorted((tmp_path / "run").iterdir()), tmp_path / "again.safetensors", like="ema:0.08")
    expected = history.average(history.weights("ema:0.08"))
    for name, value in expected.items():
        assert torch.allclose(load_file(path)[name].double(), value.double(), rtol=0, atol=1e-12)
        assert torch.equal(load_file(path)[name], load_file(single)[name])
    assert History(path).ema is None


def test_a_run_that_goes_on_records_the_same_bits(tmp_path: Path) -> None:
    whole = Run(tmp_path / "whole", each=7)
    whole.go(30)
    for name, stop in (("reopened", 21), ("state", 24)):
        first = Run(tmp_path / name, each=7)
        first.go(stop)
        state = copy.deepcopy(first.history.state_dict())
        second = Run(tmp_path / name, each=7, model=copy.deepcopy(first.model))
        second.step = stop
        if name == "state":
            second.history.load_state_dict(state)
        second.go(30 - stop)
        for one, two in zip(History(tmp_path / "whole"), History(tmp_path / name), strict=True):
            assert all(torch.equal(value, two[key]) for key, value in one.items())
        notes = [one.history._notes for one in (whole, second)]
        assert [note.profile for note in notes[0]] == [note.profile for note in notes[1]]


def test_a_gap_is_told(tmp_path: Path) -> None:
    """A run that goes on without its state leaves a gap, which the profile knows: its average is still right."""
    first = Run(tmp_path / "run", each=10)
    first.go(25)
    second = Run(tmp_path / "run", each=10, model=first.model)
    second.step = 25
    second.go(15)
    states = dict(enumerate([*first.states, *second.states], start=1))
    history = History(tmp_path / "run")
    last = history._notes[-1]
    assert last.steps == ((1, 20, 1), (26, 40, 1))
    assert last.profile is not None
    steps, values = last.profile.between(1, 41)
    expected = sum(float(value) * states[int(step)]["0.weight"] for step, value in zip(steps, values, strict=True))
    assert torch.allclose(history[-1]["0.weight"], torch.as_tensor(expected), rtol=0, atol=1e-12)


def test_steps_may_be_left_out(tmp_path: Path) -> None:
    history, model = History(tmp_path / "run", ema=(0.1,)), nn.Linear(3, 1)
    for step in range(5, 101, 5):
        nn.init.constant_(model.weight, float(step))
        history.update(model, step)
    assert history.record(model, 100)
    assert history._notes[0].steps == ((5, 100, 5),)
    steps, values = Profile(0.1, ((5, 100, 5),)).between(1, 101)
    assert float(history[0]["weight"][0, 0]) == pytest.approx(float((steps * values).sum()), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_followed_in_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    history, model = History(tmp_path / "run", ema=(0.05, 0.10)), nn.Linear(3, 2, bias=False).to(dtype)
    values: list[Tensor] = []
    for step in range(1, 41):
        nn.init.constant_(model.weight, 1 + step / 64)
        values.append(model.weight.detach().float().clone())
        history.update(model, step)
    assert history.record(model, 40)
    steps, profile = Profile(0.05, ((1, 40, 1),)).between(1, 41)
    expected = torch.stack([p * value for p, value in zip(profile, values, strict=True)]).sum(0).float()
    found = History(tmp_path / "run")[0]["weight"]
    assert found.dtype == torch.float32
    assert torch.allclose(found, expected, rtol=1e-5)
    assert len(steps) == 40


def test_tied_weights_masks_and_counters(tmp_path: Path) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Tied()
            self.register_buffer("mask", torch.tensor([0.0, -math.inf]))
            self.register_buffer("calls", torch.tensor(0))

    model, history = Masked(), History(tmp_path / "run", ema=(0.05, 0.10))
    for step in range(1, 31):
        model.get_buffer("calls").fill_(step)
        history.update(model, step)
        if step % 5 == 0:
            assert history.record(model, step)
    weights, rest = weights_of(model)
    assert set(history[-1]) == {*weights, *rest}
    found = history.average(history.weights("ema:0.08"))
    assert found["mask"].tolist() == [0.0, -math.inf]
    assert int(found["calls"]) == 30
    for name, value in weights.items():
        assert torch.allclose(found[name], value, rtol=1e-5, atol=1e-6)


def test_a_plan_trains_under_it(tmp_path: Path) -> None:
    case = CASES["resnet_basic"]
    model = case.model()
    plan = tithe.attach(model, tithe.FISH(density=0.05), loss=case.loss, data=case.batches(2), head=case.head)
    optimizer = torch.optim.SGD(plan.parameters(), lr=0.1)
    history, states = History(tmp_path / "run", ema=(0.10,)), list[dict[str, Tensor]]()
    for step, batch in enumerate(case.batches(3), start=1):
        plan.backward(lambda batch=batch: case.loss(model, batch))
        optimizer.step()
        optimizer.zero_grad()
        history.update(model, step)
        states.append({name: value.detach().clone() for name, value in weights_of(model)[0].items()})
    history.record(model, 3)
    _, values = Profile(0.10, ((1, 3, 1),)).between(1, 4)
    for name in states[0]:
        expected = sum(float(p) * state[name] for p, state in zip(values, states, strict=True))
        assert torch.allclose(history[0][name], torch.as_tensor(expected), rtol=1e-4, atol=1e-5)
    plan.release()


# --- what is refused


def test_averages_that_are_not_there_are_refused(tmp_path: Path) -> None:
    plain = recorded(tmp_path / "plain", checkpoints(nn.Linear(2, 1), 3))
    run = Run(tmp_path / "run", each=50)
    run.go(100)
    tracks = History(tmp_path / "run")
    out = tmp_path / "out.safetensors"
    for history, like, last, said in (
        (plain, "quadratic", None, "'linear', 'cosine', 'sqrt', 'ema:'"),
        (plain, "ema:wide", None, "'ema:0.08'"),
        (plain, "ema:0.08", None, "ema=(0.05, 0.10)"),
        (plain, "cosine", 4, "3 checkpoints"),
        (plain, "cosine", 0, "from 1 on"),
        (plain, "cosine", 3 / 1.5, "last=2.0"),
        (plain, "cosine", "2", "last='2'"),
        (plain, 3, None, "like=3"),
        (tracks, "cosine", None, "moving averages"),
        (tracks, "ema:0.4", None, "0.28"),
        (tracks, "ema:0.08", 3, "leave out last"),
        (tracks, "ema:0.01", None, "record more often"),
    ):
        with pytest.raises(TitheError) as caught:
            history.weights(like, last=last)
        assert said in str(caught.value), (like, str(caught.value))
        with pytest.raises(TitheError):
            tithe.average(history, out, like=like, last=last)
    with pytest.raises(TitheError, match="leave out one"):
        tithe.average(plain, out, [1.0, 0.0, 0.0], like="cosine")
    with pytest.raises(TitheError, match="add like='linear'"):
        tithe.average(plain, out, last=2)
    assert not out.exists()
    with pytest.raises(TitheError, match="'cosine'"):
        TWA(plain, start="middle")
    with pytest.raises(TitheError, match="moving averages"):
        tithe.attach(nn.Linear(2, 1), TWA(plain, start="ema:0.08"))


def test_moving_averages_that_cannot_be_kept_are_refused(tmp_path: Path) -> None:
    model = nn.Linear(2, 1)
    for ema, bits, said in (
        ((), None, "one width"),
        ((0.1, 0.1), None, "alike"),
        ((0.5,), None, "0.28"),
        ((0.1,), 8, "bits"),
    ):
        with pytest.raises(TitheError, match=said):
            History(tmp_path / "new", bits, ema=ema)
    recorded(tmp_path / "plain", checkpoints(model, 2))
    with pytest.raises(TitheError, match="weights as they were"):
        History(tmp_path / "plain", ema=(0.1,))
    with pytest.raises(TitheError, match="ema="):
        History(sorted((tmp_path / "plain").iterdir()), ema=(0.1,))
    with pytest.raises(TitheError, match="leave out update"):
        History(tmp_path / "plain").update(model, 9)
    history = History(tmp_path / "run", ema=(0.05, 0.10))
    with pytest.raises(TitheError, match="step 1 or later"):
        history.update(model, 0)
    history.record(model, 5)
    for step in (5, 4):
        with pytest.raises(TitheError, match="later step"):
            history.update(model, step)
    with pytest.raises(TitheError, match="later step"):
        history.record(model, 5)
    with pytest.raises(TitheError, match="follow the same model"):
        history.record(nn.Linear(2, 1, bias=False), 6)
    with pytest.raises(TitheError, match="widths"):
        History(tmp_path / "run", ema=(0.05,))
    with pytest.raises(TitheError, match="widths"):
        History(tmp_path / "other", ema=(0.05,)).load_state_dict(history.state_dict())
    state = copy.deepcopy(history.state_dict())
    history.record(model, 7)
    with pytest.raises(TitheError, match="remove 000002"):
        History(tmp_path / "run").load_state_dict(state)
    with torch.no_grad():
        model.weight[0, 0] = math.nan
    with pytest.raises(TitheError, match="not finite"):
        history.record(model, 8)


def test_a_disk_that_fills_between_two_averages_leaves_neither(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path / "run", each=100)
    run.go(20)
    assert run.history.record(run.model, 20)
    run.go(10)
    inner, left = recorder._write, [1]

    def full(*settings: Any) -> bool:
        left[0] -= 1
        return left[0] >= 0 and inner(*settings)

    with monkeypatch.context() as patched:
        patched.setattr(recorder, "_write", full)
        with pytest.warns(TitheWarning, match="no room for the checkpoint of step 30"):
            assert not run.history.record(run.model, 30)
    assert History(tmp_path / "run").steps == run.history.steps == [20, 20]
    run.go(10)
    assert run.history.record(run.model, 40)
    assert History(tmp_path / "run").steps == [20, 20, 40, 40]
    found = History(tmp_path / "run")[-2]["0.weight"]
    assert torch.allclose(found, run.true(0.05, "0.weight"), rtol=0, atol=1e-12)
