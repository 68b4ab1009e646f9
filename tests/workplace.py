"""A small workplace: a tiny encoder with its tokenizer, a sentence task, images that a small network can tell apart."""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from tithe.app.train import read_recipe, train

GOOD, BAD = ("good", "fine", "bright", "warm"), ("bad", "poor", "dull", "cold")
FILLERS = ("the", "a", "film", "story", "and", "was", "very", '"', "it", "'s")

RECIPE = """
[model]
pretrained = "tiny"

[data]
task = "text-classification"
train = "train.tsv"
test = "test.tsv"
text = "sentence"

[method]
name = "fish"
density = 0.2
samples = 32

[optimizer]
lr = 0.01
clip = 1.0

[run]
epochs = 2
batch_size = 8
log_every = 1
output = "out"
device = "cpu"
""".lstrip()


def sentences(num: int, seed: int) -> list[tuple[str, int]]:
    draw = random.Random(seed)
    rows: list[tuple[str, int]] = []
    for _ in range(num):
        label = draw.randrange(2)
        words = draw.choices(FILLERS, k=draw.randrange(2, 7)) + draw.choices(GOOD if label else BAD, k=2)
        draw.shuffle(words)
        rows.append((" ".join(words), label))
    return rows


def write_tsv(path: Path, rows: list[tuple[str, int]]) -> None:
    path.write_text("sentence\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in rows), encoding="utf-8")


def make_tiny(folder: Path) -> None:
    """A BERT of 2 layers with dropout, saved bare, as sentence encoders are: its classification head is new."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *FILLERS, *GOOD, *BAD]
    vocabulary = {word: number for number, word in enumerate(words)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=inner, **special).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    BertModel(config).save_pretrained(folder)


def fill(folder: Path, tiny: Path) -> None:
    """Put the tiny model, train.tsv (80 rows), test.tsv (24 rows) and recipe.toml into a folder."""
    (folder / "tiny").symlink_to(tiny)
    write_tsv(folder / "train.tsv", sentences(80, seed=1))
    write_tsv(folder / "test.tsv", sentences(24, seed=2))
    (folder / "recipe.toml").write_text(RECIPE, encoding="utf-8")


def write_images(path: Path) -> None:
    """60 + 30 images of 3 classes: a bright square in one of three corners, 8 × 8 × 3, uint8."""
    draw = np.random.default_rng(0)
    arrays: dict[str, np.ndarray[Any, Any]] = {"classes": np.array(["below", "left", "right"])}
    for split, num in (("train", 60), ("test", 30)):
        y = draw.integers(0, 3, num)
        x = draw.integers(0, 80, (num, 8, 8, 3), dtype=np.uint8)
        for image, label in zip(x, y, strict=True):
            row, column = [(0, 0), (0, 4), (4, 0)][label]
            image[row : row + 4, column : column + 4] += 120
        arrays |= {f"x_{split}": x, f"y_{split}": (y + 1) % 3}
    np.savez(path, **arrays)


def assert_equal(one: Any, two: Any) -> None:
    """Assert that two trees of tensors and values are equal, bit for bit."""
    if isinstance(one, Tensor):
        assert torch.equal(one, two)
    elif isinstance(one, Mapping):
        assert list(one) == list(two)
        for key in one:
            assert_equal(one[key], two[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(two)
        for a, b in zip(one, two, strict=True):
            assert_equal(a, b)
    else:
        assert one == two


def editor(recipe: str, images: Path, folder: Path) -> Callable[..., Path]:
    """A function that writes a recipe about a file of images, some of its text replaced, and returns its path."""

    def write(*changes: tuple[str, str]) -> Path:
        text = recipe.replace("{images}", str(images))
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        path = folder / "recipe.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def quiet() -> Console:
    """A console that keeps what is shown."""
    return Console(file=io.StringIO(), width=80)


def shown(console: Console) -> str:
    """What a quiet console was shown."""
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def run(path: Path, *settings: str, resume: bool = False, console: Console | None = None) -> dict[str, Any]:
    """Train as a recipe says."""
    return train(read_recipe(path, settings), resume=resume, console=console or quiet())
