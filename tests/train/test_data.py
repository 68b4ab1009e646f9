"""Data of every form is read alike, and what is wrong is found, with its line, before a model is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tithe import TitheError
from tithe.app.train import Recipe, parse_recipe, read_recipe
from tithe.app.train.data import Samples, chunks, epoch_order, read_examples
from tithe.app.train.images import Images
from tithe.app.train.rows import Table
from tithe.app.train.tasks.image_classification import ImageEncoder

Edit = Callable[..., Path]
TEXTS = ('he said "no', "a, b", "it 's  fine", "x")
LABELS = ("0", "1", "1", "0")


def _recipe(folder: Path, data: dict[str, Any], model: dict[str, Any] | None = None) -> Recipe:
    return parse_recipe(
        {
            "model": model or {"pretrained": "tiny"},
            "data": {"task": "text-classification", **data},
            "method": {"name": "head"},
            "optimizer": {"lr": 0.1},
            "run": {"epochs": 1, "output": "out"},
        },
        folder,
    )


def _write(folder: Path, kind: str) -> str:
    rows = [{"text": text, "label": int(label)} for text, label in zip(TEXTS, LABELS, strict=True)]
    path = folder / f"rows.{kind}"
    if kind == "tsv":
        path.write_text("text\tlabel\n" + "".join(f"{r['text']}\t{r['label']}\n" for r in rows), encoding="utf-8")
    elif kind == "csv":
        lines = [f'"{str(row["text"]).replace(chr(34), chr(34) * 2)}",{row["label"]}\n' for row in rows]
        path.write_text("\ufefftext,label\n" + "".join(lines), encoding="utf-8")
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path.name


@pytest.mark.parametrize("kind", ["tsv", "csv", "jsonl", "parquet"])
def test_every_file_format_gives_the_same_rows(kind: str, tmp_path: Path) -> None:
    name = _write(tmp_path, kind)
    examples = read_examples(_recipe(tmp_path, {"train": name, "validation": name}))
    table = examples.splits["train"]
    assert isinstance(table, Table)
    assert table.text == TEXTS
    assert examples.labels == ("0", "1")
    assert examples.targets["train"].tolist() == [0, 1, 1, 0]


def test_a_data_set_by_name_may_be_a_local_folder(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    # Not tmp_path: a folder with "test" in its name is taken for a test split.
    folder = tmp_path_factory.mktemp("hub")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    _write(folder, "jsonl")
    recipe = _recipe(folder, {"dataset": str(folder), "train": "train[:2]", "validation": "train[2:]"})
    examples = read_examples(recipe)
    assert examples.targets["train"].tolist() == [0, 1]
    with pytest.raises(TitheError, match="spam"):
        read_examples(_recipe(folder, {"dataset": str(folder), "train": "spam"}))


def test_a_validation_split_is_carved_by_seed(workplace: Path) -> None:
    def carved(seed: int) -> tuple[Table, Table]:
        data = {"train": "train.tsv", "text": "sentence", "split_seed": seed, "validation_fraction": 0.25}
        splits = read_examples(_recipe(workplace, data)).splits
        train, validation = splits["train"], splits["validation"]
        assert isinstance(train, Table)
        assert isinstance(validation, Table)
        return train, validation

    (train, validation), again, other = carved(0), carved(0), carved(1)
    assert (len(train.text), len(validation.text)) == (60, 20)
    assert again == (train, validation)
    assert other[1].lines != validation.lines
    assert not set(train.lines or ()) & set(validation.lines or ())


DATA: dict[str, tuple[tuple[str, str], str, list[str]]] = {
    "missing file": (('"train.tsv"', '"trian.tsv"'), "recipe.toml line 6: [data] train", ["trian.tsv", "--data"]),
    "wrong column": (('"sentence"', '"sentense"'), "line 8: [data] text", ["'sentense'", "sentence, label"]),
    "wrong label column": (('"sentence"', '"sentence"\nlabel = "y"'), "line 9: [data] label", ["sentence, label"]),
    "unknown format": (('"train.tsv"', '"recipe.toml"'), "line 6: [data] train", [".tsv", ".parquet"]),
    "a label not listed": (
        ('"sentence"', '"sentence"\nlabels = ["0", "2"]'),
        "train.tsv line ",
        ["label '1'", "recipe.toml line 9: [data] labels"],
    ),
    "too many labels": (('"tiny"', '"tiny"\nnum_labels = 1'), "train.tsv line ", ["line 3: [model] num_labels"]),
    "no folder": (('"sentence"', '"sentence"\nfolder = "nowhere"'), "line 6: [data] train", ["nowhere"]),
}


@pytest.mark.parametrize("name", DATA)
def test_wrong_data_says_which_line(name: str, edit: Edit) -> None:
    change, place, words = DATA[name]
    with pytest.raises(TitheError) as error:
        read_examples(read_recipe(edit(change)))
    assert place in error.value.place
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "place", "word"),
    [
        ("a.tsv", "sentence\tlabel\nx\t0\ny\n", "a.tsv line 3", "1 fields"),
        ("a.csv", 'sentence,label\n"x\ny",0\n"z', "a.csv line 4", "unexpected end"),
        ("a.csv", 'sentence,label\n"x\ny",0\nz,1,2\n', "a.csv line 4", "3 fields"),
        ("a.jsonl", '{"sentence": "x", "label": 0}\n{"sentence": "y"}\n', "a.jsonl line 2", "no 'label'"),
        ("a.jsonl", '{"sentence": "x", "label": 0}\n[1]\n', "a.jsonl line 2", "list"),
        ("a.jsonl", '{"sentence": \n', "a.jsonl line 1", "JSON"),
        ("a.tsv", "sentence\tlabel\n", "[data] train", "no rows"),
        ("a.tsv", "sentence\tlabel\nx\t0\ny\t0\n", "a.tsv line 2", "two classes"),
        ("a.parquet", "not parquet", "a.parquet", "parquet"),
    ],
)
def test_a_damaged_file_says_which_line(name: str, content: str, place: str, word: str, workplace: Path) -> None:
    (workplace / name).write_text(content, encoding="utf-8")
    with pytest.raises(TitheError) as error:
        read_examples(_recipe(workplace, {"train": name, "validation": name, "text": "sentence"}))
    assert place in error.value.place
    assert word in str(error.value)


def test_a_label_of_the_test_split_that_training_lacks_names_its_line(workplace: Path) -> None:
    (workplace / "test.tsv").write_text("sentence\tlabel\nfine\t1\nodd\t7\n", encoding="utf-8")
    data = {"train": "train.tsv", "test": "test.tsv", "text": "sentence"}
    with pytest.raises(TitheError, match=r"test\.tsv line 3: found label '7'; expected one of 0, 1"):
        read_examples(_recipe(workplace, data))


def test_regression_wants_numbers(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("text\tlabel\nx\t0.5\ny\tnan\n", encoding="utf-8")
    with pytest.raises(TitheError, match=r"a\.tsv line 3: found label 'nan'; expected a finite number"):
        read_examples(_recipe(tmp_path, {"task": "text-regression", "train": "a.tsv", "validation": "a.tsv"}))


# ------------------------------------------------------------------------------------------------------------- images

_NET = {"callable": "m:f"}


def test_images_from_npz_and_from_folders_are_the_same(images: Path, tmp_path: Path) -> None:
    with np.load(images, allow_pickle=False) as file:
        x, y, classes = file["x_test"], file["y_test"], file["classes"]
    for number, (image, label) in enumerate(zip(x, y, strict=True)):
        (tmp_path / "flat" / classes[label]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / "flat" / classes[label] / f"{number:03}.png")
    data = {"task": "image-classification", "validation_fraction": 0.5}
    from_npz = read_examples(_recipe(tmp_path, {**data, "npz": str(images)}, _NET))
    folder = {"train": "flat", "validation": "flat", "image_size": 8}
    from_folder = read_examples(_recipe(tmp_path, {**data, **folder}, _NET))
    assert set(from_folder.labels) == set(from_npz.labels) == set(classes)
    encoder = ImageEncoder((0.5,) * 3, (0.25,) * 3, 8)
    one = Samples(from_npz.splits["test"], from_npz.targets["test"], encoder)
    two = Samples(from_folder.splits["train"], from_folder.targets["train"], encoder)
    (first,) = one.batches([range(30)])
    (second,) = two.batches([range(30)])
    assert isinstance(first["inputs"], torch.Tensor)
    assert isinstance(second["inputs"], torch.Tensor)
    assert first["inputs"].shape == (30, 3, 8, 8)
    assert torch.allclose(first["inputs"].sum(0), second["inputs"].sum(0), atol=1e-3)
    expected = (torch.from_numpy(x[0]).permute(2, 0, 1) / 255 - 0.5) / 0.25
    assert torch.allclose(first["inputs"][0], expected)


def test_grey_images_get_the_channels_the_model_wants() -> None:
    pixels = np.arange(2 * 4 * 4, dtype=np.uint8).reshape(2, 4, 4)
    assert Images("x", pixels, (), ("a", "b"), 3).decode(1, None).shape == (3, 4, 4)
    grey = Images("x", pixels, (), ("a", "b"), 1).decode(1, 8)
    assert grey.shape == (1, 8, 8)
    assert grey.dtype == torch.uint8


ARRAYS = {
    "no training arrays": ({"x": np.zeros((2, 4, 4), np.uint8)}, "x_train and y_train"),
    "floats": ({"x_train": np.zeros((2, 4, 4)), "y_train": np.zeros(2, np.int64)}, "uint8"),
    "lengths differ": ({"x_train": np.zeros((2, 4, 4), np.uint8), "y_train": np.zeros(3, np.int64)}, "2 class numbers"),
    "a class without a name": (
        {"x_train": np.zeros((2, 4, 4), np.uint8), "y_train": np.array([0, 5]), "classes": np.array(["a", "b"])},
        "0 to 1",
    ),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_wrong_arrays_are_refused(name: str, tmp_path: Path) -> None:
    arrays, word = ARRAYS[name]
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(TitheError, match=word):
        read_examples(_recipe(tmp_path, {"task": "image-classification", "npz": "a.npz"}, _NET))


def test_a_pickle_in_an_npz_is_never_opened(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x_train=np.array([{}], dtype=object), y_train=np.zeros(1, np.int64))
    with pytest.raises(TitheError, match="numbers"):
        read_examples(_recipe(tmp_path, {"task": "image-classification", "npz": "a.npz"}, _NET))


def test_a_folder_without_classes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(TitheError, match="class folders"):
        read_examples(_recipe(tmp_path, {"task": "image-classification", "train": "empty"}, _NET))
    (tmp_path / "empty" / "cats").mkdir()
    with pytest.raises(TitheError, match="no image in"):
        read_examples(_recipe(tmp_path, {"task": "image-classification", "train": "empty"}, _NET))


# -------------------------------------------------------------------------------------------------------------- order


def test_the_order_is_a_pure_function_of_seed_and_epoch_and_leaves_the_generator_alone() -> None:
    state = torch.get_rng_state()
    orders = {(seed, epoch): tuple(epoch_order(50, seed=seed, epoch=epoch)) for seed in (0, 1) for epoch in (-1, 0, 1)}
    assert len(set(orders.values())) == 6
    assert all(sorted(order) == list(range(50)) for order in orders.values())
    assert torch.equal(state, torch.get_rng_state())
    assert chunks(list(range(5)), 2) == [[0, 1], [2, 3], [4]]
