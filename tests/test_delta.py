"""Deltas: a round trip is exact, through every way of writing one."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tithe
from deltas import Tied, bits, net, pick, train
from tithe.delta import apply, diff, inspect, write_delta
from tithe.errors import TitheError
from tithe.selection import Coordinates

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


class Bag(nn.Module):
    """Parameters a, b, … of given shapes and one integer buffer."""

    def __init__(self, shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for number, shape in enumerate(shapes):
            values = torch.randn(shape, generator=generator).to(dtype)
            self.register_parameter(f"p{number}", nn.Parameter(values))
        self.register_buffer("steps", torch.tensor(3))


@pytest.fixture
def delta(tmp_path: Path) -> Path:
    """A delta on `net()`: some weights of every tensor, a dense head, changed buffers."""
    model = net()
    selections = train(model, 0.2)
    head = {name: p.detach().add(1) for name, p in model.named_parameters() if name.startswith("3.")}
    path = tmp_path / "delta.safetensors"
    body = {name: s for name, s in selections.items() if not name.startswith("3.")}
    buffers = {"1.num_batches_tracked": torch.tensor(17), "1.running_mean": torch.ones(16)}
    write_delta(path, model, body, {**head, **buffers}, metadata={"method": "fish", "density": "0.2"})
    return path


# A delta brings the base to the tuned model, bit for bit.

shapes = st.lists(st.lists(st.integers(0, 5), max_size=3).map(tuple), min_size=1, max_size=4)


@given(shapes, st.sampled_from(DTYPES), st.sampled_from([0.0, 0.05, 0.4, 1.0]), st.integers(0, 3))
def test_round_trip(tmp_path_factory, shapes, dtype, density, seed):
    path = tmp_path_factory.mktemp("delta") / "delta.safetensors"
    base, tuned = Bag(shapes, dtype), Bag(shapes, dtype)
    selections = train(tuned, density, seed)
    write_delta(path, tuned, selections, {}, metadata={})
    assert bits(apply(base, path)) == bits(tuned)
    assert bits(apply(base, path)) == bits(tuned)  # twice is once
    info = inspect(path)
    assert info.num_weights == sum(math.prod(shape) for shape in shapes) + 1
    for tensor in info.tensors:
        assert tensor.kind == "dense" or tensor.selected == selections[tensor.name].size
    compared = path.with_name("compared.safetensors")
    diff(Bag(shapes, dtype), tuned, compared)
    assert bits(apply(Bag(shapes, dtype), compared)) == bits(tuned)


def test_dense_and_buffers(delta):
    base = apply(net(), delta)
    assert base[1].num_batches_tracked.item() == 17
    assert torch.equal(base[1].running_mean, torch.ones(16))
    tensors = load_file(delta)
    assert torch.equal(base[3].weight, tensors["3.weight#dense"])
    assert tensors["0.weight#indices"].dtype == torch.int32
    assert not any(name.startswith("1.running_var") for name in tensors)


def test_a_fresh_head_in_the_base_does_not_matter(delta):
    other = net()
    other[3].reset_parameters()
    assert bits(apply(other, delta)) == bits(apply(net(), delta))


def test_nan_and_signed_zero(tmp_path):
    base, tuned = net(), net()
    with torch.no_grad():
        for model in (base, tuned):
            model[0].weight[0, 0] = float("nan")
            model[0].weight[0, 1] = 0.0
        tuned[0].weight[0, 1] = -0.0
        tuned[0].weight[0, 2] = float("inf")
    diff(base, tuned, tmp_path / "d")
    assert inspect(tmp_path / "d").num_values == 2
    assert bits(apply(base, tmp_path / "d")) == bits(tuned)


def test_channels_last_and_lstm(tmp_path):
    for make in (lambda: nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last), lambda: nn.LSTM(3, 4)):
        torch.manual_seed(0)
        tuned = make()
        torch.manual_seed(0)
        base = make()
        write_delta(tmp_path / "d", tuned, train(tuned, 0.1), {}, metadata={})
        assert bits(apply(base, tmp_path / "d")) == bits(tuned)


# Tied weights: one record for a storage.


def test_tied(tmp_path):
    base, path = Tied(), tmp_path / "d"
    tuned = Tied()
    tuned.load_state_dict(base.state_dict())
    write_delta(path, tuned, train(tuned, 0.1), {}, metadata={})
    info = inspect(path)
    assert [t.aliases for t in info.tensors if t.name == "embed.weight"] == [("out.weight",)]
    assert info.num_weights == sum(p.numel() for p in tuned.parameters())
    untied = Tied(tied=False)
    untied.load_state_dict(base.state_dict())
    assert bits(apply(base, path)) == bits(tuned)
    assert base.out.weight is base.embed.weight
    assert bits(apply(untied, path)) == bits(tuned)


def test_diff_tied_against_a_file_without_the_duplicate(tmp_path):
    base, tuned = Tied(), Tied()
    tuned.load_state_dict(base.state_dict())
    state = {name: tensor.clone() for name, tensor in base.state_dict().items() if name != "out.weight"}
    save_file(state, tmp_path / "model.safetensors")
    train(tuned, 0.1)
    diff(tmp_path, tuned, tmp_path / "d")
    assert bits(apply(base, tmp_path / "d")) == bits(tuned)


def test_one_storage_given_twice(tmp_path):
    model = Tied()
    chosen = pick(model.embed.weight, 0.5)
    with pytest.raises(TitheError, match=r"given twice.*one selection"):
        write_delta(tmp_path / "d", model, {"embed.weight": chosen}, {"out.weight": model.out.weight}, metadata={})
    assert list(tmp_path.iterdir()) == []


# Comparing.


def test_diff_sources(tmp_path):
    base, tuned = net(), net()
    train(tuned, 0.1)
    save_file(base.state_dict(), tmp_path / "base.safetensors")
    folder = tmp_path / "tuned"
    folder.mkdir()
    save_file(tuned.state_dict(), folder / "model.safetensors")
    files = []
    for number, (one, two) in enumerate(
        [(base, tuned), (base.state_dict(), tuned.state_dict()), (tmp_path / "base.safetensors", str(folder))]
    ):
        diff(one, two, tmp_path / f"d{number}")
        files.append((tmp_path / f"d{number}").read_bytes())
    assert files[0] == files[1]
    assert bits(apply(net(), tmp_path / "d2")) == bits(tuned)


def test_diff_of_different_networks(tmp_path):
    for other, parts in (
        (net()[:3], "3.weight: found 2 tensors that only Sequential has"),
        (nn.ModuleDict({"module": net()}), "has the prefix 'module.'"),
        (net().half(), "expected torch.float32 of shape"),
    ):
        with pytest.raises(TitheError, match=parts):
            diff(net(), other, tmp_path / "d")
    assert list(tmp_path.iterdir()) == []


# Writing.


def test_writing_is_atomic(delta, monkeypatch):
    before = delta.read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(TitheError, match=r"found a file that cannot be written \(no space left"):
        diff(net(), net(1), delta)
    assert delta.read_bytes() == before
    assert list(delta.parent.iterdir()) == [delta]


def test_what_cannot_be_written(tmp_path):
    model = net()
    cases: list[tuple[Path, Mapping[str, Coordinates], Mapping[str, Tensor], str]] = [
        (tmp_path / "no" / "d", {}, {}, "no folder"),
        (tmp_path, {}, {}, "a folder"),
        (tmp_path / "d", {"0.wieght": pick(model[0].weight, 0.5)}, {}, "no such tensor"),
        (tmp_path / "d", {"0.weight": pick(model[0].bias, 0.5)}, {}, "found torch.float32 of shape"),
        (tmp_path / "d", {}, {"0.weight": torch.ones(16, 8).half()}, "torch.float16"),
    ]
    for path, selections, dense, part in cases:
        with pytest.raises(TitheError, match=part):
            write_delta(path, model, selections, dense, metadata={})
    assert list(tmp_path.iterdir()) == []


def test_size(tmp_path):
    """8 bytes a value: at 0.5 % of a 22.7 M fp32 encoder at most 1.05 % of the dense checkpoint."""
    width, inner = 384, 1536
    layer: list[tuple[str, tuple[int, ...]]] = []
    for part in ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"):
        layer += [(f"{part}.weight", (width, width)), (f"{part}.bias", (width,))]
    layer += [("intermediate.dense.weight", (inner, width)), ("intermediate.dense.bias", (inner,))]
    layer += [("output.dense.weight", (width, inner)), ("output.dense.bias", (width,))]
    for part in ("attention.output.LayerNorm", "output.LayerNorm"):
        layer += [(f"{part}.weight", (width,)), (f"{part}.bias", (width,))]
    state = {f"encoder.layer.{n}.{name}": torch.zeros(shape) for n in range(6) for name, shape in layer}
    state["embeddings.word_embeddings.weight"] = torch.zeros(30522, width)
    state["embeddings.position_embeddings.weight"] = torch.zeros(512, width)
    tuned = {name: tensor.clone() for name, tensor in state.items()}
    total = sum(tensor.numel() for tensor in state.values())
    assert 22_000_000 < total < 23_000_000
    for tensor in tuned.values():
        count = max(1, round(tensor.numel() * 0.005))
        tensor.view(-1)[torch.randperm(tensor.numel())[:count]] = 1.0
    diff(state, tuned, tmp_path / "d")
    assert inspect(tmp_path / "d").num_values == pytest.approx(total * 0.005, rel=1e-3)
    ratio = (tmp_path / "d").stat().st_size / (total * 4)
    assert ratio <= 0.0105


# Looking.


def test_inspect(delta):
    info = inspect(delta)
    assert (info.version, info.num_bytes) == (1, delta.stat().st_size)
    assert dict(info.metadata) == {"method": "fish", "density": "0.2", "class": "Sequential"}
    assert info.num_values == sum(tensor.selected for tensor in info.tensors)
    kinds = {tensor.name: tensor.kind for tensor in info.tensors}
    assert kinds["0.weight"] == "indices"
    assert kinds["3.weight"] == kinds["1.num_batches_tracked"] == "dense"
    assert json.loads(json.dumps(info.as_dict()))["num_values"] == info.num_values
    assert max(map(len, str(info).splitlines())) < 80
    assert "3×16" in str(info)
    assert "method fish" in str(info)


def test_inspect_of_long_names_and_metadata(tmp_path):
    model = nn.ModuleDict({"a" * 90: nn.Linear(4096, 300)})
    selections = train(model, 0.01)
    write_delta(tmp_path / ("d" * 90), model, selections, {}, metadata={"note": "many words " * 30})
    assert max(map(len, str(inspect(tmp_path / ("d" * 90))).splitlines())) < 80


def test_inspect_refuses(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "plain")
    with pytest.raises(TitheError, match="without a tithe header"):
        inspect(tmp_path / "plain")


# A plan's own delta, and a model that a plan is attached to.


def _squared(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


def test_attached(tmp_path):
    batches = [torch.randn(4, 8) for _ in range(3)]
    base, tuned = net(), net()
    method = tithe.FISH(density=0.3, samples=4)
    plan = tithe.attach(tuned, method, loss=_squared, data=batches, head=["3.*"])
    optimizer = torch.optim.AdamW(plan.parameters(), lr=0.1)
    plan.bind(optimizer)
    for batch in batches:
        plan.backward(lambda batch=batch: _squared(tuned, batch))
        optimizer.step()
        optimizer.zero_grad()
        plan.step()
    plan.save(tmp_path / "d")
    assert bits(apply(net(), tmp_path / "d")) == bits(tuned)
    other = tithe.attach(base, method, loss=_squared, data=batches, head=["3.*"])
    assert bits(apply(base, tmp_path / "d")) == bits(tuned)
    for name, selection in other.selections.items():
        theta = dict(other.named_parameters()).get(name)
        assert theta is None or torch.equal(theta, selection.gather(base.get_parameter(name)))
    other.release()
    assert bits(base) == bits(tuned)
