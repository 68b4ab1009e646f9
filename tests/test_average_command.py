"""`tithe average`: fixed weights without data, every way with a recipe, and what it prints and writes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

import tithe
from tithe import History
from tithe.app.average import METHODS, Settings
from tithe.app.average.bench import Bench
from tithe.app.average.ways import ema_weights
from tithe.app.cli import app
from tithe.app.train import read_recipe
from tithe.app.train.data import to_device
from tithe.averages.decay import decay_weights
from tithe.forward import estimate_statistics
from workplace import editor, fill, make_tiny, write_images

RUNNER = CliRunner()

NET = """
from torch import nn

def make(num_labels):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AvgPool2d(4), nn.Flatten(),
        nn.Linear(32, num_labels),
    )
"""

RECIPE = """
[model]
callable = "soup_net:make"
head = ["5.*"]

[data]
task = "image-classification"
npz = "{images}"
validation_fraction = 0.4

[method]
name = "full"

[optimizer]
lr = 0.05

[run]
epochs = 1
batch_size = 12
output = "out"
device = "cpu"
""".lstrip()


def invoke(*words: object) -> Any:
    return RUNNER.invoke(app, ["average", *map(str, words)])


def nothing(done: float, total: float) -> None:
    """No progress."""


@pytest.fixture(scope="module")
def kitchen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe, and four fine-tunings of one start: two good, one that saw little, one that was spoilt."""
    folder = tmp_path_factory.mktemp("kitchen")
    write_images(folder / "corners.npz")
    (folder / "soup_net.py").write_text(NET)
    path = editor(RECIPE, folder / "corners.npz", folder)()
    bench = Bench(read_recipe(path), _start(folder, path), nothing)
    start = bench.snapshot()
    (folder / "in").mkdir()
    for number, (steps, spoil) in enumerate(((60, 0.0), (2, 0.0), (60, 0.0), (20, 6.0))):
        bench.model.load_state_dict(start)
        bench.model.train()
        optimizer = torch.optim.SGD(bench.model.parameters(), 0.05, momentum=0.9)
        draw = torch.Generator().manual_seed(number)
        for _ in range(steps):
            rows = torch.randint(len(bench.samples["train"]), (12,), generator=draw).tolist()
            batch = next(bench.samples["train"].batches([rows]))
            bench.loss(bench.model, to_device(batch, bench.device)).backward()
            optimizer.step()
            optimizer.zero_grad()
        state = bench.snapshot()
        state["5.weight"] += spoil * torch.randn(state["5.weight"].shape, generator=draw)
        save_file(state, folder / "in" / f"{number}.safetensors")
    return folder


def _start(folder: Path, recipe: Path) -> History:
    """A bench wants checkpoints: that of a network as it is made."""
    sys.path.insert(0, str(folder))
    import soup_net  # type: ignore[import-not-found]

    torch.manual_seed(0)
    save_file(soup_net.make(3).state_dict(), folder / "start.safetensors")
    return History(folder / "start.safetensors")


def test_help_fits_80_columns_and_teaches_by_example() -> None:
    done = RUNNER.invoke(app, ["average", "--help"], env={"COLUMNS": "200", "TERMINAL_WIDTH": "200"})
    assert done.exit_code == 0
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "Example:\n    tithe average" in done.stdout


# --- without data


