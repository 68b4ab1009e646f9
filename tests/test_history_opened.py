"""A history over checkpoints that something else wrote: every format, the order, and what lies beside them."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import tithe
from deltas import net
from histories import checkpoints, flat, perturbed, recorded
from models import CASES, Case
from narrow_plans import FAMILIES, bound, step
from narrow_plans import attach as attach_narrow
from oracles import adamw, sgd
from tithe import FISH, TWA, History, TitheError
from tithe.averages.formats import PickleEntry


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def _equal(state: dict[str, Tensor], model: nn.Module) -> bool:
    expected = model.state_dict()
    return all(torch.equal(state[name], expected[name]) and state[name].dtype == expected[name].dtype for name in state)


def _check(history: History, models: list[nn.Module]) -> None:
    """Every way to read gives the models' own numbers."""
    assert len(history) == len(models)
    assert [_equal(state, model) for state, model in zip(history, models, strict=True)] == [True] * len(models)
    assert _equal(history[-1], models[-1])
    mean = history.mean()
    for name, tensor in history[0].items():
        rows = torch.stack([model.state_dict()[name].double().reshape(-1) for model in models])
        if tensor.is_floating_point():
            assert torch.allclose(mean[name].double().view(-1), rows.mean(0), rtol=1e-6, atol=1e-7)
            first, last = tensor.numel() // 3, tensor.numel() - tensor.numel() // 4
            assert torch.equal(history.columns(name, first, last).double(), rows[:, first:last])


# --- safetensors


def test_a_folder_of_files_is_read_in_the_order_of_its_numbers(tmp_path: Path) -> None:
    models = checkpoints(net(), 4)
    for name, model in zip(("step-1000", "step-20", "step-3", "final"), models, strict=True):
        save_file(_state(model), tmp_path / f"{name}.safetensors")
    (tmp_path / "notes.txt").write_text("no weights")
    (tmp_path / "logs").mkdir()
    history = History(tmp_path)
    assert [path.stem for path in history.rows.paths] == ["final", "step-3", "step-20", "step-1000"]
    _check(history, models[::-1])
    assert history.steps == [0, 1, 2, 3]
    assert history.scores == [None] * 4
    assert history.folder == tmp_path


def test_a_list_is_read_as_it_is_given(tmp_path: Path) -> None:
    models = checkpoints(net(), 3)
    paths = [tmp_path / f"{n}.safetensors" for n in (2, 10, 1)]
    for path, model in zip(paths, models, strict=True):
        save_file(_state(model), path)
    _check(History(paths), models)
    _check(History([str(path) for path in paths]), models)
    _check(History([paths[2], paths[2], paths[0]]), [models[2], models[2], models[0]])
    _check(History(paths[1]), models[1:2])
    assert History(paths[1]).folder == tmp_path


def test_formats_may_be_mixed_where_tensors_are_the_same(tmp_path: Path) -> None:
    models = checkpoints(net(), 2)
    save_file(_state(models[0]), tmp_path / "0.safetensors")
    torch.save(_state(models[1]), tmp_path / "1.pt")
    _check(History(tmp_path), models)


# --- Hugging Face


def _bert(seed: int) -> nn.Module:
    return perturbed(CASES["bert"].model(), seed)


