"""Recipes: what is wrong, on which line, and what was expected; nothing is loaded before all is checked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import tithe
from tithe import TitheError
from tithe.app.methods import SECTIONS
from tithe.app.section import AttachedSection
from tithe.app.train import parse_recipe, read_recipe
from tithe.app.train.locate import locate

Edit = Callable[..., Path]

FISH = 'name = "fish"\ndensity = 0.2\nsamples = 32'
TRAINED = f"{FISH}\n\n[optimizer]\nlr = 0.01\nclip = 1.0\n\n[run]"

WRONG = {
    "unknown key": (
        ("epochs = 2", "epochs = 2\nbatchsize = 3"),
        "recipe.toml line 21: [run] batchsize",
        ["unknown key", "epochs", "did you mean batch_size?"],
    ),
    "misspelt required key": (("output =", "outptu ="), "line 23: [run] outptu", ["did you mean output?"]),
    "unknown section": (("[run]", "[runs]"), "line 19: [runs]", ["unknown key 'runs'", "did you mean run?"]),
    "missing section": ((f"[method]\n{FISH}\n", ""), "recipe.toml", ["section [method]"]),
    "missing key": (('task = "text-classification"\n', ""), "line 4: [data]", ["found no task", "add [data] task"]),
    "no rate for sgd": (
        ("lr = 0.01\n", 'name = "sgd"\n'),
        "line 15: [optimizer]",
        ["found no lr", 'or set name = "adamw"'],
    ),
    "missing method": (('name = "fish"\n', ""), "line 10: [method]", ["add [method] name"]),
    "wrong method": (
        ('"fish"', '"fisch"'),
        "line 11: [method] name",
        ["'fisch'", "'fish', 'trady', 'vrpge', 'taylor', 'spiel', 'full', 'head'"],
    ),
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
    "no budget": ((FISH, 'name = "trady"'), "line 10: [method]", ["no budget", "add [method] budget"]),
    "a budget without a unit": (
        (FISH, 'name = "trady"\nbudget = 2000000'),
        "line 12: [method] budget",
        ["the number 2000000", '"2MB"', "{elements = 2000000}"],
    ),
    "a budget of no known unit": ((FISH, 'name = "trady"\nbudget = "2 apples"'), "line 12", ["2 apples", "mb"]),
    "two measures": (
        (FISH, 'name = "trady"\nbudget = {elements = 9, fraction = 0.1}'),
        "line 12: [method] budget",
        ["elements and fraction", "exactly one", "keep one"],
    ),
    "an unknown measure": (
        (FISH, 'name = "trady"\nbudget = {element = 9}'),
        "line 12: [method] budget.element",
        ["did you mean elements?"],
    ),
    "a ranking that nobody reads": (
        (FISH, 'name = "trady"\nbudget = "2MB"\nlayers = "all"\nranking = "r.json"'),
        "line 14: [method] ranking",
        ["remove ranking", 'layers = "topk"'],
    ),
    "bits without lean": (
        ("samples = 32", "samples = 32\nlean_bits = 8"),
        "line 14: [method] lean_bits",
        ["without lean", "add lean = true"],
    ),
    "lean of other bits": (
        ("samples = 32", "samples = 32\nlean = true\nlean_bits = 4"),
        "line 15: [method] lean_bits",
        ["8"],
    ),
    "a key of FISH": ((FISH, 'name = "trady"\nbudget = "2MB"\ndensity = 0.2'), "line 13: [method] density", ["budget"]),
    "no share to keep": ((FISH, 'name = "vrpge"'), "line 10: [method]", ["no keep", "add [method] keep"]),
    "a share of nothing": ((FISH, 'name = "vrpge"\nkeep = 0'), "line 12: [method] keep", ["greater than 0"]),
    "steps for parts of the run": (
        (FISH, 'name = "vrpge"\nkeep = 0.2\ngradual = [16, 60]'),
        "line 13: [method] gradual",
        ["[16.0, 60.0]", "from 0 to 1", "gradual = [0.16, 0.6]"],
    ),
    "a cost that nobody counts": (
        (FISH, 'name = "vrpge"\nkeep = 0.2\ncost = "watts"'),
        "line 13: [method] cost",
        ["'watts'", "'channels', 'flops' or 'params'"],
    ),
    "losses that are scaled": (
        (
            FISH + "\n\n[optimizer]\nlr = 0.01\nclip = 1.0\n\n[run]",
            'name = "vrpge"\nkeep = 0.2\n[run]\nprecision = "fp16"',
        ),
        "line 14: [run] precision",
        ["fp16", "differences", 'precision = "bf16"'],
    ),
    "a warm-up that lasts until the widths are fixed": (
        (
            FISH + "\n\n[optimizer]\nlr",
            'name = "vrpge"\nkeep = 0.2\nfinetune = 0.5\n[optimizer]\nwarmup_epochs = 1\nlr',
        ),
        "line 15: [optimizer] warmup_epochs",
        ["1 epochs in a run of 2"],
    ),
    "momentum without SGD": (
        ("lr = 0.01", "lr = 0.01\nmomentum = 0.9"),
        "line 17: [optimizer] momentum",
        ["momentum with adamw", 'name = "sgd"'],
    ),
    "two warm-ups": (
        ("lr = 0.01", "lr = 0.01\nwarmup_steps = 1\nwarmup_epochs = 1"),
        "line 18: [optimizer] warmup_epochs",
        ["at most one"],
    ),
    "a warm-up without an end": (
        ("lr = 0.01", "lr = 0.01\nwarmup_epochs = 2"),
        "line 17: [optimizer] warmup_epochs",
        ["2 epochs in a run of 2", "lower warmup_epochs"],
    ),
    "an average of nothing": (
        ("[run]", "[average]\nepochs = 1\n\n[run]"),
        "line 19: [average]",
        ["without [history]", "add a section [history]"],
    ),
    "a history every so often": (
        ("[run]", '[history]\nevery = "week"\n[run]'),
        "line 20: [history] every",
        ["'week'", '"epoch", or a number of steps'],
    ),
    "a history of no step": (("[run]", "[history]\nevery = 0\n[run]"), "line 20: [history] every", ["found 0"]),
    "a history of other bits": (("[run]", "[history]\nbits = 2\n[run]"), "line 20: [history] bits", ["8, 4 or 1"]),
    "coded deltas": (
        ("[run]", "[history]\nbits = 8\n[run]"),
        "line 20: [history] bits",
        ["beside the method fish", "deltas", "remove bits"],
    ),
    "a history after the end": (
        ("[run]", "[history]\nstart = 3\n[run]"),
        "line 20: [history] start",
        ["3 in a run of 2 epochs", "lower start"],
    ),
    "a misspelt key of the average": (
        ("[run]", "[history]\n[average]\nepoch = 3\n[run]"),
        "line 21: [average] epoch",
        ["did you mean epochs?"],
    ),
    "another average": (
        ("[run]", '[history]\n[average]\nmethod = "ema"\n[run]'),
        "line 21: [average] method",
        ["'ema'", "'twa' or 'mean'"],
    ),
    "a mean that is trained": (
        ("[run]", '[history]\n[average]\nmethod = "mean"\nlr = 1\n[run]'),
        "line 22: [average] lr",
        ['lr beside method = "mean"', "remove lr"],
    ),
    "momentum of an average without SGD": (
        ("[run]", '[history]\n[average]\ngranularity = "tensor"\nmomentum = 0.9\n[run]'),
        "line 22: [average] momentum",
        ["momentum with adamw", 'optimizer = "sgd"'],
    ),
    "rows held out for nothing": (
        ("[run]", "[history]\n[average]\nheld_out = 0.1\n[run]"),
        "line 21: [average] held_out",
        ['on = "train"', 'add on = "held_out"'],
    ),
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


@pytest.mark.parametrize(
    ("length", "warmup"),
    [("epochs = 20", (None, 2.0)), ("epochs = 200", (None, 5.0)), ("steps = 55", (5, None))],
)
def test_trady_is_trained_as_in_its_paper_unless_told_otherwise(
    length: str, warmup: tuple[int | None, float | None], edit: Edit
) -> None:
    paper = edit((FISH, 'name = "trady"\nbudget = "2MB"'), ("epochs = 2", length))
    optimizer = read_recipe(paper).optimizer
    assert (optimizer.name, optimizer.momentum, optimizer.weight_decay, optimizer.schedule) == ("sgd", 0, 0, "cosine")
    assert (optimizer.warmup_steps, optimizer.warmup_epochs) == warmup
    told = read_recipe(paper, ["optimizer.name=adamw", "optimizer.schedule=linear", "optimizer.warmup_steps=1"])
    assert (told.optimizer.name, told.optimizer.schedule) == ("adamw", "linear")
    assert (told.optimizer.warmup_steps, told.optimizer.warmup_epochs) == (1, None)
    assert (read_recipe(edit()).optimizer.name, read_recipe(edit()).optimizer.schedule) == ("adamw", "linear")


def test_vrpge_is_trained_as_in_its_paper_unless_told_otherwise(edit: Edit) -> None:
    method = 'name = "vrpge"\nkeep = 0.2\ngradual = [0.1, 0.5]'
    paper = read_recipe(edit((TRAINED, f"{method}\n\n[run]")))
    optimizer = paper.optimizer
    assert (optimizer.name, optimizer.lr, optimizer.momentum, optimizer.weight_decay) == ("sgd", 0.1, 0.9, 5e-4)
    assert (optimizer.schedule, optimizer.warmup_steps, optimizer.warmup_epochs) == ("cosine", None, None)
    assert isinstance(paper.method, AttachedSection)
    assert type(paper.method) is SECTIONS["vrpge"]
    assert paper.method.make(paper.folder, 40) == tithe.VRPGE(keep=0.2, structure_lr=12e-3, alpha=0.5, gradual=(4, 20))
    assert paper.method.make(paper.folder, 2).gradual == (0, 1)
    told = read_recipe(edit((FISH, method)), ["optimizer.name=adamw", "optimizer.schedule=linear"]).optimizer
    assert (told.name, told.lr, told.momentum, told.weight_decay, told.schedule) == ("adamw", 0.01, 0, 0, "linear")


@pytest.mark.parametrize(
    ("written", "measure", "limit"),
    [
        ('"2MB"', "bytes", 2_000_000),
        ("{elements = 27946}", "elements", 27_946),
        ("{fraction = 0.5}", "fraction", 0.5),
        ("{flops = 9}", "flops", 9),
    ],
)
def test_a_budget_is_text_or_names_its_measure(written: str, measure: str, limit: float, edit: Edit) -> None:
    recipe = read_recipe(edit((FISH, f'name = "trady"\nbudget = {written}\nlayers = "all"\nlean_bits = 8')))
    assert isinstance(recipe.method, AttachedSection)
    assert type(recipe.method) is SECTIONS["trady"]
    method = recipe.method.make(recipe.folder)
    assert getattr(method.budget, measure) == limit
    assert (method.layers, method.lean, method.dynamic) == ("all", True, True)


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
