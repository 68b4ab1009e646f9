"""Recipes as people write them: the line that is not TOML is quoted as it is to be written, and then it is TOML."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tithe import TitheError
from tithe.app.train import read_recipe

Edit = Callable[..., Path]

RUN = "[run]\nepochs = 2"

# What stands in the recipe → what somebody wrote instead → the line that the remedy has to give.
SLIPS = {
    "a Windows path": ('output = "out"', 'output = "C:\\Users\\me"', 'output = "C:/Users/me"'),
    "a path with an escape": ('output = "out"', 'output = "new\\xrun"', 'output = "new/xrun"'),
    "a raw text": ('output = "out"', 'output = r"C:\\runs"', 'output = "C:/runs"'),
    "a text without quotes": ('output = "out"', "output = runs/first", 'output = "runs/first"'),
    "a word without quotes": ('name = "fish"', "name = fish", 'name = "fish"'),
    "an open quote": ('output = "out"', 'output = "out', 'output = "out"'),
    "a late quote": ('output = "out"', 'output = out"', 'output = "out"'),
    "two kinds of quotes": ('output = "out"', "output = 'out\"", 'output = "out"'),
    "smart quotes": ('name = "fish"', "name = “fish”", 'name = "fish"'),
    "German quotes": ('name = "fish"', "name = „fish“", 'name = "fish"'),
    "single smart quotes": ('name = "fish"', "name = ‘fish’", "name = 'fish'"),
    "True": ("samples = 32", "lean = True", "lean = true"),
    "yes": ("samples = 32", "lean = yes", "lean = true"),
    "FALSE": ("samples = 32", "lean = FALSE", "lean = false"),
    "None": ("clip = 1.0", "clip = None", ""),
    "null": ("clip = 1.0", "clip = null", ""),
    "no value": ("clip = 1.0", "clip =", ""),
    "no zero before the point": ("lr = 0.01", "lr = .01", "lr = 0.01"),
    "no zero after it": ("clip = 1.0", "clip = 1.", "clip = 1.0"),
    "a power without one": ("lr = 0.01", "lr = 1.e-3", "lr = 1.0e-3"),
    "a power of ten": ("lr = 0.01", "lr = 10^-3", "lr = 1e-3"),
    "a comma for the point": ("lr = 0.01", "lr = 0,01", "lr = 0.01"),
    "a percentage": ("density = 0.2", "density = 20%", "density = 0.2"),
    "thousands": ("samples = 32", "samples = 1,024", "samples = 1024"),
    "leading zeros": ("samples = 32", "samples = 032", "samples = 32"),
    "a minus of typesetters": ("lr = 0.01", "lr = 1e−2", "lr = 1e-2"),
    "a colon": ("epochs = 2", "epochs: 2", "epochs = 2"),
    "two signs": ("epochs = 2", "epochs == 2", "epochs = 2"),
    "no sign": ("epochs = 2", "epochs 2", "epochs = 2"),
    "a walrus": ("epochs = 2", "epochs := 2", "epochs = 2"),
    "a semicolon at the end": ("epochs = 2", "epochs = 2;", "epochs = 2"),
    "a comma at the end": ("epochs = 2", "epochs = 2,", "epochs = 2"),
    "another comment": ("epochs = 2", "epochs = 2 // passes", "epochs = 2 # passes"),
    "a comment of its own": ("epochs = 2", "// passes\nepochs = 2", "# passes"),
    "a blank in a key": ("batch_size = 8", "batch size = 8", "batch_size = 8"),
    "an open section": ("[run]", "[run", "[run]"),
    "a closed section": ("[run]", "run]", "[run]"),
    "a section of YAML": ("[run]", "run:", "[run]"),
    "an open list": ('"tiny"', '"tiny"\nhead = ["classifier.*"', 'head = ["classifier.*"]'),
    "words in a list": ('"tiny"', '"tiny"\nhead = [classifier.*, pooler.*]', 'head = ["classifier.*", "pooler.*"]'),
    "a list without commas": ('"tiny"', '"tiny"\nhead = ["a.*" "b.*"]', 'head = ["a.*", "b.*"]'),
    "a tuple": ('"tiny"', '"tiny"\nhead = ("classifier.*")', 'head = ["classifier.*"]'),
    "a table of JSON": (
        "samples = 32",
        'reselect = {"every": 5, "unit": "steps"}',
        'reselect = {every = 5, unit = "steps"}',
    ),
    "a comma at a table's end": ("samples = 32", "reselect = {every = 5,}", "reselect = {every = 5}"),
    "a hidden blank": ("epochs = 2", "\u00a0epochs = 2", "epochs = 2"),
    "a blank of no width": ("epochs = 2", "epochs\u200b = 2", "epochs = 2"),
    "a full-width sign": ("epochs = 2", "epochs ＝ 2", "epochs = 2"),
    "two keys on a line": ("epochs = 2\nbatch_size = 8", "epochs = 2 batch_size = 8", "epochs = 2\nbatch_size = 8"),
    "a key behind its section": (RUN, "[run] epochs = 2", RUN),
    "a text of three quotes": ('output = "out"', 'output = """out', 'output = "out"'),
}


