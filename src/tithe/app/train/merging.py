"""`tithe merge`: deltas into an ordinary checkpoint, also where the base was loaded by a class with other names."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import tithe
from tithe.app.train.recipe import parse_recipe
from tithe.errors import TitheError
from tithe.files import staging, writing

TASK, NUM_LABELS, LABELS = "task", "num_labels", "labels"


def describe(task: str, num_labels: int, labels: Sequence[str]) -> dict[str, str]:
    """What a delta's header says about the network that it belongs to: how to build it from its base."""
    return {TASK: task, NUM_LABELS: str(num_labels), LABELS: json.dumps(list(labels), ensure_ascii=False)}


def merge_deltas(base: str, deltas: Sequence[Path], output: Path, *, overwrite: bool = False) -> Path:
    """Write the base with deltas applied, in the form of the base.

    A delta of `tithe train` belongs to the class for its task (`BertForSequenceClassification`), a base often to the
    bare model (`BertModel`): such a base is first saved by the class for the task, with a head that the delta replaces.

    Args:
        base: a safetensors file, a folder, `package:NAME/FOLDER`, or an id of the Hugging Face hub.
        deltas: files made from this base.
        output: the new file or folder.
        overwrite: let later deltas win where two write the same entry.

    Raises:
        TitheError: a file is missing or damaged, the base is another, or the output exists or cannot be written.
    """
    if not deltas:
        raise TitheError("merge", found="no delta", expected="at least one", remedy="name the deltas after the base")
    info = tithe.inspect(deltas[0])
    if Path(base).is_file() or TASK not in info.metadata:
        return tithe.merge(base, list(deltas), output, overwrite=overwrite)
    from tithe.app.train.models import load

    settings = {
        "model": {"pretrained": base, "num_labels": int(info.metadata[NUM_LABELS])},
        "data": {"task": info.metadata[TASK], "train": "train.tsv"},
        "method": {"name": "full"},
        "optimizer": {"lr": 1.0},
        "run": {"epochs": 1, "output": "."},
    }
    network = load(parse_recipe(settings), int(info.metadata[NUM_LABELS]))
    network.set_labels(json.loads(info.metadata[LABELS]))
    output = Path(os.path.abspath(output))
    with writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        with staging(output) as folder:
            network.save(folder)
            return tithe.merge(folder, list(deltas), output, overwrite=overwrite)