@pytest.mark.parametrize(
    ("options", "weights"),
    [
        ((), [0.25] * 4),
        (("--method", "mean"), [0.25] * 4),
        (("--method", "ema"), ema_weights(4, 0.9)),
        (("--method", "ema", "--decay", "0.5"), [0.125, 0.125, 0.25, 0.5]),
        (("--weights", "0.1,0.2, 0.3,0.4"), [0.1, 0.2, 0.3, 0.4]),
    ],
)
def test_fixed_weights_need_no_data(
    options: tuple[str, ...], weights: list[float], kitchen: Path, tmp_path: Path
) -> None:
    done = invoke(kitchen / "in", "-o", tmp_path / "out.safetensors", *options, "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["weights"] == pytest.approx(weights)
    assert told["output"] == str(tmp_path / "out.safetensors")
    assert [Path(path).name for path in told["checkpoints"]] == [f"{n}.safetensors" for n in range(4)]
    found, expected = load_file(tmp_path / "out.safetensors"), History(kitchen / "in").average(weights)
    assert all(torch.allclose(found[name], expected[name], atol=1e-6) for name in expected)


def test_files_are_named_one_by_one_in_this_order(kitchen: Path, tmp_path: Path) -> None:
    paths = [kitchen / "in" / f"{number}.safetensors" for number in (2, 0)]
    done = invoke(*paths, "-o", tmp_path / "out.safetensors", "--weights", "1,0", "--plot", tmp_path / "bars.png")
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines() == [
        "averaged 2 checkpoints: 2.safetensors, 0.safetensors",
        "kept from the last: 1.num_batches_tracked",
        f"written: {tmp_path / 'out.safetensors'}",
    ]
    assert torch.equal(load_file(tmp_path / "out.safetensors")["0.weight"], load_file(paths[0])["0.weight"])
    assert (tmp_path / "bars.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--method", "greedy"), "--method greedy: found no recipe"),
        (("--method", "spam"), "--method: found spam; expected auto, best, mean, ema, greedy, twa-t, twa-v"),
        (("--decay", "0.5"), "--decay: found nothing that it would be used for"),
        (("--lr", "1"), "--lr: found nothing that it would be used for"),
        (("--data", "."), "--data: found nothing that it would be used for"),
        (("--weights", "a,b"), "--weights: found 'a,b'"),
        (("--weights", "0.5,0.5"), "found 2 weights for 4 checkpoints"),
        (("--weights", "1,0,0,0", "--method", "ema"), "--weights: found --method beside it"),
        (("--weights", "1,0,0,0", "--recipe", "x.toml"), "--weights: found --recipe beside it"),
        (("--recipe", "none.toml"), "none.toml"),
        (("--recipe", "none.toml", "--bits", "3"), "--bits: found 3; expected 8, 4 or 1"),
    ],
)
def test_what_is_refused(words: tuple[str, ...], message: str, kitchen: Path, tmp_path: Path) -> None:
    done = invoke(kitchen / "in", "-o", tmp_path / "out.safetensors", *words)
    assert done.exit_code == 2, done.output
    assert done.stdout == ""
    assert message in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_checkpoint_is_said_and_left_out(kitchen: Path, tmp_path: Path) -> None:
    (tmp_path / "0.safetensors").write_bytes((kitchen / "in" / "0.safetensors").read_bytes())
    (tmp_path / "1.safetensors").write_bytes(b"\0" * 300)
    command = (tmp_path, "-o", tmp_path / "out")
    assert "1.safetensors: found a file that cannot be read" in invoke(*command).stderr
    done = invoke(*command, "--skip-damaged")
    assert done.exit_code == 0
    assert "warning: left out: " in done.stderr
    assert (tmp_path / "out").read_bytes()[-100:] == (tmp_path / "0.safetensors").read_bytes()[-100:]


# --- with a recipe


@pytest.fixture(scope="module")
def compared(kitchen: Path) -> dict[str, Any]:
    words = ("--recipe", kitchen / "recipe.toml", "--epochs", 2, "--plot", kitchen / "map.png", "--json")
    done = invoke(kitchen / "in", "-o", kitchen / "auto.safetensors", *words)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def fresh(kitchen: Path, path: Path) -> Bench:
    """What a checkpoint is, loaded anew."""
    return Bench(read_recipe(kitchen / "recipe.toml"), History(path), nothing)


