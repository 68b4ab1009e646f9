"""What is said of a delta is readable at 80 columns, and tells layers apart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tithe
from tithe.delta.ranges import fold, shorten

transformers: Any = pytest.importorskip("transformers")

SMALL = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
LAYERS = 12


TEXT = {**SMALL, "num_hidden_layers": LAYERS, "vocab_size": 40}
IMAGE = {**SMALL, "num_hidden_layers": LAYERS, "image_size": 16, "patch_size": 8}
STAGES = {"embedding_size": 4, "hidden_sizes": [4, 8, 16, 32], "depths": [3, 4, 6, 3]}
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "bert": lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**TEXT)),
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT)),
    "vit": lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**IMAGE)),
    "resnet": lambda: transformers.ResNetForImageClassification(transformers.ResNetConfig(**STAGES)),
}


@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("name", NETWORKS)
def test_layers_are_told_apart_at_80_columns(name: str, scope: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = NETWORKS[name]()
    plan = tithe.attach(model, tithe.FISH(density=0.05, score="magnitude", scope=scope))
    plan.save(tmp_path / "delta.safetensors")
    info = tithe.inspect(tmp_path / "delta.safetensors")
    lines = str(info).splitlines()
    assert max(map(len, lines)) < 80
    head = next(place for place, line in enumerate(lines) if line.startswith("tensor "))
    rows = [line.split()[0] for line in lines[head + 1 : -1] if not line.startswith(" ")]
    assert len(rows) == len(set(rows))
    layers = fold([(t.name, (t.shape, t.dtype, t.kind, t.selected)) for t in info.tensors])
    assert len(rows) == len(layers)
    assert sorted(name for names in layers.values() for name in names) == sorted(t.name for t in info.tensors)
    if scope == "tensor":
        assert any("{" in row for row in rows)
        assert len(rows) < len(info.tensors) / 2
    assert sum(int(line.split()[-2].replace(",", "")) for line in lines[head + 1 : -1] if "%" in line) == (
        info.num_values
    )


def test_only_neighbours_that_are_alike_are_folded() -> None:
    names = [(f"h.{n}.w", 4 if n != 3 else 5) for n in range(8)]
    assert list(fold(names)) == ["h.{0-2}.w", "h.3.w", "h.{4-7}.w"]
    assert list(fold([("h.0.w", 1), ("h.1.w", 1), ("h.2.w", 2), ("h.3.w", 3)])) == [f"h.{n}.w" for n in range(4)]
    assert list(fold([("h.0.w", 1), ("h.1.w", 1)])) == ["h.{0-1}.w"]
    assert fold([("s.0.l.0.w", 1), ("s.1.l.0.w", 2), ("s.1.l.1.w", 2)]) == {
        "s.0.l.0.w": ["s.0.l.0.w"],
        "s.1.l.{0-1}.w": ["s.1.l.0.w", "s.1.l.1.w"],
    }


def test_names_that_would_become_one_stay_whole() -> None:
    long = ["net.left.wing.layer.0.weight", "net.right.wing.layer.0.weight"]
    assert shorten(long, 26) == long
    assert shorten([long[0]], 26) == ["net.….wing.layer.0.weight"]
