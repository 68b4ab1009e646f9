"""The average of checkpoints on disk: what torch says it is, in the format that came in."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tithe
from deltas import net
from histories import checkpoints, perturbed, recorded
from narrow_plans import FAMILIES, bound, step
from narrow_plans import attach as attach_narrow
from oracles import adamw, sgd
from tithe import History, TitheError
from tithe.averages import weighted_sum
from tithe.averages.average import average

FLOATS = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def states(count: int, dtype: torch.dtype = torch.bfloat16) -> list[dict[str, Tensor]]:
    """Tensors of all sizes and kinds: scalars, empty ones, counters, more than a chunk of numbers."""
    out: list[dict[str, Tensor]] = []
    for seed in range(count):
        draw = torch.Generator().manual_seed(seed)
        out.append(
            {
                "embed": torch.randn(300, 127, generator=draw).to(dtype),
                "scale": torch.randn((), generator=draw).to(dtype),
                "steps": torch.tensor(10 + seed),
                "nothing": torch.empty(0, 3, dtype=dtype),
                "head": torch.randn(3, 5, generator=draw),
                "mask": torch.arange(7) % 3 == 0,
                "norm": torch.randn(11, generator=draw).to(dtype),
            }
        )
    return out


def expected(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Summed as documented: in float64 from float32 on, else in float32."""
    if not tensors[0].is_floating_point():
        return [tensor for tensor, weight in zip(tensors, weights, strict=True) if weight][-1]
    wide = torch.float64 if tensors[0].dtype.itemsize >= 4 else torch.float32
    total = torch.zeros_like(tensors[0], dtype=wide)
    for tensor, weight in zip(tensors, weights, strict=True):
        total.add_(tensor.to(wide), alpha=weight)
    return total.to(tensors[0].dtype)


def check(found: Mapping[str, Tensor], models: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> None:
    """The rounding of the sum may fall the other way in the last bit."""
    assert set(found) == set(models[0])
    for name, tensor in found.items():
        told = expected([model[name] for model in models], weights)
        assert (tensor.dtype, tensor.shape) == (told.dtype, told.shape)
        if not tensor.is_floating_point():
            assert torch.equal(tensor, told)
            continue
        eps = torch.finfo(tensor.dtype).eps
        assert torch.allclose(tensor.double(), told.double(), rtol=2 * eps, atol=4 * eps), name
        assert (tensor != told).float().mean() < 0.02 or tensor.numel() < 50


# --- safetensors files


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("weights", [None, [0.2, 0.5, 0.3], [0.0, 1.0, 0.0], [1.5, -0.75, 0.25]], ids=str)
def test_files_are_averaged_to_a_file(dtype: torch.dtype, weights: list[float] | None, tmp_path: Path) -> None:
    models = states(3, dtype)
    for number, model in enumerate(models):
        save_file(model, tmp_path / f"{number}.safetensors", metadata={"format": "pt", "who": "me"})
    calls: list[tuple[int, int]] = []
    out = average(tmp_path, tmp_path / "out.st", weights, progress=lambda done, total: calls.append((done, total)))
    check(load_file(out), models, weights or [1 / 3] * 3)
    with safe_open(out, "pt") as file:
        assert file.metadata() == {"format": "pt", "who": "me"}
    assert calls[-1][0] == calls[-1][1]
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "0.safetensors",
        "1.safetensors",
        "2.safetensors",
        "out.st",
    ]


