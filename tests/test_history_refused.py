"""Bad input to a history: one clear error that names the file, and the tensor; nothing is run, nothing is lost."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tithe
from deltas import net
from histories import checkpoints, recorded
from tithe import TWA, History, TitheError, TitheWarning


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def _saved(folder: Path, count: int = 3) -> list[Path]:
    paths = [folder / f"{place}.safetensors" for place in range(count)]
    for path, model in zip(paths, checkpoints(net(), count), strict=True):
        save_file(_state(model), path)
    return paths


def _changed(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    state = load_file(path)
    change(state)
    save_file(state, path)


# --- other tensors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update({"0.weight": torch.zeros(16, 9)}), r"float32 of shape \[16, 9\] for 0.weight.*\[16, 8\]"),
        (lambda s: s.update({"0.bias": s["0.bias"].double()}), r"float64 of shape \[16\] for 0.bias; expected float32"),
        (lambda s: s.pop("3.bias"), "no such tensor for 3.bias"),
        (lambda s: s.update({"head": torch.zeros(1)}), "a tensor for head; expected none"),
    ],
    ids=["shape", "dtype", "missing", "more"],
)
@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_checkpoints_of_another_model(
    kind: str, change: Callable[[dict[str, Tensor]], object], message: str, tmp_path: Path
) -> None:
    paths = _saved(tmp_path)
    if kind == "pt":
        state = load_file(paths[1])
        change(state)
        paths[1].unlink()
        torch.save(state, tmp_path / "1.pt")
    else:
        _changed(paths[1], change)
    with pytest.raises(TitheError, match=rf"1.{kind}: found {message}.*as in .*0.safetensors"):
        History(tmp_path)
    with pytest.raises(TitheError, match=message):
        History(tmp_path, skip_damaged=True)  # it can be read: it is no damage


def test_a_delta_among_whole_checkpoints(tmp_path: Path) -> None:
    _saved(tmp_path, 2)
    tithe.diff(net(), checkpoints(net(), 1)[0], tmp_path / "9.safetensors")
    with pytest.raises(TitheError, match=r"9.safetensors: found a delta among whole checkpoints"):
        History(tmp_path)


def test_deltas_of_another_network(tmp_path: Path) -> None:
    tithe.diff(net(), checkpoints(net(), 1)[0], tmp_path / "0.safetensors")
    other = nn.Sequential(nn.Linear(8, 15))
    tithe.diff(other, checkpoints(other, 1)[0], tmp_path / "1.safetensors")
    with pytest.raises(TitheError, match=r"1.safetensors: found no such tensor"):
        History(tmp_path)


# --- damaged files


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-50])


def _halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:40])


def _zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _garbage(path: Path) -> None:
    path.write_bytes((64).to_bytes(8, "little") + b"\xff{" * 32 + bytes(100))


def _no_table(path: Path) -> None:
    path.write_bytes((2).to_bytes(8, "little") + b"[]")


def _negative(path: Path) -> None:
    header = json.dumps({"x": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))


def _longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"more")


DAMAGES = [_truncate, _halve, _zero, _empty, _garbage, _no_table, _negative, _longer]
each_damage = pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__[1:])


@each_damage
def test_a_damaged_file_is_named_and_left_out_on_request(damage: Callable[[Path], None], tmp_path: Path) -> None:
    paths = _saved(tmp_path)
    states = [load_file(path) for path in paths]
    damage(paths[1])
    with pytest.raises(TitheError, match=r"1.safetensors: found a file that cannot be read"):
        History(tmp_path)
    with pytest.warns(TitheWarning, match=r"left out: .*1.safetensors: found a file that cannot be read") as told:
        history = History(tmp_path, skip_damaged=True)
    assert told[0].filename == __file__
    assert len(told) == 1
    assert history.rows.paths == [paths[0], paths[2]]
    assert torch.equal(history[1]["0.weight"], states[2]["0.weight"])


@pytest.mark.parametrize("damage", [_truncate, _halve, _zero, _empty, _garbage], ids=lambda damage: damage.__name__[1:])
@pytest.mark.parametrize("old", [False, True], ids=["zip", "before-1.6"])
def test_a_damaged_file_of_torch_save(old: bool, damage: Callable[[Path], None], tmp_path: Path) -> None:
    for place, model in enumerate(checkpoints(net(), 2)):
        torch.save(_state(model), tmp_path / f"{place}.pt", _use_new_zipfile_serialization=not old)
    damage(tmp_path / "1.pt")
    with pytest.raises(TitheError, match=r"1.pt: found a file that cannot be read"):
        History(tmp_path)
    with pytest.warns(TitheWarning, match=r"left out: .*1.pt"):
        assert len(History(tmp_path, skip_damaged=True)) == 1


def test_a_damaged_delta(tmp_path: Path) -> None:
    tithe.diff(net(), checkpoints(net(), 1)[0], tmp_path / "0.safetensors")
    content = bytearray((tmp_path / "0.safetensors").read_bytes())
    content[-3] ^= 1
    (tmp_path / "1.safetensors").write_bytes(content)
    with pytest.raises(TitheError, match=r"1.safetensors that do not match their checksum"):
        History(tmp_path)


def test_nothing_left(tmp_path: Path) -> None:
    for path in _saved(tmp_path, 2):
        _zero(path)
    with pytest.raises(TitheError, match=r"no checkpoint that can be read.*0.safetensors: found a file that cannot"):
        History(tmp_path, skip_damaged=True)


# --- pickles with code in them


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("old", [False, True], ids=["zip", "before-1.6"])
@pytest.mark.parametrize("suffix", ["pt", "ckpt", "bin", "pth"])
def test_code_in_a_pickle_is_not_run(suffix: str, old: bool, tmp_path: Path) -> None:
    victim, path = tmp_path / "touched", tmp_path / f"model.{suffix}"
    content = {"state_dict": _state(net()), "callback": Evil(victim)}
    torch.save(content, path, _use_new_zipfile_serialization=not old)
    for given in (path, tmp_path, [path]):
        with pytest.raises(TitheError, match=rf"model.{suffix}: found a pickle that holds .*which is no tensor"):
            History(given)
    assert not victim.exists()
    torch.load(path, weights_only=False)
    assert victim.exists(), "the file is not as evil as the test believes"


def test_a_whole_module_is_refused(tmp_path: Path) -> None:
    torch.save(net(), tmp_path / "model.pt")
    with pytest.raises(TitheError, match=r"model.pt: found a pickle that holds .*Sequential, which is no tensor"):
        History(tmp_path)


@pytest.mark.parametrize("content", [[torch.zeros(2)], {"epoch": 3}, {"state_dict": {"epoch": 3}}, torch.zeros(2)])
def test_no_state_dict(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(TitheError, match=r"model.pt: found no state dict"):
        History(tmp_path)


def test_tensors_that_are_no_dense_numbers(tmp_path: Path) -> None:
    torch.save({"w": torch.eye(3).to_sparse()}, tmp_path / "model.pt")
    with pytest.raises(TitheError, match=r"model.pt: found w, a torch.sparse_coo tensor"):
        History(tmp_path)


def test_a_compressed_file_is_refused(tmp_path: Path) -> None:
    torch.save(_state(net()), tmp_path / "plain.pt")
    names = tmp_path / "plain.pt", tmp_path / "packed.pt"
    with zipfile.ZipFile(names[0]) as plain, zipfile.ZipFile(names[1], "w", zipfile.ZIP_DEFLATED) as packed:
        for record in plain.infolist():
            packed.writestr(record.filename, plain.read(record))
    with pytest.raises(TitheError, match=r"packed.pt: found a compressed file"):
        History(tmp_path / "packed.pt")


# --- values


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite(value: float, tmp_path: Path) -> None:
    paths = _saved(tmp_path)
    _changed(paths[1], lambda state: state["0.weight"].view(-1)[77:78].fill_(value))
    history = History(tmp_path)
    for read in (
        history.mean,
        lambda: history.columns("0.weight", 64, 128),
        lambda: tithe.attach(net(), TWA(history)),
    ):
        with pytest.raises(TitheError, match=r"1.safetensors: found values of 0.weight that are not finite"):
            read()
    assert history.columns("0.weight", 78, 128).isfinite().all()


def test_large_finite_values_are_fine(tmp_path: Path) -> None:
    for place in range(2):
        save_file(
            {"w": torch.full((4,), 3e38), "v": torch.full((2,), 1.7e308, dtype=torch.float64)},
            tmp_path / f"{place}.safetensors",
        )
    mean = History(tmp_path).mean()
    assert torch.allclose(mean["w"], torch.full((4,), 3e38))
    assert torch.allclose(mean["v"], torch.full((2,), 1.7e308, dtype=torch.float64))
    assert History(tmp_path).columns("w", 0, 4).isfinite().all()


def test_recording_a_weight_that_is_not_finite(tmp_path: Path) -> None:
    history = recorded(tmp_path / "run", checkpoints(net(), 2), 8)
    model = net()
    with torch.no_grad():
        model[3].weight[0, 0] = float("nan")
    with pytest.raises(TitheError, match=r"3.weight: found a weight that is not finite"):
        history.record(model, 2)
    assert len(History(tmp_path / "run")) == 2
    assert history.record(net(), 2)
