"""`tithe price` on the command line: tables of 80 columns, JSON, a figure, and refusals that say what to do."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tithe.app.cli import app
from tithe.app.price import OFFERS, Shape, outline, parse_budget
from tithe.errors import TitheError
from workplace import make_tiny

RUNNER = CliRunner()
PARTS = {"weights", "batch", "theta", "index", "optimizer", "gradients", "kept", "peak", "trained", "file"}
TINY = [f"--set={key}={value}" for key, value in {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
}.items()]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("price") / "model"
    make_tiny(path)
    return path


def run(*words: str) -> str:
    done = RUNNER.invoke(app, ["price", *words], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    return done.stdout


def test_the_tables_fit_80_columns_and_are_plain(folder: Path) -> None:
    out = run(str(folder), "--tokens", "8", "--batch", "4", "--budget", "20%", "--memory", "1MB")
    assert "×less" in out
    assert "VR-PGE" not in out
    assert "TWA" not in out
    assert max(map(len, out.splitlines())) <= 80
    assert "\x1b" not in out
    for word in (
        "full",
        "head only",
        "FISH + lean",
        "TraDy + lean",
        "weights",
        "PEAK",
        "GFLOPs",
        "micro-batch",
        "floor",
    ):
        assert word in out
    assert "at once" in out or "micro-batches" in out


def test_all_rows_fit_80_columns_too(folder: Path) -> None:
    pytest.importorskip("peft")
    named = [part for name in OFFERS for part in ("--method", name)]
    out = run(str(folder), "--tokens", "8", "--batch", "4", "--budget", "60%", *named)
    assert max(map(len, out.splitlines())) <= 80
    assert not re.search(r"\d…|\w… ", out)
    for row in (offer.name for offer in OFFERS.values()):
        assert re.search(rf"^ {re.escape(row)}  +\d", out, re.MULTILINE), row
    assert "a mapped file" in out


def test_json_is_all_that_stdout_carries(folder: Path) -> None:
    words = ["--tokens", "8", "--batch", "4", "--budget", "20%", "--method", "full", "--method", "fish"]
    found = json.loads(run(str(folder), *words, "--memory", "1MB", "--json"))
    assert [row["method"] for row in found["rows"]] == ["full", "FISH"]
    assert (found["batch"], found["memory"], found["budget"]["fraction"]) == (4, 1_000_000, 0.2)
    for row in found["rows"]:
        assert set(row) >= PARTS
        assert row["times_less"] == pytest.approx(found["rows"][0]["peak"] / row["peak"])
        standing = sum(row[part] for part in ("weights", "batch", "theta", "index", "optimizer"))
        assert row["peak"] == standing + sum(row["at_peak"].values())
        assert set(row["flops"]) == {"forward", "input_gradient", "weight_gradient"}
        assert sum(row["layers"].values()) == row["kept"]
        assert row["fit"]["micro_batch"] >= 0


def test_a_figure_is_drawn(folder: Path, tmp_path: Path) -> None:
    run(str(folder), "--tokens", "8", "--method", "full", "--plot", str(tmp_path / "price.png"))
    assert (tmp_path / "price.png").read_bytes().startswith(b"\x89PNG")


def test_a_model_type_needs_no_file() -> None:
    found = json.loads(
        run("vit", "--set", "image_size=16", "--set", "patch_size=8", *TINY, "--method", "full", "--json")
    )
    (row,) = found["rows"]
    assert found["subject"] == "vit"
    assert row["batch"] == 8 * (3 * 16 * 16 * 4 + 8)


def test_a_language_model_has_no_head_and_its_dtype() -> None:
    words = ["llama", "--language-model", "--tokens", "8", "--dtype", "bfloat16", "--set", "vocab_size=50", *TINY]
    found = json.loads(run(*words, "--method", "full", "--method", "head", "--json"))
    assert "head only" in found["left_out"]
    assert found["rows"][0]["weights"] == pytest.approx(2 * found["rows"][0]["trained"], rel=0.05)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["brt"], "did you mean bert?"),
        (["no/such-model"], "hf download no/such-model config.json"),
        (["vit", "--image", "224"], "expected channels x height x width"),
        (["vit", "--image", "3x8x8", "--tokens", "8"], "found an image and tokens"),
        (["vit", "--set", "hiden_size=3"], "did you mean hidden_size?"),
        (["bert", "--dtype", "int8"], "--dtype bfloat16"),
        (["bert", "--budget", "lots"], "64MB"),
        (["bert", "--method", "dora"], "expected some of full, full+lean, full+ckpt, head, lora"),
        (["bert", *TINY, "--memory", "10kB"], "more than the weights alone"),
        (["bert", *TINY, "--budget", "0.0000001%", "--method", "fish"], "a budget that leaves at least one weight"),
        (["bert", *TINY, "--tokens", "1000", "--method", "full"], "which fails on shapes alone (The expanded size"),
        (["vit", *TINY, "--image", "5x224x224", "--method", "fish"], "give their shape: --image 3x224x224"),
        (["no.such.module:Model", "--tokens", "4"], "No module named 'no'"),
        (["torch.nn:Identity"], "give --image 3x224x224 or --tokens 128"),
    ],
)
def test_refusals_say_what_to_do(words: list[str], message: str) -> None:
    done = RUNNER.invoke(app, ["price", *words])
    assert done.exit_code == 2
    assert done.stderr.startswith("error: ")
    assert message in done.stderr.replace("\n", " ")


def test_a_recipe_names_a_model_too(folder: Path) -> None:
    recipe = folder.parent / "recipe.toml"
    recipe.write_text(
        '[model]\npretrained = "model"\n[data]\ntask = "text-classification"\ntrain = "train.tsv"\nmax_length = 8\n'
        '[method]\nname = "full"\n[optimizer]\nlr = 1e-3\n[run]\nepochs = 1\noutput = "out"\n'
    )
    assert outline(str(recipe), Shape()).head == ("classifier.weight", "classifier.bias")


def test_budgets_as_they_are_typed() -> None:
    assert parse_budget("1 %").fraction == 0.01
    assert parse_budget("0.25").fraction == 0.25
    assert parse_budget("1.5MiB").bytes == 3 * 2**19
    assert parse_budget("27_946").elements == 27_946
    with pytest.raises(TitheError):
        parse_budget("many")
