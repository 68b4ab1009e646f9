"""Image tasks at 128², cut to a size that one core can train: readers, stratified splits, batches."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from benchmarks.vision import SIDE

BATCH = 32
SHIFT = 8  # pixels, each way
Batch = tuple[Tensor, Tensor]  # images (N, 3, 128, 128) in [-1, 1], labels (N,)


@dataclass(frozen=True)
class Task:
    """One task and how much of it is used.

    Args:
        name: of the file and of its folder.
        num_classes: classes, all of them.
        num_train, num_validation, num_test: images, every class in its share; validation images come from the file's
            own validation split where it has one, else from its training split, apart from the training images.
        num_epochs: passes over the training images.
    """

    name: str
    num_classes: int
    num_train: int
    num_validation: int
    num_test: int
    num_epochs: int


TASKS = {
    t.name: t
    for t in (
        Task("cifar10", 10, 512, 1000, 2000, 8),
        Task("cifar100", 100, 800, 500, 2000, 8),
        Task("clothing10", 10, 512, 341, 372, 8),
    )
}

RANKED = Task("fashion_mnist", 10, 640, 100, 100, 4)  # no target: the ranking of layers is measured on it


@dataclass(frozen=True)
class Images:
    """uint8 images (N, 3, 128, 128) and labels (N,), int64."""

    x: Tensor
    y: Tensor


@dataclass(frozen=True)
class Split:
    """The images of a task; the test images are for the final table only."""

    train: Images
    validation: Images
    test: Images


@cache
def load(task: Task, data: Path) -> Split:
    """Read a task and resize it once, bilinearly; which images are taken is drawn with a fixed seed."""
    with np.load(data / task.name / f"{task.name}.npz", allow_pickle=False) as file:
        labels = {s: file[f"y_{s}"] for s in ("train", "validation", "test") if f"y_{s}" in file.files}
        train = stratified(labels["train"], task.num_train)
        if "validation" in labels:
            validation = stratified(labels["validation"], task.num_validation)
        else:
            rest = np.setdiff1d(np.arange(len(labels["train"])), train)
            validation = rest[stratified(labels["train"][rest], task.num_validation)]
        held = "validation" if "validation" in labels else "train"
        test = stratified(labels["test"], task.num_test)
        chosen = (("train", train), (held, validation), ("test", test))
        return Split(*(Images(_read(file, s, rows), torch.from_numpy(labels[s][rows]).long()) for s, rows in chosen))


def stratified(labels: np.ndarray, count: int) -> np.ndarray:
    """Rows of `count` examples with every class in its share, in random order, the same every time."""
    rng = np.random.default_rng(0)
    order = rng.permutation(len(labels))
    within = np.empty(len(labels))
    for label in np.unique(labels):
        rows = order[labels[order] == label]
        within[rows] = (np.arange(len(rows)) + 0.5) / len(rows)
    first = order[np.argsort(within[order], kind="stable")[:count]]
    return rng.permutation(first)


def _read(file: np.lib.npyio.NpzFile, split: str, rows: np.ndarray) -> Tensor:
    if f"jpeg_{split}" not in file.files:
        grey = f"x_{split}" in file.files
        pixels = file[f"x_{split}"][rows, None].repeat(3, 1) if grey else restored(file[f"med_{split}"][rows])
        images = torch.from_numpy(pixels).float()
        return interpolate(images, (SIDE, SIDE), mode="bilinear").round().to(torch.uint8)
    encoded, offsets = file[f"jpeg_{split}"].tobytes(), file[f"offsets_{split}"]
    images = np.empty((len(rows), SIDE, SIDE, 3), np.uint8)
    for i, row in enumerate(rows):
        image = Image.open(io.BytesIO(encoded[offsets[row] : offsets[row + 1]])).convert("RGB")
        images[i] = image.resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def restored(residual: np.ndarray) -> np.ndarray:
    """Images (N, 3, H, W) in RGB from residuals of the median edge detector on the planes G, R − G, B − G.

    Each value is the sum, modulo 256, of its residual and of median(left, up, left + up − corner), zeros outside:
    Weinberger, Seroussi, Sapiro, LOCO-I, IEEE Transactions on Image Processing 2000.
    """
    planes = np.pad(residual.astype(np.int16), ((0, 0), (0, 0), (1, 0), (1, 0)))
    _, _, height, width = planes.shape
    for i in range(1, height):
        for j in range(1, width):
            left, up, corner = planes[..., i, j - 1], planes[..., i - 1, j], planes[..., i - 1, j - 1]
            low, high = np.minimum(left, up), np.maximum(left, up)
            planes[..., i, j] += np.clip(left + up - corner, low, high)
            planes[..., i, j] &= 255
    green, red, blue = (planes[:, c, 1:, 1:] for c in range(3))
    return (np.stack([red + green, green, blue + green], 1) & 255).astype(np.uint8)


def training_batches(images: Images, *, seed: int, epoch: int) -> Iterator[Batch]:
    """One epoch in random order, each image flipped or not and shifted up to 8 pixels each way, grey coming in."""
    generator = torch.Generator().manual_seed(1000 * seed + epoch)
    order = torch.randperm(len(images.y), generator=generator)
    for rows in order.split(BATCH):
        flips = torch.rand(len(rows), generator=generator) < 0.5
        shifts = torch.randint(-SHIFT, SHIFT + 1, (len(rows), 2), generator=generator)
        x = torch.full((len(rows), 3, SIDE, SIDE), 128, dtype=torch.uint8)
        for one, row, flip, (down, right) in zip(x, rows.tolist(), flips.tolist(), shifts.tolist(), strict=True):
            image = images.x[row].flip(-1) if flip else images.x[row]
            one[:, max(0, down) : SIDE + down, max(0, right) : SIDE + right] = image[
                :, max(0, -down) : SIDE - down, max(0, -right) : SIDE - right
            ]
        yield _scaled(x), images.y[rows]


def evaluation_batches(images: Images, size: int = 100) -> Iterator[Batch]:
    """All images as they are."""
    for x, y in zip(images.x.split(size), images.y.split(size), strict=True):
        yield _scaled(x), y


def _scaled(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last).float().div_(127.5).sub_(1)
