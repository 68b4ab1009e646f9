"""The examples of a run: read, split, their labels counted and checked, before any model is loaded."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tithe.app.train.arrays import read_npz
from tithe.app.train.cells import likeness
from tithe.app.train.images import Images, Progress, read_folder, read_hub_images
from tithe.app.train.recipe import Recipe
from tithe.app.train.skipping import listed
from tithe.app.train.tables import Table, read_hub_table, read_table
from tithe.errors import TitheError

_SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Examples:
    """All splits of a run with their targets.

    Args:
        splits: the rows of train, validation and, where there is one with labels, test.
        targets: a tensor (N,) for each split: int64 classes, or float32 values of a regression.
        labels: the class names in the order of the model's outputs; empty for a regression.
        notes: what the user should know of them: rows that were left out, a split without labels.
    """

    splits: Mapping[str, Table | Images]
    targets: Mapping[str, Tensor]
    labels: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def fingerprint(self) -> str:
        """A digest of every row in order: a run may only be resumed on the same data."""
        digest = hashlib.sha256()
        for name, rows in self.splits.items():
            digest.update(f"{name}{len(rows.label)}".encode())
            digest.update(self.targets[name].numpy().tobytes())
            if isinstance(rows, Table):
                digest.update("\0".join(rows.text + (rows.text_pair or ())).encode())
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
    labels: tuple[str, ...] = ()
    if recipe.data.task != "text-regression":
        labels = _classes(recipe, splits["train"])
    if recipe.method.holds_out is not None:
        splits = _carve(recipe, splits, "held_out", ("method", "held_out"), recipe.method.holds_out)
    if recipe.average is not None and recipe.average.on == "held_out":
        splits = _carve(recipe, splits, "average", ("average", "held_out"), recipe.average.held_out)
    if not labels:
        targets = {
            name: torch.tensor([float(label) for label in rows.label], dtype=torch.float32)
            for name, rows in splits.items()
        }
    else:
        targets = {name: _numbers(recipe, rows, labels) for name, rows in splits.items()}
    return Examples(splits, targets, labels, tuple(notes))


def _read_splits(recipe: Recipe, progress: Progress) -> dict[str, Table | Images]:
    data, images = recipe.data, recipe.data.task == "image-classification"
    if data.npz is not None:
        path = recipe.data_path("npz")
        if not images or path is None:
            raise TitheError(
                recipe.place("data", "npz"),
                found=f"task {data.task!r}",
                expected="image-classification",
                remedy="set the task",
            )
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


def _labelled(recipe: Recipe, splits: dict[str, Table | Images]) -> tuple[dict[str, Table | Images], list[str]]:
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
    recipe: Recipe, splits: dict[str, Table | Images], name: str, key: tuple[str, str], fraction: float
) -> dict[str, Table | Images]:
    """Take a part of the training rows away, as a split of its own; `key` of the recipe says how large it is.

    No class loses its last row to it.
    """
    train = splits["train"]
    num, wanted = len(train.label), round(fraction * len(train.label))
    order = torch.randperm(num, generator=torch.Generator().manual_seed(recipe.data.split_seed)).tolist()
    left, held = Counter(train.label), list[int]()
    is_class = recipe.data.task != "text-regression"
    for row in order:
        if len(held) == wanted:
            break
        if not is_class or left[train.label[row]] > 1:
            held.append(row)
            left[train.label[row]] -= 1
    if not held or len(held) == num:
        single = is_class and wanted > 0 and not held
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


def _classes(recipe: Recipe, train: Table | Images) -> tuple[str, ...]:
    """The classes in the order of the model's outputs: the recipe's, else the data set's own, else that of the names.

    Raises:
        TitheError: there is one class only, two that are written alike, or more than the model has outputs.
    """
    labels = recipe.data.labels or train.names
    if not labels:
        labels = _order(train.label)
        _check_spelling(train, labels)
    seen = set(train.label)
    if len(seen) < 2 and len(labels) < 2:
        raise TitheError(
            train.place(0),
            found=f"only the label {train.label[0]!r}",
            expected="at least two classes",
            remedy="check [data] label, or add rows of other classes",
        )
    num_labels = recipe.model.num_labels
    if num_labels is not None and len(labels) > num_labels:
        row = next((row for row, label in enumerate(train.label) if label == labels[num_labels]), 0)
        raise TitheError(
            train.place(row),
            found=f"label {labels[num_labels]!r}, class number {num_labels + 1} of {len(labels)}",
            expected=f"{num_labels} classes ({recipe.place('model', 'num_labels')})",
            remedy="raise num_labels, or correct the label",
        )
    return labels


def _order(labels: Sequence[str]) -> tuple[str, ...]:
    names = set(labels)
    if all(name.removeprefix("-").isdecimal() for name in names):
        return tuple(sorted(names, key=int))
    return tuple(sorted(names))


def _check_spelling(train: Table | Images, labels: Sequence[str]) -> None:
    """Refuse two labels that a reader would take for one: they would be two outputs."""
    alike: dict[object, str] = {}
    for label in labels:
        other = alike.setdefault(likeness(label), label)
        if other != label:
            first, second = train.label.index(other), train.label.index(label)
            raise TitheError(
                train.place(max(first, second)),
                found=f"the label {train.label[max(first, second)]!r} beside {train.label[min(first, second)]!r} "
                f"({train.place(min(first, second))})",
                expected="one way to write a class",
                remedy="write them alike, or list every class in [data] labels if they are two",
            )


def _numbers(recipe: Recipe, rows: Table | Images, labels: tuple[str, ...]) -> Tensor:
    number = {label: index for index, label in enumerate(labels)}
    for row, label in enumerate(rows.label):
        if label not in number:
            known = ", ".join(labels[:12]) + (", …" if len(labels) > 12 else "")
            origin = recipe.place("data", "labels") if recipe.data.labels else "the training split"
            raise TitheError(
                rows.place(row),
                found=f"label {label!r}",
                expected=f"one of {known} ({origin})",
                remedy="correct the line, or list every label in [data] labels",
            )
    return torch.tensor([number[label] for label in rows.label], dtype=torch.int64)