def test_every_way_has_a_row_and_the_best_is_written(kitchen: Path, compared: dict[str, Any]) -> None:
    rows = {row["method"]: row for row in compared["rows"]}
    assert list(rows) == list(METHODS)
    best = max(row["selection"]["accuracy"] for row in rows.values())
    assert rows[compared["written"]]["selection"]["accuracy"] == best
    assert compared["splits"] == {"train": 36, "tuning": 12, "selection": 12, "test": 30}
    assert all(0 <= row["test"]["accuracy"] <= 1 for row in rows.values())
    for method, row in rows.items():
        for name, values in row["coefficients"].items():
            assert len(values) == 4
            assert sum(values) == pytest.approx(1), (method, name)
    assert set(rows["best"]["coefficients"]) == {"all"}
    assert sorted(rows["twa-v"]["coefficients"]) == sorted(
        ["0.weight", "0.bias", "1.weight", "1.bias", "5.weight", "5.bias"]
    )
    assert rows["mean"]["coefficients"]["all"] == [0.25] * 4
    kept = [value > 0 for value in rows["greedy"]["coefficients"]["all"]]
    assert rows["greedy"]["detail"] == f"{sum(kept)} of 4"
    assert not kept[3]
    assert rows["greedy"]["selection"]["accuracy"] >= rows["best"]["selection"]["accuracy"]
    assert (kitchen / "map.png").read_bytes()[:4] == b"\x89PNG"


def test_what_was_written_gives_what_the_table_says(kitchen: Path, compared: dict[str, Any]) -> None:
    row = next(row for row in compared["rows"] if row["method"] == compared["written"])
    bench = fresh(kitchen, kitchen / "auto.safetensors")
    bench.put_checkpoint(0)
    assert bench.select() == row["selection"]
    assert bench.test() == row["test"]


