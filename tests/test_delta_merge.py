"""Merging deltas into a checkpoint on disk gives what applying them to the model gives."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from deltas import Tied, net, pick, train
from tithe.delta import apply, diff, merge, write_delta, write_network
from tithe.errors import TitheError


@pytest.fixture
def delta(tmp_path: Path) -> Path:
    tuned, path = net(), tmp_path / "delta.safetensors"
    write_delta(path, tuned, train(tuned, 0.2), {}, metadata={})
    return path


def folder(path: Path, state: dict[str, Tensor], shards: int = 1) -> Path:
    """A checkpoint as Hugging Face saves it: shards with an index, and what lies beside them."""
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text("[]")
    (path / "pytorch_model.bin").write_bytes(b"stale")
    names = sorted(state)
    if shards == 1:
        save_file(state, path / "model.safetensors", {"format": "pt"})
        return path
    where: dict[str, str] = {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = {name: state[name] for name in names[number::shards]}
        save_file(part, path / file, {"format": "pt"})
        where.update(dict.fromkeys(part, file))
    total = sum(tensor.nbytes for tensor in state.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def loaded(path: Path) -> dict[str, Tensor]:
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def refused(tmp_path: Path, base: Path, paths: Path | list[Path], *parts: str) -> None:
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(TitheError) as caught:
        merge(base, paths, tmp_path / "out")
    for part in (*parts, "Remedy: "):
        assert part in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == before


def test_file(tmp_path, delta):
    save_file(net().state_dict(), tmp_path / "base.safetensors", {"format": "pt"})
    out = merge(tmp_path / "base.safetensors", delta, tmp_path / "out.safetensors")
    assert same(loaded(out), dict(apply(net(), delta).state_dict()))


@pytest.mark.parametrize("shards", [1, 3])
def test_folder(tmp_path, delta, shards):
    base = folder(tmp_path / "base", dict(net().state_dict()), shards)
    untouched = {path: path.read_bytes() for path in base.rglob("*") if path.is_file()}
    out = merge(str(base), [str(delta)], str(tmp_path / "out"))
    assert same(loaded(out), dict(apply(net(), delta).state_dict()))
    assert {path.name for path in out.iterdir()} == {p.name for p in base.iterdir()} - {"pytorch_model.bin"}
    assert (out / "1_Pooling" / "config.json").read_text() == "[]"
    assert untouched == {path: path.read_bytes() for path in base.rglob("*") if path.is_file()}
    assert sorted(os.listdir(tmp_path)) == ["base", "delta.safetensors", "out"]


def test_a_new_head_is_added(tmp_path):
    state = {name: tensor for name, tensor in net().state_dict().items() if not name.startswith("3.")}
    base = folder(tmp_path / "base", state, 2)
    tuned = net()
    head = {name: torch.ones_like(p) for name, p in tuned.named_parameters() if name.startswith("3.")}
    write_delta(tmp_path / "d", tuned, {}, head, metadata={})
    out = merge(base, tmp_path / "d", tmp_path / "out")
    assert torch.equal(loaded(out)["3.weight"], torch.ones(3, 16))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"]["3.bias"] == "model-00002-of-00002.safetensors"
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in loaded(out).values())


def test_tensors_that_the_delta_does_not_know_are_copied(tmp_path, delta):
    state = {**net().state_dict(), "pretraining.head": torch.ones(5)}
    out = merge(folder(tmp_path / "base", state), delta, tmp_path / "out")
    assert torch.equal(loaded(out)["pretraining.head"], torch.ones(5))


@pytest.mark.parametrize("kept", ["embed.weight", "out.weight", "both"])
def test_tied_duplicates_dropped_by_the_file(tmp_path, kept):
    base, tuned = Tied(), Tied()
    tuned.load_state_dict(base.state_dict())
    write_delta(tmp_path / "d", tuned, train(tuned, 0.2), {}, metadata={})
    names = {"embed.weight", "out.weight"} if kept == "both" else {kept}
    keys = names | {"body.weight", "body.bias"}
    state = {name: tensor.clone() for name, tensor in base.state_dict().items() if name in keys}
    out = merge(folder(tmp_path / "base", state), tmp_path / "d", tmp_path / "out")
    assert same(loaded(out), {name: tuned.state_dict()[name] for name in keys})


def test_two_deltas(tmp_path):
    base = folder(tmp_path / "base", dict(net().state_dict()))
    both = net()
    paths = []
    for number, name in enumerate(("0.weight", "3.weight")):
        tuned = net()
        chosen = pick(tuned.get_parameter(name), 0.2)
        for model in (tuned, both):
            chosen.scatter_(model.get_parameter(name).detach(), torch.full((chosen.size,), number + 5.0))
        diff(net(), tuned, tmp_path / f"d{number}")
        paths.append(tmp_path / f"d{number}")
    assert same(loaded(merge(base, paths, tmp_path / "out")), dict(both.state_dict()))


def test_two_deltas_that_overlap(tmp_path):
    base = folder(tmp_path / "base", dict(net().state_dict()))
    paths = []
    for number, picked in enumerate(([3, 5], [5, 7])):
        tuned = net()
        chosen = torch.tensor(picked)
        with torch.no_grad():
            tuned[0].weight.view(-1)[chosen] = float(number)
        diff(net(), tuned, tmp_path / f"d{number}")
        paths.append(tmp_path / f"d{number}")
    refused(tmp_path, base, paths, "0.weight", "written by both", "overwrite=True")
    flat = loaded(merge(base, paths, tmp_path / "out", overwrite=True))["0.weight"].view(-1)
    assert flat[[3, 5, 7]].tolist() == [0.0, 1.0, 1.0]
    heads = []
    for number in range(2):
        head = {"3.bias": torch.full((3,), float(number))}
        write_delta(tmp_path / f"h{number}", net(), {}, head, metadata={})
        heads.append(tmp_path / f"h{number}")
    with pytest.raises(TitheError, match=r"3\.bias.*written by both"):
        merge(base, heads, tmp_path / "heads")


def test_refused(tmp_path, delta):
    state = dict(net().state_dict())
    base = folder(tmp_path / "base", state)
    refused(tmp_path, folder(tmp_path / "prefix", {f"bert.{n}": t for n, t in state.items()}), delta, "prefix 'bert.'")
    half = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    refused(tmp_path, folder(tmp_path / "half", half), delta, "dtype torch.float16", "load the base in torch.float32")
    moved = {**state, "0.weight": state["0.weight"] + 1}
    refused(tmp_path, folder(tmp_path / "moved", moved), delta, "another base: 1 of", "'0.weight' in 0")
    refused(tmp_path, base, [], "no delta")
    refused(tmp_path, base, tmp_path / "base" / "model.safetensors", "without a tithe header")
    refused(tmp_path, tmp_path / "nowhere", delta, "no such file")
    delta.write_bytes(delta.read_bytes()[:-1])
    refused(tmp_path, base, delta, "a complete safetensors file")


def test_a_narrow_network_is_no_delta(tmp_path, delta):
    save_file(net().state_dict(), tmp_path / "base.safetensors")
    write_network(tmp_path / "narrow.safetensors", net(), {"0": {"out_features": 3}}, metadata={})
    for paths in ([tmp_path / "narrow.safetensors"], [delta, tmp_path / "narrow.safetensors"]):
        refused(tmp_path, tmp_path / "base.safetensors", paths, "narrow.safetensors", "a narrow network", "tithe.apply")


def test_refused_bases(tmp_path, delta):
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    torch.save(net().state_dict(), pickled / "pytorch_model.bin")
    refused(tmp_path, pickled, delta, "pickled checkpoint (pytorch_model.bin)", "safe_serialization=True")
    refused(tmp_path, pickled / "pytorch_model.bin", delta, "pickled")
    several = tmp_path / "several"
    several.mkdir()
    for name in "ab":
        save_file({"x": torch.ones(1)}, several / f"{name}.safetensors")
    refused(tmp_path, several, delta, "2 safetensors files", "pass the file itself")
    lacking = folder(tmp_path / "lacking", dict(net().state_dict()), 2)
    (lacking / "model-00001-of-00002.safetensors").unlink()
    refused(tmp_path, lacking, delta, "model-00001-of-00002.safetensors", "every shard beside its index")
    outside = folder(tmp_path / "outside", dict(net().state_dict()), 2)
    (outside / "model.safetensors.index.json").write_text('{"weight_map": {"0.weight": "../delta.safetensors"}}')
    refused(tmp_path, outside, delta, "../delta.safetensors")


def test_output_is_never_overwritten(tmp_path, delta):
    base = folder(tmp_path / "base", dict(net().state_dict()))
    for output in (base, base / "model.safetensors", delta):
        with pytest.raises(TitheError, match="an existing file or folder"):
            merge(base, delta, output)
    with pytest.raises(TitheError, match="no folder"):
        merge(base, delta, tmp_path / "no" / "out")