def test_sharded_folders_of_a_trainer(tmp_path: Path) -> None:
    models = [_bert(seed) for seed in (1, 2, 3)]
    for number, model in zip((500, 1000, 1500), models, strict=True):
        folder = tmp_path / f"checkpoint-{number}"
        model.save_pretrained(folder, max_shard_size="20KB")
        assert len(list(folder.glob("*.safetensors"))) > 1
        torch.save({"state": {}, "param_groups": []}, folder / "optimizer.pt")
        torch.save({"lr": 1.0}, folder / "scheduler.pt")
        (folder / "rng_state.pth").write_bytes(b"junk that is never opened")
        (folder / "training_args.bin").write_bytes(b"junk that is never opened")
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": number}))
    (tmp_path / "runs").mkdir()
    (tmp_path / "training_args.bin").write_bytes(b"junk that is never opened")
    (tmp_path / ".cache").mkdir()
    history = History(tmp_path)
    assert [path.name for path in history.rows.paths] == ["checkpoint-500", "checkpoint-1000", "checkpoint-1500"]
    _check(history, models)
    _check(History(tmp_path / "checkpoint-1000"), models[1:2])
    _check(History([tmp_path / "checkpoint-1500", tmp_path / "checkpoint-500"]), [models[2], models[0]])
    model = _bert(9)
    plan = tithe.attach(model, TWA(history), loss=CASES["bert"].loss)
    plan.release()
    mean = torch.stack([flat(one) for one in models]).mean(0)
    assert torch.allclose(flat(model), mean, rtol=0, atol=1e-6)


def test_single_files_and_old_pickles_of_hugging_face(tmp_path: Path) -> None:
    models = [_bert(1), _bert(2)]
    models[0].save_pretrained(tmp_path / "a-1")
    (tmp_path / "a-2").mkdir()
    torch.save(_state(models[1]), tmp_path / "a-2" / "pytorch_model.bin")
    history = History(tmp_path)
    saved = set(history[0])
    assert saved == set(history[1])
    _check(history, models)


def test_a_final_model_among_its_checkpoints_is_not_guessed_about(tmp_path: Path) -> None:
    _bert(1).save_pretrained(tmp_path)
    _bert(2).save_pretrained(tmp_path / "checkpoint-10")
    with pytest.raises(TitheError, match=r"a checkpoint, and 1 more in folders like checkpoint-10"):
        History(tmp_path)
    assert len(History([tmp_path / "checkpoint-10", tmp_path / "model.safetensors"])) == 2


# --- torch.save


