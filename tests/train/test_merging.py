"""`merge` gives an ordinary checkpoint, whichever class the base was saved by."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import tithe
from tithe import TitheError
from tithe.app.train import read_recipe, train
from tithe.app.train.data import read_examples
from tithe.app.train.merging import _known_class, merge_deltas
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


def trained(tiny: Path, path: Path, *, labels: int = 3, head: tuple[str, ...] = ("classifier.*",)) -> Any:
    """A delta of `plan.save` on a model that was loaded in Python, and the trained model."""
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=labels)
    plan = tithe.attach(model, tithe.FISH(density=0.05, score="magnitude"), where="bert.encoder.*", head=head)
    with torch.no_grad():
        for parameter in plan.parameters():
            parameter.add_(0.25)
    model(torch.ones(1, 4, dtype=torch.int64)).logits.sum().backward()  # θ goes into the weights
    plan.save(path)
    plan.release()
    return model


def test_a_delta_made_in_python_merges_onto_a_bare_base(tiny: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = trained(tiny, tmp_path / "delta.safetensors")
    assert tithe.inspect(tmp_path / "delta.safetensors").metadata["class"] == "BertForSequenceClassification"
    merge_deltas(str(tiny), [tmp_path / "delta.safetensors"], tmp_path / "tuned")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "tuned")
    expected = model.state_dict()
    assert merged.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in merged.state_dict().items())
    assert merged.config.num_labels == 3
    assert AutoTokenizer.from_pretrained(tmp_path / "tuned")("fine film")["input_ids"]


def test_a_head_that_the_delta_lacks_is_refused_by_name(tiny: Path, tmp_path: Path) -> None:
    trained(tiny, tmp_path / "delta.safetensors", head=())
    with pytest.raises(TitheError, match=r"classifier\.bias: found no such tensor in .* and not all of it in"):
        merge_deltas(str(tiny), [tmp_path / "delta.safetensors"], tmp_path / "tuned")
    assert not (tmp_path / "tuned").exists()


@pytest.mark.parametrize(
    "name", ["os", "AutoModel", "PreTrainedModel", "models.bert.BertModel", "system", "", "Trainer"]
)
def test_only_a_model_class_of_transformers_is_looked_up(name: str) -> None:
    assert _known_class(name) is None


def test_a_class_that_nobody_knows_is_merged_by_names_alone(tiny: Path, tmp_path: Path) -> None:
    """The prefix differs then, which the error says."""
    from transformers import AutoModelForSequenceClassification

    class Mine(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = AutoModelForSequenceClassification.from_pretrained(tiny)

    tuned = Mine()
    plan = tithe.attach(tuned, tithe.FISH(k=5, score="magnitude"), where="inner.bert.*")
    plan.save(tmp_path / "delta.safetensors")
    with pytest.raises(TitheError, match=r"prefix 'inner\.bert\.'"):
        merge_deltas(str(tiny), [tmp_path / "delta.safetensors"], tmp_path / "tuned")
