"""`merge` gives an ordinary checkpoint, whichever class the base was saved by."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console

import tithe
from tithe import TitheError
from tithe.app.train import read_recipe, train
from tithe.app.train.data import read_examples
from tithe.app.train.merging import merge_deltas
from tithe.app.train.models import build


def test_a_bare_base_and_a_delta_become_a_folder_that_transformers_reads(
    edit: Callable[..., Path], workplace: Path, tiny: Path
) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    path = edit(("epochs = 2", "steps = 3"))
    train(read_recipe(path), console=Console(file=io.StringIO()))
    delta = workplace / "out" / "delta.safetensors"
    assert merge_deltas(str(tiny), [delta], workplace / "tuned") == workplace / "tuned"
    assert not list(workplace.glob(".merge*"))

    merged = AutoModelForSequenceClassification.from_pretrained(workplace / "tuned")
    recipe = read_recipe(path)
    torch.manual_seed(9)
    applied = tithe.apply(build(recipe, read_examples(recipe)).model, delta)
    expected = applied.state_dict()
    assert list(merged.state_dict()) == list(expected)
    assert all(torch.equal(value, expected[name]) for name, value in merged.state_dict().items())
    assert merged.config.id2label == {0: "0", 1: "1"}
    assert AutoTokenizer.from_pretrained(workplace / "tuned")("fine film")["input_ids"]

    with pytest.raises(TitheError, match="existing"):
        merge_deltas(str(tiny), [delta], workplace / "tuned")
    with pytest.raises(TitheError, match="written by both"):
        merge_deltas(str(tiny), [delta, delta], workplace / "again")
    assert merge_deltas(str(tiny), [delta, delta], workplace / "again", overwrite=True).is_dir()


def test_files_are_merged_as_files(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    base = {"a.weight": torch.zeros(4, 4), "a.bias": torch.zeros(4)}
    tuned = {"a.weight": torch.eye(4), "a.bias": torch.zeros(4)}
    save_file(base, tmp_path / "base.safetensors")
    tithe.diff(base, tuned, tmp_path / "delta.safetensors")
    out = merge_deltas(str(tmp_path / "base.safetensors"), [tmp_path / "delta.safetensors"], tmp_path / "o.safetensors")
    assert torch.equal(load_file(out)["a.weight"], tuned["a.weight"])
