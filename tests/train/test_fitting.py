"""Model and data that do not fit are told so before the first step, with both numbers and the key that settles it."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from tithe import TitheError
from tithe.app.train import read_recipe, train
from tithe.app.train.loop import Run
from workplace import make_tiny, run, write_tsv

Edit = Callable[..., Path]

NETS = """
from torch import nn

def net(num_labels, channels=3, outputs=None):
    return nn.Sequential(nn.Conv2d(channels, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(4, outputs or num_labels))

def grey(num_labels):
    return net(num_labels, channels=1)

def five(num_labels):
    return net(num_labels, outputs=5)

def two(num_labels):
    return net(num_labels, outputs=2)

def flat(num_labels):
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, num_labels))

def unpooled(num_labels):
    return nn.Sequential(nn.Conv2d(3, num_labels, 3))

class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(1, 1)

    def forward(self, images):
        raise KeyError("where")

def odd(num_labels):
    return Odd()
"""

RECIPE = """
[model]
callable = "nets:{net}"
head = ["*"]
[data]
task = "image-classification"
npz = "a.npz"
[method]
name = "full"
[optimizer]
lr = 0.01
[run]
steps = 1
device = "cpu"
output = "out"
"""


@pytest.fixture
def images_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Write a recipe about 24 images of 3 classes, 8 × 8 × 3, for one of the networks above."""
    name = f"nets_{abs(hash(tmp_path))}"
    (tmp_path / f"{name}.py").write_text(NETS)
    monkeypatch.syspath_prepend(str(tmp_path))
    draw = np.random.default_rng(0)
    np.savez(tmp_path / "a.npz", x_train=draw.integers(0, 255, (24, 8, 8, 3), np.uint8), y_train=np.arange(24) % 3)

    def write(net: str) -> Path:
        path = tmp_path / "recipe.toml"
        path.write_text(RECIPE.format(net=net).replace("nets:", f"{name}:"))
        return path

    return write


def _refused(path: Path, *settings: str) -> TitheError:
    before = list(path.parent.rglob("step-*"))
    with pytest.raises(TitheError) as error:
        run(path, *settings)
    assert list(path.parent.rglob("step-*")) == before
    return error.value


def test_channels(images_recipe: Callable[[str], Path]) -> None:
    path = images_recipe("grey")
    error = _refused(path)
    assert "[data] channels" in error.place
    assert "3 channels, and a model that takes 1" in error.found
    assert error.remedy == "set channels = 1 in [data]"
    assert run(path, "data.channels=1")["steps"] == 1


def test_outputs(images_recipe: Callable[[str], Path]) -> None:
    path = images_recipe("five")
    error = _refused(path)
    assert error.found == "a model with 5 outputs"
    assert error.expected == "3: 3 classes in the data"
    assert "num_labels = 5 in [model]" in error.remedy
    assert run(path, "model.num_labels=5")["steps"] == 1
    error = _refused(images_recipe("two"), "run.output=other")
    assert (error.found, error.expected) == ("a model with 2 outputs", "3: 3 classes in the data")
    assert "(2, 3, 6, 6)" in _refused(images_recipe("unpooled"), "run.output=other").found


def test_sizes(images_recipe: Callable[[str], Path], tmp_path: Path) -> None:
    path = images_recipe("flat")
    run(path, "run.output=first")
    np.savez(tmp_path / "a.npz", x_train=np.zeros((24, 9, 9, 3), np.uint8), y_train=np.arange(24) % 3)
    error = _refused(path)
    assert "(2, 3, 9, 9)" in error.found
    assert "image_size" in error.remedy
    assert run(path, "data.image_size=8")["steps"] == 1


def test_whatever_a_model_raises_is_one_message(images_recipe: Callable[[str], Path]) -> None:
    assert "KeyError: 'where'" in _refused(images_recipe("odd")).found


def test_a_model_is_as_before_it_was_tried(edit: Edit) -> None:
    torch.manual_seed(0)
    made = Run(read_recipe(edit()), resume=False, console=Console(file=io.StringIO()))
    assert made.model.training


