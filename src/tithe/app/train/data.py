"""The examples of a run: read, split, checked before any model is loaded, and made into batches."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast, final

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from tithe.app.train.arrays import read_npz
from tithe.app.train.documents import cut_tail
from tithe.app.train.images import Progress, read_folder, read_hub_images
from tithe.app.train.recipe import Recipe
from tithe.app.train.rows import Batch, Table, Targets
from tithe.app.train.skipping import listed
from tithe.app.train.tables import read_hub_table, read_table
from tithe.app.train.tasks import task_of
from tithe.app.train.tasks.base import Encoder, Rows
from tithe.errors import TitheError

_SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Examples:
    """All splits of a run with their targets.

    Args:
        splits: the rows of train, validation and, where there is one with labels, test.
        targets: for each split, what the task made of each row's label.
        labels: the class names in the order of the model's outputs; empty where the task knows no classes.
        notes: what the user should know of them: rows that were left out, a split without labels.
    """

    splits: Mapping[str, Rows]
    targets: Mapping[str, Targets]
    labels: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def fingerprint(self) -> str:
        """A digest of every row in order: a run may only be resumed on the same data."""
        digest = hashlib.sha256(json.dumps(self.labels).encode())
        for name, rows in self.splits.items():
            digest.update(f"{name}{len(rows.label)}".encode())
            digest.update(json.dumps(rows.label).encode())
            if isinstance(rows, Table):
                # A message of a chat may hold whatever JSON or parquet does.
                digest.update(json.dumps([rows.text, rows.text_pair], default=str).encode())
            elif rows.pixels is not None:
                digest.update(np.ascontiguousarray(rows.pixels).data)
            else:
                digest.update("\0".join(f"{file.parent.name}/{file.name}" for file in rows.files).encode())
        return digest.hexdigest()[:16]


def _silent(what: str, done: int, total: int) -> None:
    """Show nothing."""


def read_examples(recipe: Recipe, progress: Progress = _silent) -> Examples:
    """Read every split that the recipe names, carve a validation split where none is given, and check the labels.

    Args:
        recipe: the run.
        progress: told how many of the pictures are read.

    Raises:
        TitheError: a file, a column or a label is not what was expected; it names the line.
    """
    splits = _read_splits(recipe, progress)
    notes = [
        f"{name}: left out {len(rows.skipped)} that cannot be used: {listed(list(rows.skipped))}"
        for name, rows in splits.items()
        if rows.skipped
    ]
    splits, unlabelled = _labelled(recipe, splits)
    notes += [f"{name}: no labels, so no score" for name in unlabelled]
    if "validation" not in splits:
        splits = _carve(recipe, splits, "validation", ("data", "validation_fraction"), recipe.data.validation_fraction)
    task = task_of(recipe)
    labels = task.classes(recipe, splits["train"])
    if recipe.method.holds_out is not None:
        splits = _carve(recipe, splits, "held_out", ("method", "held_out"), recipe.method.holds_out)
    if recipe.average is not None and recipe.average.on == "held_out":
        splits = _carve(recipe, splits, "average", ("average", "held_out"), recipe.average.held_out)
    targets = {name: task.targets(recipe, rows, labels) for name, rows in splits.items()}
    return Examples(splits, targets, labels, tuple(notes))


def _read_splits(recipe: Recipe, progress: Progress) -> dict[str, Rows]:
    data, images = recipe.data, "image_size" in recipe.data.terms.keys
    if data.npz is not None:
        path = recipe.data_path("npz")
        assert path is not None
        found = read_npz(recipe, path)
        sizes = {name: rows.pixels.shape[1:3] for name, rows in found.items() if rows.pixels is not None}
        if len(set(sizes.values())) > 1 and data.image_size is None:
            raise TitheError(
                recipe.place("data", "npz"),
                found=" and ".join(f"x_{name} of {size[0]} × {size[1]} pixels" for name, size in sizes.items()),
                expected="images of one size",
                remedy=f"add image_size = {sizes['train'][0]} to [data], which resizes them",
            )
        return dict(found)
    if data.dataset is not None:
        wanted = {"train": data.train or "train", "validation": data.validation, "test": data.test}
        if images:
            return {
                split: read_hub_images(recipe, split, name, progress)
                for split, name in wanted.items()
                if name is not None
            }
        return {split: read_hub_table(recipe, split, name) for split, name in wanted.items() if name is not None}
    # Every path is looked at before the first file is read.
    paths = {split: path for split in _SPLITS if (path := recipe.data_path(split)) is not None}
    if images:
        return {split: read_folder(recipe, split, path, progress) for split, path in paths.items()}
    return {split: read_table(recipe, split, path) for split, path in paths.items()}


def _labelled(recipe: Recipe, splits: dict[str, Rows]) -> tuple[dict[str, Rows], list[str]]:
    """Part the splits without labels from the others; only the test split may be one."""
    seen = set(splits["train"].label) | set(recipe.data.labels or ()) | set(splits["train"].names)
    unlabelled: list[str] = []
    for name, rows in splits.items():
        # GLUE and others write -1 in every row of a split whose labels they keep.
        if rows.labelled and (name == "train" or "-1" in seen or set(rows.label) != {"-1"}):
            continue
        if name != "test":
            raise TitheError(
                rows.place(0),
                found=f"no label in any row of the {name} split",
                expected="a label in each",
                remedy="write the labels"
                + ("; or remove validation, and a part of train is held out for it" if name == "validation" else ""),
            )
        unlabelled.append(name)
    return {name: rows for name, rows in splits.items() if name not in unlabelled}, unlabelled


def _carve(
    recipe: Recipe, splits: dict[str, Rows], name: str, key: tuple[str, str], fraction: float
) -> dict[str, Rows]:
    """Take a part of the training rows away, as a split of its own; `key` of the recipe says how large it is.

    No class loses its last row to it.
    """
    train = splits["train"]
    if isinstance(train, Table) and train.running:
        return _carve_texts(train, splits, name, fraction)
    task, num, wanted = task_of(recipe), len(train.label), round(fraction * len(train.label))
    order = torch.randperm(num, generator=torch.Generator().manual_seed(recipe.data.split_seed)).tolist()
    classes = [tuple(task.classes_in(label)) for label in train.label]
    left, held = Counter(name for own in classes for name in set(own)), list[int]()
    for row in order:
        if len(held) == wanted:
            break
        if all(left[name] > 1 for name in classes[row]):
            held.append(row)
            left.subtract(set(classes[row]))
    if not held or len(held) == num:
        single = bool(left) and wanted > 0 and not held
        raise TitheError(
            recipe.place(*key),
            found=f"{len(held)} of {num} training examples for {name}"
            + (": every class has a single one" if single else ""),
            expected="at least one in both",
            remedy=("add examples" if single else f"change {key[1]}")
            + (", or give a validation split" if name == "validation" else ""),
        )
    taken = set(held)
    rest = [row for row in range(num) if row not in taken]
    carved = {"train": train.take(rest), name: train.take(sorted(held))}
    return {**carved, **{name: split for name, split in splits.items() if name != "train"}}


def _carve_texts(train: Table, splits: dict[str, Rows], name: str, fraction: float) -> dict[str, Rows]:
    """Hold out the end of every text, cut where a line ends: what is held out then follows from what is trained on."""
    pairs = [cut_tail(text, fraction) for text in train.text]
    for row, (head, tail) in enumerate(pairs):
        if not head.strip() or not tail.strip():
            raise TitheError(
                train.place(row),
                found=f"a text of {len(train.text[row])} characters, too short to hold out a part of it for {name}",
                expected="longer texts" + (", or a validation file" if name == "validation" else ""),
                remedy=f"give {name} a file of its own" if name == "validation" else "add text",
            )
    one, two = (replace(train, text=tuple(pair[side] for pair in pairs)) for side in (0, 1))
    return {"train": one, name: two, **{other: rows for other, rows in splits.items() if other != "train"}}


class Samples(Dataset[Any]):
    """One split, encoded: what a loader draws from.

    Args:
        rows: the split.
        targets: what each row is to give, as the task made it.
        encoder: how rows become items, and items batches.

    Raises:
        TitheError: a row cannot be encoded; it names the line.
    """

    def __init__(self, rows: Rows, targets: Targets, encoder: Encoder) -> None:
        self._encoder = encoder
        self._items, self.notes = encoder.encode(rows, targets)
        self._weights = encoder.weights(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, row: int) -> Any:
        return self._items[row]

    @property
    def largest(self) -> int:
        """A row of the largest input: a batch with it is as large as batches of its length can be."""
        return self._encoder.largest(self._items)

    def weight(self, rows: Sequence[int]) -> int:
        """Count what the mean loss of a batch with these rows is a mean of."""
        return len(rows) if self._weights is None else sum(self._weights[row] for row in rows)

    def batches(self, rows: Sequence[Sequence[int]], workers: int = 0) -> Iterator[Batch]:
        """Iterate over the batches with these rows, leaving the global random state alone."""
        loader = DataLoader(
            self,
            batch_sampler=cast(Any, rows),
            collate_fn=self._encoder.join,
            num_workers=workers,
            generator=torch.Generator().manual_seed(0),
        )
        return iter(loader)


def epoch_order(num: int, *, seed: int, epoch: int) -> list[int]:
    """The order of the training rows in one epoch: a pure function of seed and epoch.

    Example:
        >>> epoch_order(4, seed=0, epoch=1) == epoch_order(4, seed=0, epoch=1)
        True
    """
    digest = hashlib.sha256(f"{seed}/{epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.randperm(num, generator=generator).tolist()


def chunks(rows: Sequence[int], size: int) -> list[Sequence[int]]:
    """Cut rows into pieces of `size`; the last may be shorter.

    Example:
        >>> chunks([1, 2, 3], 2)
        [[1, 2], [3]]
    """
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def even_chunks(rows: Sequence[int], size: int) -> list[Sequence[int]]:
    """Cut rows into pieces of about one length, `size` at most: norms that train need more than one sample in each.

    Example:
        >>> even_chunks([1, 2, 3, 4], 3)
        [[1, 3], [2, 4]]
    """
    num = -(-len(rows) // size)
    return [rows[start::num] for start in range(num)]


@final
@dataclass(frozen=True)
class Batches:
    """Batches of one split on a device, the same ones each time.

    Args:
        samples: the split.
        rows: of each batch.
        device: where the batches go.
        workers: processes that read them.
    """

    samples: Samples
    rows: Sequence[Sequence[int]]
    device: torch.device
    workers: int = 0

    def __iter__(self) -> Iterator[Batch]:
        return (to_device(batch, self.device) for batch in self.samples.batches(self.rows, self.workers))


def choosing_rows(
    samples: Samples, batch_size: int, *, seed: int, share: tuple[int, int], priced: bool
) -> list[Sequence[int]]:
    """Put the training rows in the order of one seeded shuffle, to choose by: on each process its share, in batches.

    Args:
        samples: the training split.
        batch_size: of one process.
        seed: of the shuffle.
        share: this process's number, and how many there are.
        priced: whether a budget is priced for the first batch: it is then the same on every process, and the largest
            that a step can have.
    """
    rows, (rank, world) = epoch_order(len(samples), seed=seed, epoch=-1), share
    if not priced:
        return chunks(rows[rank::world], batch_size)
    rows = [samples.largest, *(row for row in rows if row != samples.largest)]
    return [rows[:batch_size], *chunks(rows[batch_size:][rank::world], batch_size)]


def to_device(batch: Batch, device: torch.device) -> Batch:
    """A batch with its tensors on a device."""
    inputs = batch["inputs"]
    moved = (
        {name: value.to(device) for name, value in inputs.items()} if isinstance(inputs, dict) else inputs.to(device)
    )
    return {"inputs": moved, "labels": batch["labels"].to(device)}