@pytest.mark.parametrize("name", SLIPS)
def test_the_remedy_of_a_slip_is_the_line_and_then_the_recipe_is_read(name: str, edit: Edit) -> None:
    right, wrong, mended = SLIPS[name]
    path = edit((right, wrong))
    with pytest.raises(TitheError) as error:
        read_recipe(path)
    number = re.match(r"recipe\.toml line (\d+)", error.value.place)
    assert number is not None
    lines = path.read_text(encoding="utf-8").split("\n")
    line = int(number[1]) - 1
    assert lines[line].strip() in error.value.found
    assert f"write `{mended}`" in error.value.remedy if mended else "remove the line" in error.value.remedy
    lines[line] = mended
    path.write_text("\n".join(lines), encoding="utf-8")
    read_recipe(path)


def test_two_slips_are_told_one_after_the_other(edit: Edit) -> None:
    path = edit(("lr = 0.01", "lr = .01"), ("epochs = 2", "epochs: 2"))
    with pytest.raises(TitheError, match=r"line 16 .*`lr = 0\.01`"):
        read_recipe(path)
    path.write_text(path.read_text().replace("= .01", "= 0.01"))
    with pytest.raises(TitheError, match=r"line 20 .*`epochs = 2`"):
        read_recipe(path)


def test_a_key_or_section_written_twice_names_both_lines(edit: Edit) -> None:
    with pytest.raises(TitheError, match=r"line 21: .*as on line 20 .*remove line 21, or line 20"):
        read_recipe(edit(("epochs = 2", "epochs = 2\nepochs = 3")))
    with pytest.raises(TitheError, match=r"line 19: .*`\[data\]` as on line 4 .*join the two"):
        read_recipe(edit(("[run]", "[data]\n[run]")))


ODD = {
    "nothing": "",
    "a picture": "\ufffdPNG",
    "JSON": '{"model": {"pretrained": "tiny"}}',
    "Python": "import tithe\ntithe.train()\n",
    "YAML": "model:\n  pretrained: tiny\n- a\n",
    "prose": "Dear diary,\n\nI trained a model today.\n",
    "quotes": '"""\n',
    "brackets": "[" * 3000,
    "deep": "a = " + "[" * 5000,
}


@pytest.mark.parametrize("name", ODD)
def test_what_is_no_recipe_is_one_message(name: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(ODD[name], encoding="utf-8")
    with pytest.raises(TitheError, match=r"recipe\.toml"):
        read_recipe(path)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_recipe_with_a_byte_order_mark_is_read(encoding: str, edit: Edit) -> None:
    path = edit(("epochs = 2", "epochs = 2 # été"))
    path.write_bytes(path.read_text(encoding="utf-8").encode(encoding))
    assert read_recipe(path).run.epochs == 2


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "utf-16-le"])
def test_a_recipe_in_another_encoding_names_the_line_and_the_likely_one(encoding: str, edit: Edit) -> None:
    path = edit(("epochs = 2", "epochs = 2 # été"))
    text = path.read_text(encoding="utf-8")
    path.write_bytes(text.encode(encoding))
    with pytest.raises(TitheError) as error:
        read_recipe(path)
    if encoding != "utf-16-le":
        assert error.value.place == "recipe.toml line 20 column 14"
        assert "été" in error.value.found
    assert "save the file as UTF-8" in error.value.remedy
    path.write_text(text, encoding="utf-8")
    assert read_recipe(path).run.epochs == 2


# ------------------------------------------------------------------------------------------------------- paths

PATHS = {
    "a form feed": ('"runs\\first"', "control character", "runs/first"),
    "a tab": ('"runs\\train"', "control character", "runs/train"),
    "an escape character": ('"runs\\u001bx"', "control character", None),
    "a null": ('"runs\\u0000x"', "control character", None),
    "backslashes": ("'runs\\first'", "backslash", "runs/first"),
    "nothing": ('""', "an empty text", None),
    "blanks": ('"  "', "an empty text", None),
    "no such user": ('"~nobody-of-this-name/x"', "no such user", None),
    "no such variable": ('"$NO_SUCH_VARIABLE/x"', "$NO_SUCH_VARIABLE", None),
}


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize(("key", "old", "line"), [("output", '"out"', 23), ("train", '"train.tsv"', 6)])
def test_a_path_that_would_be_another_than_it_seems_is_refused(
    name: str, key: str, old: str, line: int, edit: Edit
) -> None:
    written, word, mended = PATHS[name]
    with pytest.raises(TitheError) as error:
        read_recipe(edit((old, written)))
    assert f"line {line}: " in error.value.place
    assert error.value.place.endswith(f" {key}")
    assert word in error.value.found
    if mended is not None:
        assert f'write "{mended}"' in error.value.remedy
        read_recipe(edit((old, f'"{mended}"')))