def test_one_checkpoint_is_itself_bit_for_bit(tmp_path: Path) -> None:
    models = states(2)
    for number, model in enumerate(models):
        save_file(model, tmp_path / f"{number}.safetensors")
    for number in range(2):
        out = load_file(average(tmp_path, tmp_path / f"{number}.out", [1.0 - number, 0.0 + number]))
        assert all(torch.equal(out[name], models[number][name]) for name in out)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.tuples(st.sampled_from([0, 1, 3, 64, 257]), st.sampled_from([*FLOATS, torch.int32])), min_size=1),
    count=st.integers(1, 4),
    longest=st.sampled_from([16, 48, 1024]),
    seed=st.integers(0, 99),
)
def test_blocks_of_any_size_give_the_same(
    sizes: list[tuple[int, torch.dtype]],
    count: int,
    longest: int,
    seed: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The order of tensors in a file may differ, too: a file by safetensors begins with the widest."""
    for name, value in (("_LONGEST", longest), ("_SHORTEST", 16), ("_CHUNK", 50)):
        monkeypatch.setattr(weighted_sum, name, value)
    draw = torch.Generator().manual_seed(seed)
    models = [
        {f"t{i}": (9 * torch.randn(size, generator=draw)).to(dtype) for i, (size, dtype) in enumerate(sizes)}
        for _ in range(count)
    ]
    for model in models:
        model.update({name: models[0][name] for name in model if not model[name].is_floating_point()})
    folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
    folder.mkdir()
    for number, model in enumerate(models):
        # Of the second checkpoint the tensors lie in other places: a pickle has them in the order given.
        if number % 2:
            torch.save(dict(reversed(model.items())), folder / f"{number}.pt")
        else:
            save_file(model, folder / f"{number}.safetensors")
    out = load_file(average([*sorted(folder.iterdir())], folder / "out"))
    check(out, models, [1 / count] * count)


def test_other_places_in_each_file(tmp_path: Path) -> None:
    models = states(3)
    paths = [tmp_path / f"{number}" for number in range(3)]
    for path, model in zip(paths, models, strict=True):
        path.mkdir()
        names = list(model)
        cut = 2 + int(path.name)
        parts = {"a.safetensors": names[:cut], "b.safetensors": names[cut:]}
        for file, inside in parts.items():
            save_file({name: model[name] for name in inside}, path / file)
        index = {"weight_map": {name: file for file, inside in parts.items() for name in inside}}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
    out = average(paths, tmp_path / "out")
    assert (out / "model.safetensors.index.json").read_bytes() == (
        paths[0] / "model.safetensors.index.json"
    ).read_bytes()
    assert list(load_file(out / "a.safetensors")) == ["embed", "scale"]
    check(load_file(out / "a.safetensors") | load_file(out / "b.safetensors"), models, [1 / 3] * 3)


# --- Hugging Face folders


@pytest.mark.parametrize("shard", ["1GB", "20KB"])
def test_a_folder_is_averaged_to_what_from_pretrained_reads(shard: str, tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=8,
    )  # fmt: skip
    models = checkpoints(BertModel(config), 3)
    for number, model in enumerate(models):
        folder = tmp_path / f"checkpoint-{number}"
        model.save_pretrained(folder, max_shard_size=shard)  # type: ignore[operator]
        (folder / "tokenizer.json").write_text(f"words of {number}")
        (folder / "trainer_state.json").write_text("{}")
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text("{}")
        torch.save({"step": number}, folder / "optimizer.pt")
    out = average(tmp_path, tmp_path / "out")
    weights = sorted(path.name for path in (tmp_path / "checkpoint-0").glob("model*"))
    assert sorted(path.name for path in out.iterdir()) == sorted(
        ["1_Pooling", "config.json", "tokenizer.json", *weights]
    )
    assert (out / "tokenizer.json").read_text() == "words of 0"
    read = BertModel.from_pretrained(out)
    check(read.state_dict(), [model.state_dict() for model in models], [1 / 3] * 3)
    assert (len(weights) > 1) == (shard == "20KB")


def test_a_folder_with_an_old_pickle(tmp_path: Path) -> None:
    models = states(2)
    for number, model in enumerate(models):
        (tmp_path / f"{number}").mkdir()
        torch.save(model, tmp_path / f"{number}" / "pytorch_model.bin")
        (tmp_path / f"{number}" / "config.json").write_text("{}")
    out = average([tmp_path / "0", tmp_path / "1"], tmp_path / "out")
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "pytorch_model.bin"]
    check(torch.load(out / "pytorch_model.bin", weights_only=True), models, [0.5, 0.5])


# --- files by torch.save


def test_a_state_dict_by_torch_save(tmp_path: Path) -> None:
    models = states(2)
    for number, model in enumerate(models):
        torch.save(model, tmp_path / f"{number}.pt")
    out = average(tmp_path, tmp_path / "out.pt", [0.25, 0.75])
    check(torch.load(out, weights_only=True), models, [0.25, 0.75])


@pytest.mark.parametrize("old", [False, True], ids=["zip", "old"])
def test_what_lies_beside_the_weights_is_the_last_ones(old: bool, tmp_path: Path) -> None:
    models = states(3)
    for number, model in enumerate(models):
        content = {
            "state_dict": {**model, "tied": model["embed"]},
            "epoch": number,
            "hyper_parameters": {"lr": 0.1},
            "optimizer_states": [{"state": {0: {"exp_avg": torch.full((4,), float(number))}}}],
        }
        torch.save(content, tmp_path / f"{number}.ckpt", _use_new_zipfile_serialization=not old)
    out = torch.load(average(tmp_path, tmp_path / "out.ckpt"), weights_only=True)
    assert out["epoch"] == 2
    assert out["hyper_parameters"] == {"lr": 0.1}
    assert out["optimizer_states"][0]["state"][0]["exp_avg"].tolist() == [2.0] * 4
    assert out["state_dict"]["tied"].data_ptr() == out["state_dict"]["embed"].data_ptr()
    del out["state_dict"]["tied"]
    check(out["state_dict"], models, [1 / 3] * 3)


# --- recorded histories


@pytest.mark.parametrize("bits", [None, 8, 1])
def test_a_recorded_history_gives_a_plain_file(bits: int | None, tmp_path: Path) -> None:
    history = recorded(tmp_path / "run", checkpoints(net(), 4), bits)
    out = average(tmp_path / "run", tmp_path / "out.safetensors", [0.1, 0.2, 0.3, 0.4])
    check(load_file(out), list(history), [0.1, 0.2, 0.3, 0.4])
    with safe_open(out, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert len(History([out])) == 1
    net(1).load_state_dict(load_file(out))


def test_a_history_object_is_as_good_as_its_path(tmp_path: Path) -> None:
    history = recorded(tmp_path / "run", checkpoints(net(), 2))
    out = load_file(average(history, str(tmp_path / "out.safetensors")))
    assert all(torch.allclose(out[name], tensor) for name, tensor in history.mean().items())


# --- deltas


def delta_run(folder: Path, base: nn.Module, seeds: Sequence[int]) -> list[Path]:
    """Deltas of one random choice a seed; one of a seed that comes again goes on training."""
    plans: dict[int, tuple[tithe.Plan, torch.optim.Optimizer, nn.Module]] = {}
    paths: list[Path] = []
    for number, seed in enumerate(seeds):
        if seed not in plans:
            model = net()
            model.load_state_dict(base.state_dict())
            plan = tithe.attach(model, tithe.FISH(density=0.1, score="random"), seed=seed)
            plans[seed] = plan, adamw(plan.parameters()), model
            plan.bind(plans[seed][1])
        plan, optimizer, model = plans[seed]
        plan.backward(lambda: model(torch.randn(6, 8)).square().mean())  # noqa: B023
        optimizer.step()
        optimizer.zero_grad()
        plan.step()
        paths.append(folder / f"{number}.safetensors")
        plan.save(paths[-1])
    return paths


def test_deltas_of_one_base_are_averaged_to_a_delta(tmp_path: Path) -> None:
    base = net()
    paths = delta_run(tmp_path, base, [0, 0, 0])
    out = average(paths, tmp_path / "out.safetensors")
    assert tithe.inspect(out).metadata["averaged"] == "3"
    tuned = []
    for path in (*paths, out):
        model = net()
        model.load_state_dict(base.state_dict())
        tuned.append({name: value.clone() for name, value in tithe.apply(model, path).state_dict().items()})
    check(tuned[-1], tuned[:-1], [1 / 3] * 3)
    assert out.stat().st_size <= paths[0].stat().st_size + 32


def test_deltas_that_change_different_places_are_refused(tmp_path: Path) -> None:
    paths = delta_run(tmp_path, net(), [0, 1])
    with pytest.raises(TitheError, match=r"found a delta that changes other places.*tithe merge"):
        average(paths, tmp_path / "out.safetensors")


def test_deltas_of_different_bases_are_refused(tmp_path: Path) -> None:
    base, other = net(), perturbed(net(), 1)
    paths: list[Path] = []
    for number, start in enumerate((base, other)):
        tuned = net()
        tuned.load_state_dict(start.state_dict())
        with torch.no_grad():
            tuned[0].weight[0, :2] += 1
        tithe.diff(start, tuned, tmp_path / f"{number}.safetensors")
        paths.append(tmp_path / f"{number}.safetensors")
    with pytest.raises(TitheError, match="another base"):
        average(paths, tmp_path / "out.safetensors")


def test_narrow_networks_are_averaged_to_a_narrow_network(tmp_path: Path) -> None:
    case = FAMILIES["residual"]
    plan = attach_narrow(case)
    optimizer = bound(plan, sgd)
    step(plan, optimizer, case, case.batches(1)[0])
    plan.settle(draws=2)
    paths: list[Path] = []
    for number in range(3):
        step(plan, optimizer, case, case.batches(3)[number])
        paths.append(tmp_path / f"{number}.safetensors")
        plan.save(paths[-1])
    out = average(paths, tmp_path / "out.safetensors")
    models = [tithe.apply(case.model(), path).state_dict() for path in (*paths, out)]
    check(models[-1], models[:-1], [1 / 3] * 3)


# --- masks


def test_infinities_that_all_share_are_kept(tmp_path: Path) -> None:
    models = states(2, torch.float32)
    for number, model in enumerate(models):
        model["bias"] = torch.full((4, 4), -math.inf).triu(1)
        save_file(model, tmp_path / f"{number}.safetensors")
    out = load_file(average(tmp_path, tmp_path / "out.safetensors", [1.5, -0.5]))
    assert torch.equal(out.pop("bias"), models[0].pop("bias"))
    del models[1]["bias"]
    check(out, models, [1.5, -0.5])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_what_is_not_finite_is_named(value: float, dtype: torch.dtype, tmp_path: Path) -> None:
    models = states(3, dtype)
    models[1]["norm"][3] = value
    for number, model in enumerate(models):
        save_file(model, tmp_path / f"{number}.safetensors")
    with pytest.raises(TitheError, match=r"1\.safetensors: found values of norm that are not finite"):
        average(tmp_path, tmp_path / "out.safetensors")
    assert len(list(tmp_path.iterdir())) == 3
    average(tmp_path, tmp_path / "out.safetensors", [0.5, 0.0, 0.5])


def test_an_average_beyond_its_dtype_is_refused(tmp_path: Path) -> None:
    for number, value in enumerate((6e4, -6e4)):
        save_file({"w": torch.full((5,), value, dtype=torch.float16)}, tmp_path / f"{number}.safetensors")
    with pytest.raises(TitheError, match="w: found an average beyond the range"):
        average(tmp_path, tmp_path / "out.safetensors", [3.0, -2.0])
