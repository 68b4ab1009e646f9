"""Recipes: what is wrong, on which line, and what was expected; nothing is loaded before all is checked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tithe import TitheError
from tithe.train import parse_recipe, read_recipe
from tithe.train.locate import locate

Edit = Callable[..., Path]

WRONG = {
    "unknown key": (
        ("epochs = 2", "epochs = 2\nbatchsize = 3"),
        "recipe.toml line 21: [run] batchsize",
        ["unknown key", "epochs", "did you mean batch_size?"],
    ),
    "misspelt required key": (("output =", "outptu ="), "line 23: [run] outptu", ["did you mean output?"]),
    "unknown section": (("[run]", "[runs]"), "line 19: [runs]", ["unknown key 'runs'", "did you mean run?"]),
    "missing section": (("[optimizer]\nlr = 0.01\nclip = 1.0\n", ""), "recipe.toml", ["optimizer"]),
    "missing key": (("lr = 0.01\n", ""), "line 15: [optimizer]", ["found no lr", "add [optimizer] lr"]),
    "missing method": (('name = "fish"\n', ""), "line 10: [method]", ["add [method] name"]),
    "wrong method": (('"fish"', '"fisch"'), "line 11: [method] name", ["'fisch'", "'fish'", "'full'", "'head'"]),
    "key of another method": (
        ('name = "fish"\ndensity = 0.2', 'name = "full"\ndensity = 0.2'),
        "line 12: [method] density",
        ["one of name"],
    ),
    "wrong type": (("lr = 0.01", 'lr = "small"'), "line 16: [optimizer] lr", ["'small'", "number"]),
    "out of range": (("density = 0.2", "density = 1.5"), "line 12: [method] density", ["1.5", "less than or equal"]),
    "two sizes": (("density = 0.2", "density = 0.2\nk = 9"), "line 10: [method]", ["density and k", "exactly one"]),
    "no length": (("epochs = 2\n", ""), "line 19: [run]", ["none of them", "epochs, steps"]),
    "two models": (
        ('pretrained = "tiny"', 'pretrained = "tiny"\ntimm = "resnet18"'),
        "line 1: [model]",
        ["exactly one of pretrained, timm, callable"],
    ),
    "not a callable": (('pretrained = "tiny"', 'callable = "no colon"'), "line 2: [model] callable", ["module:call"]),
    "wrong unit": (
        ("samples = 32", "samples = 32\nreselect = {every = 1, unit = 'days'}"),
        "line 14: [method] reselect.unit",
        ["'days'", "'steps' or 'epochs'"],
    ),
    "a text for a list": (('pretrained = "tiny"', 'pretrained = "tiny"\nhead = "x"'), "line 3: [model] head", ["list"]),
    "not TOML": (("epochs = 2", "epochs = = 2"), "recipe.toml line 20", ["TOML"]),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_recipe_says_where_and_what(name: str, edit: Edit) -> None:
    change, place, words = WRONG[name]
    with pytest.raises(TitheError) as error:
        read_recipe(edit(change))
    assert place in error.value.place
    for word in words:
        assert word in str(error.value)


def test_a_missing_recipe_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(TitheError, match=r"none\.toml"):
        read_recipe(tmp_path / "none.toml")


def test_settings_from_outside_replace_the_files(edit: Edit) -> None:
    recipe = read_recipe(edit(), ["run.epochs=5", "data.folder=/data", "method.reselect.every=2", "run.output=a b"])
    assert recipe.run.epochs == 5
    assert recipe.data.folder == "/data"
    assert recipe.settings()["method"]["reselect"] == {"every": 2, "unit": "epochs"}
    assert recipe.run.output == "a b"


@pytest.mark.parametrize(
    ("setting", "place"),
    [
        ("run.epochs=0", "--set run.epochs"),
        ("run.spam=1", "--set run.spam"),
        ("epochs", "--set epochs"),
        ("a.b.c=1", "a"),
    ],
)
def test_a_wrong_setting_names_itself(setting: str, place: str, edit: Edit) -> None:
    with pytest.raises(TitheError) as error:
        read_recipe(edit(), [setting])
    assert place in error.value.place


def test_a_setting_inside_a_value_is_refused(edit: Edit) -> None:
    with pytest.raises(TitheError, match="a section"):
        read_recipe(edit(), ["run.epochs.more=1"])


def test_lines_step_over_strings_arrays_and_comments() -> None:
    text = '''
# [fake]
[a] # a comment with = and [brackets]
b = """
c = 1
[d]
"""
e = [ # ]
  "[x]", "y = 1",
]
"f g".h = 3
[a.i]
j = {k = 1, l = [2]}
[[m]]
n = 1
'''
    lines = locate(text, "x").lines
    assert lines == {
        ("a",): 3,
        ("a", "b"): 4,
        ("a", "e"): 8,
        ("a", "f g", "h"): 11,
        ("a", "i"): 12,
        ("a", "i", "j"): 13,
        ("m",): 14,
        ("m", "n"): 15,
    }


def test_a_recipe_from_python_names_its_keys() -> None:
    with pytest.raises(TitheError, match=r"\[model\]"):
        parse_recipe({"model": {}, "data": {"task": "text-regression", "train": "a.tsv"}})
