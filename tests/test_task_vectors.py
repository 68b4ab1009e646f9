"""Fine-tunings of one base merged into one model: what the papers say, tensor by tensor, in the format that came in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BertConfig, BertModel
from typer.testing import CliRunner

import tithe
from tithe import TitheError
from tithe.app.cli import app
from tithe.averages.task_vectors import merge_isotropic, merge_ties, trim

BERT: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}


def states(count: int = 3, dtype: torch.dtype = torch.float32) -> list[dict[str, Tensor]]:
    """A base, and fine-tunings of it: matrices, a kernel, vectors, a number, a counter."""
    draw = torch.Generator().manual_seed(0)
    shapes = {"linear": (12, 7), "wide": (5, 30), "kernel": (4, 3, 3, 3), "bias": (12,), "scale": (), "none": (0, 4)}
    base = {name: torch.randn(shape, generator=draw).to(dtype) for name, shape in shapes.items()}
    found = [{**base, "steps": torch.tensor(3)}]
    for index in range(count):
        moved = {name: w + 0.1 * torch.randn(w.shape, generator=draw).to(dtype) for name, w in base.items()}
        found.append({**moved, "steps": torch.tensor(10 + index)})
    return found


def written(folder: Path, tensors: list[dict[str, Tensor]]) -> tuple[Path, list[Path]]:
    """Each as a file: the base, and the others."""
    paths = [folder / f"{index}.safetensors" for index in range(len(tensors))]
    for path, state in zip(paths, tensors, strict=True):
        save_file(state, path)
    return paths[0], paths[1:]


def ties_by_entry(vectors: list[Tensor], alphas: list[float], density: float) -> Tensor:
    """Yadav et al., algorithm 1, one entry after the other."""
    trimmed: list[list[float]] = []
    for vector in vectors:
        values = vector.flatten().tolist()
        order = sorted(range(len(values)), key=lambda j: (-abs(values[j]), j))[: max(1, int(density * len(values)))]
        trimmed.append([value if j in order else 0.0 for j, value in enumerate(values)])
    merged: list[float] = []
    for column in zip(*trimmed, strict=True):
        sign = 1 if sum(a * v for a, v in zip(alphas, column, strict=True)) >= 0 else -1
        agreeing = [(a, v) for a, v in zip(alphas, column, strict=True) if v * sign > 0]
        merged.append(sum(a * v for a, v in agreeing) / sum(a for a, _ in agreeing) if agreeing else 0.0)
    return torch.tensor(merged, dtype=torch.float64).view(vectors[0].shape)


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("alphas", [[1.0, 1.0, 1.0], [0.5, 2.0, 1.0]])
def test_ties_is_the_papers_algorithm(density: float, alphas: list[float]) -> None:
    draw = torch.Generator().manual_seed(1)
    vectors = torch.randn(3, 6, 5, generator=draw, dtype=torch.float64)
    found = merge_ties(trim(vectors, density), torch.tensor(alphas))
    assert torch.allclose(found, ties_by_entry(list(vectors), alphas, density))


@given(st.integers(1, 4), st.integers(1, 40), st.floats(0.01, 1.0), st.integers(0, 99))
def test_trimming_keeps_as_many_of_the_largest_as_the_density_says(
    n: int, size: int, density: float, seed: int
) -> None:
    vectors = torch.randint(-3, 4, (n, size), generator=torch.Generator().manual_seed(seed)).double()
    found = trim(vectors, density)
    count = max(1, int(density * size))
    for row, kept in zip(vectors, found, strict=True):
        assert bool(((kept == row) | (kept == 0)).all())
        assert torch.equal(
            kept.abs().sort(descending=True).values[:count], row.abs().sort(descending=True).values[:count]
        )
        assert int(kept.count_nonzero()) <= count


@given(st.integers(1, 4), st.integers(1, 8), st.integers(1, 8), st.integers(0, 99))
def test_isotropic_matrices_have_one_singular_value_and_the_directions_of_the_sum(
    n: int, rows: int, columns: int, seed: int
) -> None:
    vectors = torch.randn(n, rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    total, found = vectors.sum(0), merge_isotropic(vectors, torch.ones(n))
    sigma = torch.linalg.svdvals(total)
    assert torch.allclose(torch.linalg.svdvals(found), sigma.mean().expand_as(sigma))
    # U Vᵀ is the orthogonal part of the polar decomposition: its product with the sum is symmetric and not negative.
    stretch = found.mT @ total if rows >= columns else total @ found.mT
    assert torch.allclose(stretch, stretch.mT, atol=1e-9)
    assert float(torch.linalg.eigvalsh(stretch).min()) > -1e-9


def test_directions_that_no_task_has_stay_out() -> None:
    draw = torch.Generator().manual_seed(2)
    low = torch.randn(20, 3, generator=draw) @ torch.randn(3, 30, generator=draw)
    found = torch.linalg.svdvals(merge_isotropic(low[None], torch.ones(1)))
    assert torch.allclose(found[:3], torch.linalg.svdvals(low).mean().expand(3))
    assert float(found[3:].max()) < 1e-4 * float(found[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", ["ties", "iso-c"])
def test_a_merged_file_is_the_base_plus_the_merged_vectors(method: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    models = states(3, dtype)
    base, tuned = written(tmp_path, models)
    told: list[Any] = []
    out = tmp_path / "merged.safetensors"
    path = tithe.merge_tasks(base, tuned, out, method, density=0.4, scale=0.7, weights=[1, 2, 1], report=told.append)
    found, alpha = load_file(path), torch.tensor([1.0, 2.0, 1.0])
    assert set(found) == set(models[0])
    assert torch.equal(found["steps"], models[0]["steps"])
    for name, start in models[0].items():
        if name == "steps" or not start.numel():
            continue
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        vectors = torch.stack([model[name].to(wide) - start.to(wide) for model in models[1:]])
        merged = merge_ties(trim(vectors, 0.4), alpha) if method == "ties" else merge_isotropic(vectors, alpha)
        assert torch.equal(found[name], (start.to(wide) + merged * 0.7).to(dtype)), name
    assert told[0].weights == (1.0, 2.0, 1.0)
    assert told[0].kept == ("steps",)


def test_the_two_limits(tmp_path: Path) -> None:
    """One task, whole, is that model; scale 0 is the base."""
    models = states(1, torch.float64)
    base, tuned = written(tmp_path, models)
    one = load_file(tithe.merge_tasks(base, tuned, tmp_path / "one.safetensors", density=1.0))
    none = load_file(tithe.merge_tasks(base, tuned, tmp_path / "none.safetensors", "iso-c", scale=0.0))
    for name, start in models[0].items():
        if start.is_floating_point():
            assert torch.allclose(one[name], models[1][name], rtol=0, atol=1e-15)
            assert torch.equal(none[name], start)


def test_a_folder_of_transformers_comes_out_as_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = BertModel(BertConfig(**BERT))
    model.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    start = {name: value.clone() for name, value in model.state_dict().items()}
    for task in ("a", "b"):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(start[name] + 0.01 * torch.randn_like(parameter))
        model.save_pretrained(tmp_path / "tuned" / task, max_shard_size="20KB")
    tithe.merge_tasks(tmp_path / "base", tmp_path / "tuned", tmp_path / "merged")
    merged = BertModel.from_pretrained(tmp_path / "merged")
    b = model.state_dict()
    a = BertModel.from_pretrained(tmp_path / "tuned" / "a").state_dict()
    for name, value in merged.state_dict().items():
        vectors = torch.stack([a[name] - start[name], b[name] - start[name]])
        assert torch.allclose(value, start[name] + merge_ties(trim(vectors, 0.2), torch.ones(2)), atol=1e-7), name


def test_a_torch_file_keeps_what_the_base_holds_beside_the_weights(tmp_path: Path) -> None:
    models = [nn.Linear(4, 3) for _ in range(3)]
    paths = [tmp_path / f"{name}.pt" for name in ("base", "a", "b")]
    for path, model in zip(paths, models, strict=True):
        torch.save({"state_dict": model.state_dict(), "epoch": path.stem}, path)
    tithe.merge_tasks(paths[0], paths[1:], tmp_path / "merged.pt", "iso-c")
    found = torch.load(tmp_path / "merged.pt", weights_only=True)
    base, *tuned = (model.weight.detach() for model in models)
    expected = base + merge_isotropic(torch.stack([one - base for one in tuned]), torch.ones(2))
    assert found["epoch"] == "base"
    assert torch.allclose(found["state_dict"]["weight"], expected, atol=1e-6)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown method": ({"method": "dare"}, "'ties' or 'iso-c'"),
    "a density of 0": ({"density": 0.0}, "a share in (0, 1]"),
    "a density in words": ({"density": "all"}, "a share in (0, 1]"),
    "a scale that is not finite": ({"scale": float("nan")}, "a finite number"),
    "a weight too few": ({"weights": [1.0]}, "one positive number a checkpoint"),
    "a weight below zero": ({"weights": [1.0, -1.0]}, "one positive number a checkpoint"),
    "one number for all": ({"weights": 1.0}, "one positive number a checkpoint"),
    "weights in words": ({"weights": ["one", "two"]}, "one positive number a checkpoint"),
}


@pytest.mark.parametrize(("settings", "expected"), REFUSED.values(), ids=REFUSED)
def test_settings_that_are_refused(settings: dict[str, Any], expected: str, tmp_path: Path) -> None:
    base, tuned = written(tmp_path, states(2))
    with pytest.raises(TitheError) as error:
        tithe.merge_tasks(base, tuned, tmp_path / "merged.safetensors", **settings)
    assert expected in error.value.expected
    assert not (tmp_path / "merged.safetensors").exists()


@pytest.mark.parametrize("method", ["ties", "iso-c"])
@pytest.mark.parametrize(("dtype", "large"), [(torch.float16, 6e4), (torch.float32, 3e38)])
def test_what_would_be_infinite_is_refused(method: Any, dtype: torch.dtype, large: float, tmp_path: Path) -> None:
    base, tuned = {"weight": torch.zeros(4, 4, dtype=dtype)}, {"weight": torch.eye(4, dtype=dtype) * large}
    start, others = written(tmp_path, [base, tuned, tuned])
    out = tmp_path / "merged.safetensors"
    with pytest.raises(TitheError, match=f"weight: found a merged tensor beyond the range of {dtype}"):
        tithe.merge_tasks(start, others, out, method, density=1.0, scale=1.2)
    assert not out.exists()


@pytest.mark.parametrize("method", ["ties", "iso-c"])
def test_models_of_eight_bits_are_merged(method: Any, tmp_path: Path) -> None:
    eight = torch.float8_e4m3fn
    models = [{name: state[name].to(eight) for name in ("linear", "kernel", "bias")} for state in states(2)]
    base, tuned = written(tmp_path, models)
    merged = load_file(tithe.merge_tasks(base, tuned, tmp_path / "merged.safetensors", method))
    (tmp_path / "wide").mkdir()
    wide = [{name: w.float() for name, w in state.items()} for state in models]
    start, others = written(tmp_path / "wide", wide)
    expected = load_file(tithe.merge_tasks(start, others, tmp_path / "wide" / "merged.safetensors", method))
    for name, values in merged.items():
        assert values.dtype == eight
        assert torch.equal(values.float(), expected[name].to(eight).float())


def test_a_model_with_other_tensors_or_broken_values_is_named(tmp_path: Path) -> None:
    models = states(2)
    models[1]["bias"][3] = float("inf")
    base, tuned = written(tmp_path, models)
    with pytest.raises(TitheError, match=r"1\.safetensors.*bias"):
        tithe.merge_tasks(base, tuned, tmp_path / "merged.safetensors")
    save_file({"linear": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(TitheError):
        tithe.merge_tasks(base, tmp_path / "other.safetensors", tmp_path / "merged.safetensors")
    (tmp_path / "two").mkdir()
    for name in ("x", "y"):
        save_file(states(0)[0], tmp_path / "two" / f"{name}.safetensors")
    with pytest.raises(TitheError, match="2 checkpoints"):
        tithe.merge_tasks(tmp_path / "two", tuned, tmp_path / "merged.safetensors")
    assert not (tmp_path / "merged.safetensors").exists()


def test_deltas_are_refused_with_the_way_out(tmp_path: Path) -> None:
    base = nn.Linear(6, 4)
    save_file(base.state_dict(), tmp_path / "base.safetensors")
    plan = tithe.attach(base, tithe.FISH(k=3, score="magnitude"))
    plan.save(tmp_path / "delta.safetensors")
    with pytest.raises(TitheError, match="tithe merge"):
        tithe.merge_tasks(tmp_path / "base.safetensors", tmp_path / "delta.safetensors", tmp_path / "out.safetensors")


def command(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, ["merge-tasks", *map(str, arguments)])


def test_the_command_does_what_the_function_does(tmp_path: Path) -> None:
    base, tuned = written(tmp_path, states(2))
    out, same = tmp_path / "command.safetensors", tmp_path / "function.safetensors"
    shown = command(base, *tuned, "-o", out, "--density", "0.3", "--weights", "1,3", "--scale", "0.5")
    tithe.merge_tasks(base, tuned, same, weights=[1, 3], density=0.3, scale=0.5)
    assert shown.exit_code == 0
    assert shown.stdout.splitlines()[:2] == [
        "merged 2 checkpoints: 1.safetensors, 2.safetensors",
        "kept from the base: steps",
    ]
    assert out.read_bytes() == same.read_bytes()
    told = command(base, *tuned, "-o", tmp_path / "iso.safetensors", "--method", "iso-c", "--json")
    assert json.loads(told.stdout)["method"] == "iso-c"


@pytest.mark.parametrize(
    ("options", "said"),
    [(["--method", "dare"], "ties or iso-c"), (["--method", "iso-c", "--density", "0.5"], "leave it out")],
)
def test_the_command_refuses_options_without_effect(options: list[str], said: str, tmp_path: Path) -> None:
    base, tuned = written(tmp_path, states(1))
    shown = command(base, *tuned, "-o", tmp_path / "out.safetensors", *options)
    assert shown.exit_code == 2
    assert said in " ".join(shown.output.split())
    assert not (tmp_path / "out.safetensors").exists()
