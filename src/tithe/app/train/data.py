"""The examples of a run made into batches: encoded, put into order, moved to a device; `examples` reads them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypedDict, cast, final

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tithe.app.train.images import Images
from tithe.app.train.tables import Table


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
