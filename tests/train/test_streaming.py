"""Streams: rows are read while training goes on, a resumed run sees the same ones; what a stream cannot is refused."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from task_rows import TEXTS
from tithe import TitheError
from tithe.app.train import read_recipe
from tithe.app.train.loop import Run
from tithe.app.train.signals import Interrupted
from tithe.app.train.streaming import _Window
from workplace import RECIPE, assert_equal, quiet, run, sentences

LINE = 'train = "train.txt"'
STREAM = 'dataset = "hub"\nstreaming = true\nvalidation = "validation"\nshuffle_buffer = 7'


@pytest.fixture
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set folder of 40 texts, and a recipe about them; no folder has "test" in its name."""
    place = tmp_path_factory.mktemp("stream")
    (place / "hub").mkdir()
    for split, num in (("train", 40), ("validation", 8)):
        rows = ({"text": f"number {n} of {n * n}, and so on"} for n in range(num))
        (place / "hub" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "recipe.toml").write_text(TEXTS.replace(LINE, STREAM))
    return place


def make(place: Path, *settings: str) -> Run:
    return Run(read_recipe(place / "recipe.toml", settings), resume=False, console=quiet())


@pytest.mark.parametrize("packing", ["true", "false"])
def test_a_stream_is_learned_from_pass_after_pass(packing: str, place: Path) -> None:
    result = run(place / "recipe.toml", f"data.packing={packing}", "run.steps=30", "run.evaluate_every=10")
    losses = [evaluation["loss"] for evaluation in result["evaluations"]]
    assert len(losses) == 3
    assert losses[-1] < losses[0]
    assert result["epochs"] == 3  # an epoch is what lies between two evaluations
    assert "train: rows are read while training goes on" in result["notes"][0]


@pytest.mark.parametrize(("accumulate", "packing"), [(1, "true"), (2, "false")])
def test_resuming_equals_never_stopping(
    accumulate: int, packing: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = place / "recipe.toml"
    settings = [f"run.accumulate={accumulate}", f"data.packing={packing}", "run.steps=9", "run.evaluate_every=4"]
    whole = run(path, *settings, "run.output=whole")
    parts = Run(read_recipe(path, [*settings, "run.output=parts"]), resume=False, console=quiet())
    import signal

    monkeypatch.setattr(parts, "_asked_to_stop", lambda: signal.SIGINT if parts.position.step == 5 else None)
    with pytest.raises(Interrupted):
        parts.fit()
    again = run(path, *settings, "run.output=parts", resume=True)
    assert whole["evaluations"] == again["evaluations"]
    assert_equal(*(load_file(place / name / "delta.safetensors") for name in ("whole", "parts")))


def test_every_row_is_seen_once_in_a_pass_and_in_another_order_in_the_next(place: Path) -> None:
    (place / "recipe.toml").write_text(TEXTS.replace(LINE, STREAM).replace("max_length = 16", "max_length = 64"))
    samples = make(place, "run.steps=20").samples["train"]
    seen = [tuple(samples[row][0]) for row in range(80)]
    assert len(set(seen[:40])) == 40
    assert set(seen[:40]) == set(seen[40:])
    assert seen[:40] != seen[40:]


def test_classes_of_a_stream_are_those_that_the_recipe_lists(place: Path, tiny: Path) -> None:
    (place / "tiny").symlink_to(tiny)
    for split, num in (("train", 60), ("validation", 10)):
        rows = ({"sentence": text, "label": label} for text, label in sentences(num, seed=num))
        (place / "hub" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = RECIPE.replace('train = "train.tsv"\ntest = "test.tsv"', STREAM).replace("epochs = 2", "steps = 6")
    (place / "recipe.toml").write_text(text)
    with pytest.raises(TitheError, match="does not name its classes") as error:
        run(place / "recipe.toml")
    assert "labels = [" in error.value.remedy
    result = run(place / "recipe.toml", "data.labels=[0, 1]")
    assert result["labels"] == ["0", "1"]
    assert result["trainable"]["fraction"] == pytest.approx(0.2, abs=1e-3)


REFUSED = {
    "no number of steps": (["run.epochs=1"], "epochs of a stream", "steps = 1000"),
    "no validation split": (["data.validation"], "without a validation split", "validation ="),
    "files": (["data.dataset"], "streaming of files", 'dataset = "FOLDER"'),
    "workers": (["run.workers=2"], "workers beside streaming", "remove workers"),
    "an average": (["history.every=1", 'average.method="mean"'], "[average] beside", "remove [average]"),
    "rows that are held out": ([], "held out of a stream", "remove streaming"),
    "a price": ([], "a price of the largest row", "packing = true"),
}
METHOD = 'name = "fish"\ndensity = 0.2\nsamples = 4\nscore = "magnitude"'
METHODS = {
    "rows that are held out": 'name = "vrpge"\nkeep = 0.5',
    "a price": 'name = "trady"\nbudget = "1MB"',
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_stream_cannot_do_is_refused_by_the_recipe(name: str, place: Path) -> None:
    settings, found, remedy = REFUSED[name]
    text = (place / "recipe.toml").read_text().replace(METHOD, METHODS.get(name, METHOD))
    for setting in settings:
        key, equals, _ = setting.partition("=")
        if not equals:
            lines = text.splitlines()
            text = "\n".join(line for line in lines if not line.startswith(key.partition(".")[2] + " ="))
    text = text.replace("steps = 3\n", "") if "run.epochs=1" in settings else text
    text = text.replace('dataset = "hub"', 'train = "a.txt"') if "data.dataset" in settings else text
    if "data.dataset" in settings:
        text = text.replace("[data]", '[data]\ntrain = "a.txt"')
    (place / "recipe.toml").write_text(text)
    with pytest.raises(TitheError) as error:
        read_recipe(place / "recipe.toml", [setting for setting in settings if "=" in setting])
    assert found in error.value.found
    assert remedy in error.value.remedy


def test_rows_that_cannot_be_used_are_named_when_they_come(place: Path) -> None:
    rows = [{"text": "fine"}] * 20 + [{"text": None}] + [{"text": "fine"}] * 20
    (place / "hub" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(TitheError, match="pass 1, from row 1: row 21 column 'text': found null"):
        make(place, "data.shuffle_buffer=0")
    assert len(make(place, "data.skip_bad=true").samples["train"]) == 12
    (place / "hub" / "train.jsonl").write_text('{"body": "x"}\n')
    with pytest.raises(TitheError, match="no column 'text'"):
        make(place)


def test_a_window_keeps_the_last_items() -> None:
    window = _Window(itertools.count(), keep=8)
    assert window.take([2, 0]) == [2, 0]
    assert window.take(range(4, 8)) == [4, 5, 6, 7]
    assert window.take([0]) == [0]
    assert window.take([100, 99]) == [100, 99]
    assert len(window._kept) <= 8


def test_a_damaged_file_of_a_stream_is_named(place: Path) -> None:
    file = place / "hub" / "train.jsonl"
    file.write_text(file.read_text() + '{"text": "cut o')
    with pytest.raises(TitheError, match="write the file again") as error:
        make(place)
    assert error.value.place.endswith("train.jsonl line 41")
