"""The examples of a run: read, split, checked before any model is loaded, and made into batches."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypedDict, cast, final

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tithe.app.train.arrays import read_npz
from tithe.app.train.cells import likeness
from tithe.app.train.images import Images, Progress, read_folder, read_hub_images
from tithe.app.train.recipe import Recipe
from tithe.app.train.skipping import listed
from tithe.app.train.tables import Table, read_hub_table, read_table
from tithe.errors import TitheError

_SPLITS = ("train", "validation", "test")


class Batch(TypedDict):
    """`inputs`: the tokenizer's tensors by name, or images (N, C, H, W); `labels`: (N,), classes or float targets."""

    inputs: dict[str, Tensor] | Tensor
    labels: Tensor


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that is used here."""

    def __call__(self, *texts: Any, **settings: Any) -> Any:
        """Encode texts."""
        ...

    def pad(self, encoded: Any, **settings: Any) -> Any:
        """Pad encoded texts to one length."""
        ...


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


@dataclass(frozen=True)
class TextEncoder:
    """Makes batches of a `Table`: encoded once, padded to the longest of each batch.

    Args:
        tokenizer: a Hugging Face tokenizer.
        max_length: tokens that a text (or pair) is cut to.
    """

    tokenizer: Tokenizer
    max_length: int

    def encode(self, rows: Table | Images) -> Sequence[Any]:
        """One mapping of token lists for each row."""
        assert isinstance(rows, Table)
        texts = [list(rows.text)] if rows.text_pair is None else [list(rows.text), list(rows.text_pair)]
        encoded = cast(Mapping[str, list[Any]], self.tokenizer(*texts, truncation=True, max_length=self.max_length))
        return [dict(zip(encoded, row, strict=True)) for row in zip(*encoded.values(), strict=True)]

    def largest(self, items: Sequence[Any]) -> int:
        """The row of the most tokens, the first of several."""
        return max(range(len(items)), key=lambda row: len(items[row]["input_ids"]))

    def join(self, items: Sequence[Any]) -> dict[str, Tensor] | Tensor:
        """Pad encoded rows to tensors (N, longest)."""
        return dict(cast(Mapping[str, Tensor], self.tokenizer.pad(list(items), return_tensors="pt")))


@dataclass(frozen=True)
class ImageEncoder:
    """Makes batches of `Images`: scaled to 0–1, then normalised by channel.

    Args:
        mean: one number a channel.
        std: one number a channel.
        size: side in pixels that images are resized to, or None to leave arrays as they are.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: int | None

    def encode(self, rows: Table | Images) -> Sequence[Any]:
        """The images, decoded when they are asked for."""
        assert isinstance(rows, Images)
        return _Decoded(rows, self.size)

    def largest(self, items: Sequence[Any]) -> int:
        """The first: images of a batch have one size."""
        return 0

    def join(self, items: Sequence[Any]) -> dict[str, Tensor] | Tensor:
        """Stack uint8 images to float32 (N, C, H, W)."""
        images_NCHW = torch.stack(list(items)).float() / 255
        mean_C11, std_C11 = (torch.tensor(values).reshape(-1, 1, 1) for values in (self.mean, self.std))
        return (images_NCHW - mean_C11) / std_C11


Encoder = TextEncoder | ImageEncoder


@dataclass(frozen=True)
class _Decoded(Sequence[Tensor]):
    images: Images
    size: int | None

    def __len__(self) -> int:
        return len(self.images.label)

    def __getitem__(self, row: Any) -> Any:
        return self.images.decode(row, self.size)


class Samples(Dataset[tuple[Any, Tensor]]):
    """One split, encoded: what a loader draws from.

    Args:
        rows: the split.
        targets: (N,), the classes or values.
        encoder: how rows become inputs.
    """

    def __init__(self, rows: Table | Images, targets: Tensor, encoder: Encoder) -> None:
        self._items, self._targets, self._encoder = encoder.encode(rows), targets, encoder

    def __len__(self) -> int:
        return len(self._targets)

    def __getitem__(self, row: int) -> tuple[Any, Tensor]:
        return self._items[row], self._targets[row]

    @property
    def largest(self) -> int:
        """A row of the largest input: a batch with it is as large as batches of its length can be."""
        return self._encoder.largest(self._items)

    def batches(self, rows: Sequence[Sequence[int]], workers: int = 0) -> Iterator[Batch]:
        """Iterate over the batches with these rows, leaving the global random state alone."""
        loader = DataLoader(
            self,
            batch_sampler=cast(Any, rows),
            collate_fn=self._join,
            num_workers=workers,
            generator=torch.Generator().manual_seed(0),
        )
        return iter(loader)

    def _join(self, items: Sequence[tuple[Any, Tensor]]) -> Batch:
        return {
            "inputs": self._encoder.join([item for item, _ in items]),
            "labels": torch.stack([target for _, target in items]),
        }


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
