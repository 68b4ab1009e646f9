"""The command line: what it prints, where, and with which exit code."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tithe.app.cli import app
from workplace import RECIPE, fill, make_tiny

RUNNER = CliRunner()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workplace in which a short run has finished."""
    folder = tmp_path_factory.mktemp("cli")
    make_tiny(folder / "model")
    fill(folder, folder / "model")
    done = RUNNER.invoke(app, ["train", str(folder / "recipe.toml"), "--set", "run.epochs=1"])
    assert done.exit_code == 0, done.output
    (folder / "stdout").write_text(done.stdout)
    (folder / "stderr").write_text(done.stderr)
    return folder


@pytest.mark.parametrize("command", [(), ("train",), ("price",), ("merge",), ("inspect",), ("demo",)])
def test_help_fits_80_columns_and_teaches_by_example(command: tuple[str, ...]) -> None:
    done = RUNNER.invoke(app, [*command, "--help"], env={"COLUMNS": "200", "TERMINAL_WIDTH": "200"})
    assert done.exit_code == 0
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "\x1b" not in done.stdout
    assert "\b" not in done.stdout
    if command:
        assert "Example:\n    tithe " in done.stdout
        assert f"tithe {command[0]}" in done.stdout
    else:
        assert all(name in done.stdout for name in ("train", "price", "merge", "inspect", "demo"))


def test_training_prints_progress_to_stderr_and_a_plain_table_to_stdout(trained: Path) -> None:
    out, err = (trained / "stdout").read_text(), (trained / "stderr").read_text()
    for text in (out, err):
        assert "\x1b" not in text
    assert max(map(len, out.replace(str(trained), "").splitlines())) <= 80
    for word in ("validation", "test", "accuracy", "weights", "optimizer", "delta"):
        assert word in out
    assert "step 1/9" in err
    assert "s left" in err
    assert re.search(r"\d [MG]B  ", err)


def test_json_is_all_that_stdout_carries(trained: Path) -> None:
    done = RUNNER.invoke(app, ["train", str(trained / "recipe.toml"), "--set", "run.epochs=1", "--resume", "--json"])
    assert done.exit_code == 0
    assert json.loads(done.stdout)["steps"] == 9


def test_inspect_and_merge_a_trained_delta(trained: Path) -> None:
    delta = trained / "out" / "delta.safetensors"
    shown = RUNNER.invoke(app, ["inspect", str(delta)])
    assert shown.exit_code == 0
    assert "classifier.weight" in shown.stdout
    assert max(map(len, shown.stdout.splitlines())) <= 80
    info = json.loads(RUNNER.invoke(app, ["inspect", str(delta), "--json"]).stdout)
    assert info["metadata"]["task"] == "text-classification"
    # A few tensors are stored whole, where that takes fewer bytes than indices and values.
    assert info["num_values"] >= json.loads((trained / "out" / "result.json").read_text())["trainable"]["total"]

    command = ["merge", str(trained / "model"), str(delta), "-o", str(trained / "tuned")]
    merged = RUNNER.invoke(app, [*command, "--json"])
    assert merged.exit_code == 0, merged.stderr
    assert json.loads(merged.stdout)["output"] == str(trained / "tuned")
    assert (trained / "tuned" / "config.json").is_file()
    again = RUNNER.invoke(app, command)
    assert again.exit_code == 2
    assert again.stderr.startswith("error: ")
    assert len(again.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "{}/none.toml"], ["none.toml"]),
        (["train", "{}/recipe.toml", "--set", "run.spam=1"], ["--set run.spam", "unknown key"]),
        (["train", "{}/recipe.toml", "--data", "{}/nowhere", "--set", "run.output=new"], ["[data] train", "nowhere"]),
        (["train", "{}/recipe.toml"], ["line 23: [run] output", "--resume"]),
        (["inspect", "{}/none.safetensors"], ["none.safetensors"]),
        (["inspect", "{}/recipe.toml"], ["recipe.toml"]),
        (["merge", "{}/none", "{}/none.safetensors", "-o", "{}/x"], ["none.safetensors"]),
    ],
)
def test_what_is_refused_is_one_message_and_exit_code_2(arguments: list[str], words: list[str], trained: Path) -> None:
    done = RUNNER.invoke(app, [argument.replace("{}", str(trained)) for argument in arguments])
    assert done.exit_code == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    for word in (*words, "Remedy"):
        assert word in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no full device")
def test_a_standard_output_that_is_full_is_one_message(trained: Path) -> None:
    command = [sys.executable, "-m", "tithe", "inspect", str(trained / "out" / "delta.safetensors"), "--json"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: standard output: found No space left on device")
    assert done.stderr.count("\n") == 1


def test_a_loss_that_is_not_finite_is_exit_code_3(trained: Path) -> None:
    (trained / "infinite.py").write_text(
        "import torch\n"
        "class Infinite(torch.nn.Module):\n"
        "    def __init__(self, num_labels):\n"
        "        super().__init__()\n"
        "        self.classifier = torch.nn.Linear(1, num_labels)\n"
        "    def forward(self, input_ids, **rest):\n"
        "        return self.classifier(input_ids[:, :1].float()) * torch.inf\n"
    )
    text = RECIPE.replace('pretrained = "tiny"', 'callable = "infinite:Infinite"\ntokenizer = "tiny"')
    text = text.replace('name = "fish"\ndensity = 0.2\nsamples = 32', 'name = "full"').replace('"out"', '"infinite"')
    (trained / "infinite.toml").write_text(text)
    done = RUNNER.invoke(app, ["train", str(trained / "infinite.toml")])
    assert done.exit_code == 3
    assert "error: step 1: found loss nan" in done.stderr
    assert "no checkpoint was due yet" in done.stderr


def test_no_argument_shows_help() -> None:
    assert "Usage" in RUNNER.invoke(app, []).output