@pytest.mark.parametrize("method", list(METHODS))
def test_a_way_that_is_named_is_written(method: str, kitchen: Path, tmp_path: Path) -> None:
    words = ("--recipe", kitchen / "recipe.toml", "--method", method, "--epochs", 1, "--lr", 0.01)
    done = invoke(kitchen / "in", "-o", tmp_path / "out.safetensors", *words, "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["written"] == method
    row = next(row for row in told["rows"] if row["method"] == method)
    bench = fresh(kitchen, tmp_path / "out.safetensors")
    bench.put_checkpoint(0)
    assert bench.test() == row["test"]
    found = load_file(tmp_path / "out.safetensors")
    if method == "best":
        index = row["coefficients"]["all"].index(1.0)
        assert (tmp_path / "out.safetensors").read_bytes() == (kitchen / "in" / f"{index}.safetensors").read_bytes()
        return
    states = list(History(kitchen / "in"))
    for name in ("0.weight", "5.weight"):
        weights = row["coefficients"].get(name, row["coefficients"].get("all"))
        expected = sum(w * state[name].double() for w, state in zip(weights, states, strict=True))
        assert torch.allclose(found[name].double(), expected, atol=1e-5)
    mean = sum(state["1.running_mean"] for state in states) / 4
    assert not torch.allclose(found["1.running_mean"], mean)
    model = bench.model
    estimate_statistics(model, bench.loss, bench.statistics)
    assert torch.allclose(model.state_dict()["1.running_mean"], found["1.running_mean"], atol=1e-6)
    assert int(found["1.num_batches_tracked"]) == 3


@pytest.mark.parametrize("granularity", ["model", "tensor"])
def test_trained_coefficients_find_out_what_was_spoilt(granularity: str, kitchen: Path, tmp_path: Path) -> None:
    words = ("--recipe", kitchen / "recipe.toml", "--granularity", granularity, "--epochs", 100, "--lr", 1.0)
    done = invoke(kitchen / "in", "-o", tmp_path / "out", *words, "--method", "twa-v", "--json")
    assert done.exit_code == 0, done.output
    rows = {row["method"]: row for row in json.loads(done.stdout)["rows"]}
    for method in ("twa-t", "twa-v"):
        assert rows[method]["test"]["accuracy"] > rows["mean"]["test"]["accuracy"] + 0.1
        head = rows[method]["coefficients"].get("5.weight", rows[method]["coefficients"].get("all"))
        assert abs(head[3]) < 0.15
        assert rows[method]["detail"].startswith("lr 1, epoch ")


def test_the_table_fits_80_columns_and_says_how_it_was_made(kitchen: Path, tmp_path: Path) -> None:
    words = ("--recipe", kitchen / "recipe.toml", "--epochs", 1, "--granularity", "model", "--bits", 8)
    done = invoke(kitchen / "in", "-o", tmp_path / "out.safetensors", *words)
    assert done.exit_code == 0, done.output
    lines = done.stdout.replace(str(tmp_path), "").splitlines()
    assert max(map(len, lines)) <= 80
    assert "\x1b" not in done.stdout
    for word in (*METHODS.values(), "selection", "test", "* written: ", "TWA-v trained on 12 others; test has 30"):
        assert word in done.stdout
    assert sum(line.lstrip().startswith("* ") for line in lines) == 2


def test_the_same_again_is_the_same(kitchen: Path, compared: dict[str, Any], tmp_path: Path) -> None:
    words = ("--recipe", kitchen / "recipe.toml", "--epochs", 2, "--json")
    again = json.loads(invoke(kitchen / "in", "-o", tmp_path / "out.safetensors", *words).stdout)
    for one, two in zip(compared["rows"], again["rows"], strict=True):
        assert {**one, "seconds": 0} == {**two, "seconds": 0}


def test_checkpoints_of_another_model_are_refused(kitchen: Path, tmp_path: Path) -> None:
    for number in range(2):
        save_file({"0.weight": torch.ones(8, 3, 3, 3), "other": torch.ones(2)}, tmp_path / f"{number}.safetensors")
    done = invoke(tmp_path, "-o", tmp_path / "out", "--recipe", kitchen / "recipe.toml")
    assert done.exit_code == 2
    assert "found no such tensor in the checkpoints" in done.stderr


def test_one_checkpoint_is_its_own_average(kitchen: Path, tmp_path: Path) -> None:
    words = ("--recipe", kitchen / "recipe.toml", "--epochs", 1, "--json")
    done = invoke(kitchen / "in" / "0.safetensors", "-o", tmp_path / "out", *words)
    assert done.exit_code == 0, done.output
    assert len(json.loads(done.stdout)["rows"]) == 6


def test_a_recipe_without_a_test_split_says_so(tmp_path: Path) -> None:
    make_tiny(tmp_path / "model")
    fill(tmp_path, tmp_path / "model")
    text = (tmp_path / "recipe.toml").read_text()
    (tmp_path / "recipe.toml").write_text(text.replace('test = "test.tsv"\n', ""))
    _text_checkpoints(tmp_path, lambda model, path: model.save_pretrained(path))
    words = ("--recipe", tmp_path / "recipe.toml", "--epochs", 1, "--lr", 0.01, "--method", "twa-v")
    done = invoke(tmp_path / "in", "-o", tmp_path / "out", *words)
    assert done.exit_code == 0, done.output
    assert "no test split" in done.stdout
    from transformers import AutoModelForSequenceClassification

    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert loaded.config.num_labels == 2
    assert (tmp_path / "out" / "config.json").is_file()


def _text_checkpoints(folder: Path, write: Callable[[Any, Path], None]) -> None:
    """Two perturbed copies of the recipe's model."""
    from histories import checkpoints
    from tithe.app.train.data import read_examples
    from tithe.app.train.models import build

    recipe = read_recipe(folder / "recipe.toml")
    torch.manual_seed(0)
    model: nn.Module = build(recipe, read_examples(recipe)).model
    (folder / "in").mkdir()
    for number, other in enumerate(checkpoints(model, 2)):
        write(other, folder / "in" / str(number))


def test_deltas_of_a_run_are_averaged_on_its_base(tmp_path: Path) -> None:
    make_tiny(tmp_path / "model")
    fill(tmp_path, tmp_path / "model")
    (tmp_path / "in").mkdir()
    for number in range(2):
        settings = ["--set", f"run.output=out{number}", "--set", "run.epochs=1", "--set", f"data.split_seed={number}"]
        done = RUNNER.invoke(app, ["train", str(tmp_path / "recipe.toml"), *settings])
        assert done.exit_code == 0, done.output
        (tmp_path / f"out{number}" / "delta.safetensors").rename(tmp_path / "in" / f"{number}.safetensors")
    words = ("--recipe", tmp_path / "recipe.toml", "--epochs", 1, "--method", "twa-v", "--json")
    done = invoke(tmp_path / "in", "-o", tmp_path / "out.safetensors", *words)
    assert done.exit_code == 0, done.output
    row = json.loads(done.stdout)["rows"][-1]
    recipe = read_recipe(tmp_path / "recipe.toml")
    bench = Bench(recipe, History(tmp_path / "in"), nothing)
    tithe.apply(bench.model, tmp_path / "out.safetensors")
    assert bench.test() == row["test"]


def test_ctrl_c_leaves_nothing(kitchen: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "tithe", "average", kitchen / "in", "-o", tmp_path / "out.safetensors"]
    words += ["--recipe", kitchen / "recipe.toml", "--epochs", "100000", "--lr", "1e-5"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        list(map(str, words)), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stderr is not None
    while " left" not in (line := process.stderr.readline()):  # what other libraries say on import comes first
        assert line
    process.send_signal(signal.SIGINT)
    try:
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()  # one that went on would be taken for a fault of the tests after this one
    assert process.returncode == 130
    assert out == ""
    assert err.splitlines()[-1] == "stopped: nothing was written"
    assert list(tmp_path.iterdir()) == []


def test_settings_have_the_papers_defaults() -> None:
    assert Settings() == Settings(method="auto", decay=0.9, bits=None, granularity="tensor", epochs=5, lr=None)


@pytest.mark.parametrize("like", ["linear", "cosine", "sqrt"])
def test_a_decay_is_one_more_way_and_is_written(like: str, kitchen: Path, tmp_path: Path) -> None:
    words = ("--recipe", kitchen / "recipe.toml", "--like", like, "--last", 3, "--epochs", 1, "--lr", 0.01, "--json")
    done = invoke(kitchen / "in", "-o", tmp_path / "out.safetensors", *words)
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["written"] == like
    assert len(told["rows"]) == len(METHODS) + 1
    row = next(row for row in told["rows"] if row["method"] == like)
    assert row["coefficients"]["all"] == pytest.approx(decay_weights(like, 4, last=3))
    assert row["detail"] == "of the last 3"
    bench = fresh(kitchen, tmp_path / "out.safetensors")
    bench.put_checkpoint(0)
    assert bench.test() == row["test"]


def test_an_average_by_name_goes_with_no_other_way_to_say_it(kitchen: Path, tmp_path: Path) -> None:
    for words, said in (
        (("--like", "cosine", "--method", "ema"), "--like: found --method ema"),
        (("--like", "cosine", "--weights", "0.5,0.5,0,0"), "--weights: found --like beside it"),
        (("--last", 2), "add --like linear"),
        (("--like", "cosin"), "'cosine', 'sqrt'"),
        (("--like", "ema:0.08"), "ema=(0.05, 0.10)"),
        (("--like", "cosine", "--last", 5), "4 checkpoints"),
        (("--like", "cosine", "--lr", 1), "--lr: found nothing"),
    ):
        done = invoke(kitchen / "in", "-o", tmp_path / "out.safetensors", *words)
        assert done.exit_code == 2, done.output
        assert said in " ".join(done.stderr.split()), done.stderr
    assert not (tmp_path / "out.safetensors").exists()
