"""The networks that train narrow: VGG, ResNet-20 and -32, MobileNetV2 and a ViT-small for images of 32² or 16².

VGG and ResNet are built from the width of each group of channels that have to agree, so that a uniformly narrow one is
as easy to make as the full one. Shortcuts of the ResNets are projections where the shape changes (He, Zhang, Ren, Sun,
CVPR 2016, option B): an identity that pads with zeros would join the channels of two stages.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.vision import ConvNorm, InvertedResidual, MobileNetV2

Batch = tuple[Tensor, Tensor]  # images (N, 3, H, W), labels (N,)

CLASSES = 10


class VGG(nn.Module):
    """Convolutions of 3×3 with batch norm (Simonyan, Zisserman, ICLR 2015), global mean, one linear layer.

    Args:
        widths: output channels of each convolution.
        pools: indices of the convolutions that a 2×2 pool follows.
    """

    def __init__(self, widths: Sequence[int], pools: Sequence[int]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        c = 3
        for i, d in enumerate(widths):
            layers += [nn.Conv2d(c, d, 3, padding=1, bias=False), nn.BatchNorm2d(d), nn.ReLU(inplace=True)]
            layers += [nn.MaxPool2d(2)] if i in pools else []
            c = d
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(c, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


class Basic(nn.Module):
    """Two 3×3 convolutions and a shortcut, which is a projection where the shape changes."""

    def __init__(self, c: int, inner: int, d: int, *, changes: bool, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c, inner, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, d, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(d)
        projection = nn.Sequential(nn.Conv2d(c, d, 1, stride, bias=False), nn.BatchNorm2d(d)) if changes else None
        self.shortcut = projection or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        return torch.relu(y + self.shortcut(x))


class ResNet(nn.Module):
    """A residual network for small images: three stages of `depth` blocks.

    Args:
        widths: in the order of the layers: of the first stage's stream, then of the inside of each block, where the
            first block of a later stage is followed by the width of that stage's stream.
        depth: blocks a stage.
    """

    def __init__(self, widths: Sequence[int], depth: int) -> None:
        super().__init__()
        given = iter(widths)
        c = next(given)
        self.stem = nn.Sequential(nn.Conv2d(3, c, 3, padding=1, bias=False), nn.BatchNorm2d(c))
        blocks: list[nn.Module] = []
        for stage in range(3):
            for i in range(depth):
                changes, inner = stage > 0 and i == 0, next(given)
                d = next(given) if changes else c
                blocks.append(Basic(c, inner, d, changes=changes, stride=2 if changes else 1))
                c = d
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(c, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.blocks(torch.relu(self.stem(x))).mean((2, 3)))


class SmallMobileNetV2(MobileNetV2):
    """MobileNetV2 of width 1.0 for 32² images: the stem, and the stages of 24 and 32 channels, keep the resolution."""

    def __init__(self) -> None:
        super().__init__(CLASSES)
        self.features[0] = ConvNorm(3, 32, 3)
        self.features[2] = InvertedResidual(16, 24, 1, 6)
        self.features[4] = InvertedResidual(24, 32, 1, 6)


def vit_small() -> nn.Module:
    """Hugging Face's ViT, 384 wide with 6 heads, patches of 4 in 32²; 6 layers where ViT-small has 12."""
    from transformers import ViTConfig, ViTForImageClassification  # takes seconds, which are not for the others to pay

    config = ViTConfig(
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=6,
        intermediate_size=1536,
        image_size=32,
        patch_size=4,
        num_labels=CLASSES,
    )
    return ViTForImageClassification(config)


@dataclass(frozen=True)
class Architecture:
    """A network that can be built narrower.

    Args:
        name: for people.
        widths: channels of each group that has to agree, full, in the order of the layers that make them first.
        build: from widths to a network with freshly drawn weights.
        side: pixels of the images, both sides.
    """

    name: str
    widths: tuple[int, ...]
    build: Callable[[Sequence[int]], nn.Module]
    side: int

    def full(self) -> nn.Module:
        """The network in its full width."""
        return self.build(self.widths)

    def ratio(self, widths: Sequence[int]) -> float:
        """FLOPs of a forward pass at these widths, as a part of the full network's."""
        return self.flops(tuple(widths)) / self.flops(self.widths)

    @cache  # noqa: B019 -- an architecture is a constant of this module
    def flops(self, widths: tuple[int, ...]) -> int:
        """FLOPs of a forward pass of one image."""
        with torch.device("meta"):
            return flops(self.build(widths), torch.empty(1, 3, self.side, self.side))


def resnet(depth: int, side: int) -> Architecture:
    """ResNet-(6 · depth + 2)."""
    widths = (16,) * (depth + 1) + (32,) * (depth + 1) + (64,) * (depth + 1)
    return Architecture(f"ResNet-{6 * depth + 2}", widths, partial(ResNet, depth=depth), side)


VGG16 = Architecture(
    "VGG-16",
    (64, 64, 128, 128, 256, 256, 256) + (512,) * 6,
    partial(VGG, pools=(1, 3, 6, 9, 12)),
    32,
)
VGG7 = Architecture("VGG-7", (32, 32, 64, 64, 128, 128, 128), partial(VGG, pools=(1, 3)), 16)


@torch.no_grad()
def flops(model: nn.Module, x: Tensor) -> int:
    """FLOPs of a forward pass, two a multiply-add, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        model.eval()(x)
    return counter.get_total_flops()


def uniform(architecture: Architecture, ratio: float) -> tuple[int, ...]:
    """Widths all scaled by the same factor, so that the FLOPs come closest to `ratio` of the full network's."""
    scales = [[max(1, round(step / 1000 * w)) for w in architecture.widths] for step in range(1, 1001)]
    above = bisect_left(scales, ratio, hi=len(scales) - 1, key=architecture.ratio)  # FLOPs rise with the factor
    below = next((widths for widths in reversed(scales[:above]) if widths != scales[above]), scales[above])
    return tuple(min(below, scales[above], key=lambda widths: abs(architecture.ratio(widths) - ratio)))


def drawn(architecture: Architecture, ratio: float, seed: int) -> tuple[int, ...]:
    """Widths of a random mask: each channel with the same probability, until the FLOPs are within 3 % of the ratio.

    Channels of one layer are alike before training, so their number is all that a fixed random mask decides.
    """
    generator = torch.Generator().manual_seed(seed)
    share = sum(uniform(architecture, ratio)) / sum(architecture.widths)
    while True:
        counts = [int((torch.rand(w, generator=generator) < share).sum()) for w in architecture.widths]
        widths = tuple(max(1, count) for count in counts)
        if 0.97 * ratio <= architecture.ratio(widths) <= ratio:
            return widths


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy."""
    return nn.functional.cross_entropy(logits_of(model, batch[0]), batch[1])


def logits_of(model: nn.Module, x: Tensor) -> Tensor:
    """The network's answer, a Hugging Face output opened."""
    answer: Any = model(x)
    return answer if isinstance(answer, Tensor) else answer.logits
