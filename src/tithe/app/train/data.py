"""The examples of a run: read, split, checked before any model is loaded, and made into batches."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypedDict, cast, final

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tithe.app.train.images import Images, read_folder, read_hub_images, read_npz
from tithe.app.train.recipe import Recipe
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
        splits: the rows of train, validation and, where there is one, test.
        targets: a tensor (N,) for each split: int64 classes, or float32 values of a regression.
        labels: the class names in the order of the model's outputs; empty for a regression.
    """

    splits: Mapping[str, Table | Images]
    targets: Mapping[str, Tensor]
    labels: tuple[str, ...]

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


def read_examples(recipe: Recipe) -> Examples:
    """Read every split that the recipe names, carve a validation split where none is given, and check the labels.

    Raises:
        TitheError: a file, a column or a label is not what was expected; it names the line.
    """
    splits = _read_splits(recipe)
    if "validation" not in splits:
        splits = _carve(recipe, splits, "validation", ("data", "validation_fraction"), recipe.data.validation_fraction)
    labels: tuple[str, ...] = ()
    if recipe.data.task != "text-regression":
        labels = recipe.data.labels or _order(splits["train"].label)
        _check_count(recipe, splits["train"], labels)
    if recipe.method.holds_out is not None:
        splits = _carve(recipe, splits, "held_out", ("method", "held_out"), recipe.method.holds_out)
    if recipe.average is not None and recipe.average.on == "held_out":
        splits = _carve(recipe, splits, "average", ("average", "held_out"), recipe.average.held_out)
    if not labels:
        return Examples(splits, {name: _values(rows) for name, rows in splits.items()}, ())
    return Examples(splits, {name: _classes(recipe, rows, labels) for name, rows in splits.items()}, labels)


def _read_splits(recipe: Recipe) -> dict[str, Table | Images]:
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
        return dict(read_npz(recipe, path))
    if data.dataset is not None:
        wanted = {"train": data.train or "train", "validation": data.validation, "test": data.test}
        read_hub = read_hub_images if images else read_hub_table
        return {split: read_hub(recipe, split, name) for split, name in wanted.items() if name is not None}
    # Every path is looked at before the first file is read.
    paths = {split: path for split in _SPLITS if (path := recipe.data_path(split)) is not None}
    read = read_folder if images else read_table
    return {split: read(recipe, split, path) for split, path in paths.items()}


def _carve(
    recipe: Recipe, splits: dict[str, Table | Images], name: str, key: tuple[str, str], fraction: float
) -> dict[str, Table | Images]:
    """Take a part of the training rows away, as a split of its own; `key` of the recipe says how large it is."""
    train = splits["train"]
    num, held = len(train.label), round(fraction * len(train.label))
    if held == 0 or held == num:
        raise TitheError(
            recipe.place(*key),
            found=f"{held} of {num} training examples for {name}",
            expected="at least one in both",
            remedy=f"change {key[1]}" + (", or give a validation split" if name == "validation" else ""),
        )
    rows = torch.randperm(num, generator=torch.Generator().manual_seed(recipe.data.split_seed)).tolist()
    carved = {"train": train.take(sorted(rows[held:])), name: train.take(sorted(rows[:held]))}
    return {**carved, **{name: split for name, split in splits.items() if name != "train"}}


def _order(labels: Sequence[str]) -> tuple[str, ...]:
    names = set(labels)
    if all(name.isdecimal() for name in names):
        return tuple(sorted(names, key=int))
    return tuple(sorted(names))


def _check_count(recipe: Recipe, train: Table | Images, labels: Sequence[str]) -> None:
    if len(labels) < 2:
        raise TitheError(
            train.place(0),
            found=f"only the label {labels[0]!r}",
            expected="at least two classes",
            remedy="check [data] label",
        )
    num_labels = recipe.model.num_labels
    if num_labels is not None and len(labels) > num_labels:
        row = next(row for row, label in enumerate(train.label) if label == labels[num_labels])
        raise TitheError(
            train.place(row),
            found=f"label {labels[num_labels]!r}, class number {num_labels + 1} of {len(labels)}",
            expected=f"{num_labels} classes ({recipe.place('model', 'num_labels')})",
            remedy="raise num_labels, or correct the label",
        )


def _classes(recipe: Recipe, rows: Table | Images, labels: tuple[str, ...]) -> Tensor:
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


def _values(rows: Table | Images) -> Tensor:
    values: list[float] = []
    for row, label in enumerate(rows.label):
        try:
            values.append(float(label))
        except ValueError:
            values.append(float("nan"))
        if not np.isfinite(values[-1]):
            raise TitheError(
                rows.place(row),
                found=f"label {label!r}",
                expected="a finite number (regression)",
                remedy="correct the line",
            )
    return torch.tensor(values, dtype=torch.float32)


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
