"""`tithe predict`: a finished run answers rows as its own evaluation did, for every task."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from task_rows import RECIPE, ROWS, T5, TEXTS
from tithe import TitheError
from tithe.app.cli import app
from tithe.app.train.predicting import predict
from workplace import run

Edit = Callable[..., Path]


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def done(edit: Edit, workplace: Path) -> Path:
    """The folder of a run that told good from bad sentences."""
    run(edit(("epochs = 2", "steps = 12"), ("lr = 0.01", "lr = 0.02")))
    return workplace / "out"


def test_answers_score_as_the_run_did(done: Path, workplace: Path) -> None:
    found = predict(done, workplace / "test.tsv", output=workplace / "answers.csv")
    result = json.loads((done / "result.json").read_text())
    assert found.metrics == result["metrics"]["test"]
    written = rows(workplace / "answers.csv")
    assert [row["place"] for row in written] == [f"test.tsv line {line}" for line in range(2, 26)]
    assert {row["label"] for row in written} <= {"0", "1"}
    assert all(0.5 <= float(row["probability"]) <= 1 for row in written)
    right = [line.split("\t")[1] for line in (workplace / "test.tsv").read_text().splitlines()[1:]]
    hits = sum(row["label"] == label for row, label in zip(written, right, strict=True))
    assert hits / 24 == found.metrics["accuracy"]


def test_rows_need_no_labels_and_formats_follow_the_ending(done: Path, workplace: Path) -> None:
    (workplace / "new.jsonl").write_text('{"sentence": "a good film"}\n{"sentence": "a bad film"}\n')
    found = predict(done, workplace / "new.jsonl")
    assert found.metrics == {}
    for suffix in ("csv", "tsv", "jsonl", "json"):
        output = workplace / f"answers.{suffix}"
        predict(done, workplace / "new.jsonl", output=output)
        text = output.read_text()
        if suffix == "jsonl":
            read = [json.loads(line) for line in text.splitlines()]
        elif suffix == "json":
            read = json.loads(text)
        else:
            read = list(csv.DictReader(text.splitlines(), delimiter="," if suffix == "csv" else "\t"))
        assert [row["label"] for row in read] == [row["label"] for row in found.rows]
    with pytest.raises(TitheError, match=r"the ending '\.xlsx'"):
        predict(done, workplace / "new.jsonl", output=workplace / "answers.xlsx")


def test_the_command_prints_csv_or_json(done: Path, workplace: Path) -> None:
    (workplace / "new.csv").write_text("sentence\na good film\na bad film\n")
    told = CliRunner().invoke(app, ["predict", str(done), str(workplace / "new.csv")])
    assert told.exit_code == 0
    assert told.stdout.splitlines()[0] == "place,label,probability"
    told = CliRunner().invoke(app, ["predict", str(done), str(workplace / "test.tsv"), "--json"])
    data = json.loads(told.stdout)
    assert len(data["rows"]) == 24
    assert set(data["metrics"]) == {"accuracy"}
    told = CliRunner().invoke(app, ["predict", str(workplace / "nowhere"), str(workplace / "new.csv")])
    assert told.exit_code == 2
    assert "no folder" in told.stderr


def test_what_cannot_be_answered_is_refused(done: Path, workplace: Path) -> None:
    def refused(file: str, folder: Path = done) -> TitheError:
        with pytest.raises(TitheError) as error:
            predict(folder, workplace / file)
        return error.value

    (workplace / "new.csv").write_text("text\na good film\n")
    assert "no column 'sentence'" in refused("new.csv").found
    (workplace / "new.csv").write_text("sentence,label\na good film,1\n,0\n")
    assert refused("new.csv").place == "new.csv line 3 column 'sentence'"
    (workplace / "new.csv").write_text("sentence,label\na good film,1\na bad film,7\n")
    assert refused("new.csv").found == "label '7'"
    assert refused("nowhere.csv").found == "no file or folder"
    assert "no result.json" in refused("test.tsv", workplace).found
    shutil.copytree(done, workplace / "copy")
    (workplace / "copy" / "result.json").write_text("{}")
    assert "KeyError" in refused("test.tsv", workplace / "copy").found
    shutil.copy(done / "result.json", workplace / "copy")
    (workplace / "copy" / "delta.safetensors").unlink()
    assert "delta.safetensors" in refused("test.tsv", workplace / "copy").place


def test_a_run_is_answered_by_wherever_it_was_moved(done: Path, workplace: Path, tmp_path_factory: Any) -> None:
    before = predict(done, workplace / "test.tsv").rows
    moved = tmp_path_factory.mktemp("moved") / "run"
    shutil.move(done, moved)
    assert predict(moved, workplace / "test.tsv").rows == before


@pytest.mark.parametrize("task", sorted(ROWS))
def test_the_other_tasks_answer(task: str, tiny: Path, tmp_path: Path) -> None:
    import random

    (tmp_path / "tiny").symlink_to(tiny)
    draw = random.Random(1)
    made = [ROWS[task](draw) for _ in range(30)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    model = T5 if task == "seq2seq" else 'pretrained = "tiny"'
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE.format(task=task, model=model, data='test = "train.jsonl"'))
    result = run(path)
    found = predict(tmp_path / "out", tmp_path / "train.jsonl", output=tmp_path / "a.csv", new_tokens=4)
    assert found.metrics == pytest.approx(result["metrics"]["test"])
    assert len(found.rows) == len(rows(tmp_path / "a.csv")) == 30
    key = {"token-classification": "tags", "multi-label": "labels", "seq2seq": "text"}[task]
    for row, answer in zip(made, found.rows, strict=True):
        if key == "tags":
            assert len(answer[key]) == len(row["tokens"])
    bare = [{name: value for name, value in row.items() if name in ("tokens", "text", "source")} for row in made]
    (tmp_path / "bare.jsonl").write_text("".join(json.dumps(row) + "\n" for row in bare))
    again = predict(tmp_path / "out", tmp_path / "bare.jsonl", new_tokens=4)
    assert [row[key] for row in again.rows] == [row[key] for row in found.rows]
    assert again.metrics == {}


def test_a_language_model_goes_on_with_texts(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("abcd" * 200)
    (tmp_path / "recipe.toml").write_text(TEXTS.replace("density = 0.2", "density = 1.0"))
    run(tmp_path / "recipe.toml", "run.steps=40", "optimizer.lr=0.03", "data.packing=true")
    (tmp_path / "new.jsonl").write_text('{"text": "abcdabc"}\n{"text": "bcdabcdab"}\n')
    found = predict(tmp_path / "out", tmp_path / "new.jsonl", new_tokens=4)
    assert [row["continuation"] for row in found.rows] == ["dabc", "cdab"]
    assert all(row["perplexity"] < 3 for row in found.rows)
    found = predict(tmp_path / "out", tmp_path / "new.jsonl", new_tokens=0)
    assert "continuation" not in found.rows[0]
    (tmp_path / "new.jsonl").write_text(json.dumps({"text": "abcd" * 20}) + "\n")
    found = predict(tmp_path / "out", tmp_path / "new.jsonl", new_tokens=2)
    assert "only their last are read" in found.notes[0]
    assert found.rows[0]["tokens"] == 16


def test_pictures_are_answered_as_they_were_normalised(images: Path, tmp_path: Path) -> None:
    (tmp_path / "shaded_net.py").write_text(
        "from torch import nn\n"
        "def make(num_labels):\n"
        "    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AvgPool2d(4), nn.Flatten(),\n"
        "                         nn.Linear(32, num_labels))\n"
    )
    text = f"""
    [model]
    callable = "shaded_net:make"
    head = ["4.*"]
    [data]
    task = "image-classification"
    npz = "{images}"
    [method]
    name = "full"
    [optimizer]
    lr = 0.02
    [run]
    steps = 20
    output = "out"
    """
    (tmp_path / "recipe.toml").write_text(text)
    result = run(tmp_path / "recipe.toml")
    found = predict(tmp_path / "out", images)
    assert found.metrics == result["metrics"]["test"]
    with np.load(images, allow_pickle=False) as file:
        (tmp_path / "new").mkdir()
        for number in range(5):
            Image.fromarray(file["x_test"][number]).save(tmp_path / "new" / f"{number}.png")
    told = predict(tmp_path / "out", tmp_path / "new", output=tmp_path / "a.json")
    one = predict(tmp_path / "out", tmp_path / "new" / "0.png")
    assert [row["place"] for row in told.rows] == [str(tmp_path / "new" / f"{number}.png") for number in range(5)]
    assert one.rows[0]["label"] == told.rows[0]["label"]
    with pytest.raises(TitheError, match="no picture"):
        predict(tmp_path / "out", tmp_path / "shaded_net.py")


def test_another_file_may_be_read_in_another_way(done: Path, workplace: Path) -> None:
    file = workplace / "new.csv"
    file.write_bytes("body\na g\u00f6od film\n\na bad film\n".encode("cp1252"))
    with pytest.raises(TitheError, match="cp1252") as error:
        predict(done, file)
    assert error.value.remedy.endswith("(here: --set data.KEY=VALUE)")
    settings = ["data.encoding=cp1252"]
    with pytest.raises(TitheError, match="no column 'sentence'"):
        predict(done, file, overrides=settings)
    assert len(predict(done, file, overrides=[*settings, "data.text=body"]).rows) == 2
    file.write_text("sentence,label\na film,0\na bad film,\n")
    assert len(predict(done, file, overrides=["data.skip_bad=true"]).rows) == 1
    for wrong in ("optimizer.lr=1", "data.task=seq2seq", "data.max_length=9"):
        with pytest.raises(TitheError, match="which a finished run has"):
            predict(done, file, overrides=[wrong])
