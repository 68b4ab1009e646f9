"""Image classification: one class an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch

from tithe.app.train.images import Images
from tithe.app.train.rows import Batch, Targets
from tithe.app.train.tasks.base import Encoder, Rows
from tithe.app.train.tasks.text_classification import Classification


class ImageClassification(Classification):
    """One class for each image."""

    name = "image-classification"
    architecture = "AutoModelForImageClassification"


@final
@dataclass(frozen=True)
class ImageEncoder(Encoder):
    """Makes batches of `Images`: scaled to 0–1, then normalised by channel.

    Args:
        mean: one number a channel.
        std: one number a channel.
        size: side in pixels that images are resized to, or None to leave arrays as they are.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: int | None

    tokenizer = None

    def encode(self, rows: Rows, targets: Targets) -> tuple[Sequence[Any], tuple[str, ...]]:
        """The images with their classes, decoded when they are asked for."""
        assert isinstance(rows, Images)
        return _Decoded(rows, self.size, targets), ()

    def join(self, items: Sequence[Any]) -> Batch:
        """Stack uint8 images to float32 (N, C, H, W)."""
        images_NCHW = torch.stack([image for image, _ in items]).float() / 255
        mean_C11, std_C11 = (torch.tensor(values).reshape(-1, 1, 1) for values in (self.mean, self.std))
        inputs = (images_NCHW - mean_C11) / std_C11
        return {"inputs": inputs, "labels": torch.stack([target for _, target in items])}

    def statistics(self) -> dict[str, Any]:
        """Mean and deviation of the channels, and the size."""
        size = {} if self.size is None else {"image_size": self.size}
        return {"mean": list(self.mean), "std": list(self.std), **size}

    def largest(self, items: Sequence[Any]) -> int:
        """The first: images of a batch have one size."""
        return 0


@dataclass(frozen=True)
class _Decoded(Sequence[Any]):
    images: Images
    size: int | None
    targets: Targets

    def __len__(self) -> int:
        return len(self.images.label)

    def __getitem__(self, row: Any) -> Any:
        return self.images.decode(row, self.size), self.targets[row]