@pytest.mark.parametrize("old", [False, True], ids=["zip", "before-1.6"])
def test_files_of_torch_save(old: bool, tmp_path: Path) -> None:
    models = checkpoints(CASES["resnet_basic"].model(), 3)
    contents: list[Any] = [
        _state(models[0]),
        {"epoch": 3, "state_dict": _state(models[1]), "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}}},
        {"loss": torch.tensor(0.5), "best": torch.tensor(0.9), "model": {"state_dict": _state(models[2])}},
    ]
    for place, content in enumerate(contents):
        torch.save(content, tmp_path / f"{place}.pt", _use_new_zipfile_serialization=not old)
    _check(History(tmp_path), models)
    keys = [PickleEntry(tmp_path / f"{place}.pt").keys for place in range(3)]
    assert keys == [(), ("state_dict",), ("model", "state_dict")]


def test_a_checkpoint_of_lightning(tmp_path: Path) -> None:
    models = checkpoints(net(), 2)
    for epoch, model in enumerate(models):
        content = {
            "epoch": epoch,
            "global_step": 10 * epoch,
            "pytorch-lightning_version": "2.5.0",
            "state_dict": _state(model),
            "loops": {"fit_loop": {"state_dict": {}}},
            "callbacks": {},
            "optimizer_states": [adamw(model.parameters()).state_dict()],
            "lr_schedulers": [],
            "hyper_parameters": {"lr": 0.1, "name": "tiny"},
        }
        torch.save(content, tmp_path / f"epoch={epoch}-step={10 * epoch}.ckpt")
    _check(History(tmp_path), models)


def test_every_layout_of_memory_is_read_from_torch_files(tmp_path: Path) -> None:
    torch.manual_seed(0)
    shared = torch.arange(100.0)

    def made(shift: float) -> dict[str, Tensor]:
        return {
            "conv": (torch.randn(6, 5, 3, 3) + shift).contiguous(memory_format=torch.channels_last),
            "turned": (torch.randn(7, 11) + shift).t(),
            "slice": (shared + shift)[13:44],
            "stepped": (shared + shift)[::3],
            "cut": (torch.randn(9, 9) + shift)[2:7, 1:8],
            "spread": torch.tensor([1.0 + shift]).expand(4, 5),
            "number": torch.tensor(shift),
            "empty": torch.empty(0, 4),
            "half": torch.randn(3, 5).to(torch.bfloat16),
            "wide": torch.randn(3).double(),
            "count": torch.tensor([shift], dtype=torch.int64),
            "flag": torch.tensor(True),
        }

    states = [made(shift) for shift in (0.0, 1.0)]
    for place, state in enumerate(states):
        torch.save(state, tmp_path / f"{place}.pt")
    history = History(tmp_path)
    for found, expected in zip(history, states, strict=True):
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    for name in ("conv", "turned", "slice", "stepped", "cut", "spread"):
        rows = torch.stack([state[name].reshape(-1) for state in states])
        for first, last in ((0, rows.shape[1]), (3, 4), (7, rows.shape[1] - 2), (5, 5)):
            assert torch.equal(history.columns(name, first, last), rows[:, first:last]), (name, first, last)


def test_parameters_and_tied_tensors_in_torch_files(tmp_path: Path) -> None:
    weight = nn.Parameter(torch.randn(4, 3))
    torch.save({"a": weight, "b": weight}, tmp_path / "0.pt")
    history = History(tmp_path)
    assert torch.equal(history[0]["a"], weight)
    assert torch.equal(history[0]["b"], weight)
    assert not history[0]["a"].requires_grad


# --- deltas and narrow networks


def _fish_run(folder: Path, model: nn.Module, case: Case, steps: int, seed: int = 0) -> list[dict[str, Tensor]]:
    """Deltas over the steps of a run, and the whole states behind them."""
    folder.mkdir(exist_ok=True)
    plan = tithe.attach(model, FISH(density=0.05, score="random"), loss=case.loss, data=case.batches(2), seed=seed)
    optimizer = adamw(plan.parameters())
    plan.bind(optimizer)
    states: list[dict[str, Tensor]] = []
    for number, batch in enumerate(case.batches(steps)):
        optimizer.zero_grad()
        plan.backward(lambda batch=batch: case.loss(plan.model, batch))
        optimizer.step()
        plan.step()
        plan.save(folder / f"{seed}-{number}.safetensors")
        states.append(_state(model))
    plan.release()
    return states


def _merged(model: nn.Module, name: str, values: Tensor, places: Tensor | None) -> Tensor:
    whole = model.state_dict()[name].clone()
    if places is None:
        return values
    whole.view(-1)[places] = values
    return whole


@pytest.mark.parametrize("name", ["bert", "mlp"])
def test_deltas_of_one_run_are_a_history(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    base, model = case.model(), case.model()
    states = _fish_run(tmp_path / "run", model, case, 3)
    history = History(tmp_path / "run")
    assert history.partial
    assert len(history) == 3
    for index, state in enumerate(history):
        for name_, values in state.items():
            whole = _merged(base, name_, values, history.rows.places.get(name_))
            assert torch.equal(whole, states[index][name_]), name_
            assert torch.equal(history[index][name_], values)
    held = [entry.places for entry in history.rows.entries]
    assert all(held[0][name_] is held[2][name_] for name_ in held[0]), "one copy of the places"
    for start in (base, model):  # the base, and what was trained from it
        copied = copy.deepcopy(start)
        tithe.attach(copied, TWA(history), loss=case.loss).release()
        for name_, p in copied.named_parameters():
            expected = torch.stack([state[name_].double() for state in states]).mean(0)
            assert torch.allclose(p.double(), expected, rtol=0, atol=1e-6), name_


def test_deltas_in_different_places_need_their_base(tmp_path: Path) -> None:
    case = CASES["mlp"]
    base = case.model()
    states = [_fish_run(tmp_path / "runs", case.model(), case, 1, seed)[0] for seed in (0, 1, 2)]
    history = History(tmp_path / "runs")
    with pytest.raises(TitheError, match=r"0-0.*other places of .* and no base"):
        history.mean()
    based = history.on(base.state_dict())
    for name, values in based.mean().items():
        mean = _merged(base, name, values, based.rows.places.get(name))
        expected = torch.stack([state[name].double() for state in states]).mean(0)
        assert torch.allclose(mean.double(), expected, rtol=0, atol=1e-6), name
    for name, form in based.rows.forms.items():
        block = based.columns(name, 0, form.numel)
        ends = (form.numel // 3, form.numel - form.numel // 3)
        assert torch.equal(based.columns(name, *ends), block[:, slice(*ends)])
    tithe.attach(base, TWA(history), loss=case.loss).release()
    for name, p in base.named_parameters():
        expected = torch.stack([state[name].double() for state in states]).mean(0)
        assert torch.allclose(p.double(), expected, rtol=0, atol=1e-6), name


def test_deltas_on_another_base_are_refused(tmp_path: Path) -> None:
    case = CASES["mlp"]
    _fish_run(tmp_path / "run", case.model(), case, 2)
    other = perturbed(case.model(), 5)
    with pytest.raises(TitheError, match=r"0-0.safetensors: found another base"):
        tithe.attach(other, TWA(History(tmp_path / "run")), loss=case.loss)
    wider = nn.Sequential(nn.Linear(3, 4))
    with pytest.raises(TitheError, match=r"in the base"):
        History(tmp_path / "run").on(wider.state_dict())


def test_a_delta_whole_in_one_and_in_places_in_another(tmp_path: Path) -> None:
    base = net()
    some, every = copy.deepcopy(base), perturbed(base, 1)
    with torch.no_grad():
        some[0].weight.view(-1)[[3, 17]] = 5.0
    for name, tuned in (("0", some), ("1", every)):
        tithe.diff(base, tuned, tmp_path / f"{name}.safetensors")
    history = History(tmp_path).on(base.state_dict())
    assert "0.weight" not in history.rows.places
    block = history.columns("0.weight", 2, 90)
    assert torch.equal(block[0], some[0].weight.detach().view(-1)[2:90])
    assert torch.equal(block[1], every[0].weight.detach().view(-1)[2:90])


def test_narrow_networks_are_a_history(tmp_path: Path) -> None:
    case = FAMILIES["residual"]
    plan = attach_narrow(case)
    optimizer = bound(plan, sgd)
    for batch in case.batches(2):
        step(plan, optimizer, case, batch)
    plan.settle(draws=2)
    for number, batch in enumerate(case.batches(3)):
        step(plan, optimizer, case, batch)
        plan.save(tmp_path / f"{number}.safetensors")
    states = [_state(tithe.apply(case.model(), tmp_path / f"{number}.safetensors")) for number in range(3)]
    history = History(tmp_path)
    assert [state.keys() for state in history] == [state.keys() for state in states]
    for found, expected in zip(history, states, strict=True):
        assert all(torch.equal(found[name], expected[name]) for name in found)
    with pytest.raises(TitheError, match=r"narrow by tithe.apply"):
        tithe.attach(case.model(), TWA(history), loss=case.loss)
    narrow = tithe.apply(case.model(), tmp_path / "2.safetensors")
    averaged = tithe.attach(narrow, TWA(history), loss=case.loss, data=case.batches(2))
    averaged.release()
    for name, p in narrow.named_parameters():
        expected = torch.stack([state[name].double() for state in states]).mean(0)
        assert torch.allclose(p.double(), expected, rtol=0, atol=1e-6), name


# --- a few more


def test_several_histories_together(tmp_path: Path) -> None:
    models = checkpoints(net(), 4)
    recorded(tmp_path / "one", models[:2])
    recorded(tmp_path / "two", models[2:])
    _check(History([tmp_path / "one", tmp_path / "two"]), models)


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    history = recorded(tmp_path / "run", checkpoints(net(), 2))
    os.truncate(tmp_path / "run" / "000001.safetensors", 900)
    with pytest.raises(TitheError, match=r"000001.*can no longer be read"):
        history.mean()
    (tmp_path / "run" / "000001.safetensors").unlink()
    with pytest.raises(TitheError, match=r"000001.*can no longer be read"):
        history.mean()
