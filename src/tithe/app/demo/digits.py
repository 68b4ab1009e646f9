"""The embedded images and the two tasks made of them.

Reference:
    E. Alpaydin, C. Kaynak. Optical Recognition of Handwritten Digits. UCI Machine Learning Repository, 1998,
    doi 10.24432/C50P49. Licence CC BY 4.0. The attribution and the changes made are in digits.txt beside the data.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from typing import final

import numpy as np
import torch
from torch import Tensor

from tithe.errors import TitheError

SHA256 = "b2dab7b501728c22e9119ad76740b2e17c77a231e42d1e592380d90886f1a05e"
"""SHA-256 of digits.npz."""

NUM_CLASSES = 5
"""Classes of each task: the digits 0 to 4 in the first, 5 to 9 in the second."""

Batch = tuple[Tensor, Tensor]
"""Images, float32 of shape (N, 1, 8, 8) in [0, 1], and labels, int64 of shape (N,)."""


@final
@dataclass(frozen=True)
class Task:
    """One classification task, cut into three parts that share no image.

    The cut follows the order of the file, where neighbours are likely to be of one writer: a random cut would put
    the same hands on both sides and make the test easier.

    Args:
        name: what the classes are, for people.
        train: images and labels to learn from.
        validation: images and labels that choose the learning rate, and nothing else.
        test: images and labels looked at once, by the finished network.
    """

    name: str
    train: Batch
    validation: Batch
    test: Batch

    def epochs(self, batch_size: int, seed: int) -> Iterator[list[Batch]]:
        """Endless epochs over the training images, each a fresh shuffle cut into full batches.

        Args:
            batch_size: images in a batch; what is left over at the end of an epoch is dropped.
            seed: of the shuffles; the same seed gives the same batches.
        """
        images, labels = self.train
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(images), generator=generator)
            whole = order[: len(order) // batch_size * batch_size]
            yield [(images[part], labels[part]) for part in whole.split(batch_size)]


def images_and_labels() -> tuple[np.ndarray, np.ndarray]:
    """The embedded digits: uint8 images of shape (1797, 8, 8), pixels 0 to 16, and uint8 labels of shape (1797,).

    Raises:
        TitheError: the file is not the one that was shipped.
    """
    content = files("tithe.app.demo").joinpath("digits.npz").read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if digest != SHA256:
        raise TitheError(
            "tithe/app/demo/digits.npz",
            found=f"a file of {len(content)} bytes with SHA-256 {digest[:12]}…",
            expected=f"{SHA256[:12]}…",
            remedy="install tithe again: the file was changed after it was packed",
        )
    with np.load(io.BytesIO(content), allow_pickle=False) as archive:
        return archive["images"], archive["labels"]


def tasks() -> tuple[Task, Task]:
    """The task to pretrain on, digits 0 to 4, and the task to fine-tune to, digits 5 to 9.

    Returns:
        0 to 4 with 672 / 64 / 165 images in train / validation / test, and 5 to 9 with 320 / 160 / 416.
    """
    images, labels = images_and_labels()
    pixels = torch.from_numpy(images).to(torch.float32).div_(16).unsqueeze(1)
    classes = torch.from_numpy(labels).to(torch.int64)
    low = classes < NUM_CLASSES
    return (
        _cut("digits 0 to 4", pixels[low], classes[low], 672, 64),
        _cut("digits 5 to 9", pixels[~low], classes[~low] - NUM_CLASSES, 320, 160),
    )


def _cut(name: str, images: Tensor, labels: Tensor, num_train: int, num_validation: int) -> Task:
    sizes = [num_train, num_validation, len(images) - num_train - num_validation]
    train, validation, test = zip(images.split(sizes), labels.split(sizes), strict=True)
    return Task(name, train, validation, test)
