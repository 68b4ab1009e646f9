"""CIFAR-10 and CIFAR-100 at 16², cut to a size that one core can train, and batches of them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import count
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, pad

from benchmarks.images import Images, Split, restored, stratified

SIDE = 16  # pixels, both sides: means of 2×2
SHIFT = 2  # pixels, each way
SIZES = {"cifar10": (10_000, 2_000), "cifar100": (8_500, 1_500)}  # images for training, for validation
NUM_HELD = 512
BATCH = 64

Batch = tuple[Tensor, Tensor]  # images (N, 3, 16, 16), labels (N,)


@cache
def load(data: Path, name: str = "cifar10") -> Split:
    """Training and validation images, all test images at hand; which are taken is the same every time."""
    num_train, num_validation = SIZES[name]
    with np.load(data / name / f"{name}.npz", allow_pickle=False) as file:
        labels = file["y_train"]
        train = stratified(labels, num_train)
        rest = np.setdiff1d(np.arange(len(labels)), train)
        validation = rest[stratified(labels[rest], num_validation)]
        return Split(
            _read(file["med_train"][train], labels[train]),
            _read(file["med_train"][validation], labels[validation]),
            _read(file["med_test"], file["y_test"]),
        )


def _read(residual: np.ndarray, labels: np.ndarray) -> Images:
    pixels = avg_pool2d(torch.from_numpy(restored(residual)).float(), 2)
    return Images(pixels.round().to(torch.uint8), torch.from_numpy(labels).long())


def apart(images: Images) -> tuple[Images, Images]:
    """All but the last 512 images, and those."""
    return (
        Images(images.x[:-NUM_HELD], images.y[:-NUM_HELD]),
        Images(images.x[-NUM_HELD:], images.y[-NUM_HELD:]),
    )


def training_batches(images: Images, *, seed: int) -> Iterator[Batch]:
    """Epoch after epoch without end, in random order, each image flipped or not and shifted up to 2 pixels each way.

    The last images of an epoch that do not fill a batch are left out of it.
    """
    x = pad(images.x, (SHIFT,) * 4, value=128)
    for epoch in count():
        generator = torch.Generator().manual_seed(1000 * seed + epoch)
        order = torch.randperm(len(images.y), generator=generator)
        for rows in order[: len(order) // BATCH * BATCH].split(BATCH):
            across = torch.arange(SIDE).expand(BATCH, -1)
            flips = torch.rand(BATCH, 1, generator=generator) < 0.5
            down, right = torch.randint(2 * SHIFT + 1, (2, BATCH, 1), generator=generator)
            columns = torch.where(flips, across.flip(-1), across) + right
            shown = x[rows[:, None, None], :, (across + down)[:, :, None], columns[:, None, :]]  # (N, H, W, 3)
            yield _scaled(shown.permute(0, 3, 1, 2)), images.y[rows]


def evaluation_batches(images: Images, size: int = 500) -> Iterator[Batch]:
    """All images as they are."""
    for x, y in zip(images.x.split(size), images.y.split(size), strict=True):
        yield _scaled(x), y


def _scaled(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last).float().div_(64).sub_(2)
