"""`tithe merge`: deltas into an ordinary checkpoint, also where the base was loaded by a class with other names."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import tithe
from tithe.app.train.recipe import parse_recipe
from tithe.delta.file import TensorFile
from tithe.delta.format import CLASS, Entry, decode
from tithe.delta.merge import copy_extras
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
    A delta of `plan.save` names the class itself, which is used if it is one of transformers' own.

    Args:
        base: a safetensors file, a folder, `package:NAME/FOLDER`, or an id of the Hugging Face hub.
        deltas: files made from this base.
        output: the new file or folder.
        overwrite: let later deltas win where two write the same entry.

    Raises:
        TitheError: a file is missing or damaged, the base is another, the class has weights that neither the base nor
            a delta holds whole, or the output exists or cannot be written.
    """
    if not deltas:
        raise TitheError("merge", found="no delta", expected="at least one", remedy="name the deltas after the base")
    info = tithe.inspect(deltas[0])
    if Path(base).is_file():
        return tithe.merge(base, list(deltas), output, overwrite=overwrite)
    if TASK not in info.metadata:
        return _merge_by_class(base, deltas, output, info.metadata.get(CLASS, ""), overwrite=overwrite)
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
    return _merge_saved(network.save, deltas, output, overwrite=overwrite)


def _merge_saved(save: Callable[[Path], object], deltas: Sequence[Path], output: Path, *, overwrite: bool) -> Path:
    """Merge into a base that is first saved to a folder beside the output."""
    output = Path(os.path.abspath(output))
    with writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        with staging(output) as folder:
            save(folder)
            return tithe.merge(folder, list(deltas), output, overwrite=overwrite)


def _merge_by_class(base: str, deltas: Sequence[Path], output: Path, name: str, *, overwrite: bool) -> Path:
    """Merge into the base as the class of that name loads it, where the base was saved by another."""
    from tithe.app.train.models import quiet, resolve

    settings = {
        "model": {"pretrained": base},
        "data": {"task": "text-classification", "train": "train.tsv"},
        "method": {"name": "full"},
        "optimizer": {"lr": 1.0},
        "run": {"epochs": 1, "output": "."},
    }
    found = resolve(parse_recipe(settings), base, "pretrained")
    kind = _known_class(name)
    origin = Path(found)
    if kind is None or not (origin / "config.json").is_file():
        return tithe.merge(found, list(deltas), output, overwrite=overwrite)
    with quiet():
        config = kind.config_class.from_pretrained(found)
    if name in (config.architectures or ()):
        return tithe.merge(found, list(deltas), output, overwrite=overwrite)
    headers = [decode(TensorFile(path)) for path in deltas]
    entries = headers[0].entries
    dtype = next((entry.dtype for entry in entries.values() if entry.dtype.is_floating_point), torch.float32)
    config = _with_labels(kind, config, entries)
    with quiet(), torch.random.fork_rng(devices=()):
        model, told = kind.from_pretrained(
            found, config=config, dtype=dtype, ignore_mismatched_sizes=True, output_loading_info=True
        )
    mismatched = [key if isinstance(key, str) else key[0] for key in told["mismatched_keys"]]
    for key in sorted({*told["missing_keys"], *mismatched}):
        if not any(key in header.entries and header.entries[key].kind == "dense" for header in headers):
            raise TitheError(
                key,
                found=f"no such tensor in {base}, and not all of it in {deltas[0]}",
                expected=f"every weight of {name} in one of the two",
                remedy=f"load the base with {name}, save_pretrained it before training, and merge into that folder",
            )

    def save(folder: Path) -> None:
        with quiet():
            model.save_pretrained(folder)
        copy_extras(origin, folder)

    return _merge_saved(save, deltas, output, overwrite=overwrite)


def _known_class(name: str) -> Any:
    """The model class of that name among those that transformers itself offers; None for any other."""
    import transformers

    if not name.isidentifier() or name not in dir(transformers):
        return None
    found: Any = getattr(transformers, name)
    own = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    return found if own and found is not transformers.PreTrainedModel else None


def _with_labels(kind: Any, config: Any, entries: Mapping[str, Entry]) -> Any:
    """The configuration with as many labels as fit the shapes of the delta."""
    heads = {entry.shape[0] for entry in entries.values() if entry.kind == "dense" and entry.shape}
    for count in (config.num_labels, *sorted(heads)):
        tried = copy.deepcopy(config)
        tried.num_labels = count
        with torch.device("meta"):
            state = kind(tried).state_dict()
        if all(key not in state or tuple(state[key].shape) == entry.shape for key, entry in entries.items()):
            return tried
    return config
