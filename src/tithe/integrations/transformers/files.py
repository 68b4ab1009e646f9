"""What a Trainer's folders hold of a plan: its state, its delta, and the card that says what was measured."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from tithe.errors import TitheError

DELTA = "delta.safetensors"
OPTIMIZER = "optimizer.pt"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
_BEGIN, _END = "<!-- tithe -->", "<!-- /tithe -->"


def plan_state(checkpoint: str | Path) -> Mapping[str, Any]:
    """Read the plan's state out of the optimizer's in a checkpoint.

    Raises:
        TitheError: when there is none.
    """
    path = Path(checkpoint) / OPTIMIZER
    found = None
    if path.is_file():
        found = torch.load(path, map_location="cpu", weights_only=True)["state"].get("tithe")
    if found is None:
        what = "an optimizer's state without a plan's" if path.is_file() else f"no {OPTIMIZER}"
        raise TitheError(
            str(checkpoint),
            found=what,
            expected="a checkpoint of with_tithe, with the optimizer's state (save_only_model=False)",
            remedy="load its weights into the model and train without resume_from_checkpoint: a new choice is made",
        )
    return found


def holds_weights(checkpoint: str | Path) -> bool:
    """Return whether a checkpoint has weights of its own beside a delta."""
    return any((Path(checkpoint) / name).is_file() for name in (*WEIGHTS, *INDICES, *ADAPTERS))


def is_renamed(checkpoint: str | Path, model: nn.Module) -> bool:
    """Return whether weights were saved under other names than the model's, as `save_pretrained` does for some models.

    `from_pretrained` knows these names; a Trainer that loads a checkpoint does not, and goes on without its weights.
    """
    names: set[str] = set()
    for name in WEIGHTS[:1]:
        if (Path(checkpoint) / name).is_file():
            with safe_open(Path(checkpoint) / name, "pt") as file:
                names |= set(file.keys())
    for name in INDICES:
        if (Path(checkpoint) / name).is_file():
            names |= set(json.loads((Path(checkpoint) / name).read_text("utf-8"))["weight_map"])
    return not names <= set(model.state_dict())


def remove_weights(folder: str | Path) -> None:
    """Remove the files of weights from a folder."""
    for name in WEIGHTS:
        (Path(folder) / name).unlink(missing_ok=True)


def write_card(folder: str | Path, rows: Mapping[str, str], *, alone: bool) -> None:
    """Write what was trained and measured into the folder's README.md, in a section of its own.

    Args:
        folder: where the file is or will be.
        rows: what was measured, in words.
        alone: whether the folder has a delta and no weights.
    """
    path = Path(folder) / "README.md"
    text = path.read_text("utf-8") if path.is_file() else "---\nlibrary_name: transformers\ntags:\n- tithe\n---\n"
    if alone:
        use = f'The weights are those of the base model with `tithe.apply(model, "{DELTA}")`.'
    else:
        use = f'`from_pretrained` reads the weights; `tithe.apply(base, "{DELTA}")` makes them from the base model.'
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    section = f"{_BEGIN}\n## Trained in part\n\n| | |\n|---|---|\n{table}\n\n{use}\n{_END}\n"
    between = re.compile(f"{re.escape(_BEGIN)}.*?{re.escape(_END)}\n?", re.DOTALL)
    there = between.search(text) is not None
    text = between.sub(lambda _: section, text) if there else f"{text.rstrip()}\n\n{section}"
    path.write_text(text, "utf-8")
