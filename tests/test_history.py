"""A recorded history: what is read is what was there, exactly or within its own code, whatever the tensors are like."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

import tithe
from deltas import Tied
from histories import checkpoints, recorded, walk
from models import CASES
from narrow_plans import attach as attach_narrow
from oracles import adamw
from tithe import FISH, TWA, Budget, History, TitheError, TraDy
from tithe.averages.quantize import decode, encode

ALL_BITS = [None, 8, 4, 1]
each_bits = pytest.mark.parametrize("bits", ALL_BITS)


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def _same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    """Names, dtypes, shapes and bits."""
    form = {name: (t.dtype, tuple(t.shape)) for name, t in one.items()}
    assert form == {name: (t.dtype, tuple(t.shape)) for name, t in two.items()}
    return all(torch.equal(one[name], two[name]) for name in one)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


# --- whole checkpoints


def test_what_was_recorded_is_read_again(tmp_path: Path) -> None:
    models = checkpoints(CASES["resnet_basic"].model(), 3)
    history = History(tmp_path / "run")
    assert len(history) == 0
    assert list(history) == []
    assert history.steps == []
    for place, model in enumerate(models):
        assert history.record(model, 10 * place + 5, score=[0.5, None, 0.25][place])
        assert len(history) == place + 1
    for one in (history, History(tmp_path / "run"), History(str(tmp_path / "run"))):
        assert one.steps == [5, 15, 25]
        assert one.scores == [0.5, None, 0.25]
        assert [_same(state, _state(model)) for state, model in zip(one, models, strict=True)] == [True] * 3
        assert all(_same(one[i], _state(models[i])) for i in (0, 2, -1, -3))
        with pytest.raises(IndexError):
            one[3]


def test_the_mean_is_that_of_torch_in_float64(tmp_path: Path) -> None:
    models = checkpoints(CASES["resnet_basic"].model(), 7)
    history = recorded(tmp_path / "run", models)
    states = [_state(model) for model in models]
    mean, weighted = history.mean(), history.average([0, 0.25, 0, 0, 0.75, 0, 0])
    for name in states[0]:
        if not states[0][name].is_floating_point():
            assert torch.equal(mean[name], states[-1][name])
            continue
        stacked = torch.stack([state[name].double() for state in states])
        assert torch.allclose(mean[name].double(), stacked.mean(0), rtol=1e-7, atol=1e-12), name
        # A float32 times 1/4 or 3/4 is exact in float64, and of two a sum is rounded once, by whatever kernel.
        assert torch.equal(weighted[name], (0.25 * stacked[1] + 0.75 * stacked[4]).float()), name


def test_whole_checkpoints_are_ordinary_files(tmp_path: Path) -> None:
    models = checkpoints(CASES["bert"].model(), 2)
    recorded(tmp_path / "run", models)
    for place, model in enumerate(models):
        found = load_file(tmp_path / "run" / f"{place:06d}.safetensors")
        assert _same(found, _state(model))
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["000000.safetensors", "000001.safetensors"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@each_bits
def test_a_history_goes_on_where_it_was(bits: int | None, dtype: torch.dtype, tmp_path: Path) -> None:
    models = walk(CASES["mlp"].model(dtype=dtype), 6)
    never = recorded(tmp_path / "never", models, bits)
    for step, model in enumerate(models):
        assert History(tmp_path / "often", bits if step < 2 else None).record(model, step)
    often = History(tmp_path / "often")
    assert often.bits == never.bits == bits
    assert often.steps == list(range(6))
    # With one bit a run that goes on no longer knows what the code before has rounded, so that later rows differ.
    same = range(2 if bits == 1 else 6)
    for index, (one, two) in enumerate(zip(never, often, strict=True)):
        assert _same(one, two) or index not in same, index
        assert _same(two, often[index]), index
    for name, form in never.rows.forms.items():
        one, two = (history.columns(name, 0, form.numel)[: len(same)] for history in (never, often))
        assert torch.equal(one, two), name


# --- codes


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bits", [8, 4, 1])
def test_the_error_of_a_row_is_that_of_its_own_code(bits: int, dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(37, 41, dtype=dtype), nn.Linear(41, 3, dtype=dtype))
    models = walk(model, 51)
    history = recorded(tmp_path / "run", models, bits)
    for name, weight in model.named_parameters():
        rows = history.columns(name, 0, weight.numel()).double()
        points = torch.stack([dict(one.named_parameters())[name].detach().double().view(-1) for one in models])
        assert torch.equal(rows[0], points[0])
        whole = weight.numel() * weight.element_size() <= -(-weight.numel() // 256) * (32 * bits + 2)
        error = torch.zeros_like(points[0])
        for index in range(1, 51):
            # What the code of this step alone does to the way from the row before to this checkpoint, or with one bit
            # to where three quarters of the error before it lead.
            wanted = points[index] + (0.75 * error if bits == 1 else 0)
            step = wanted - rows[index - 1]
            blocks = torch.nn.functional.pad(step, (0, -step.numel() % 256)).view(-1, 1, 256)
            coded = decode(*encode(blocks, bits), bits).view(-1)[: step.numel()].double()
            bound = torch.zeros_like(step) if whole else (coded - step).abs()
            assert ((rows[index] - wanted).abs() <= bound + 1e-6).all(), (index, name)
            error = wanted - rows[index]
        if bits > 1:
            assert (rows[-1] - points[-1]).norm() <= 0.1 * (points[-1] - points[0]).norm()


@pytest.mark.parametrize("bits", [8, 4])
def test_columns_are_within_half_a_scale(bits: int, tmp_path: Path) -> None:
    """|w − w̃| ≤ s / 2 with the scale s that is stored for the 256 weights around."""
    models = walk(nn.Linear(64, 50, bias=False), 51)
    history = recorded(tmp_path / "run", models, bits)
    block = history.columns("weight", 0, 3200)
    for index in range(1, 51):
        scales = load_file(tmp_path / "run" / f"{index:06d}.safetensors")["weight#scales"].double()
        limit = scales.repeat_interleave(256)[:3200] / 2
        error = (block[index].double() - models[index].weight.detach().double().view(-1)).abs()
        assert (error <= limit + 1e-6).all(), index


@each_bits
def test_checkpoints_take_what_their_bits_say(bits: int | None, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(512, 512, bias=False), nn.Linear(512, 512, bias=False))
    weights, rows = 2 * 512 * 512, 9
    recorded(tmp_path / "run", walk(model, rows + 1), bits)
    each = 4 * weights if bits is None else weights * bits // 8 + 2 * weights // 256
    header = 600
    assert 0 <= _size(tmp_path / "run") - 4 * weights - rows * each <= (rows + 1) * header


@pytest.mark.parametrize("bits", [8, 4, 1])
def test_what_does_not_change_takes_no_room(bits: int, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 4))
    model[0].requires_grad_(False)
    models = [model]
    for _ in range(4):
        models.append(copy.deepcopy(models[-1]))
        with torch.no_grad():
            models[-1][1].weight.add_(0.1)
    history = recorded(tmp_path / "run", models, bits)
    assert all(path.stat().st_size < 5000 for path in sorted((tmp_path / "run").iterdir())[1:])
    for state, one in zip(history, models, strict=True):
        assert torch.equal(state["0.weight"], one[0].weight)
        assert torch.equal(state["1.bias"], one[1].bias)


@pytest.mark.parametrize("bits", [8, 4, 1])
def test_what_is_shorter_than_its_codes_is_exact(bits: int, tmp_path: Path) -> None:
    models = walk(nn.BatchNorm1d(8), 5)
    history = recorded(tmp_path / "run", models, bits)
    assert [_same(state, _state(model)) for state, model in zip(history, models, strict=True)] == [True] * 5


# --- whatever a model is made of


class Odd(nn.Module):
    """Tensors without entries, single numbers, counters, and sizes that fill no block."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.scalar = nn.Parameter(torch.tensor(0.5, dtype=dtype))
        self.empty = nn.Parameter(torch.empty(0, 3, dtype=dtype))
        self.block = nn.Parameter(torch.randn(2, 128, dtype=dtype))
        self.more = nn.Parameter(torch.randn(257, dtype=dtype))
        self.linear = nn.Linear(3, 2, dtype=dtype)
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("flags", torch.tensor([True, False, True]))
        self.register_buffer("none", torch.empty(0, dtype=torch.int32))
        self.register_buffer("mask", torch.tensor([0.0, float("-inf")]))
        self.register_buffer("hidden", torch.ones(2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        kept = self.empty.sum() + self.block.sum() + self.more.sum()
        return self.linear(x) * self.scalar + 0 * kept

    def get_extra_state(self) -> object:
        return {"no": "tensor"}

    def set_extra_state(self, state: object) -> None:
        pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@each_bits
def test_empty_tensors_single_numbers_and_counters(bits: int | None, dtype: torch.dtype, tmp_path: Path) -> None:
    models = walk(Odd(dtype), 3)
    recorded(tmp_path / "run", models[:2], bits)
    history = History(tmp_path / "run")
    assert history.record(models[2], 2)
    for state, model in zip(History(tmp_path / "run"), models, strict=True):
        expected = _state(model)
        assert {n: (t.dtype, t.shape) for n, t in state.items()} == {n: (t.dtype, t.shape) for n, t in expected.items()}
        for name in ("scalar", "empty", "count", "flags", "none", "mask"):
            assert torch.equal(state[name], expected[name]), name
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert history.columns("empty", 0, 0).shape == (3, 0)
    assert history.columns("scalar", 0, 1).dtype == wide
    assert torch.equal(history.columns("scalar", 0, 1)[:, 0], torch.stack([m.scalar.detach() for m in models]).to(wide))
    mean = history.mean()
    assert mean["empty"].shape == (0, 3)
    assert mean["scalar"].shape == ()
    assert torch.equal(mean["mask"], models[0].mask)
    assert torch.equal(mean["count"], models[-1].count)


@each_bits
@pytest.mark.parametrize("granularity", ["model", "tensor"])
def test_such_tensors_move_in_the_span(granularity: str, bits: int | None, tmp_path: Path) -> None:
    models = walk(Odd(), 3)
    model = Odd()
    plan = tithe.attach(model, TWA(recorded(tmp_path / "run", models, bits), granularity=granularity))
    optimizer = adamw(plan.parameters())
    plan.bind(optimizer)
    plan.backward(lambda: plan.model(torch.ones(4, 3)).square().mean())
    optimizer.step()
    plan.release()
    assert all(value.isfinite().all() for value in model.parameters())
    assert model.empty.shape == (0, 3)


@given(
    shapes=st.lists(st.lists(st.integers(0, 40), max_size=3), min_size=1, max_size=4),
    bits=st.sampled_from(ALL_BITS),
    count=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_any_range_of_columns_is_that_of_the_tensors(
    shapes: list[list[int]], bits: int | None, count: int, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    torch.manual_seed(seed)
    model = nn.Module()
    for place, shape in enumerate(shapes):
        model.register_parameter(f"w{place}", nn.Parameter(torch.randn(shape)))
    history = recorded(tmp_path_factory.mktemp("any") / "run", walk(model, count), bits)
    for name, weight in model.named_parameters():
        rows = torch.stack([state[name].view(-1) for state in history])
        ends = torch.randint(weight.numel() + 1, (2,)).sort().values.tolist()
        assert torch.equal(history.columns(name, *ends), rows[:, slice(*ends)])
        assert torch.equal(history.columns(name, 0, weight.numel()), rows)
        expected = rows.double().mean(0).view(weight.shape)
        assert torch.allclose(history.mean()[name].double(), expected, rtol=1e-6, atol=1e-7)


def test_tied_weights_are_recorded_once(tmp_path: Path) -> None:
    models = checkpoints(Tied(), 3)
    history = recorded(tmp_path / "run", models, 8)
    assert list(history[0]).count("out.weight") == 0
    assert torch.equal(history[0]["embed.weight"], models[0].out.weight)
    plan = tithe.attach(Tied(), TWA(history))
    plan.release()
    assert plan.model.out.weight is plan.model.embed.weight


def test_channels_last_weights_are_recorded_in_order(tmp_path: Path) -> None:
    model = nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)
    history = recorded(tmp_path / "run", [model])
    assert not model.weight.is_contiguous()
    assert torch.equal(history[0]["weight"], model.weight)
    assert torch.equal(history.columns("weight", 7, 40)[0], model.weight.detach().reshape(-1)[7:40])


def _fish(model: nn.Module, case: object) -> tithe.Plan:
    return tithe.attach(model, FISH(density=0.1), loss=case.loss, data=case.batches(2))


def _trady(model: nn.Module, case: object) -> tithe.Plan:
    return tithe.attach(model, TraDy(Budget(fraction=0.5)), loss=case.loss, data=case.batches(2))


@pytest.mark.filterwarnings("ignore:.*no rule for input channels:tithe.TitheWarning")
@pytest.mark.filterwarnings("ignore:the running statistics of:tithe.TitheWarning")
@pytest.mark.parametrize("name", ["bert", "resnet_basic"])
@pytest.mark.parametrize("method", ["fish", "trady", "vrpge", "twa"])
def test_a_model_with_a_plan_is_recorded_under_its_own_names(method: str, name: str, tmp_path: Path) -> None:
    case = CASES[name]
    model = case.model()
    names = list(_state(model))
    num_storages = len({tensor.data_ptr() for tensor in model.state_dict().values()})

    def twa(model: nn.Module, case: object) -> tithe.Plan:
        return tithe.attach(model, TWA(recorded(tmp_path / "before", checkpoints(model, 3))), loss=case.loss)

    makers: dict[str, Callable[..., tithe.Plan]] = {
        "fish": _fish,
        "trady": _trady,
        "vrpge": lambda model, case: attach_narrow(case, model),
        "twa": twa,
    }
    plan = makers[method](model, case)
    optimizer = adamw(plan.parameters())
    plan.bind(optimizer)
    history = History(tmp_path / "run")
    states: list[dict[str, Tensor]] = []
    for step, batch in enumerate(case.batches(2)):
        optimizer.zero_grad()
        plan.backward(lambda batch=batch: case.loss(plan.model, batch))
        optimizer.step()
        plan.step()
        assert history.record(model, step)
        states.append(_state(model))
    plan.release()
    assert history.record(model, 2)
    states.append(_state(model))
    assert set(history[0]) <= set(names)
    assert len(history[0]) == num_storages
    for state, expected in zip(history, states, strict=True):
        assert all(torch.equal(state[name], expected[name]) for name in state)
    assert any(not torch.equal(states[0][name], states[1][name]) for name in names)


def test_recording_leaves_the_model_as_it_is(tmp_path: Path) -> None:
    model = Odd()
    before, attributes = _state(model), sorted(vars(model))
    versions = [p._version for p in model.parameters()]
    recorded(tmp_path / "run", [model, model], 4)
    assert _same(_state(model), before)
    assert sorted(vars(model)) == attributes
    assert [p._version for p in model.parameters()] == versions
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_readers_leave_alone_what_a_run_is_writing(tmp_path: Path) -> None:
    recorded(tmp_path / "run", [nn.Linear(2, 2)])
    being_written = tmp_path / "run" / ".000001.0123456789abcdef.tmp"
    being_written.write_bytes(b"half")
    History(tmp_path / "run").mean()
    assert being_written.exists()


def test_steps_of_recorded_files_that_are_opened_one_by_one(tmp_path: Path) -> None:
    history = History(tmp_path / "run")
    for step, score in ((3, 0.1), (9, None), (20, 0.7)):
        history.record(nn.Linear(2, 2), step, score=score)
    files = sorted((tmp_path / "run").iterdir())
    some = History([files[2], files[0]])
    assert (some.steps, some.scores) == ([20, 3], [0.7, 0.1])
    assert torch.equal(some[0]["weight"], history[2]["weight"])


def test_numbers_of_other_kinds_are_taken(tmp_path: Path) -> None:
    history = History(tmp_path / "run")
    assert history.record(nn.Linear(2, 2), torch.tensor(4), score=torch.tensor(0.5))
    again = History(tmp_path / "run")
    assert (again.steps, again.scores) == ([4], [0.5])


def test_a_relative_path_stays_what_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    history = recorded(Path("run"), [nn.Linear(2, 2)])
    assert history.folder == Path("run")
    assert os.listdir(tmp_path) == ["run"]
    assert len(History("run")) == 1


def test_infinite_in_one_checkpoint_alone_is_no_mask(tmp_path: Path) -> None:
    models = [Odd(), Odd()]
    models[1].mask[0] = math.inf
    history = recorded(tmp_path / "run", models)
    with pytest.raises(TitheError, match=r"000001.*values of mask that are not finite"):
        history.mean()