def test_texts_are_cut_to_the_positions_that_a_model_has(edit: Edit, workplace: Path) -> None:
    long = "the film was very good " * 40
    write_tsv(workplace / "train.tsv", [(long if i == 7 else "a film", i % 2) for i in range(40)])
    path = edit(("epochs = 2", "steps = 1"))
    assert run(path)["steps"] == 1
    error = _refused(path, "data.max_length=64", "run.output=other")
    assert error.place == "--set data.max_length: [data] max_length"
    assert "64 tokens, and a model with 32 learned positions" in error.found
    told = re.search(r"max_length = (\d+)", error.remedy)
    assert told is not None
    assert run(path, f"data.max_length={told[1]}", "run.output=third")["steps"] == 1


def test_the_positions_of_roberta_begin_after_its_padding(tmp_path: Path, edit: Edit, workplace: Path) -> None:
    from transformers import RobertaConfig, RobertaModel

    shape: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = RobertaConfig(vocab_size=40, max_position_embeddings=18, pad_token_id=0, type_vocab_size=2, **shape)
    folder = tmp_path / "other"
    RobertaModel(config).save_pretrained(folder)
    path = edit(('"tiny"', '"other"\ntokenizer = "tiny"\nhead = ["classifier.*"]'), ("epochs = 2", "steps = 1"))
    write_tsv(workplace / "train.tsv", [("the film was very good " * 9, i % 2) for i in range(40)])
    assert "17 learned positions" in _refused(path, "data.max_length=18").found
    assert run(path, "data.max_length=17", "run.output=second")["steps"] == 1


def test_a_tokenizer_of_another_model(edit: Edit, workplace: Path) -> None:
    from transformers import BertConfig, BertModel

    shape: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=6, **shape)).save_pretrained(workplace / "small")
    path = edit(('"tiny"', '"small"\ntokenizer = "tiny"'), ("epochs = 2", "steps = 1"))
    error = _refused(path)
    assert "[model] tokenizer" in error.place
    assert "a model with 6 tokens" in error.found
    make_tiny(workplace / "small")
    assert run(path, 'model.tokenizer="small"')["steps"] == 1


# ---------------------------------------------------------------------------------------------- the end of a run


@pytest.mark.parametrize("split", ["test", "validation"])
def test_a_finished_training_is_not_lost_to_its_evaluation(split: str, edit: Edit, workplace: Path) -> None:
    path = edit(("epochs = 2", "steps = 2"))
    made = Run(read_recipe(path), resume=False, console=Console(file=io.StringIO()))
    made.fit()
    inner = made.evaluate

    def fails(name: str) -> dict[str, float]:
        if name == split:
            raise OSError("the disk has gone")
        return inner(name)

    made.evaluate = fails  # pyright: ignore[reportAttributeAccessIssue]
    from tithe.app.train.report import finish, show

    result = finish(made)
    assert result["failed"] == {split: "OSError: the disk has gone"}
    assert split not in result["metrics"]
    assert (workplace / "out" / "delta.safetensors").is_file()
    assert (workplace / "out" / "result.json").is_file()
    console = Console(file=io.StringIO(), width=80)
    show(result, console)
    assert "not scored: OSError: the disk has gone" in console.file.getvalue()  # pyright: ignore


def test_what_was_left_out_is_in_the_result_and_on_the_screen(edit: Edit, workplace: Path) -> None:
    with (workplace / "train.tsv").open("a") as file:
        file.write("\t1\nfine\t\n")
    (workplace / "test.tsv").write_text("sentence\nfine\n")
    path = edit(("epochs = 2", "steps = 1"), ('"sentence"', '"sentence"\nskip_bad = true'))
    console = Console(file=io.StringIO(), width=200)
    result = train(read_recipe(path), console=console)
    assert result["notes"] == [
        "train: left out 2 that cannot be used: train.tsv line 82 column 'sentence': an empty text; "
        "train.tsv line 83 column 'label': an empty label",
        "test: no labels, so no score",
    ]
    assert set(result["metrics"]) == {"validation"}
    for note in result["notes"]:
        assert note in console.file.getvalue()  # pyright: ignore


def test_an_output_that_cannot_be_written_is_refused_at_once(edit: Edit, workplace: Path) -> None:
    (workplace / "file").write_text("")
    (workplace / "lost").symlink_to("nowhere")
    for output in ("file", "file/deeper", "lost", "/proc/nowhere"):
        with pytest.raises(TitheError, match=r"run\.output: \[run\] output"):
            run(edit(), f"run.output={output}")
    assert run(edit(("epochs = 2", "steps = 1")), "run.output=deeper/still")["steps"] == 1
