"""What a history cannot be opened or recorded with, and files that do not follow from each other: clear errors."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tithe
from deltas import Tied, net
from histories import checkpoints, recorded
from models import CASES
from tithe import FISH, TWA, History, TitheError, TitheWarning
from tithe.averages.safetensors_ranges import FlatFile, FlatWriter, Form


def _saved(folder: Path, count: int) -> list[Path]:
    """Checkpoints that no history recorded."""
    paths = [folder / f"{place}.safetensors" for place in range(count)]
    for path, model in zip(paths, checkpoints(net(), count), strict=True):
        save_file(model.state_dict(), path)
    return paths


# --- paths and settings


def test_nothing_to_read(tmp_path: Path) -> None:
    for folder in (tmp_path / "missing", tmp_path):
        history = History(folder)
        for read in (History.mean, lambda one: one.rows, lambda one: one[0], lambda one: one.average([])):
            with pytest.raises(TitheError, match="no checkpoint"):
                read(history)
        with pytest.raises(TitheError, match=rf"{folder.name}.*no checkpoint; .*check the path"):
            tithe.attach(net(), TWA(folder))
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_is_missing(tmp_path: Path) -> None:
    paths = _saved(tmp_path, 2)
    with pytest.raises(TitheError, match=r"gone.safetensors: found no such file"):
        History([*paths, tmp_path / "gone.safetensors"])
    with pytest.raises(TitheError, match=r"gone.pt: found no such file"):
        History([tmp_path / "gone.pt", *paths])
    with pytest.raises(TitheError, match="no path"):
        History([])


def test_a_folder_of_other_things(tmp_path: Path) -> None:
    (tmp_path / "readme.md").write_text("nothing here")
    with pytest.raises(TitheError, match="1 files and folders, none of them a checkpoint"):
        History(tmp_path)


@pytest.mark.parametrize("bits", [2, 16, 0, "8"])
def test_bits_that_there_are_not(bits: object, tmp_path: Path) -> None:
    with pytest.raises(TitheError, match="expected None, 8, 4 or 1"):
        History(tmp_path, bits)


def test_bits_other_than_recorded(tmp_path: Path) -> None:
    recorded(tmp_path / "coded", checkpoints(net(), 2), 8)
    recorded(tmp_path / "whole", checkpoints(net(), 2))
    for folder, bits, found in (("coded", 4, "checkpoints of 8 bits"), ("whole", 8, "whole checkpoints")):
        with pytest.raises(TitheError, match=rf"{found}; expected bits={bits}"):
            History(tmp_path / folder, bits)
    assert History(tmp_path / "coded").bits == 8
    _saved(tmp_path, 1)
    with pytest.raises(TitheError, match="bits=8 for checkpoints that are written already"):
        History(tmp_path / "0.safetensors", 8)


def test_recording_over_checkpoints_of_something_else(tmp_path: Path) -> None:
    paths = _saved(tmp_path, 3)
    before = {path: path.read_bytes() for path in paths}
    for given in (tmp_path, paths, paths[0]):
        with pytest.raises(TitheError, match="checkpoints that something else wrote"):
            History(given).record(net(), 9)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("bits", [None, 8])
def test_recording_another_model(bits: int | None, tmp_path: Path) -> None:
    recorded(tmp_path / "run", checkpoints(net(), 2), bits)
    others = {
        r"0.weight.*float32 of shape \[16, 9\] in the model; expected float32 of shape \[16, 8\]": nn.Sequential(
            nn.Linear(9, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3)
        ),
        "0.bias.*bfloat16": net().bfloat16(),
        "4.weight.*expected none": nn.Sequential(*net(), nn.Linear(3, 2, bias=False)),
        "3.bias.*no such tensor in the model": net()[:3],
    }
    for message, model in others.items():
        with pytest.raises(TitheError, match=message):
            History(tmp_path / "run").record(model, 5)
    assert len(list((tmp_path / "run").iterdir())) == 2


@pytest.mark.parametrize("step", [4, 3, 0, -1])
def test_a_step_that_is_not_later(step: int, tmp_path: Path) -> None:
    history = History(tmp_path / "run")
    history.record(net(), 4)
    for one in (history, History(tmp_path / "run")):
        with pytest.raises(TitheError, match=rf"step {step} after step 4; expected a later step"):
            one.record(net(), step)


def test_a_model_that_safetensors_cannot_hold(tmp_path: Path) -> None:
    model = nn.Module()
    model.register_buffer("mask", torch.eye(3).to_sparse())
    with pytest.raises(TitheError, match=r"found mask, a torch.sparse_coo tensor"):
        History(tmp_path / "run").record(model, 0)
    with pytest.raises(TitheError, match=r"weight: found a tensor without values"):
        History(tmp_path / "run").record(nn.Linear(2, 2, device="meta"), 0)
    assert list(tmp_path.iterdir()) == []


def test_weights_of_an_average(tmp_path: Path) -> None:
    history = recorded(tmp_path / "run", checkpoints(net(), 3))
    with pytest.raises(TitheError, match="2 weights; expected 3"):
        history.average([0.5, 0.5])


def test_untied_weights_of_a_tied_run(tmp_path: Path) -> None:
    history = recorded(tmp_path / "run", [Tied()])
    with pytest.raises(TitheError, match=r"out.weight.*expected none"):
        history.record(Tied(tied=False), 1)


# --- the files of a run


@pytest.mark.parametrize("bits", [None, 8])
def test_files_of_two_histories_in_one_folder(bits: int | None, tmp_path: Path) -> None:
    recorded(tmp_path / "one", checkpoints(net(), 2), bits)
    recorded(tmp_path / "two", checkpoints(net(), 4), bits)
    for name in ("000002.safetensors", "000003.safetensors"):
        shutil.copy(tmp_path / "two" / name, tmp_path / "one" / name)
    with pytest.raises(TitheError, match=r"000002.safetensors: found a checkpoint of another history"):
        History(tmp_path / "one")
    with pytest.warns(TitheWarning, match=r"left out: .*00000[23]") as told:
        assert len(History(tmp_path / "one", skip_damaged=True)) == 2
    assert len(told) == 2


@pytest.mark.parametrize("bits", [None, 8])
def test_a_file_in_the_middle_is_gone(bits: int | None, tmp_path: Path) -> None:
    models = checkpoints(net(), 5)
    recorded(tmp_path / "run", models, bits)
    (tmp_path / "run" / "000002.safetensors").unlink()
    with pytest.raises(TitheError, match=r"000003.safetensors: found .*one after a gap"):
        History(tmp_path / "run")
    if bits is None:
        history = History(tmp_path / "run", skip_damaged=True)
        assert history.steps == [0, 1, 3, 4]
        assert torch.equal(history[2]["0.weight"], models[3][0].weight)
    else:
        with pytest.warns(TitheWarning, match=r"00000[34].*a coded step after one that is left out"):
            assert History(tmp_path / "run", skip_damaged=True).steps == [0, 1]


@pytest.mark.parametrize("place", [0, 2, 4])
@pytest.mark.parametrize("bits", [None, 4])
def test_a_damaged_file_of_a_run(bits: int | None, place: int, tmp_path: Path) -> None:
    recorded(tmp_path / "run", checkpoints(net(), 5), bits)
    before = list(History(tmp_path / "run"))
    damaged = tmp_path / "run" / f"{place:06d}.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-50])
    with pytest.raises(TitheError, match=rf"{place:06d}.safetensors: found a file that cannot be read"):
        History(tmp_path / "run")
    kept = [i for i in range(5) if i != place] if bits is None else list(range(place))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        if not kept:
            with pytest.raises(TitheError, match="no checkpoint that can be read"):
                History(tmp_path / "run", skip_damaged=True)
            return
        history = History(tmp_path / "run", skip_damaged=True)
    assert [f"{i:06d}" in "".join(str(one.message) for one in told) for i in range(5)] == [
        i not in kept for i in range(5)
    ]
    assert history.steps == kept
    for index, state in zip(kept, history, strict=True):
        assert all(torch.equal(state[name], before[index][name]) for name in state)
    with pytest.raises(TitheError, match="damaged checkpoints that were left out"):
        history.record(net(), 9)


def test_a_coded_step_alone(tmp_path: Path) -> None:
    recorded(tmp_path / "run", checkpoints(net(), 3), 8)
    files = sorted((tmp_path / "run").iterdir())
    assert len(History(files[:1])) == 1
    with pytest.raises(TitheError, match=r"000001.safetensors: found a step of a coded history"):
        History(files)
    with pytest.raises(TitheError, match=r"000001.safetensors: found a step of a coded history"):
        History([tmp_path / "run", files[0]])


def _rewritten(path: Path, change: Callable[[dict[str, Any]], object], **tensors: Tensor | None) -> None:
    """Write a recorded file anew, with its checksums: another note, and other tensors or without some."""
    found = FlatFile.open(path)
    note = json.loads(found.metadata["tithe_history"])
    change(note)
    state = {**load_file(path), **tensors}
    kept = {name: tensor.clone() for name, tensor in state.items() if tensor is not None}  # no map of the file
    with path.open("wb") as file:
        forms = {name: Form.of(tensor) for name, tensor in kept.items()}
        writer = FlatWriter(file, forms, {"tithe_history": json.dumps(note)}, checked=note.get("version") != 1)
        for name in writer.names:
            writer.write(kept[name])
        writer.finish()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda note: note.update(version=3), "a history of version 3"),
        (lambda note: note.update(version=1), "a checkpoint without checksums after one that has them"),
        (lambda note: note.pop("step"), "a damaged note"),
        (lambda note: note.update(other=1), "a damaged note"),
        (lambda note: note.update(step="1"), "a damaged note"),
        (lambda note: note.update(step=1e309), "a damaged note"),
        (lambda note: note.update(score=[]), "a damaged note"),
        (lambda note: note.update(bits=3), "a damaged note"),
        (lambda note: note.update(bits=4), "bits=4; expected bits=8"),
    ],
)
def test_a_note_that_is_not_ours(change: Callable[[dict[str, object]], object], message: str, tmp_path: Path) -> None:
    recorded(tmp_path / "run", checkpoints(net(), 3), 8)
    _rewritten(tmp_path / "run" / "000001.safetensors", change)
    with pytest.raises(TitheError, match=rf"000001.safetensors: found {message}"):
        History(tmp_path / "run")


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        ("0.weight#codes", "codes or scales alone for 0.weight"),
        ("0.weight#scales", "codes or scales alone for 0.weight"),
        ("1.num_batches_tracked", "no such tensor for 1.num_batches_tracked"),
    ],
)
def test_a_coded_file_that_lacks_a_part(tensor: str, message: str, tmp_path: Path) -> None:
    recorded(tmp_path / "run", checkpoints(nn.Sequential(nn.Linear(8, 64), nn.BatchNorm1d(64)), 3), 8)
    assert tensor in load_file(tmp_path / "run" / "000001.safetensors")
    _rewritten(tmp_path / "run" / "000001.safetensors", lambda note: note, **{tensor: None})
    with pytest.raises(TitheError, match=rf"000001.safetensors: found {message}"):
        History(tmp_path / "run")


def test_codes_of_another_size(tmp_path: Path) -> None:
    recorded(tmp_path / "run", checkpoints(nn.Linear(8, 64), 3), 8)
    path = tmp_path / "run" / "000001.safetensors"
    cut = load_file(path)["weight#codes"][:1].clone()
    _rewritten(path, lambda note: note, **{"weight#codes": cut})
    with pytest.raises(TitheError, match=r"000001.safetensors: found uint8 of shape \[1, 256\] for weight#codes"):
        History(tmp_path / "run")


def test_fish_deltas_do_not_hide_a_missing_weight(tmp_path: Path) -> None:
    """A history of whole checkpoints that lacks a weight of the model says so; one of deltas leaves it alone."""
    case = CASES["mlp"]
    model = case.model()
    state = model.state_dict()
    name = next(iter(state))
    save_file({other: tensor for other, tensor in state.items() if other != name}, tmp_path / "0.safetensors")
    with pytest.raises(TitheError, match=rf"{name}: found no such tensor"):
        tithe.attach(model, TWA(tmp_path))
    plan = tithe.attach(model, FISH(k=5, score="magnitude"), loss=case.loss, data=case.batches(1))
    plan.save(tmp_path / "delta.safetensors")
    plan.release()
    tithe.attach(case.model(), TWA(tmp_path / "delta.safetensors")).release()