def test_home_and_variables_are_expanded(edit: Edit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("RUNS", "/somewhere")
    assert read_recipe(edit(('"out"', '"~/runs/x"'))).output == tmp_path / "home" / "runs" / "x"
    assert read_recipe(edit(('"out"', '"$RUNS/x"'))).output == Path("/somewhere/x")
    assert read_recipe(edit(('"out"', '"${RUNS}/x"'))).output == Path("/somewhere/x")
    (tmp_path / "home").mkdir()
    os.rename(tmp_path / "train.tsv", tmp_path / "home" / "train.tsv")
    assert read_recipe(edit(('"train.tsv"', '"~/train.tsv"'))).data_path("train") == tmp_path / "home" / "train.tsv"
    recipe = read_recipe(edit(('"sentence"', '"sentence"\nfolder = "~"')))
    assert recipe.data_path("train") == tmp_path / "home" / "train.tsv"


def test_a_path_that_no_system_takes_is_missing(edit: Edit) -> None:
    for odd in ("x" * 5000, "train.tsv/deeper"):
        with pytest.raises(TitheError, match="no file or folder"):
            read_recipe(edit(('"train.tsv"', f'"{odd}"'))).data_path("train")


# -------------------------------------------------------------------------------------------- values of another type

TYPES = {
    "a truth for a number": ("epochs = 2", "epochs = true", "found true", "epochs = 2"),
    "a truth for a rate": ("lr = 0.01", "lr = true", "found true", "lr = 0.01"),
    "infinity": ("lr = 0.01", "lr = inf", "finite", "lr = 0.01"),
    "not a number": ("lr = 0.01", "lr = nan", "found nan", "lr = 0.01"),
    "a number for a text": ('text = "sentence"', "text = 3", 'write text = "3"', 'text = "3"'),
    "a text for a list": ('"tiny"', '"tiny"\nhead = "x.*"', 'write head = ["x.*"]', '"tiny"\nhead = ["x.*"]'),
    "another case": ('device = "cpu"', 'device = "CPU"', 'write device = "cpu"', 'device = "cpu"'),
    "a key of another section": ("[run]", "epochs = 2\n[run]", "move it to [run]", "[run]"),
}


@pytest.mark.parametrize("name", TYPES)
def test_a_value_of_another_type_says_how_to_write_it(name: str, edit: Edit) -> None:
    right, wrong, words, mended = TYPES[name]
    with pytest.raises(TitheError) as error:
        read_recipe(edit((right, wrong)))
    assert words in str(error.value)
    read_recipe(edit((right, mended)))


def test_mean_and_deviation_are_of_pixels_from_0_to_1(edit: Edit) -> None:
    def written(line: str) -> Path:
        return edit(('"text-classification"', '"image-classification"'), ('text = "sentence"', line))

    with pytest.raises(TitheError) as error:
        read_recipe(written("mean = [123.7, 116.3, 103.5]"))
    told = error.value.remedy.removeprefix("write ")
    assert read_recipe(written(told)).data.mean == (0.4851, 0.4561, 0.4059)
    for wrong in ("mean = [-0.1]", "std = [0.0]", "std = [58.4]"):
        with pytest.raises(TitheError, match="from 0 to 1"):
            read_recipe(written(wrong))


def test_a_key_of_another_task_is_refused(edit: Edit) -> None:
    for line in ("mean = [0.5]", "packing = true", 'messages = "messages"', "max_target_length = 9", 'separator = ";"'):
        with pytest.raises(TitheError, match=r"with task = .*remove .*, or change task") as error:
            read_recipe(edit(('"sentence"', f'"sentence"\n{line}')))
        assert error.value.place == f"recipe.toml line 9: [data] {line.split()[0]}"


def test_a_regression_has_one_output(edit: Edit) -> None:
    with pytest.raises(TitheError, match=r"\[model\] num_labels: found 3 outputs .*remove num_labels"):
        read_recipe(edit(("text-classification", "text-regression"), ('"tiny"', '"tiny"\nnum_labels = 3')))
