"""Tasks beside classification: words, several classes a text, texts for texts; each learns, scores and refuses."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tithe
from task_rows import BART, RECIPE, ROWS, T5, TEXTS
from tithe import TitheError
from tithe.app.price import Shape, outline, price
from tithe.app.train import read_recipe
from tithe.app.train.loop import Run
from tithe.app.train.models import load
from tithe.app.train.tasks import TASKS
from tithe.app.train.tasks.text import IGNORED
from tithe.app.train.terms import TERMS
from workplace import quiet, run

Write = Callable[..., Path]


@pytest.fixture
def write(tiny: Path, tmp_path: Path) -> Write:
    """Write a recipe for a task, and its rows."""
    (tmp_path / "tiny").symlink_to(tiny)

    def made(task: str, rows: list[Any] | None = None, *, model: str = 'pretrained = "tiny"', data: str = "") -> Path:
        draw = random.Random(1)
        rows = [ROWS[task](draw) for _ in range(60)] if rows is None else rows
        (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        path = tmp_path / "recipe.toml"
        path.write_text(RECIPE.format(task=task, model=model, data=data))
        return path

    return made


def make(path: Path, *settings: str) -> Run:
    return Run(read_recipe(path, settings), resume=False, console=quiet())


def refusal(path: Path, *settings: str) -> TitheError:
    with pytest.raises(TitheError) as error:
        make(path, *settings)
    assert not (path.parent / "out").exists()
    return error.value


def rows_with(task: str, at: int, **changed: Any) -> list[Any]:
    draw = random.Random(1)
    rows = [ROWS[task](draw) for _ in range(12)]
    rows[at] = {key: value for key, value in {**rows[at], **changed}.items() if value is not ...}
    return rows


def test_every_task_has_its_terms() -> None:
    assert set(TASKS) == set(TERMS)
    for terms in TERMS.values():
        assert set(terms.usual) <= set(terms.metrics)
        assert set(terms.columns) <= terms.keys


# ---------------------------------------------------------------------------------------------------- they learn


def test_words_are_learned(write: Write) -> None:
    result = run(write("token-classification"), "run.steps=30", "optimizer.lr=0.05")
    assert result["labels"] == ["BAD", "GOOD", "O"]
    assert result["metrics"]["validation"]["f1"] > 0.9
    assert result["metrics"]["validation"]["accuracy"] > 0.9


def test_several_classes_are_learned(write: Write) -> None:
    result = run(write("multi-label"), "run.steps=30", "optimizer.lr=0.05")
    assert result["labels"] == ["bad", "good"]
    assert result["metrics"]["validation"]["f1"] > 0.85
    config = json.loads((Path(result["files"]["result"]).parent / "model" / "config.json").read_text())
    assert config["problem_type"] == "multi_label_classification"
    assert config["id2label"] == {"0": "bad", "1": "good"}


@pytest.mark.parametrize("model", [T5, BART], ids=["t5", "bart"])
def test_texts_are_turned_into_texts(model: str, write: Write) -> None:
    result = run(write("seq2seq", model=model), "run.steps=20", "optimizer.lr=0.03", "run.evaluate_every=5")
    losses = [evaluation["loss"] for evaluation in result["evaluations"]]
    assert losses[-1] < 0.9 * losses[0]
    assert set(result["metrics"]["validation"]) == {"loss", "exact_match"}


def test_an_exact_match_is_what_generation_writes(write: Write) -> None:
    """After a few steps some targets are written exactly, some not: both ways to tell agree on each."""
    rows = [{"source": "ab"[n % 2] * 2, "target": "xy"[n % 2] + "zz"[n % 3 :]} for n in range(24)]
    one = make(write("seq2seq", rows, model=T5), "run.steps=40", "optimizer.lr=0.03", "data.validation=train.jsonl")
    one.fit()
    samples, model = one.samples["validation"], one.model.eval()
    (batch,) = samples.batches([range(24)])
    with torch.no_grad():
        exact = one.task.tally(model, batch)[:, 2].bool()
        inputs: Any = batch["inputs"]
        written = model.generate(**inputs, max_new_tokens=6, do_sample=False, num_beams=1)  # pyright: ignore
    told = one.network.encoder.tokenizer.batch_decode(written, skip_special_tokens=True)
    assert [text == row["target"] for text, row in zip(told, rows, strict=True)] == exact.tolist()
    assert 0 < int(exact.sum()) < 24


@pytest.mark.parametrize("task", ["token-classification", "seq2seq"])
def test_a_batch_is_the_mean_over_what_its_rows_weigh(task: str, write: Write) -> None:
    one = make(write(task, model=T5 if task == "seq2seq" else 'pretrained = "tiny"'))
    samples, model = one.samples["train"], one.model.eval()
    (batch,) = samples.batches([range(5)])
    with torch.no_grad():
        whole = float(one.loss(model, batch))
        parts = [float(one.loss(model, next(samples.batches([[row]])))) for row in range(5)]
    weights = [samples.weight([row]) for row in range(5)]
    mean = sum(part * weight for part, weight in zip(parts, weights, strict=True)) / sum(weights)
    assert whole == pytest.approx(mean, rel=1e-5)


METHODS = {
    "fish": "density = 0.2\nsamples = 8",
    "trady": 'budget = {fraction = 0.2}\nlayers = "all"\nsamples = 8',
    "vrpge": "keep = 0.6",
}


@pytest.mark.parametrize("task", sorted(ROWS))
@pytest.mark.parametrize(
    "method", ["fish", *(pytest.param(name, marks=pytest.mark.slow) for name in ("trady", "vrpge"))]
)
def test_the_methods_train_every_task(method: str, task: str, write: Write) -> None:
    path = write(task, model=T5 if task == "seq2seq" else 'pretrained = "tiny"')
    path.write_text(path.read_text().replace('name = "full"', f'name = "{method}"\n{METHODS[method]}'))
    result = run(path)
    assert result["steps"] == 3
    assert result["trainable"]["total"] > 0


# ----------------------------------------------------------------------------------------------------- how rows read


def test_a_word_of_several_tokens_has_one_class(write: Write) -> None:
    one = make(write("token-classification"))
    samples = one.samples["train"]
    item, labels = samples[0]
    text = one.examples.splits["train"].text[0]  # pyright: ignore[reportAttributeAccessIssue]
    assert [label != IGNORED for label in labels] == [False, *[True] * len(text), False]
    assert len(item["input_ids"]) == len(labels)


def test_words_and_classes_may_be_written_as_texts(write: Write, tmp_path: Path) -> None:
    path = write("token-classification")
    (tmp_path / "a.csv").write_text("tokens,tags\na good film,O GOOD O\na bad film,O BAD O\n" * 4)
    one = make(path, "data.train=a.csv")
    assert one.examples.splits["train"].label[0] in {("O", "GOOD", "O"), ("O", "BAD", "O")}


def test_classes_of_a_data_set_come_by_number_and_in_its_order(write: Write, tmp_path: Path) -> None:
    import datasets

    features = datasets.Features(
        {
            "tokens": datasets.List(datasets.Value("string")),
            "tags": datasets.List(datasets.ClassLabel(names=["O", "GOOD", "BAD"])),
        }
    )
    rows = {"tokens": [["a", "good", "film"], ["bad"]] * 6, "tags": [[0, 1, 0], [2]] * 6}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "a.parquet")
    one = make(write("token-classification"), "data.train=a.parquet")
    assert one.examples.labels == ("O", "GOOD", "BAD")


def test_several_classes_in_one_cell(write: Write, tmp_path: Path) -> None:
    path = write("multi-label", data='separator = "|"')
    (tmp_path / "a.csv").write_text("text,labels\n" + 'good,x | y\nbad,""\nfine,y\npoor,x\n' * 3)
    one = make(path, "data.train=a.csv")
    assert one.examples.labels == ("x", "y")
    assert {tuple(row) for row in one.examples.targets["train"].tolist()} == {(1, 1), (0, 0), (0, 1), (1, 0)}  # pyright: ignore


def test_lists_in_cells_of_a_table_are_read_as_json(write: Write, tmp_path: Path) -> None:
    path = write("token-classification")
    row = '"[""a"", ""good film""]","[""O"", ""GOOD""]"\n[ a ],O BAD O\n'
    (tmp_path / "a.csv").write_text("tokens,tags\n" + row * 6)
    split = make(path, "data.train=a.csv").examples.splits["train"]
    assert set(split.text) == {("a", "good film"), ("[", "a", "]")}  # pyright: ignore
    assert set(split.label) == {("O", "GOOD"), ("O", "BAD", "O")}
    path = write("multi-label")
    (tmp_path / "a.csv").write_text("text,labels\n" + 'fine,"[""x"", ""y""]"\nbad,[]\ngood,x\n' * 4)
    one = make(path, "data.train=a.csv")
    assert one.examples.labels == ("x", "y")


@pytest.mark.parametrize("separator", [";", "|", " "])
def test_a_separator_that_is_not_named_is_no_part_of_a_class(separator: str, write: Write) -> None:
    labels = ["good", f"good{separator}bad", "bad"]
    rows = [{"text": f"film {n}", "labels": labels[n % 3]} for n in range(12)]
    error = refusal(write("multi-label", rows, data='validation = "train.jsonl"'))
    assert error.place == "train.jsonl line 2"
    assert f"set separator = {separator!r}" in error.remedy
    one = make(write("multi-label", rows, data=f'separator = "{separator}"'))
    assert one.examples.labels == ("bad", "good")
    one = make(write("multi-label", rows, data=f"labels = {sorted(labels)}"))
    assert one.examples.labels == tuple(sorted(labels))


def test_blanks_around_a_separator_do_not_count(write: Write) -> None:
    rows = [{"text": f"film {n}", "labels": ["a;b", "a", "b"][n % 3]} for n in range(12)]
    assert make(write("multi-label", rows, data='separator = " ; "')).examples.labels == ("a", "b")


def test_rows_that_all_have_every_class_are_refused(write: Write) -> None:
    rows = [{"text": f"film {n}", "labels": [n % 2, 1 - n % 2]} for n in range(12)]
    error = refusal(write("multi-label", rows))
    assert error.found == "every class (0, 1) in every row"
    assert "not 0 or 1 for each" in error.remedy


@pytest.mark.parametrize(("key", "right"), [("source", "text"), ("tokens", "text"), ("tags", "label")])
def test_the_usual_name_of_a_column_is_no_key(key: str, right: str, write: Write) -> None:
    error = refusal(write("seq2seq", data=f'{key} = "x"'))
    assert error.remedy == f'name the column by {right} = "x"'


def test_what_is_cut_is_said(write: Write) -> None:
    notes = make(write("token-classification"), "data.max_length=5").notes
    assert any("longer than 5 tokens ([data] max_length): cut" in note for note in notes)
    notes = make(write("seq2seq", model=T5), "data.max_length=4", "data.max_target_length=3").notes
    assert notes[:2] == [
        "train: 54 of 54 sources are longer than 4 tokens ([data] max_length): cut",
        "train: 54 of 54 targets are longer than 3 tokens ([data] max_target_length): cut",
    ]
    notes = make(write("multi-label"), "data.max_length=4").notes
    assert any("texts are longer than 4 tokens" in note for note in notes)


REFUSED: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "fewer tags": ("token-classification", {"tags": ["O"]}, "1 classes for", "correct the line"),
    "more tags": ("token-classification", {"tags": ["O"] * 30}, "30 classes for", "correct the line"),
    "no tags": ("token-classification", {"tags": []}, "an empty list", "remove the line"),
    "null tags": ("token-classification", {"tags": None}, "null", "write the classes"),
    "a null tag": ("token-classification", {"tags": ["O", None]}, "null as number 2", "correct"),
    "a nested tag": ("token-classification", {"tags": [["O"]]}, "a list as number 1", "correct"),
    "no words": ("token-classification", {"tokens": []}, "an empty list", "remove the line"),
    "null words": ("token-classification", {"tokens": None}, "null", "write the words"),
    "an empty word": ("token-classification", {"tokens": ["a", " "]}, "an empty text as number 2", "correct"),
    "a number for words": ("token-classification", {"tokens": 3}, "the value '3'", "write the words"),
    "tags left out": ("token-classification", {"tags": ...}, "nothing", "write the classes"),
    "null classes": ("multi-label", {"labels": None}, "null", "[] for none"),
    "classes left out": ("multi-label", {"labels": ...}, "nothing", "[] for none"),
    "a null class": ("multi-label", {"labels": ["good", None]}, "null", "correct"),
    "a class twice": ("multi-label", {"labels": ["good", "good"]}, "'good' twice", "write it once"),
    "an object": ("multi-label", {"labels": {"good": 1}}, "an object", "correct"),
    "an empty text": ("multi-label", {"text": ""}, "an empty text", "correct"),
    "an aligned tag": ("token-classification", {"tags": ["O", -100]}, "the class -100", "the classes of words"),
    "tags as Python prints": ("token-classification", {"tags": "['O', 'BAD']"}, "as Python prints it", "JSON"),
    "words as numpy prints": ("token-classification", {"tokens": "['a' 'film']"}, "as Python prints it", "JSON"),
    "classes as Python prints": ("multi-label", {"labels": "['good', 'bad']"}, "as Python prints it", "JSON"),
    "a flag for each class": ("multi-label", {"labels": [0, 1, 1]}, "'1' twice", "not 0 or 1 for each"),
    "no target": ("seq2seq", {"target": ...}, "no 'target'", "write the label"),
    "null target": ("seq2seq", {"target": None}, "null", "write the label"),
    "an empty target": ("seq2seq", {"target": "  "}, "an empty text", "write the label"),
    "a list for a target": ("seq2seq", {"target": ["a"]}, "a list", "correct"),
    "null source": ("seq2seq", {"source": None}, "null", "correct"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_row_that_is_none_is_refused_with_its_line_or_left_out_by_wish(name: str, write: Write) -> None:
    task, changed, found, remedy = REFUSED[name]
    model = T5 if task == "seq2seq" else 'pretrained = "tiny"'
    path = write(task, rows_with(task, 4, **changed), model=model, data='validation = "train.jsonl"')
    error = refusal(path)
    assert error.place.startswith("train.jsonl line 5")
    assert found in error.found
    assert remedy in error.remedy
    one = make(path, "data.skip_bad=true")
    assert len(one.samples["train"]) == 11
    assert any("left out 1" in note for note in one.notes)


def test_a_class_that_training_does_not_know_is_named(write: Write, tmp_path: Path) -> None:
    for task, row, name in (
        ("token-classification", {"tokens": ["a", "film"], "tags": ["O", "MISC"]}, "MISC"),
        ("multi-label", {"text": "a film", "labels": ["good", "new"]}, "new"),
    ):
        (tmp_path / "other.jsonl").write_text(json.dumps(row) + "\n")
        path = write(task)
        error = refusal(path, "data.validation=other.jsonl")
        assert error.place == "other.jsonl line 1"
        assert error.found == f"label {name!r}"


def test_rows_without_a_single_class_are_refused(write: Write) -> None:
    rows = [{"text": f"film {n}", "labels": []} for n in range(12)]
    error = refusal(write("multi-label", rows))
    assert error.found == "no label in any row"
    rows = [{"tokens": ["a", "film"], "tags": ["O", "O"]}] * 12
    assert "only the label 'O'" in refusal(write("token-classification", rows)).found
    rows = [{"text": f"film {n}", "labels": None} for n in range(12)]
    assert "no label in any row of the train split" in refusal(write("multi-label", rows)).found


def test_two_ways_to_write_a_class_of_words_are_refused(write: Write) -> None:
    rows = [{"tokens": ["a", "film"], "tags": ["O", "good" if n % 2 else "GOOD"]} for n in range(12)]
    error = refusal(write("token-classification", rows, data='validation = "train.jsonl"'))
    assert "the label 'good' beside 'GOOD'" in error.found
    assert error.place == "train.jsonl line 2"


def test_a_tokenizer_that_does_not_know_words_is_refused(write: Write) -> None:
    error = refusal(write("token-classification"), "model.tokenizer=bytes")
    assert "does not say which token belongs to which word" in error.found


def test_a_model_that_does_not_fit_the_task_is_refused(write: Write) -> None:
    error = refusal(write("seq2seq"))
    assert "[model] pretrained" in error.place
    error = refusal(
        write(
            "seq2seq",
            model=T5.replace('"t5"', '"bert"')
            .replace("d_model = 16", "")
            .replace("d_kv = 8", "")
            .replace("d_ff = 32", "")
            .replace("num_layers = 1", "")
            .replace("num_heads = 2", ""),
        )
    )
    assert "[model] scratch" in error.place


def test_a_test_split_without_targets_is_not_scored(write: Write, tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_text('{"source": "ab"}\n{"source": "cd"}\n')
    one = make(write("seq2seq", model=T5), "data.test=test.jsonl")
    assert one.notes == ["test: no labels, so no score"]


@pytest.mark.parametrize("task", [*sorted(ROWS), "causal-lm", "text-regression"])
def test_a_price_of_a_recipe_is_what_a_step_takes(task: str, write: Write) -> None:
    model = T5 if task == "seq2seq" else TEXTS.partition("[data]")[0].replace("[model]", "", 1)
    data = "max_length = 12" + ("\nmax_target_length = 5" if task == "seq2seq" else "")
    if task not in {"seq2seq", "causal-lm"}:
        model, data = 'pretrained = "tiny"', data + ('\nlabels = ["O", "A", "B"]' if task in ROWS else "")
    path = write(task, [], model=model, data=data)
    subject = outline(str(path), Shape())
    (row,) = price(subject, batch=3, methods=("full",)).rows
    recipe = read_recipe(path)
    network = load(recipe, 1 if task == "text-regression" else 3)
    network.model.train()
    batch = subject.batch(3)
    ledger = tithe.measure(lambda: TASKS[task].loss(network.model, batch).backward())
    assert row.kept == ledger.kept
    assert row.trained == sum(parameter.numel() for parameter in network.model.parameters())
