"""Runs under a budget, and lean ones: they learn, say what they drew and spent, and resume as if never stopped."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

import tithe
from tithe import TitheError
from tithe.app.train import read_recipe
from tithe.app.train.checkpoints import Checkpoints
from tithe.app.train.loop import Run
from tithe.app.train.progress import read_log
from tithe.app.train.report import show
from tithe.app.train.signals import Interrupted
from workplace import assert_equal, editor, quiet, run, shown, write_tsv

Edit = Callable[..., Path]

NET = """
from torch import nn

def make(num_labels):
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),
        nn.AvgPool2d(4), nn.Flatten(), nn.Linear(64, 32), nn.GELU(), nn.Linear(32, num_labels),
    )
"""
RECIPE = """
[model]
callable = "budget_net:make"
head = ["9.*"]

[data]
task = "image-classification"
npz = "{images}"

[method]
name = "trady"
budget = "40kB"
samples = 16

[optimizer]
lr = 0.1

[run]
epochs = 6
batch_size = 10
log_every = 1
output = "out"
device = "cpu"
""".lstrip()
METHOD = 'name = "trady"\nbudget = "40kB"\nsamples = 16'


@pytest.fixture
def write(images: Path, tmp_path: Path) -> Callable[..., Path]:
    """Write the recipe with some of its text replaced; return its path."""
    (tmp_path / "budget_net.py").write_text(NET, encoding="utf-8")
    return editor(RECIPE, images, tmp_path)


def test_a_run_under_a_budget_learns_and_says_what_it_drew_and_spent(write: Edit, tmp_path: Path) -> None:
    console = quiet()
    result = run(write(), "run.epochs=12", console=console)
    assert result["metrics"]["test"]["accuracy"] > 0.6
    assert result["recipe"]["optimizer"]["name"] == "sgd"
    assert result["bytes"]["optimizer"] == 0
    draws = result["draws"]
    assert [draw["step"] for draw in draws] == [6 * epoch for epoch in range(12)]
    assert len({draw["spent"] for draw in draws}) > 1
    for draw in draws:
        assert 0.6 * 40_000 < draw["spent"] <= draw["limit"] == 40_000
        assert 0 < draw["channels"] < draw["of_channels"] == 3 + 16 + 64
        assert 1 <= draw["layers"] <= draw["of_layers"] == 3
    logged = read_log(tmp_path / "out", "draw")
    assert [entry["spent"] for entry in logged] == [draw["spent"] for draw in draws]
    progress = shown(console)
    assert progress.count("draw: ") == 12
    assert "step 6/72  draw: " in progress
    assert f"of 40.0 kB  {draws[0]['channels']} of 83 channels" in progress
    table = quiet()
    show(result, table)
    for word in ("budget", "of 40.0 kB at most, 12 draws", "last draw", "predicted", "other layers"):
        assert word in shown(table)
    assert max(map(len, shown(table).replace(str(tmp_path), "").splitlines())) <= 80


def test_the_predicted_peak_of_a_draw_is_what_the_step_measures(write: Edit) -> None:
    result = run(write(), "run.steps=1", "run.epochs=", *()) if False else run(write(("epochs = 6", "steps = 1")))
    (draw,), ledger = result["draws"], result["ledger"]
    standing = draw["peak"] - ledger["peak"]
    assert 0 < standing < draw["spent"]


@pytest.mark.parametrize(
    ("optimizer", "method"),
    [
        ("lr = 0.1", METHOD),
        ('lr = 0.05\nname = "sgd"\nmomentum = 0.9', METHOD + "\ndynamic = false"),
        ('lr = 0.01\nname = "adamw"', METHOD + '\nscore = "rgn"'),
    ],
    ids=["paper", "static with momentum", "oracle with adamw"],
)
def test_resuming_equals_never_stopping_with_draws_before_and_after(
    optimizer: str, method: str, write: Edit, tmp_path: Path
) -> None:
    path = write(("lr = 0.1", optimizer), (METHOD, method), ("epochs = 6", "epochs = 3"))
    whole = run(path, "run.output=whole")
    made = Run(read_recipe(path, ["run.output=parts"]), resume=False, console=quiet())
    inner = made.trainee.step

    def step() -> bool:
        changed = inner()
        if made.position.step == 8:
            made._signals.received = signal.SIGINT
        return changed

    made.trainee.step = step  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(Interrupted, match="step 8 of 18"):
        made.fit()
    parts = run(path, "run.output=parts", resume=True)
    first, second = (Checkpoints(tmp_path / name / "checkpoints").load(18) for name in ("whole", "parts"))
    for key in ("trainee", "optimizer", "random"):
        assert_equal(first[key], second[key])
    for split in ("train", "draw"):
        assert read_log(tmp_path / "whole", split) == read_log(tmp_path / "parts", split)
    deltas = (load_file(tmp_path / name / "delta.safetensors") for name in ("whole", "parts"))
    assert_equal(*deltas)
    for key in ("metrics", "best_step", "evaluations", "trainable", "draws"):
        assert whole[key] == parts[key]
    assert len(whole["draws"]) == (1 if "dynamic = false" in method else 3)


def test_sentences_of_any_length_stay_within_the_prices_of_the_longest(edit: Edit, workplace: Path) -> None:
    lengths = [2] * 40 + [20] + [3] * 39
    rows = [("the " * length + ("good" if i % 2 else "bad"), i % 2) for i, length in enumerate(lengths)]
    write_tsv(workplace / "train.tsv", rows)
    fish = 'name = "fish"\ndensity = 0.2\nsamples = 32'
    path = edit((fish, 'name = "trady"\nbudget = "30kB"\nsamples = 8'))
    result = run(path)
    assert len(result["draws"]) == 2
    made = Run(read_recipe(path, ["run.output=other"]), resume=False, console=quiet())
    first = next(iter(made._choosing))
    assert next(iter(first["inputs"].values())).shape == (8, 23)


def test_a_ranking_is_read_from_the_recipes_folder(write: Edit, tmp_path: Path) -> None:
    layers = {"0.weight": (16, 3, 3, 3), "3.weight": (16, 16, 3, 3), "7.weight": (32, 64)}
    tithe.Ranking({name: float(name == "7.weight") for name in layers}, layers).save(tmp_path / "net.json")
    path = write((METHOD, METHOD + '\nranking = "net.json"'))
    made = Run(read_recipe(path), resume=False, console=quiet())
    assert isinstance(made.trainee, tithe.Plan)
    assert list(made.trainee.selections) == ["7.weight"]


@pytest.mark.parametrize(
    ("name", "lean"), [("fish", ""), ("fish", "lean_bits = 8"), ("full", "lean_exact = true"), ("head", "")]
)
def test_any_method_may_be_lean_and_keeps_less_for_backward(name: str, lean: str, write: Edit) -> None:
    method = f'name = "{name}"' + ("\ndensity = 0.3\nsamples = 16" if name == "fish" else "")
    path = write((METHOD, method), ("epochs = 6", "epochs = 2"), ("lr = 0.1", "lr = 0.01"))
    stock = run(path, "run.output=stock")
    path = write((METHOD, f"{method}\nlean = true\n{lean}"), ("epochs = 6", "epochs = 2"), ("lr = 0.1", "lr = 0.01"))
    found = run(path, "run.output=lean")
    assert found["trainable"] == stock["trainable"]
    if name == "head":  # nothing below the head is asked for a gradient
        assert found["bytes"]["kept_for_backward"] <= stock["bytes"]["kept_for_backward"]
    else:
        assert found["bytes"]["kept_for_backward"] < 0.95 * stock["bytes"]["kept_for_backward"]
    if lean == "lean_exact = true":
        assert found["metrics"] == stock["metrics"]


WRONG = {
    "no ranking there": ((METHOD, METHOD + '\nranking = "none.json"'), "[method] ranking", "Ranking.compute"),
    "less than the head": (('"40kB"', '"100B"'), "[method]: head", "raise the budget"),
    "less than a channel": (('"40kB"', '"600B"'), "[method]: budget", "one channel"),
    "where that matches nothing": (("samples = 16", 'samples = 16\nwhere = ["spam"]'), "[method]", "spam"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_is_refused_before_training(name: str, write: Edit, tmp_path: Path) -> None:
    change, place, word = WRONG[name]
    with pytest.raises(TitheError) as error:
        run(write(change))
    assert place in error.value.place
    assert word in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_ranking_of_another_network_is_refused(write: Edit, tmp_path: Path) -> None:
    tithe.Ranking({"0.weight": 1.0}, {"0.weight": (4, 4)}).save(tmp_path / "other.json")
    with pytest.raises(TitheError, match=r"0\.weight.*ranked"):
        run(write((METHOD, METHOD + '\nranking = "other.json"')))
